"""Architecture: a state of the search, and its JSON."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from n2n_fast.files.errors import BadInput


@dataclass(frozen=True)
class Architecture:
    """A point of an architecture space: which layers are kept, how many units of each group, which kernel sizes.

    keep: one bool per layer. widths: kept units per channel group. kernels: one kernel size per layer, () without.
    params, macs: of the student, macs for one row of the example input; they follow from the rest.
    """

    keep: tuple[bool, ...]
    widths: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    params: int = field(compare=False)
    macs: int = field(compare=False)

    def to_json(self) -> str:
        """One line of JSON, read back by `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Architecture":
        """The inverse of `to_json`; raises BadInput for anything else."""
        try:
            raw = json.loads(text)
            if set(raw) != {field.name for field in fields(cls)}:
                raise ValueError(f"its fields are {', '.join(map(str, raw))[:100]}")
            return cls(
                keep=tuple(_checked(keep, bool) for keep in _checked(raw["keep"], list)),
                widths=tuple(_checked(width, int, 1) for width in _checked(raw["widths"], list)),
                kernels=tuple(
                    tuple(_checked(size, int, 1) for size in _checked(kernel, list))
                    for kernel in _checked(raw["kernels"], list)
                ),
                params=_checked(raw["params"], int, 0),
                macs=_checked(raw["macs"], int, 0),
            )
        except (ValueError, TypeError, RecursionError) as error:
            raise BadInput(f"not an architecture written by n2n-fast: {error!r:.200}") from None

    @property
    def key(self) -> str:
        """A short hash that names this architecture within its space."""
        content = json.dumps([self.keep, self.widths, self.kernels]).encode()
        return hashlib.sha256(content).hexdigest()[:12]


def _checked(value: Any, kind: type, least: int | None = None) -> Any:
    """Return `value` if it is exactly of this type and not below `least`; ValueError otherwise."""
    if type(value) is not kind or (least is not None and int(value) < least):  # type: ignore[call-overload]
        raise ValueError(f"{value!r} where a {kind.__name__} was expected")
    return value
