"""Architecture -> nn.Module: which channels of the teacher a student keeps, and the module that holds them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from n2n_fast import ops
from n2n_fast.channels import CONVS
from n2n_fast.graph import Architecture, TracedTeacher, kernel_size
from n2n_fast.tracing import bare_copy, shallow_copy


@dataclass(frozen=True)
class Slot:
    """One tensor of the teacher: attribute `name` of layer `layer`, cut along dimension 0 and, if set, 1."""

    layer: int
    name: str
    tensor: Tensor
    is_parameter: bool
    out_axis: int
    in_axis: int | None


def slots_of(traced: TracedTeacher) -> list[Slot]:
    """Every tensor that a student cuts out of the teacher, in the order of the layers."""
    slots = []
    for i, module in enumerate(traced.modules):
        if traced.out_axis[i] < 0:
            continue
        width = len(traced.axes[traced.out_axis[i]])
        for tensors, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in tensors.items():
                if tensor is None or tensor.ndim == 0 or len(tensor) != width:
                    continue
                in_axis = int(traced.in_axis[i]) if tensor.ndim > 1 and traced.dense_input[i] else None
                slots.append(Slot(i, name, tensor.detach(), is_parameter, int(traced.out_axis[i]), in_axis))
    return slots


def l1_saliency(traced: TracedTeacher, slots: Sequence[Slot]) -> np.ndarray:
    """Saliency of each unit by absolute weights, (units,) float64.

    The sum over all tensors that write a unit times the sum over all that read it, each tensor divided by its mean:
    a channel that nobody writes or nobody reads is worth nothing, whatever the other side weighs.
    """
    written, read = (np.zeros(len(traced.group_of)) for _ in range(2))
    for slot in slots:
        if not slot.is_parameter:
            continue
        weight = slot.tensor.abs().double().flatten(1) if slot.tensor.ndim > 1 else slot.tensor.abs().double()[:, None]
        weight = (weight / weight.mean().clamp_min(1e-30)).cpu()
        np.add.at(written, traced.axes[slot.out_axis], weight.mean(1).numpy())
        if slot.in_axis is not None:
            inputs = weight.view(len(weight), slot.tensor.shape[1], -1).mean((0, 2))
            np.add.at(read, traced.axes[slot.in_axis], inputs.numpy())
    unread = np.isin(np.arange(len(read)), np.concatenate([traced.axes[a] for a in traced.in_axis]), invert=True)
    return written * np.where(unread, 1.0, read)


class StudentFactory:
    """Builds students of one traced teacher: shallow clones of its graph, their tensors cut by one native call."""

    def __init__(self, traced: TracedTeacher, saliency: np.ndarray | None = None) -> None:
        """saliency: of each unit, (units,); absolute weights by default."""
        self.traced = traced
        self.slots = slots_of(traced)
        self.saliency = l1_saliency(traced, self.slots) if saliency is None else saliency
        cut = {(slot.layer, slot.name) for slot in self.slots}
        # whatever else a layer holds is copied as it is: BN's counters, the weights of opaque modules
        self.whole = [
            [name for name in (*module._parameters, *module._buffers) if (i, name) not in cut]
            for i, module in enumerate(traced.modules)
        ]

    def build(self, arch: Architecture, kept: Sequence[np.ndarray | None]) -> fx.GraphModule:
        """The student with its weights sliced from the teacher's ("inherit"); kept: as `kept_channels` gives it."""
        slots = [slot for slot in self.slots if arch.keep[slot.layer]]
        tensors = self._materialize(arch, slots, kept)
        modules: list[nn.Module] = [
            self._resized(i, arch, kept) if keep else nn.Identity() for i, keep in enumerate(arch.keep)
        ]
        for slot, tensor in zip(slots, tensors, strict=True):
            place: dict[str, Any] = (
                modules[slot.layer]._parameters if slot.is_parameter else modules[slot.layer]._buffers
            )
            place[slot.name] = nn.Parameter(tensor) if slot.is_parameter else tensor
        return self._assemble(dict(zip(self.traced.names, modules, strict=True)))

    def kept_channels(self, arch: Architecture, classes: Sequence[Sequence[int]]) -> list[np.ndarray | None]:
        """For each axis the positions of the channels kept, None for all of them.

        classes: groups that share one width in `arch`; those of equal size also keep the same channels.
        """
        traced = self.traced
        keep = np.ones(len(traced.group_of), dtype=bool)
        for groups in classes:
            shared: dict[int, np.ndarray] = {}
            for g in groups:
                size = len(traced.units[g])
                shared[size] = shared.get(size, 0) + self.saliency[traced.units[g]]
            for g in groups:
                units = traced.units[g]
                if arch.widths[g] < len(units):
                    order = np.argsort(-shared[len(units)], kind="stable")
                    keep[units[order[arch.widths[g] :]]] = False
        masks = [keep[axis] for axis in traced.axes]
        return [None if mask.all() else np.flatnonzero(mask) for mask in masks]

    def _materialize(
        self, arch: Architecture, slots: Sequence[Slot], kept: Sequence[np.ndarray | None]
    ) -> list[Tensor]:
        """The students' tensors, in the order of `slots`; one native call for each dtype among them."""
        index = [None if k is None else torch.from_numpy(k) for k in kept]
        made: dict[int, Tensor] = {}
        for dtype in {slot.tensor.dtype for slot in slots}:
            chosen = [i for i, slot in enumerate(slots) if slot.tensor.dtype == dtype]
            results = ops.materialize(
                [_as_2d_kernel(slots[i].tensor) for i in chosen],
                [index[slots[i].out_axis] for i in chosen],
                [None if (axis := slots[i].in_axis) is None else index[axis] for i in chosen],
                [_new_kernel(slots[i], arch) for i in chosen],
            )
            for i, result in zip(chosen, results, strict=True):
                made[i] = (
                    result.view(*result.shape[:2], *slots[i].tensor.shape[2:])
                    if slots[i].tensor.ndim in (3, 5)
                    else result
                )
        return [made[i] for i in range(len(slots))]

    def _resized(self, i: int, arch: Architecture, kept: Sequence[np.ndarray | None]) -> nn.Module:
        """Layer i as a shallow copy that announces its new shapes."""
        traced, module = self.traced, self.traced.modules[i]
        if traced.out_axis[i] < 0:
            return copy.deepcopy(module).eval()
        copied: Any = shallow_copy(module)
        for name in self.whole[i]:
            tensors: dict[str, Any] = copied._parameters if name in copied._parameters else copied._buffers
            tensors[name] = copy.deepcopy(tensors[name])
        given, made = (
            len(traced.axes[axis]) if kept[axis] is None else len(kept[axis])
            for axis in (traced.in_axis[i], traced.out_axis[i])
        )
        if isinstance(module, CONVS):
            copied.in_channels, copied.out_channels = given, made
            copied.groups = given * module.groups // module.in_channels if module.groups > 1 else 1
            _crop_convolution(copied, arch.kernels[i])
        elif isinstance(module, nn.Linear):
            copied.in_features, copied.out_features = given, made
        elif isinstance(module, nn.GroupNorm):
            copied.num_groups, copied.num_channels = module.num_groups * made // module.num_channels, made
        elif isinstance(module, nn.LayerNorm):
            copied.normalized_shape = (made,)
        elif isinstance(module, nn.PReLU):
            copied.num_parameters = made if module.num_parameters > 1 else 1
        elif hasattr(module, "num_features"):
            copied.num_features = made
        return copied  # type: ignore[no-any-return]

    def _assemble(self, layers: dict[str, nn.Module]) -> fx.GraphModule:
        """A clone of the traced graph module with other layers: the same forward, nothing shared but the graph."""
        root = self.traced.module
        student = _clone(root, "", layers)
        type(student).forward = type(root).forward  # every GraphModule has a class of its own
        return student  # type: ignore[return-value]


