"""Architecture -> nn.Module: which channels of the teacher a student keeps, and the module that holds them."""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from n2n_fast import native
from n2n_fast.files.errors import raise_device_fault
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.graph import TracedTeacher
from n2n_fast.networks.kinds import CONVS, NORMS, TRANSPOSED, kernel_size
from n2n_fast.networks.tracing import bare_copy, shallow_copy


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


def l1_saliency(traced: TracedTeacher) -> np.ndarray:
    """Saliency of each unit by absolute weights, (units,) float64.

    The sum over all tensors that write a unit times the sum over all that read it, each tensor divided by its mean:
    a channel that nobody writes or nobody reads is worth nothing, whatever the other side weighs.
    """
    written, read = (np.zeros(len(traced.group_of)) for _ in range(2))
    for slot in slots_of(traced):
        if not slot.is_parameter:
            continue
        weight = slot.tensor.float() if slot.tensor.element_size() < 4 else slot.tensor
        weight = weight.reshape(len(weight), 1 if slot.columns is None else weight.shape[1], -1)
        for dim, axis in enumerate((slot.rows, slot.columns)):
            if axis is None:
                continue
            total = written if (dim == 0) != slot.transposed else read
            sums = torch.linalg.vector_norm(weight, 1, (1 - dim, 2)).double().cpu()
            np.add.at(total, traced.axes[axis], (sums / sums.mean().clamp_min(1e-30)).numpy())
    unread = np.isin(np.arange(len(read)), np.concatenate([traced.axes[a] for a in traced.in_axis]), invert=True)
    return written * np.where(unread, 1.0, read)


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


class _Misfit(Exception):
    """A tensor is not as wide as its channels."""


