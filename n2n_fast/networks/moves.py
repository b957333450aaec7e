"""Operations that need not be known by name: a trial on tensors that are made up tells what they do to channels.

Chunks, slices, views, permutations and shuffles move numbers: where each went is read from a tensor whose entries are
the positions of its channels. Others treat each channel by itself, or take all of them together.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from n2n_fast.files.errors import raise_device_fault
from n2n_fast.networks.channels import ChannelLabels, Channels, NotUnderstood

VIEWS = ("view", "reshape")
MAX_PIECES = 16  # of which a slice is put together
TRIALS = 8  # of whether channels depend on each other


def channels_after(labels: ChannelLabels, node: fx.Node) -> Channels | None:
    """The channels of a node's result, None where it has none; raises NotUnderstood."""
    source, function = _operation(labels, node)
    value, shape = labels.values[source], labels.shapes[source]
    assert value is not None
    if (flat := _flattened(labels, node, source, value)) is not None:
        return flat
    try:
        with torch.no_grad():
            result = None
            if value.repeat == 1:
                if (origin := moved(function, shape, value.dim)) is not None:
                    result = _after_move(labels, node, source, value, origin)
                elif (dim := separate(function, shape, value.dim)) is not None:
                    result = Channels(dim, value.labels)
            if result is not None or reduces(function, shape, value.dim):
                return result
    except Exception as error:  # noqa: BLE001 - whatever it raises, it is not understood
        raise_device_fault(error)
    raise NotUnderstood


# Trials


def _operation(labels: ChannelLabels, node: fx.Node) -> tuple[fx.Node, Callable[[Tensor], Any]]:
    """(tensor, function of it) of a node that reads one tensor with channels; raises NotUnderstood for others."""
    sources = [n for n in node.all_input_nodes if labels.values[n] is not None]
    if len(sources) != 1 or any(n not in labels.numbers for n in node.all_input_nodes if n is not sources[0]):
        raise NotUnderstood
    function = functools.partial(_call, labels, node, sources[0])
    if sources[0] in labels.shapes:
        return sources[0], function
    source, several = _operation(labels, sources[0])  # of which this node takes one
    return source, lambda x: function(several(x))


def _call(labels: ChannelLabels, node: fx.Node, source: fx.Node, x: Any) -> Any:
    """What a node makes of `x` in place of what `source` gives."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: x if n is source else labels.numbers[n])
    if node.op == "call_module":
        return labels.module(node)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def moved(function: Callable[[Tensor], Any], shape: Sequence[int], dim: int) -> np.ndarray | None:
    """For each number of `function`'s result the channel of its input that it comes from, -1 for a constant.

    None where it does more than to move numbers: channels are numbered in two ways, and must be recognised by both.
    """
    width = shape[dim]
    places = [width if d == dim else 1 for d in range(len(shape))]
    codes = [torch.arange(1.0, width + 1), 3.0 * torch.randperm(width, generator=torch.Generator().manual_seed(0)) + 5]
    results = [function(code.view(places).expand(*shape).contiguous()) for code in codes]
    if not isinstance(results[0], Tensor) or not results[0].is_floating_point():
        return None
    first, second = (result.double() for result in results)
    origin = first.round().long() - 1
    if bool((first.round() != first).any()) or int(origin.min()) < -1 or int(origin.max()) not in range(width):
        return None
    expected = torch.where(origin < 0, first, codes[1].double()[origin.clamp_min(0)])
    return origin.numpy() if torch.equal(second, expected) else None


def separate(function: Callable[[Tensor], Any], shape: Sequence[int], dim: int) -> int | None:
    """The dimension of `function`'s result along which each channel depends on the same channel of its input alone.

    Tried by changing random halves of the channels; None if there is no such dimension.
    """
    generator = torch.Generator().manual_seed(0)
    width = shape[dim]
    places = [width if d == dim else 1 for d in range(len(shape))]
    before = torch.rand(*shape, generator=generator)
    result = function(before)
    if not isinstance(result, Tensor):
        return None
    candidates = [d for d in range(1, result.ndim) if result.shape[d] == width]
    candidates.sort(key=lambda d: d != dim)
    for _ in range(TRIALS):
        changes = torch.rand(width, generator=generator) < 0.5
        differs = function(torch.where(changes.view(places), before.flip(0) + 1, before)) != result
        candidates = [d for d in candidates if not bool((differs.movedim(d, 0).flatten(1).any(1) & ~changes).any())]
    return candidates[0] if candidates and width > 1 else None


def reduces(function: Callable[[Tensor], Any], shape: Sequence[int], dim: int) -> bool:
    """Whether the result has the same shape for half of the channels: `function` takes their mean, their maximum."""
    half = [-(-size // 2) if d == dim else size for d, size in enumerate(shape)]
    results = [function(torch.ones(sizes)) for sizes in (list(shape), half)]
    return all(isinstance(result, Tensor) for result in results) and results[0].shape == results[1].shape


# What a move leaves of the channel axis


def _after_move(
    labels: ChannelLabels, node: fx.Node, source: fx.Node, value: Channels, origin: np.ndarray
) -> Channels | None:
    """Channels after a move that can be made at every width, None for others.

    origin: for each number of the result the position of the channel it comes from, -1 for a filler.
    """
    width, dim = len(value.labels), _dimension(labels, node, value, origin)
    if dim is None:
        return None
    rows = np.moveaxis(origin, dim, 0).reshape(origin.shape[dim], -1)
    members = [np.unique(row[row >= 0]) for row in rows]  # channels at each place of the result's axis
    joined = np.concatenate(members)
    if 0 < len(joined) < width and (np.diff(joined) == 1).all():
        return _slice(labels, node, source, value, range(int(joined[0]), int(joined[-1]) + 1))
    columns = int(joined[1]) if len(joined) == width > 1 and joined[1] > 0 and width % joined[1] == 0 else 1
    grid = np.arange(width).reshape(-1, columns)
    shuffled = np.array_equal(joined, grid.T.flatten())
    in_order = (np.diff(joined) >= 0).all() or np.array_equal(joined, np.tile(np.arange(width), len(joined) // width))
    if any(len(m) == 0 for m in members) or len(np.unique(joined)) < width or not (in_order or shuffled):
        return None
    if not in_order:
        labels.tie(*value.labels[grid])
    for m in members:
        labels.tie(value.labels[m[:-1]], value.labels[m[1:]])
    if labels.name(node) in VIEWS and labels.shapes[node][0] == labels.shapes[source][0]:
        _free_size(node, dim)
    return Channels(dim, value.labels[[m[0] for m in members]])


def _dimension(labels: ChannelLabels, node: fx.Node, value: Channels, origin: np.ndarray) -> int | None:
    """The dimension of a moved tensor that becomes its channel axis, None if there is none."""
    varying = [d for d in range(origin.ndim) if (np.diff(origin, axis=d) != 0).any()]
    if not varying and len(value.labels) == 1 and origin.ndim > 1:
        return min(value.dim, origin.ndim - 1)
    if not varying or 0 in varying:
        return None
    if 1 not in varying:
        return varying[-1]
    chosen = _made_second(labels, node, origin.ndim)
    return chosen if chosen in varying else 1


def _made_second(labels: ChannelLabels, node: fx.Node, rank: int) -> int:
    """Which dimension of a node's result becomes the second one in all that is made of it; 1 if that is not known."""
    example = torch.empty(*range(2, rank + 2), device="meta")
    dims = {size - 2 for user in node.users if (size := _second_size(labels, user, node, example))}
    return dims.pop() if len(dims) == 1 else 1