def _clone(module: nn.Module, path: str, layers: dict[str, nn.Module]) -> nn.Module:
    """`module` with the leaves named in `layers` replaced and its own tensors copied."""
    if path in layers:
        return layers[path]
    copied = bare_copy(module)
    copied._parameters = {k: copy.deepcopy(v) for k, v in module._parameters.items()}
    copied._buffers = {k: copy.deepcopy(v) for k, v in module._buffers.items()}
    prefix = f"{path}." if path else ""
    copied._modules = {
        name: _clone(child, prefix + name, layers) for name, child in module._modules.items() if child is not None
    }
    return copied


def _as_2d_kernel(weight: Tensor) -> Tensor:
    """(O, I, k) as (O, I, 1, k) and (O, I, a, b, c) as (O, I, a, b·c); other shapes as they are."""
    if weight.ndim == 3:
        return weight.unsqueeze(2)
    return weight.flatten(3) if weight.ndim == 5 else weight


def _new_kernel(slot: Slot, arch: Architecture) -> tuple[int, int] | None:
    kernel = arch.kernels[slot.layer]
    return (kernel[0], kernel[1]) if slot.tensor.ndim == 4 and len(kernel) == 2 else None


def _crop_convolution(conv: Any, kernel: tuple[int, ...]) -> None:
    """Set the kernel size of `conv`, and the padding that leaves its output's size unchanged."""
    cut = [(before - after) // 2 for before, after in zip(kernel_size(conv), kernel, strict=True)]
    conv.kernel_size = kernel
    if conv.padding == "valid":
        return
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        conv.padding = tuple(p - c * d for p, c, d in zip(conv.padding, cut, conv.dilation, strict=True))
        sides = [(p, p) for p in conv.padding]
    conv._reversed_padding_repeated_twice = [p for side in reversed(sides) for p in side]  # torch pads by this one


def randomize(student: nn.Module) -> nn.Module:
    """Give every layer of `student` a new random initialisation from torch's global generator."""
    for module in student.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return student


def independent_copy(student: nn.Module) -> nn.Module:
    """A deep copy whose tensors each have a storage of their own, and whose graph is shared with no other student."""
    copied = copy.deepcopy(student)
    for module in copied.modules():
        for name, buffer in module._buffers.items():  # deepcopy clones a parameter alone, but a buffer's whole storage
            module._buffers[name] = None if buffer is None else buffer.clone()
    return copied