class StudentFactory:
    """Builds students of one traced teacher: shallow clones of its graph, their tensors cut by one native call."""

    def __init__(self, traced: TracedTeacher, saliency: np.ndarray) -> None:
        """saliency: of each unit, (units,); the highest are kept."""
        self.traced = traced
        self.saliency = saliency
        slots = slots_of(traced)
        self.banks = []
        for dtype in dict.fromkeys(slot.tensor.dtype for slot in slots):
            of_dtype = [slot for slot in slots if slot.tensor.dtype == dtype]
            tensors = [_as_2d_kernel(slot.tensor) for slot in of_dtype]
            bank = native.WeightBank(tensors, [slot.rows for slot in of_dtype], [slot.columns for slot in of_dtype])
            self.banks.append((bank, of_dtype, np.array([slot.layer for slot in of_dtype])))
        cut = {(slot.layer, slot.name) for slot in slots}
        # whatever else a layer holds is copied as it is: BN's counters, the weights of opaque modules
        self.whole = [
            [name for name in (*module._parameters, *module._buffers) if (i, name) not in cut]
            for i, module in enumerate(traced.modules)
        ]
        self.kernels = tuple(layer.kernel_size for layer in traced.layers)
        self._announce = [_announcer(module) for module in traced.modules]
        self._alone = [self._by_saliency([g])[0][1] for g in range(len(traced.units))]

    def build(self, arch: Architecture, kept: Sequence[np.ndarray | None]) -> fx.GraphModule:
        """The student with its weights sliced from the teacher's ("sliced"); kept: of `kept_channels`."""
        with _collector_paused():
            return self._build(arch, kept)

    def _build(self, arch: Architecture, kept: Sequence[np.ndarray | None]) -> fx.GraphModule:
        channels = [
            len(axis) if index is None else len(index) for axis, index in zip(self.traced.axes, kept, strict=True)
        ]
        modules: list[nn.Module] = [
            self._resized(i, arch, channels) if keep else nn.Identity() for i, keep in enumerate(arch.keep)
        ]
        for slot, tensor in self._materialize(arch, kept):
            place: dict[str, Any] = (
                modules[slot.layer]._parameters if slot.is_parameter else modules[slot.layer]._buffers
            )
            place[slot.name] = nn.Parameter(tensor) if slot.is_parameter else tensor
        return self._assemble(dict(zip(self.traced.names, modules, strict=True)))

    def kept_units(self, arch: Architecture, classes: Sequence[Iterable[int]]) -> np.ndarray:
        """Which units are kept, (units,) bool.

        classes: groups that share one width in `arch`; those of equal size also keep the same channels.
        """
        keep = np.ones(len(self.traced.group_of), dtype=bool)
        for groups in classes:
            members = list(groups)
            ranked = self._by_saliency(members) if len(members) > 1 else [(members[0], self._alone[members[0]])]
            for g, units in ranked:
                keep[units[arch.widths[g] :]] = False
        return keep

    def kept_channels(self, keep: np.ndarray) -> list[np.ndarray | None]:
        """For each axis the positions of the channels kept, None for all of them; keep: of each unit."""
        masks = [keep[axis] for axis in self.traced.axes]
        return [None if mask.all() else mask.nonzero()[0] for mask in masks]

    def misfit(self, arch: Architecture, keep: np.ndarray) -> str | None:
        """Name of the first node that fails in a student or gives another width than was foreseen; None if all fit.

        Such as a view to a size written as a number: nothing else may go wrong in students.
        """
        student, traced = self.build(arch, self.kept_channels(keep)), self.traced
        running: list[str] = []

        class Checker(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                running.append(n.name)
                result = super().run_node(n)
                expected = list(traced.shapes.get(n, ()))
                if n in traced.units_of and expected:
                    dim, units = traced.units_of[n]
                    expected[dim] = int(keep[units[units >= 0]].sum() + (units < 0).sum())
                if isinstance(result, Tensor) and n in traced.shapes and list(result.shape) != expected:
                    raise _Misfit
                return result

        try:
            with torch.no_grad():
                Checker(student).run(traced.example)
        except Exception as error:  # noqa: BLE001 - whatever it raises, this node does not fit
            raise_device_fault(error)
            return running[-1]
        return None

    def _by_saliency(self, groups: Sequence[int]) -> list[tuple[int, np.ndarray]]:
        """For each group of a class its units, those to be kept first, first."""
        shared: dict[int, np.ndarray] = {}
        for g in groups:
            units = self.traced.units[g]
            shared[len(units)] = shared.get(len(units), 0) + self.saliency[units]
        return [
            (g, units[np.argsort(-shared[len(units)], kind="stable")])
            for g, units in ((g, self.traced.units[g]) for g in groups)
        ]

    def _materialize(self, arch: Architecture, kept: Sequence[np.ndarray | None]) -> Iterator[tuple[Slot, Tensor]]:
        """The student's tensors; one native call for each dtype among them."""
        keep = np.array(arch.keep)
        for bank, slots, layers in self.banks:
            chosen = keep[layers].nonzero()[0]
            kernels = None  # uncropped
            if arch.kernels != self.kernels:
                kernels = np.array([_new_kernel(slots[k], arch) for k in chosen.tolist()]).reshape(-1, 2)
            for k, tensor in zip(chosen.tolist(), bank.materialize(chosen, kept, kernels), strict=True):
                source = slots[k].tensor
                yield slots[k], tensor.view(*tensor.shape[:2], *source.shape[2:]) if source.ndim in (3, 5) else tensor

    def _resized(self, i: int, arch: Architecture, channels: Sequence[int]) -> nn.Module:
        """Layer i as a shallow copy that announces its new shapes; channels: on each axis."""
        traced, module = self.traced, self.traced.modules[i]
        if traced.out_axis[i] < 0:
            return copy.deepcopy(module).eval()
        copied = shallow_copy(module)
        for name in self.whole[i]:
            tensors: dict[str, Any] = copied._parameters if name in copied._parameters else copied._buffers
            tensors[name] = _own(tensors[name])
        given, made = channels[traced.in_axis[i]], channels[traced.out_axis[i]]
        announce = self._announce[i]
        if announce is not None:
            copied.__dict__.update(announce(module, given, made, arch.kernels[i]))  # past nn.Module's slow setattr
        return copied

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
    for tensors in (copied._parameters, copied._buffers):
        for name, value in tensors.items():
            tensors[name] = _own(value)
    prefix = f"{path}." if path else ""
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else _clone(child, prefix + name, layers)
    return copied


def _own(tensor: Tensor | None) -> Any:
    """A copy of a parameter or buffer."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    return None if tensor is None else tensor.clone()


def _as_2d_kernel(weight: Tensor) -> Tensor:
    """(O, I, k) as (O, I, 1, k) and (O, I, a, b, c) as (O, I, a, b·c); other shapes as they are."""
    if weight.ndim == 3:
        return weight.unsqueeze(2)
    return weight.flatten(3) if weight.ndim == 5 else weight


def _new_kernel(slot: Slot, arch: Architecture) -> tuple[int, ...]:
    """The size to which the tensor, as `_as_2d_kernel` has it, is cropped."""
    kernel = arch.kernels[slot.layer]
    if slot.tensor.ndim == 4 and len(kernel) == 2:
        return kernel
    return tuple(_as_2d_kernel(slot.tensor).shape[2:]) or (1, 1)


_Attributes = dict[str, Any]
_Announcer = Callable[[Any, int, int, tuple[int, ...]], _Attributes]


def _announcer(module: nn.Module) -> _Announcer | None:
    """What a layer says of its own shapes once it reads `given` channels and writes `made`; None: nothing."""
    table: tuple[tuple[tuple[type, ...], _Announcer], ...] = (
        ((*CONVS, *TRANSPOSED), _conv_attributes),
        ((nn.Linear,), lambda module, given, made, kernel: {"in_features": given, "out_features": made}),
        ((nn.GroupNorm,), _group_norm_attributes),
        ((nn.LayerNorm,), lambda module, given, made, kernel: {"normalized_shape": (made,)}),
        ((nn.PReLU,), lambda module, given, made, kernel: {"num_parameters": min(made, module.num_parameters)}),
        (NORMS, lambda module, given, made, kernel: {"num_features": made}),
    )
    return next((announce for types, announce in table if isinstance(module, types)), None)


def _group_norm_attributes(norm: Any, given: int, made: int, kernel: tuple[int, ...]) -> _Attributes:
    return {"num_groups": norm.num_groups * made // norm.num_channels, "num_channels": made}


def _conv_attributes(conv: Any, given: int, made: int, kernel: tuple[int, ...]) -> _Attributes:
    groups = given * conv.groups // conv.in_channels if conv.groups > 1 else 1
    attributes = {"in_channels": given, "out_channels": made, "groups": groups, "kernel_size": kernel}
    return attributes if kernel == conv.kernel_size else attributes | _cropped_attributes(conv, kernel)


def _cropped_attributes(conv: Any, kernel: tuple[int, ...]) -> dict[str, Any]:
    """A smaller kernel for `conv`, and the padding that leaves its output's size unchanged."""
    before = kernel_size(conv)
    if kernel == before or conv.padding == "valid":
        return {}
    if conv.padding == "same":
        padding = conv.padding
        totals = [d * (k - 1) for d, k in zip(conv.dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        cuts = [(a - b) // 2 * d for a, b, d in zip(before, kernel, conv.dilation, strict=True)]
        padding = tuple(p - cut for p, cut in zip(conv.padding, cuts, strict=True))
        sides = [(p, p) for p in padding]
    twice = [p for side in reversed(sides) for p in side]  # torch pads by this one
    return {"padding": padding, "_reversed_padding_repeated_twice": twice}


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