def _second_size(labels: ChannelLabels, user: fx.Node, node: fx.Node, x: Tensor) -> int | None:
    try:
        return int(_call(labels, user, node, x).shape[1])
    except Exception as error:  # noqa: BLE001 - such as a view to certain sizes, which does not tell
        raise_device_fault(error)
        return None


def _slice(labels: ChannelLabels, node: fx.Node, source: fx.Node, value: Channels, kept: range) -> Channels | None:
    """Some channels in a row: pieces of a chunk, so that they remain the same share of a narrower tensor."""
    dim, step = value.dim, math.gcd(kept.start, kept.stop, len(value.labels))
    pieces, sliced = range(kept.start // step, kept.stop // step), list(labels.shapes[source])
    sliced[dim] = len(kept)
    if len(pieces) > MAX_PIECES or tuple(sliced) != labels.shapes[node]:
        return None
    sliced[dim] = step
    rows = value.labels.reshape(-1, step)
    labels.tie(*rows)
    graph, chunking = node.graph, (source, len(rows), dim)
    known = (user for user in source.users if user in labels.values and user.target is torch.chunk)
    chunk = next((user for user in known if user.args == chunking), None)
    with graph.inserting_before(node):
        if chunk is None:
            chunk = graph.call_function(torch.chunk, chunking)
            labels.values[chunk] = value
        if len(pieces) > 1:
            taken = [graph.call_function(operator.getitem, (chunk, i)) for i in pieces]
            for i, piece in zip(pieces, taken, strict=True):
                labels.values[piece], labels.shapes[piece] = Channels(dim, rows[i]), tuple(sliced)
            _become(node, torch.cat, taken, dim)
        else:
            _become(node, operator.getitem, chunk, pieces[0])
    return Channels(dim, value.labels[kept])


def _become(node: fx.Node, function: Callable[..., Any], *args: Any) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", function, args, {}


def _flattened(labels: ChannelLabels, node: fx.Node, source: fx.Node, value: Channels) -> Channels | None:
    """After what is flatten(1), each channel stands at all of its positions in a row; None for others."""
    before, after = labels.shapes[source], labels.shapes[node]
    known = node.op == "call_module" or labels.name(node) in (*VIEWS, "flatten")
    if not known or value.dim != 1 or after != (before[0], math.prod(before[1:])):
        return None
    if node.op != "call_module":  # sizes written as numbers would not fit a narrower student
        _become(node, torch.flatten, source, 1)
    positions = math.prod(before[2:])
    return Channels(1, np.repeat(value.labels, positions), value.repeat * positions)


def _free_size(node: fx.Node, dim: int) -> None:
    """Let a view's size along `dim` follow from the others, if that can be written."""
    source: Any = node.args[0]
    given: Any = node.args[1:]
    sizes = list(given[0] if given and isinstance(given[0], Sequence) else given)
    if dim >= len(sizes) or sizes[dim] == -1:
        return
    if sizes[0] == -1:
        with node.graph.inserting_before(node):
            sizes[0] = node.graph.call_method("size", (source, 0))
    if -1 not in sizes:
        sizes[dim] = -1
        _become(node, torch.reshape, source, sizes)
