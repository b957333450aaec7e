"""What the nodes of a traced graph do to channel labels: one rule for each kind of module and function."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from torch import fx, nn

from n2n_fast.networks.channels import ChannelLabels, Channels, NotUnderstood
from n2n_fast.networks.kinds import ACTIVATIONS, CONVS, NORMS, POOLS, TRANSPOSED
from n2n_fast.networks.moves import channels_after
from n2n_fast.networks.tracing import ChannelScale, is_dropout

# What is known without a trial, as functions, operators or methods
POINTWISE = {
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign", "tanh"),
    *("hardswish", "hardsigmoid", "hardtanh", "sigmoid", "alpha_dropout"),
    *("clamp", "abs", "exp", "sqrt", "square", "neg", "pos", "contiguous", "clone", "detach"),
    *("to", "float", "half", "double", "bfloat16", "type", "cpu", "cuda"),
}
ELEMENTWISE = {
    *("add", "sub", "mul", "div", "truediv", "pow", "maximum", "minimum", "max", "min", "where", "lerp"),
    *("gt", "lt", "ge", "le", "expand_as"),
}
CONCATENATIONS = ("cat", "concat", "concatenate")


def follow_channels(
    traced: fx.GraphModule,
    shapes: dict[fx.Node, tuple[int, ...]],
    numbers: dict[fx.Node, Any],
    pinned_nodes: Collection[str] = (),
) -> ChannelLabels:
    """Label the channels of every tensor of the graph, whose sizes that are written as numbers become relative.

    shapes, numbers: of the graph's nodes, for one example. pinned_nodes: names of nodes that are not to be understood,
    and paths of such modules.
    """
    labels = ChannelLabels(traced, shapes, numbers)
    for node in traced.graph.nodes:
        labels.values[node] = _visit(labels, node, pinned_nodes)
    traced.graph.eliminate_dead_code()
    return labels


def _visit(labels: ChannelLabels, node: fx.Node, pinned_nodes: Collection[str]) -> Channels | None:
    if node.op == "output":
        labels.outputs = [value.labels for value in labels.read_by(node)]
        labels.pins += labels.outputs
    try:
        if node.op == "call_module":
            return _module(labels, node, pinned=node.name in pinned_nodes or node.target in pinned_nodes)
        if node.op in ("call_function", "call_method"):
            return _function(labels, node, pinned=node.name in pinned_nodes)
    except NotUnderstood as error:
        return labels.pin_unknown(node, str(error))
    shape = labels.shapes.get(node, ())
    return Channels(1, labels.pinned(shape[1])) if node.op == "placeholder" and len(shape) > 1 else None


# Modules


def _module(labels: ChannelLabels, node: fx.Node, *, pinned: bool) -> Channels | None:
    module = labels.module(node)
    if pinned or len(node.all_input_nodes) != 1 or node not in labels.shapes:
        raise NotUnderstood
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return _weighted(labels, node, 1, (module.in_channels, module.out_channels), module.groups)
    if isinstance(module, nn.Linear):
        return _weighted(labels, node, -1, (module.in_features, module.out_features), 1)
    source = node.all_input_nodes[0]
    value = labels.values[source]
    if value is None:
        raise NotUnderstood
    if isinstance(module, NORMS):
        _check_norm(labels, node, module, value)
    elif isinstance(module, ChannelScale):
        dim = len(labels.shapes[source]) - len(module.view) + module.view.index(-1)
        if value.dim != dim or labels.shapes[source] != labels.shapes[node]:
            raise NotUnderstood("a parameter lies across channels")
    elif not isinstance(module, (*ACTIVATIONS, *POOLS)) and not is_dropout(module):
        if module._parameters or module._buffers or module._modules:
            raise NotUnderstood
        result = channels_after(labels, node)
        same = result is not None and result.dim == value.dim and labels.shapes[source] == labels.shapes[node]
        labels.record(node, *((value.labels, result.labels) if result is not None and same else (None, None)))
        return result
    labels.record(node, value.labels, value.labels)
    return value


def _weighted(labels: ChannelLabels, node: fx.Node, dim: int, widths: tuple[int, int], groups: int) -> Channels:
    """Convolutions and linear layers. A grouped convolution keeps or drops whole convolution groups.

    dim: of the channels, on both sides; widths: of input and output.
    """
    source, (inputs, outputs) = node.all_input_nodes[0], widths
    value = labels.values[source]
    if value is not None and value.dim == dim % len(labels.shapes[source]) and len(value.labels) == inputs:
        read = value.labels
    else:
        labels.pin(node, f"{labels.name(node)} runs across channels")
        read = labels.pinned(inputs)
    known = labels.layers.get(str(node.target))
    written = known.output if known is not None and known.output is not None else labels.fresh(outputs)
    if groups > 1:
        first = read[:: inputs // groups]
        labels.tie(read, np.repeat(first, inputs // groups))
        labels.tie(written, np.repeat(first, outputs // groups))
    labels.record(node, read, written)
    return Channels(dim % len(labels.shapes[node]), written)


def _check_norm(labels: ChannelLabels, node: fx.Node, module: nn.Module, value: Channels) -> None:
    """Raise NotUnderstood for a norm over other dimensions; a group norm keeps or drops whole groups."""
    shape, dim = labels.shapes[node], 1
    if isinstance(module, nn.LayerNorm):  # a subclass may normalise over another dimension than the last
        dim = len(shape) - 1 if type(module) is nn.LayerNorm else value.dim
    several = isinstance(module, nn.LayerNorm) and tuple(module.normalized_shape) != (shape[dim],)
    if value.dim != dim or several:
        raise NotUnderstood
    if isinstance(module, nn.GroupNorm):
        block = module.num_channels // module.num_groups
        labels.tie(value.labels, np.repeat(value.labels[::block], block))


# Functions


def _function(labels: ChannelLabels, node: fx.Node, *, pinned: bool) -> Channels | None:
    read = labels.read_by(node)
    if node in labels.numbers or node.target in ("size", "dim", getattr) or not read:
        return None
    if pinned:
        labels.pins += [value.labels for value in _sized_by(labels, node)]
        raise NotUnderstood(f"{labels.name(node)} has sizes of its own")
    name, rank = labels.name(node), max(len(labels.shapes.get(n, ())) for n in node.all_input_nodes)
    if name in POINTWISE and len(node.all_input_nodes) == 1:
        return read[0]
    if name in CONCATENATIONS or name == "stack":
        return _joined(labels, node, stack=name == "stack")
    if name in ELEMENTWISE and len(labels.shapes.get(node, ())) == rank:
        return _elementwise(labels, node)
    if node not in labels.shapes:  # several tensors: each is tried by itself
        return read[0]
    return channels_after(labels, node)


def _sized_by(labels: ChannelLabels, node: fx.Node) -> list[Channels]:
    """The channels of tensors whose sizes this node uses."""
    values: list[Channels] = []
    waiting = [n for n in node.all_input_nodes if n in labels.numbers]
    while waiting:
        number = waiting.pop()
        values += labels.read_by(number)
        waiting += [n for n in number.all_input_nodes if n in labels.numbers]
    return values


def _elementwise(labels: ChannelLabels, node: fx.Node) -> Channels:
    """Broadcasting: channels that meet are tied; a single channel spreads over the other operand's."""
    rank = len(labels.shapes[node])
    places, others = [], []  # dimension of the result and labels; shapes of what has none
    for n in node.all_input_nodes:
        if (value := labels.values[n]) is not None:
            places.append((value.dim + rank - len(labels.shapes[n]), value.labels))
        elif n in labels.shapes:
            others.append(labels.shapes[n])
    width = max(len(row) for _, row in places)
    wide = [(dim, row) for dim, row in places if len(row) == width]
    dim, row = wide[0]
    if any(place != dim for place, _ in wide) or labels.shapes[node][dim] != width:
        raise NotUnderstood
    if any(len(shape) >= rank - dim and shape[len(shape) - rank + dim] > 1 for shape in others):
        labels.pin(node, f"{labels.name(node)} meets a tensor of fixed width")
    labels.tie(*(row for _, row in wide))
    return Channels(dim, row)


def _joined(labels: ChannelLabels, node: fx.Node, *, stack: bool) -> Channels:
    """Concatenations and stacks. Along another dimension than the channels', channels at the same place are tied."""
    tensors: Any = node.args[0] if node.args and isinstance(node.args[0], Sequence) else ()
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    values = [labels.values[n] for n in tensors]
    known = [value for value in values if value is not None]
    if not isinstance(dim, int) or not known or any(value.dim != known[0].dim for value in known):
        raise NotUnderstood
    dim, along = dim % len(labels.shapes[node]), known[0].dim
    if dim == along and not stack:  # what has no labels is of fixed width
        widths = [labels.shapes[n][dim] for n in tensors]
        rows = [v.labels if v else labels.pinned(width) for v, width in zip(values, widths, strict=True)]
        return Channels(dim, np.concatenate(rows))
    if len(known) < len(tensors):
        labels.pin(node, f"{labels.name(node)} meets a tensor of fixed width")
    labels.tie(*(value.labels for value in known))
    return Channels(along + (stack and dim <= along), known[0].labels)
