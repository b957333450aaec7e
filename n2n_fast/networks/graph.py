"""A traced teacher: its layers, the channel groups that tie them together, and the cost of any architecture made of it.

Channels that are tied are one *unit*, kept or dropped as a whole; units that occur equally often on every weight's axes
form one *group*, of which any number may be kept. So an architecture is a number of units per group, and every shape
follows from it.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from n2n_fast.files.errors import BadInput
from n2n_fast.networks.channels import (
    ACTIVATIONS,
    BATCH_NORMS,
    CONVS,
    NORMS,
    POOLS,
    TRANSPOSED,
    WEIGHTED,
    ChannelLabels,
    LayerChannels,
    components,
)
from n2n_fast.networks.tracing import ChannelScale, is_dropout, trace, unused, values_of

KINDS = ("conv", "depthwise", "linear", "norm", "activation", "pool", "reshape", "dropout", "opaque")


@dataclass(frozen=True)
class Layer:
    """One leaf module of the teacher, with the features x_t the policies see (section 3.1 of the paper).

    name: the module's path in the teacher. kernel_size, stride, padding: one int per spatial dimension, () without.
    out_channels: width of its output. skip_start, skip_end: layers since the innermost enclosing branch began and
    until it ends, 0 outside. removable: stage 1 may remove it. shrinkable: stage 2 may choose its channels or kernel.
    note: why it is not removable, empty if it is. width_note: why it does not choose its channels, empty if it does.
    fit_note: why its weights are sliced and not fitted to activations, empty if they are or it has none. groups: the
    channel groups of its output; what shares a group shares its width.
    """

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    out_channels: int
    skip_start: int
    skip_end: int
    removable: bool
    shrinkable: bool
    note: str = ""
    width_note: str = ""
    fit_note: str = ""
    groups: tuple[int, ...] = ()


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


class TracedTeacher:
    """The teacher's graph, layers and channel groups.

    module: the traced graph, sharing the teacher's tensors. layers: one per leaf module, in order of first call.
    axes: the distinct channel axes of all layers, each an array of unit numbers; in_axis, out_axis: index of each
    layer's, -1 without. group_of: group of each unit. sizes, pinned: units per group, and whether all must stay.
    writers: for each group the weighted layers whose outputs it names. fittable: layers whose weights can be fitted to
    their inputs; repeats: how often each input channel stands in a row; norm_after: the batch norm that alone reads the
    output. largest_activation: numbers per image. warnings: what was not understood.
    """

    def __init__(
        self, teacher: nn.Module, example: Tensor, leaf: Iterable[str] = (), held: Collection[str] = ()
    ) -> None:
        """held: names of the graph's nodes whose inputs are to stay at full width."""
        if example.ndim < 3 or len(example) < 1:
            raise BadInput(f"example_input: expected (N, C, H, W) with N >= 1, got {tuple(example.shape)}")
        parameter = next((p for p in teacher.parameters() if p.is_floating_point()), example)
        if parameter.is_meta:
            raise BadInput("the teacher is on the meta device, without weights; load them first")
        self.example = example = torch.cat([example[:1], example[:1]]).to(parameter.device, parameter.dtype)
        self.module = trace(teacher, example, leaf)
        shapes, numbers = values_of(self.module, teacher, example)
        labels = ChannelLabels(self.module, shapes, numbers, {*leaf, *held})
        self.shapes = {node: shape for node, shape in shapes.items() if node not in labels.folded}
        self.module.recompile()
        self.warnings = tuple(labels.warnings)
        if idle := unused(self.module, teacher):
            self.warnings += (f"{', '.join(idle)}: not used in evaluation, students do without",)
        self.names = tuple(labels.layers)
        self.modules = tuple(self.module.get_submodule(name) for name in self.names)
        self.opaque = [layer.opaque for layer in labels.layers.values()]
        self._units(labels)
        self._costs(labels)
        if any(self.opaque) or labels.warnings:  # what happens there costs the same in every architecture
            from torch.utils.flop_counter import FlopCounterMode  # here, since it imports triton

            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.module(example[:1])
            self.direct_macs = counter.get_total_flops() // 2 - self._whole_cost()[1]
        calls: dict[str, list[fx.Node]] = {name: [] for name in self.names}
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                calls[str(node.target)].append(node)
        self._neighbours(labels, shapes, calls)
        self.layers = self._layers(labels, shapes, calls)

    def _units(self, labels: ChannelLabels) -> None:
        """Number the units and gather them in groups; express every layer's axes in units."""
        root = components(labels.count, labels.ties)
        sides = [side for layer in labels.layers.values() for side in (layer.input, layer.output)]
        is_used = np.zeros(labels.count, dtype=bool)
        is_used[root[np.concatenate([np.arange(0), *(s for s in sides if s is not None)])]] = True
        used = np.flatnonzero(is_used)
        number = np.full(labels.count, -1)
        number[used] = np.arange(len(used))
        axes: dict[bytes, int] = {}
        self.axes: list[np.ndarray] = []
        index = []
        for side in sides:
            if side is None:
                index.append(-1)
                continue
            units = number[root[side]]
            index.append(axes.setdefault(units.tobytes(), len(self.axes)))
            if index[-1] == len(self.axes):
                self.axes.append(units)
        self.units_of = {
            node: (value.dim, number[root[value.labels]]) for node, value in labels.values.items() if value
        }
        self.in_axis, self.out_axis = np.array(index[::2], dtype=int), np.array(index[1::2], dtype=int)
        pinned, output = (
            np.isin(used, root[np.concatenate([*lists, np.arange(0)])]) for lists in (labels.pins, labels.outputs)
        )
        self.group_of = self._groups(pinned)
        groups = int(self.group_of.max(initial=-1)) + 1
        self.sizes = np.bincount(self.group_of, minlength=groups)
        self.pinned = np.bincount(self.group_of, weights=pinned, minlength=groups) > 0
        self.output = np.bincount(self.group_of, weights=output, minlength=groups) > 0
        self.units = [np.flatnonzero(self.group_of == g) for g in range(groups)]
        # occurrences[a, g]: channels of axis a for each kept unit of group g
        self.occurrences = np.stack([np.bincount(self.group_of[axis], minlength=groups) for axis in self.axes])
        self.occurrences //= self.sizes

    def _groups(self, pinned: np.ndarray) -> np.ndarray:
        """Partition refinement: units with equal counts on every axis, and equally pinned, are one group."""
        group = pinned.astype(int)
        for axis in self.axes:
            units, counts = np.unique(axis, return_counts=True)
            _, part = np.unique(group[units] * (counts.max() + 1) + counts, return_inverse=True)
            group[units] = group.max(initial=0) + 1 + part
        _, first, part = np.unique(group, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[part]

    def _costs(self, labels: ChannelLabels) -> None:
        """Params of layer i: per_pair·in·out·kernel + per_channel·out + constant; MACs: positions·pairs·kernel."""
        count = len(self.names)
        self.per_pair, self.per_channel, self.constant = (np.zeros(count, dtype=np.int64) for _ in range(3))
        self.dense_input = np.zeros(count, dtype=bool)
        self.positions = np.array([layer.positions for layer in labels.layers.values()], dtype=np.int64)
        for i, module in enumerate(self.modules):
            if isinstance(module, WEIGHTED):
                groups = getattr(module, "groups", 1)
                self.dense_input[i] = groups == 1
                self.per_pair[i] = 1 if groups == 1 else int(module.in_channels) // groups  # type: ignore[arg-type]
                self.per_channel[i] = 0 if module.bias is None else 1
            elif self.out_axis[i] >= 0 and not isinstance(module, nn.PReLU):
                self.per_channel[i] = sum(p is not None for p in module._parameters.values())
            elif isinstance(module, nn.PReLU) and module.num_parameters > 1 and self.out_axis[i] >= 0:
                self.per_channel[i] = 1
            else:
                self.constant[i] = sum(p.numel() for p in module.parameters())
        # writers[g]: the layers that could choose the width of group g, in order
        weighted = self.dense_input | (self.per_pair > 0)
        self.writers = [
            [int(i) for i in np.flatnonzero(weighted) if self.occurrences[self.out_axis[i], g]]
            for g in range(len(self.sizes))
        ]
        attributes = {str(node.target) for node in self.module.graph.nodes if node.op == "get_attr"}
        direct = [value for name, value in self.module.named_parameters() if name in attributes]
        self.direct_params = sum(value.numel() for value in direct)
        self.direct_macs = 0

    def _whole_cost(self) -> tuple[int, int]:
        return self.cost(
            [True] * len(self.names), self.sizes.tolist(), [kernel_size(module) for module in self.modules]
        )

    def cost(self, keep: Sequence[bool], widths: Sequence[int], kernels: Sequence[tuple[int, ...]]) -> tuple[int, int]:
        """(params, MACs for one image) of an architecture, without building it."""
        width = np.append(self.occurrences @ np.asarray(widths, dtype=np.int64), 0)  # axis -1: no channels
        kernel = np.array([math.prod(k) for k in kernels], dtype=np.int64)
        out = width[self.out_axis]
        pairs = self.per_pair * out * np.where(self.dense_input, width[self.in_axis], 1) * kernel
        kept = np.asarray(keep, dtype=bool)
        params = int((pairs + self.per_channel * out + self.constant)[kept].sum()) + self.direct_params
        return params, int((pairs * self.positions)[kept].sum()) + self.direct_macs

    # Layers and their features

    def _neighbours(
        self, labels: ChannelLabels, shapes: dict[fx.Node, tuple[int, ...]], calls: dict[str, list[fx.Node]]
    ) -> None:
        """What fitting a layer's weights needs to know of its surroundings."""
        index = {name: i for i, name in enumerate(self.names)}
        self.largest_activation = max(math.prod(shape) // 2 for shape in shapes.values())
        self.repeats = [layer.repeat for layer in labels.layers.values()]
        self.fittable, self.groupwise, self.norm_after = [], [], []
        for i, name in enumerate(self.names):
            call = calls[name][0]
            transposed = isinstance(self.modules[i], TRANSPOSED)
            once = len(calls[name]) == 1 and not transposed
            self.fittable.append(once and bool(self.dense_input[i]))
            self.groupwise.append(once and getattr(self.modules[i], "groups", 1) > 1)
            users = [str(user.target) for user in call.users if user.op == "call_module"]
            norms = [index[user] for user in users if isinstance(self.modules[index[user]], BATCH_NORMS)]
            self.norm_after.append(norms[0] if norms and len(call.users) == 1 else None)

    def _layers(
        self, labels: ChannelLabels, shapes: dict[fx.Node, tuple[int, ...]], calls: dict[str, list[fx.Node]]
    ) -> tuple[Layer, ...]:
        weighted = [i for i, module in enumerate(self.modules) if isinstance(module, WEIGHTED)]
        ends = weighted[:1], weighted[-1:]
        skips = _skips(self.module.graph, {name: i for i, name in enumerate(self.names)})
        deciders = {writers[0] for g, writers in enumerate(self.writers) if writers and not self.pinned[g]}
        layers = []
        for i, (name, module) in enumerate(zip(self.names, self.modules, strict=True)):
            note = "first layer" if i in ends[0] else "classifier" if i in ends[1] else ""
            note = note or self._why_fixed(i, [(n, shapes) for n in calls[name]])
            kernel = tuple(kernel_size(module))
            layers.append(
                Layer(
                    name=name,
                    kind=_kind(module, self.opaque[i]),
                    kernel_size=kernel,
                    stride=_ints(getattr(module, "stride", ()), len(kernel)),
                    padding=_padding(module, kernel),
                    out_channels=_width(labels.layers[name], calls[name][0], shapes),
                    skip_start=skips[i][0],
                    skip_end=skips[i][1],
                    removable=not note,
                    shrinkable=i in deciders or smallest_kernel(module) != kernel,
                    note=note,
                    width_note="" if i in deciders else self._why_decided(i),
                    fit_note=self._why_sliced(i, len(calls[name])),
                    groups=() if self.out_axis[i] < 0 else tuple(_runs(self.group_of[self.axes[self.out_axis[i]]])),
                )
            )
        return tuple(layers)

    def _why_fixed(self, i: int, calls: Sequence[tuple[fx.Node, dict[fx.Node, tuple[int, ...]]]]) -> str:
        """Why stage 1 may not remove layer i; empty if it may."""
        module = self.modules[i]
        if self.out_axis[i] < 0:
            return "not understood" if self.opaque[i] else "reshapes"
        if is_dropout(module):
            return "removing it changes nothing"
        for node, shapes in calls:
            before, after = shapes[node.all_input_nodes[0]], shapes[node]
            dim = len(after) - 1 if isinstance(module, (nn.Linear, nn.LayerNorm)) else 1
            spatial = [list(shape[:dim] + shape[dim + 1 :]) for shape in (before, after)]
            strided = any(s > 1 for s in _ints(getattr(module, "stride", ()), len(kernel_size(module))))
            adaptive = isinstance(module, POOLS) and hasattr(module, "output_size")
            if spatial[0] != spatial[1] or strided or adaptive:
                return "changes the resolution"
        weighted = isinstance(module, WEIGHTED)
        if weighted and self.output[self.group_of[self.axes[self.out_axis[i]]]].any():
            return "classifier"
        if self.relations(i) is None:
            return "its input and output channels cannot meet"
        return ""

    def _why_decided(self, i: int) -> str:
        """Why stage 2 does not choose the width of layer i's output here."""
        if self.out_axis[i] < 0:
            return "held at full width" if self.opaque[i] else "follows its input"
        groups = np.flatnonzero(self.occurrences[self.out_axis[i]])
        if self.pinned[groups].all():
            return "as many as classes" if self.output[groups].all() else "held at full width"
        first = next((self.writers[g][0] for g in groups if self.writers[g] and not self.pinned[g]), i)
        return f"decided by {self.names[first]}" if isinstance(self.modules[i], WEIGHTED) else "follows its input"

    def _why_sliced(self, i: int, calls: int) -> str:
        """Why layer i's weights cannot be fitted to activations."""
        if not isinstance(self.modules[i], WEIGHTED) or self.fittable[i] or self.groupwise[i]:
            return ""
        return f"called {calls} times" if calls > 1 else "transposed"

    def relations(self, i: int) -> list[tuple[int, int, int, int]] | None:
        """What removing layer i asks of the widths: (g, m, h, n) means m·width[g] = n·width[h]. None: impossible."""
        if self.in_axis[i] == self.out_axis[i]:
            return []
        sides = [_runs(self.group_of[self.axes[axis]]) for axis in (self.in_axis[i], self.out_axis[i])]
        if len(sides[0]) != len(sides[1]):
            return None
        found = []
        for g, h in zip(*sides, strict=True):
            m, n = self.occurrences[self.in_axis[i], g], self.occurrences[self.out_axis[i], h]
            if g == h and m != n:
                return None
            common = math.gcd(m, n)
            if g != h and (self.sizes[g] < n // common or self.sizes[h] < m // common):
                return None  # fewer channels than the other side's smallest number
            for (held, a), (other, b) in (((g, m), (h, n)), ((h, n), (g, m))):
                width, rest = divmod(a * self.sizes[held], b)
                if self.pinned[held] and (
                    rest or width > self.sizes[other] or (self.pinned[other] and width < self.sizes[other])
                ):
                    return None  # at full width, one side is wider than the other can be
            if g != h:
                found.append((int(g), int(m), int(h), int(n)))
        return found


def _runs(values: np.ndarray) -> list[int]:
    """Values without repetition of neighbours."""
    return [int(v) for v in values[np.append(True, values[1:] != values[:-1])]]


def _width(layer: LayerChannels, call: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]) -> int:
    if layer.output is not None:
        return len(layer.output)
    shape = shapes.get(call, ())
    return shape[1] if len(shape) > 1 else 0


def _kind(module: nn.Module, opaque: bool) -> str:
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return "depthwise" if module.groups == module.in_channels > 1 else "conv"
    if is_dropout(module):
        return "dropout"
    table: tuple[tuple[tuple[type, ...], str], ...] = (
        ((nn.Linear,), "linear"),
        ((*NORMS, ChannelScale), "norm"),
        (ACTIVATIONS, "activation"),
        (POOLS, "pool"),
    )
    return next((kind for types, kind in table if isinstance(module, types)), "opaque" if opaque else "reshape")


def _ints(value: Any, count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    return tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else ()


def kernel_size(module: nn.Module) -> tuple[int, ...]:
    """Kernel size of a convolution or pool, one int per spatial dimension; () for other modules."""
    value = getattr(module, "kernel_size", ())
    if isinstance(value, int):
        return (value,) * (1 if "1d" in type(module).__name__ else 3 if "3d" in type(module).__name__ else 2)
    return tuple(value)


def _padding(module: nn.Module, kernel: tuple[int, ...]) -> tuple[int, ...]:
    value = getattr(module, "padding", ())
    if value == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(_ints(module.dilation, len(kernel)), kernel, strict=True))
    return (0,) * len(kernel) if isinstance(value, str) else _ints(value, len(kernel))


def smallest_kernel(module: nn.Module) -> tuple[int, ...]:
    """The smallest kernel to which a convolution can be cropped at its centre without changing its output's size."""
    kernel = kernel_size(module)
    if not isinstance(module, nn.Conv2d):
        return kernel
    padding, dilation = _padding(module, kernel), module.dilation
    return tuple(max(1, k - 2 * (p // d)) if k % 2 else k for k, p, d in zip(kernel, padding, dilation, strict=True))


def crop(kernel: tuple[int, ...], smallest: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """`kernel` shrunk by `ratio` in each dimension, rounded and then down to an odd size, at least `smallest`."""
    sizes = (max(s, round(k * ratio)) for k, s in zip(kernel, smallest, strict=True))
    return tuple(n if (k - n) % 2 == 0 else n - 1 for k, n in zip(kernel, sizes, strict=True))


def _skips(graph: fx.Graph, layers: dict[str, int]) -> list[tuple[int, int]]:
    """(skip_start, skip_end) of every layer: its distance from both ends of the innermost branch around it.

    A branch lies between a node where several paths meet and the last node that all of them come from.
    """
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    dominator: list[int] = []
    ancestors: list[set[int]] = []
    skips = [(0, 0)] * len(layers)
    span = [len(nodes)] * len(layers)
    for i, node in enumerate(nodes):
        inputs = [order[n] for n in node.all_input_nodes if n.op != "get_attr"]
        ancestors.append(set(inputs).union(*(ancestors[j] for j in inputs)))
        if not inputs:
            dominator.append(0)
            continue
        meet = inputs[0]
        for other in inputs[1:]:
            meet = _common(dominator, meet, other)
        dominator.append(meet)
        if len(inputs) < 2:
            continue
        between = sorted(ancestors[i] - ancestors[meet] - {meet})
        inside = [layers[str(nodes[j].target)] for j in between if nodes[j].op == "call_module"]
        inside = sorted(set(inside))
        for layer in inside:
            if len(inside) < span[layer]:
                span[layer] = len(inside)
                skips[layer] = (layer - inside[0] + 1, inside[-1] - layer + 1)
    return skips


def _common(dominator: Sequence[int], a: int, b: int) -> int:
    """The last node through which every path to both `a` and `b` goes."""
    while a != b:
        a, b = (dominator[a], b) if a > b else (a, dominator[b])
    return a
