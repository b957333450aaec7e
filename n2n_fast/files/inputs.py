"""What a network takes, as its files say: size, channels, preprocessing and class names of its images."""

from collections.abc import Callable, Mapping
from typing import Any

from n2n_fast.files.errors import BadInput
from n2n_fast.files.safe_load import parse_json

INPUT = "student.json"  # beside a student, and in its .pt2


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _all(test: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(test, value))


FIELDS: dict[str, Callable[[Any], bool]] = {
    "image_size": lambda value: _all(_is_size, value) and len(value) == 2,
    "channels": _is_size,
    "mean": lambda value: _all(_is_number, value),
    "std": lambda value: _all(lambda number: _is_number(number) and number > 0, value),
    "dtype": lambda value: isinstance(value, str),
    "range": lambda value: _all(_is_number, value) and len(value) == 2,
    "classes": lambda value: _all(lambda name: isinstance(name, str), value),
}


def input_of(described: Any) -> dict[str, Any]:
    """These fields of what `ImageData.described` once gave; anyone may have changed it since. Raises BadInput."""
    if not isinstance(described, Mapping):
        raise BadInput("what it says of its images is damaged")
    for name, is_right in FIELDS.items():
        if not is_right(described.get(name)):
            raise BadInput(f"what it says of its images is damaged ({name}: {str(described.get(name))[:40]})")
    return {name: described[name] for name in FIELDS}


def input_from(text: str | bytes) -> dict[str, Any]:
    """The same, from JSON."""
    try:
        described = parse_json(text)
    except ValueError:
        described = None
    return input_of(described)
