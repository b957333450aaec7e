"""The layers of a teacher as the policies see them (section 3.1 of the paper), and why some of them are fixed."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx, nn

from n2n_fast.networks.channels import ChannelLabels, LayerChannels
from n2n_fast.networks.groups import ChannelGroups
from n2n_fast.networks.kinds import (
    ADAPTIVE_POOLS,
    TRANSPOSED,
    WEIGHTED,
    kernel_size,
    kind_of,
    padding,
    smallest_kernel,
    stride,
)
from n2n_fast.networks.tracing import is_dropout


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


def layers_of(groups: ChannelGroups, labels: ChannelLabels) -> tuple[Layer, ...]:
    """All layers, in order of first call."""
    weighted = [i for i, module in enumerate(groups.modules) if isinstance(module, WEIGHTED)]
    ends = {**dict.fromkeys(weighted[-1:], "classifier"), **dict.fromkeys(weighted[:1], "first layer")}
    skips = _skips(labels.traced.graph, {name: i for i, name in enumerate(groups.names)})
    deciders = {writers[0] for g, writers in enumerate(groups.writers) if writers and not groups.pinned[g]}
    layers = []
    for i, (module, channels) in enumerate(zip(groups.modules, labels.layers.values(), strict=True)):
        note = ends.get(i) or _why_fixed(groups, labels, i, channels)
        layer = Layer(
            name=groups.names[i],
            kind=kind_of(module, channels.opaque),
            kernel_size=kernel_size(module),
            stride=stride(module),
            padding=padding(module),
            out_channels=_width(labels, channels),
            skip_start=skips[i][0],
            skip_end=skips[i][1],
            removable=not note,
            shrinkable=i in deciders or smallest_kernel(module) != kernel_size(module),
            note=note,
            width_note="" if i in deciders else _why_decided(groups, i, channels),
            fit_note=_why_sliced(groups, i, channels),
            groups=tuple(groups.along(groups.out_axis[i])),
        )
        layers.append(layer)
    return tuple(layers)


def _width(labels: ChannelLabels, channels: LayerChannels) -> int:
    if channels.output is not None:
        return len(channels.output)
    shape = labels.shapes.get(channels.calls[0], ())
    return shape[1] if len(shape) > 1 else 0


def _why_fixed(groups: ChannelGroups, labels: ChannelLabels, i: int, channels: LayerChannels) -> str:
    """Why stage 1 may not remove layer i; empty if it may."""
    module = groups.modules[i]
    if channels.output is None:
        return "not understood" if channels.opaque else "reshapes"
    if is_dropout(module):
        return "removing it changes nothing"
    if any(s > 1 for s in stride(module)) or isinstance(module, ADAPTIVE_POOLS):
        return "changes the resolution"
    for node in channels.calls:
        before, after = (list(labels.shapes[n]) for n in (node.all_input_nodes[0], node))
        dim = -1 if isinstance(module, (nn.Linear, nn.LayerNorm)) else 1
        del before[dim], after[dim]
        if before != after:
            return "changes the resolution"
    if isinstance(module, WEIGHTED) and groups.output[groups.along(groups.out_axis[i])].any():
        return "classifier"
    return "its input and output channels cannot meet" if groups.relations(i) is None else ""


def _why_decided(groups: ChannelGroups, i: int, channels: LayerChannels) -> str:
    """Why stage 2 does not choose the width of layer i's output here."""
    if channels.output is None:
        return "held at full width" if channels.opaque else "follows its input"
    written = np.flatnonzero(groups.occurrences[groups.out_axis[i]])
    if groups.pinned[written].all():
        return "as many as classes" if groups.output[written].all() else "held at full width"
    if not isinstance(groups.modules[i], WEIGHTED):
        return "follows its input"
    return f"decided by {next(groups.names[groups.writers[g][0]] for g in written if not groups.pinned[g])}"


def _why_sliced(groups: ChannelGroups, i: int, channels: LayerChannels) -> str:
    """Why layer i's weights cannot be fitted to activations."""
    if channels.output is None or not isinstance(groups.modules[i], WEIGHTED):
        return ""
    if len(channels.calls) > 1:
        return f"called {len(channels.calls)} times"
    return "transposed" if isinstance(groups.modules[i], TRANSPOSED) else ""


def _skips(graph: fx.Graph, layers: dict[str, int]) -> list[tuple[int, int]]:
    """(skip_start, skip_end) of every layer: its distance from both ends of the innermost branch around it."""
    innermost: list[list[int]] = [[] for _ in layers]
    for branch in _branches(graph):
        inside = sorted({layers[str(node.target)] for node in branch if node.op == "call_module"})
        for i in inside:
            if not innermost[i] or len(inside) < len(innermost[i]):
                innermost[i] = inside
    return [(i - inside[0] + 1, inside[-1] - i + 1) if inside else (0, 0) for i, inside in enumerate(innermost)]


def _branches(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes between each node where several paths meet and the last node that all of them come from."""
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    dominator: list[int] = []
    ancestors: list[set[int]] = []
    for i, node in enumerate(nodes):
        inputs = [order[n] for n in node.all_input_nodes if n.op != "get_attr"]
        ancestors.append(set(inputs).union(*(ancestors[j] for j in inputs)))
        dominator.append(functools.reduce(functools.partial(_common, dominator), inputs or [0]))
        if len(inputs) > 1:
            yield [nodes[j] for j in ancestors[i] - ancestors[dominator[i]] - {dominator[i]}]


def _common(dominator: Sequence[int], a: int, b: int) -> int:
    """The last node through which every path to both `a` and `b` goes."""
    while a != b:
        a, b = (dominator[a], b) if a > b else (a, dominator[b])
    return a
