"""Architecture -> nn.Module: which channels of the teacher a student keeps, and the module made of them."""

import contextlib
import copy
import gc
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from n2n_fast import native
from n2n_fast.files.errors import raise_device_fault
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.graph import TracedTeacher
from n2n_fast.networks.kinds import CONVS, NORMS, TRANSPOSED
from n2n_fast.networks.rewriting import bare_copy
from n2n_fast.networks.widths import WidthClasses


@dataclass(frozen=True)
class Slot:
    """One tensor of the teacher: attribute `name` of layer `layer`, cut along dimension 0 and, if set, 1.

    rows, columns: the axes along both; the layer writes the channels of its rows, or, if `transposed`, reads them.
    """

    layer: int
    name: str
    tensor: Tensor
    is_parameter: bool
    rows: int
    columns: int | None
    transposed: bool


def slots_of(traced: TracedTeacher) -> list[Slot]:
    """Every tensor that a student cuts out of the teacher, in the order of the layers."""
    slots = []
    for i, module in enumerate(traced.modules):
        for tensors, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in tensors.items():
                transposed = isinstance(module, TRANSPOSED) and name == "weight"
                sides = [int(traced.out_axis[i]), int(traced.in_axis[i])]
                rows, columns = reversed(sides) if transposed else sides
                if rows < 0 or tensor is None or tensor.ndim == 0 or len(tensor) != len(traced.axes[rows]):
                    continue
                across = columns if tensor.ndim > 1 and traced.dense_input[i] else None
                slots.append(Slot(i, name, tensor.detach(), is_parameter, rows, across, transposed))
    return slots


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection meanwhile: a student is thousands of new objects, none of them garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class StudentFactory:
    """Builds students of one traced teacher: shallow clones of its graph, their tensors cut by one native call.

    classes: of the teacher. importance: of each unit, (units,); the highest are kept.
    """

    def __init__(self, traced: TracedTeacher, classes: WidthClasses, importance: np.ndarray) -> None:
        self.traced, self.classes, self.importance = traced, classes, importance
        slots = slots_of(traced)
        self._cut: dict[int, set[str]] = {i: set() for i in range(len(traced.modules))}
        for slot in slots:
            self._cut[slot.layer].add(slot.name)
        self._banks: list[tuple[native.WeightBank, list[Slot]]] = []
        for dtype in dict.fromkeys(slot.tensor.dtype for slot in slots):
            same = [slot for slot in slots if slot.tensor.dtype == dtype]
            tensors = [with_2d_kernels(slot.tensor) for slot in same]
            bank = native.WeightBank(tensors, [slot.rows for slot in same], [slot.columns for slot in same])
            self._banks.append((bank, same))
        self._ranked: dict[tuple[int, ...], list[np.ndarray]] = {}

    def kept_units(self, arch: Architecture) -> np.ndarray:
        """Which units are kept, (units,) bool. Groups of a width class that have equal sizes keep the same channels."""
        keep = np.ones(len(self.importance), dtype=bool)
        for groups in (tuple(tied.factors) for tied in self.classes.of(arch.keep)):
            if groups not in self._ranked:
                self._ranked[groups] = self._by_importance(groups)
            for g, units in zip(groups, self._ranked[groups], strict=True):
                keep[units[arch.widths[g] :]] = False
        return keep

    def _by_importance(self, groups: Sequence[int]) -> list[np.ndarray]:
        """Units of each of a class's groups, the most important first."""
        shared: dict[int, Any] = {}
        members = [self.traced.units[g] for g in groups]
        for units in members:
            shared[len(units)] = shared.get(len(units), 0) + self.importance[units]
        return [units[np.argsort(-shared[len(units)], kind="stable")] for units in members]

    def kept_channels(self, arch: Architecture) -> list[np.ndarray | None]:
        """For each axis the positions of the channels kept, (channels,) int64; None for all of them."""
        keep = self.kept_units(arch)
        masks = [keep[axis] for axis in self.traced.axes]
        return [None if mask.all() else mask.nonzero()[0] for mask in masks]

    @_collector_paused()
    def build(self, arch: Architecture, kept: Sequence[np.ndarray | None]) -> fx.GraphModule:
        """The student with its weights sliced from the teacher's ("sliced"); kept: of `kept_channels`."""
        traced = self.traced
        width = [len(axis) if index is None else len(index) for axis, index in zip(traced.axes, kept, strict=True)]
        layers = [self._resized(i, arch, width) if keep else nn.Identity() for i, keep in enumerate(arch.keep)]
        for bank, slots in self._banks:
            chosen = [k for k, slot in enumerate(slots) if arch.keep[slot.layer]]
            kernels = cropped_kernels(bank, arch, [(k, slots[k].layer) for k in chosen])
            for k, tensor in zip(chosen, bank.materialize(np.array(chosen), kept, kernels), strict=True):
                slot, whole = slots[k], slots[k].tensor.shape[2:]
                own = tensor.view(*tensor.shape[:2], *whole) if len(whole) in (1, 3) else tensor
                if slot.is_parameter:
                    layers[slot.layer]._parameters[slot.name] = nn.Parameter(own)
                else:
                    layers[slot.layer]._buffers[slot.name] = own
        student = _clone(traced.module, "", dict(zip(traced.names, layers, strict=True)))
        type(student).forward = type(traced.module).forward  # every GraphModule has a class of its own
        return student  # type: ignore[return-value]

    def misfit(self, arch: Architecture) -> str | None:
        """Name of the first node of a student that fails or is not as wide as its channels are; None if all fit.

        Such as a view to a size written as a number: nothing else may go wrong in students.
        """
        traced, keep = self.traced, self.kept_units(arch)

        class Check(fx.Interpreter):
            node = ""

            def run_node(self, n: fx.Node) -> Any:
                self.node = n.name
                result = super().run_node(n)
                expected = list(traced.shapes.get(n, ()))
                if n in traced.units_of and expected:
                    dim, units = traced.units_of[n]
                    expected[dim] = int(keep[units[units >= 0]].sum() + (units < 0).sum())
                if isinstance(result, Tensor) and n in traced.shapes and list(result.shape) != expected:
                    raise ValueError(f"expected {expected}, got {list(result.shape)}")
                return result

        check = Check(self.build(arch, self.kept_channels(arch)))
        try:
            with torch.no_grad():
                check.run(traced.example)
        except Exception as error:  # noqa: BLE001 - whatever it raises, this node does not fit
            raise_device_fault(error)
            return check.node
        return None

    def _resized(self, i: int, arch: Architecture, width: Sequence[int]) -> nn.Module:
        """Layer i as a shallow copy that announces its new shapes, its tensors yet to be cut; width: of each axis."""
        traced, module = self.traced, self.traced.modules[i]
        if traced.out_axis[i] < 0:
            return copy.deepcopy(module).eval()
        layer = _copy(module, self._cut[i])
        shapes = _shapes(module, width[traced.in_axis[i]], width[traced.out_axis[i]], arch.kernels[i])
        layer.__dict__.update(shapes)  # past nn.Module's slow setattr
        return layer


