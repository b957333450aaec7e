"""What the nodes of a traced graph do to channel labels: one rule for each kind of module and function."""

import operator
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from n2n_fast.networks.channels import ChannelLabels, Channels, NotUnderstood
from n2n_fast.networks.kinds import ACTIVATIONS, CONVS, NORMS, POOLS, TRANSPOSED
from n2n_fast.networks.moves import channels_after
from n2n_fast.networks.tracing import ChannelScale, is_dropout

# What is known without a trial
POINTWISE = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.softsign),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.dropout, F.dropout2d, F.alpha_dropout),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.abs, torch.exp, torch.sqrt, torch.square, torch.neg),
    *(operator.neg, operator.pos, abs),
    *("relu", "sigmoid", "tanh", "clamp", "abs", "exp", "sqrt", "square", "neg", "contiguous", "clone", "detach"),
    *("to", "float", "half", "double", "bfloat16", "type", "cpu", "cuda"),
}
ELEMENTWISE = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum, torch.pow),
    *(torch.max, torch.min, torch.where, torch.lerp, operator.gt, operator.lt, operator.ge, operator.le),
    *("add", "sub", "mul", "div", "pow", "maximum", "minimum", "expand_as"),
}
CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


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
    if node.target in POINTWISE and len(node.all_input_nodes) == 1:
        return read[0]
    if node.target in CONCATENATIONS:
        return _concatenate(labels, node)
    rank = max(len(labels.shapes.get(n, ())) for n in node.all_input_nodes)
    if node.target in ELEMENTWISE and len(labels.shapes.get(node, ())) == rank:
        return _elementwise(labels, node)
    if node.target is torch.stack:
        return _stack(labels, node)
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


def _listed(labels: ChannelLabels, node: fx.Node) -> tuple[Sequence[fx.Node], int, list[Channels]]:
    """The tensors that a node puts together, along which dimension, and the channels of those that have any."""
    tensors: Any = node.args[0] if node.args and isinstance(node.args[0], Sequence) else ()
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    values = [value for n in tensors if (value := labels.values[n]) is not None]
    if not isinstance(dim, int) or not values or any(value.dim != values[0].dim for value in values):
        raise NotUnderstood
    return tensors, dim % len(labels.shapes[node]), values


def _concatenate(labels: ChannelLabels, node: fx.Node) -> Channels:
    tensors, dim, values = _listed(labels, node)
    if dim == values[0].dim:  # what has no labels is of fixed width
        rows = [value.labels if (value := labels.values[n]) else labels.pinned(labels.shapes[n][dim]) for n in tensors]
        return Channels(dim, np.concatenate(rows))
    if len(values) < len(tensors):
        labels.pin(node, f"{labels.name(node)} meets a tensor of fixed width")
    labels.tie(*(value.labels for value in values))
    return values[0]


def _stack(labels: ChannelLabels, node: fx.Node) -> Channels:
    tensors, dim, values = _listed(labels, node)
    if len(values) < len(tensors):
        raise NotUnderstood
    labels.tie(*(value.labels for value in values))
    return Channels(values[0].dim + (dim <= values[0].dim), values[0].labels)
