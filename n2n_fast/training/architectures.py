"""The architecture of a network, told from the keys and shapes of its state dict."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from n2n_fast.files.errors import BadInput
from n2n_fast.training.teachers import SMALL_RESNETS, create

ALIKE = 0.6  # share of the key patterns that two members of a family have in common

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    """The keys and shapes by which architectures are told apart, without counters of batches, which nobody reads."""
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}


def differences(network: Shapes, file: Shapes) -> tuple[float, str]:
    """How a file's keys and shapes differ from those of a network: the share of all keys, 0 where none, and which."""
    differing = {
        "missing": [key for key in network if key not in file],
        "unexpected": [key for key in file if key not in network],
        "misshaped": [
            f"{key} {file[key]} instead of {shape}"
            for key, shape in network.items()
            if key in file and file[key] != shape
        ],
    }
    texts = [
        f"{len(keys)} keys {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in differing.items()
        if keys
    ]
    return sum(map(len, differing.values())) / max(1, len({**network, **file})), ", ".join(texts)


def infer_architecture(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The name and the options (classes, channels, cifar_stem) with which `create` makes a network of this state dict.

    Raises BadInput that names the nearest architecture and what differs.
    """
    file = shapes_of(state)
    nearest: tuple[float, str] = (math.inf, "")
    for form in _candidates(file):
        options, share, text = form.compared(file)
        if not share:
            return form.name, options
        nearest = min(nearest, (share, f"{form.name}: {text}"))
    raise BadInput(
        f"fits no known architecture; nearest is {nearest[1]}; give --arch package.module:factory for your own"
    )


def options_for(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options with which `create` makes the network `name` of this state dict. Raises BadInput."""
    options, share, text = _form(name).compared(shapes_of(state))
    if share:
        raise BadInput(f"does not fit {name}: {text}")
    return options


@dataclass(frozen=True)
class _Form:
    """The keys and shapes of one architecture, and what in them is free: the classes, the channels, a ResNet's stem."""

    name: str
    shapes: Shapes
    is_resnet: bool

    def compared(self, file: Shapes) -> tuple[dict[str, Any], float, str]:
        """The options of `create` with which the network is nearest to a file, and the `differences` that are left."""
        stem = next(key for key, shape in self.shapes.items() if len(shape) == 4)
        head = list(self.shapes)[-1].rpartition(".")[0]
        channels = file.get(stem, self.shapes[stem])[1:2]
        classes = file.get(f"{head}.weight", self.shapes[f"{head}.weight"])[:1]
        cifar_stem = self.is_resnet and file.get(stem, ())[2:] == (3, 3)
        kernel = (3, 3) if cifar_stem else self.shapes[stem][2:]
        shapes = {**self.shapes, stem: (*self.shapes[stem][:1], *channels, *kernel)}
        for key in {f"{head}.weight", f"{head}.bias"} & self.shapes.keys():  # not every classifier has a bias
            shapes[key] = (*classes, *self.shapes[key][1:])
        options = {"classes": math.prod(classes), "channels": math.prod(channels), "cifar_stem": cifar_stem}
        return options, *differences(shapes, file)


class OnMeta(TorchFunctionMode):
    """Allocate parameters and buffers on the meta device, so that a network of any size is made at once.

    `torch.device("meta")` would not do: RegNet computes its widths with tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]  # there is nothing to fill, and finding that out takes most of the time
        if func in (torch.empty, torch.zeros, torch.ones):
            options["device"] = "meta"
        return func(*args, **options)


def _form(name: str) -> _Form:
    with OnMeta():
        model = create(name, 1000)
    from torchvision.models import ResNet

    return _Form(name, shapes_of(model.state_dict()), isinstance(model, ResNet))


def _candidates(file: Shapes) -> Iterator[_Form]:
    """Every architecture whose keys look like these: all of the families whose first member does."""
    patterns = _patterns(file)
    for family in _families():
        first = _form(family[0])
        yield first
        ours = _patterns(first.shapes)
        if len(ours & patterns) >= ALIKE * len(ours | patterns):
            yield from map(_form, family[1:])


def _patterns(shapes: Shapes) -> set[str]:
    """The keys with their numbers left out, in which the members of a family are alike."""
    return {re.sub(r"\d+", "#", key) for key in shapes}


def _families() -> list[list[str]]:
    """Names of `create` that come from the same module, ResNets first since they are met most."""
    from torchvision import models

    families: dict[str, list[str]] = {"resnet": []}
    for name in sorted(models.list_models(module=models), key=_natural_order):
        family = models.get_model_builder(name).__module__.rpartition(".")[2]
        families.setdefault(family, []).append(name)
    return [list(SMALL_RESNETS), *families.values()]


def _natural_order(name: str) -> list[tuple[int, str]]:
    """A key that puts resnet50 before resnet101: small members of a family are met more and made sooner."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