def _clone(module: nn.Module, path: str, layers: dict[str, nn.Module]) -> nn.Module:
    """`module` with the leaves named in `layers` replaced and its own tensors copied."""
    if path in layers:
        return layers[path]
    copied = _copy(module)
    prefix = f"{path}." if path else ""
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else _clone(child, prefix + name, layers)
    return copied


def _copy(module: nn.Module, but: Collection[str] = ()) -> nn.Module:
    """A copy with tensors of its own, except those named in `but`, and the same children."""
    copied = bare_copy(module)
    for tensors in (copied._parameters, copied._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and name not in but:
                own: Any = tensor.detach().clone()
                tensors[name] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
    return copied


def with_2d_kernels(weight: Tensor) -> Tensor:
    """(O, I, k) as (O, I, k, 1) and (O, I, a, b, c) as (O, I, a, b·c); other shapes as they are."""
    return weight.reshape(*weight.shape[:3], -1) if weight.ndim > 2 else weight


def cropped_kernels(bank: native.WeightBank, arch: Architecture, chosen: Iterable[tuple[int, int]]) -> np.ndarray:
    """Kernel sizes in an architecture, (n, 2), of tensors of a bank; chosen: the position and the layer of each."""
    sizes: list[Sequence[int]] = []
    for k, layer in chosen:
        kernel, whole = arch.kernels[layer], bank.weights[k].shape[2:]
        sizes.append(kernel if len(kernel) == len(whole) == 2 else whole or (1, 1))
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


def _shapes(module: Any, inputs: int, outputs: int, kernel: tuple[int, ...]) -> dict[str, Any]:
    """The attributes in which a layer announces its numbers of channels and its kernel."""
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        groups = inputs * module.groups // module.in_channels if module.groups > 1 else 1
        attributes = {"in_channels": inputs, "out_channels": outputs, "groups": groups, "kernel_size": kernel}
        return attributes if kernel == module.kernel_size else attributes | _cropped_padding(module, kernel)
    if isinstance(module, nn.Linear):
        return {"in_features": inputs, "out_features": outputs}
    if isinstance(module, nn.GroupNorm):
        return {"num_groups": module.num_groups * outputs // module.num_channels, "num_channels": outputs}
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": (outputs,)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": min(outputs, module.num_parameters)}
    return {"num_features": outputs} if isinstance(module, NORMS) else {}


def _cropped_padding(conv: Any, kernel: tuple[int, ...]) -> dict[str, Any]:
    """The padding with which a smaller kernel leaves the output of `conv` its size."""
    if conv.padding == "valid":
        return {}
    if conv.padding == "same":
        padding = conv.padding
        totals = [d * (k - 1) for d, k in zip(conv.dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        cuts = [(a - b) // 2 * d for a, b, d in zip(conv.kernel_size, kernel, conv.dilation, strict=True)]
        padding = tuple(p - cut for p, cut in zip(conv.padding, cuts, strict=True))
        sides = [(p, p) for p in padding]
    twice = [p for side in reversed(sides) for p in side]  # torch pads by this one
    return {"padding": padding, "_reversed_padding_repeated_twice": twice}


def independent_copy(student: nn.Module) -> nn.Module:
    """A deep copy whose tensors each have a storage of their own, and whose graph is shared with no other student."""
    copied = copy.deepcopy(student)
    for module in copied.modules():
        for name, buffer in module._buffers.items():  # deepcopy clones a parameter alone, but a buffer's whole storage
            module._buffers[name] = None if buffer is None else buffer.clone()
    return copied
