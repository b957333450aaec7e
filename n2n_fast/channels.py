"""Channel labels, followed through a traced graph: which channels of which tensors must stay together.

Every channel of every tensor carries a *label*. A convolution makes new ones, a norm passes its input's through,
``add`` ties two of them together, ``cat`` puts them side by side. What an operation that is not understood touches is
pinned: it stays at full width.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize
from torchvision.ops import StochasticDepth

from n2n_fast.tracing import ChannelScale

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
NORMS = (*BATCH_NORMS, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)
POOLS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.PReLU, nn.RReLU),
)
DROPOUTS = (nn.modules.dropout._DropoutNd, StochasticDepth)

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
    *("add", "sub", "mul", "div", "pow", "maximum", "minimum"),
}
SPATIAL = {
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.interpolate),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
}
VIEWS = (torch.reshape, "view", "reshape")
PERMUTATIONS = {torch.permute, torch.transpose, torch.swapaxes, "permute", "transpose", "swapaxes"}
REDUCTIONS = {torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin"}


@dataclass(frozen=True)
class Channels:
    """The channel axis of a tensor: its dimension and the label of each of its channels.

    repeat: after a flatten, the number of positions at which each channel stands in a row.
    """

    dim: int
    labels: np.ndarray
    repeat: int = 1


@dataclass
class LayerChannels:
    """Labels on both sides of a layer, and its output positions per image (summed over its calls).

    input and output are None for layers without channels of their own meaning (opaque ones). repeat: of the input.
    """

    input: np.ndarray | None
    output: np.ndarray | None
    positions: int
    repeat: int = 1


class ChannelLabels:
    """Follows channel labels through a traced graph; see above."""

    def __init__(self, traced: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
        self.traced, self.shapes = traced, shapes
        self.count = 0
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.pins: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []
        self.warnings: list[str] = []
        self.layers: dict[str, LayerChannels] = {}
        self.values: dict[fx.Node, Channels | None] = {}
        self.pieces: dict[fx.Node, list[Channels]] = {}  # what a chunk is made of
        self.folded: dict[
            fx.Node, np.ndarray
        ] = {}  # labels (a, b) along dimensions 1 and 2, on the way through a shuffle
        for node in traced.graph.nodes:
            self.values[node] = self._visit(node)

    # What the rules below are made of

    def fresh(self, size: int) -> np.ndarray:
        self.count += size
        return np.arange(self.count - size, self.count)

    def pinned(self, size: int) -> np.ndarray:
        labels = self.fresh(size)
        self.pins.append(labels)
        return labels

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        self.ties.append((a, b))

    def pin(self, node: fx.Node, what: str) -> None:
        """Hold at full width whatever reaches `node`, `what` is not understood; what leaves it has no labels."""
        reached = [self.values[n] for n in node.all_input_nodes]
        self.pins += [value.labels for value in reached if value is not None]
        self.warnings.append(f"{node.name}: {what} is not understood; the channels it touches stay at full width")

    def channels_at(self, node: fx.Node, dim: int, size: int) -> np.ndarray:
        """Labels of `node`'s channels if they lie along `dim`; otherwise everything about it is pinned."""
        value = self.values[node]
        if value is not None and value.dim == dim % len(self.shapes[node]) and len(value.labels) == size:
            return value.labels
        if value is not None:
            self.pins.append(value.labels)
        return self.pinned(size)

    # One rule per kind of node

    def _visit(self, node: fx.Node) -> Channels | None:
        if any(n in self.folded for n in node.all_input_nodes):
            return self._unfold(node)
        if any(n in self.pieces for n in node.all_input_nodes):
            return self._piece(node)
        if node.op == "placeholder":
            shape = self.shapes[node]
            return Channels(1, self.pinned(shape[1])) if len(shape) > 1 else None
        if node.op == "call_module":
            return self._module(node, self.traced.get_submodule(str(node.target)))
        if node.op in ("call_function", "call_method"):
            return self._function(node)
        if node.op == "output":
            self.outputs = [value.labels for n in node.all_input_nodes if (value := self.values[n]) is not None]
            self.pins += self.outputs
        return None

    def _module(self, node: fx.Node, module: nn.Module) -> Channels | None:
        if len(node.all_input_nodes) != 1 or node not in self.shapes:
            return self._opaque(node, type(module).__name__)
        if parametrize.is_parametrized(module) or module._forward_pre_hooks:  # weight norm: its weight is computed
            return self._opaque(node, f"the parametrization of {type(module).__name__}")
        source = node.all_input_nodes[0]
        if isinstance(module, CONVS):
            return self._weighted(node, 1, module.in_channels, module.out_channels, module.groups)
        if isinstance(module, nn.Linear):
            return self._weighted(node, -1, module.in_features, module.out_features, 1)
        if isinstance(module, NORMS):
            return self._norm(node, module)
        if isinstance(module, ChannelScale):
            return self._scale(node, module)
        if isinstance(module, nn.Flatten):
            self._record(node, None, None)
            return self._flatten(node)
        if isinstance(module, (*ACTIVATIONS, *POOLS, *DROPOUTS)):
            value = self.values[source]
            if value is None:
                return self._opaque(node, type(module).__name__)
            self._record(node, value.labels, value.labels)
            return value
        return self._opaque(node, type(module).__name__)

    def _weighted(self, node: fx.Node, dim: int, inputs: int, outputs: int, groups: int) -> Channels:
        """Convolutions and linear layers. A grouped convolution keeps or drops whole convolution groups."""
        source = node.all_input_nodes[0]
        given = self.channels_at(source, dim, inputs)
        known = self.layers.get(str(node.target))
        made = known.output if known is not None and known.output is not None else self.fresh(outputs)
        if groups > 1:
            first = given[:: inputs // groups]
            self.tie(given, np.repeat(first, inputs // groups))
            self.tie(made, np.repeat(first, outputs // groups))
        self._record(node, given, made)
        return Channels(dim % len(self.shapes[node]), made)

    def _norm(self, node: fx.Node, module: nn.Module) -> Channels | None:
        source = node.all_input_nodes[0]
        value, shape = self.values[source], self.shapes[source]
        if value is None:
            return self._opaque(node, type(module).__name__)
        dim = 1
        if isinstance(module, nn.LayerNorm):  # a subclass may normalise over another dimension than the last
            dim = len(shape) - 1 if type(module) is nn.LayerNorm else value.dim
        whole = isinstance(module, nn.LayerNorm) and tuple(module.normalized_shape) != (shape[dim],)
        if value.dim != dim or whole:
            return self._opaque(node, type(module).__name__)
        if isinstance(module, nn.GroupNorm):
            block = module.num_channels // module.num_groups
            self.tie(value.labels, np.repeat(value.labels[::block], block))
        self._record(node, value.labels, value.labels)
        return value

    def _scale(self, node: fx.Node, module: ChannelScale) -> Channels | None:
        source = node.all_input_nodes[0]
        value = self.values[source]
        dim = len(self.shapes[source]) - len(module.view) + module.view.index(-1)
        if value is None or value.dim != dim or self.shapes[source] != self.shapes[node]:
            return self._opaque(node, "a parameter")
        self._record(node, value.labels, value.labels)
        return value

    def _opaque(self, node: fx.Node, what: str) -> Channels | None:
        self.pin(node, what)
        self._record(node, None, None)
        return None

    def _record(self, node: fx.Node, given: np.ndarray | None, made: np.ndarray | None) -> None:
        """Note a layer's channels; weights that are used again tie the channels of both calls."""
        shape = self.shapes.get(node, ())
        positions = math.prod(shape[1:]) // len(made) if made is not None and len(made) else 0
        known = self.layers.get(str(node.target))
        if known is None:
            value = self.values[node.all_input_nodes[0]]
            self.layers[str(node.target)] = LayerChannels(given, made, positions, value.repeat if value else 1)
            return
        known.positions += positions
        if not list(self.traced.get_submodule(str(node.target)).parameters()):
            return
        for before, now in ((known.input, given), (known.output, made)):
            if before is not None and now is not None and before is not now:
                self.tie(before, now)

    def _function(self, node: fx.Node) -> Channels | None:
        labelled = [n for n in node.all_input_nodes if self.values[n] is not None]
        is_size = node not in self.shapes and node.target in ("size", "dim", getattr)
        if not labelled or is_size:
            return None
        if node not in self.shapes:  # several tensors
            return self._chunk(node)
        if node.target in POINTWISE and len(node.all_input_nodes) == 1:
            return self.values[labelled[0]]
        if node.target in SPATIAL and self.shapes[node][1] == self.shapes[labelled[0]][1]:
            return self.values[labelled[0]]
        if node.target in ELEMENTWISE:
            return self._elementwise(node)
        if node.target in (torch.cat, torch.concat, torch.concatenate):
            return self._concatenate(node)
        if node.target in REDUCTIONS:
            return self._reduce(node)
        if node.target in PERMUTATIONS:
            return self._permute(node)
        if node.target is torch.channel_shuffle:
            return self._shuffle(node)
        return None if self._fold(node) else self._flatten(node)

    def _unknown(self, node: fx.Node) -> Channels | None:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        self.pin(node, target)
        return None

    def _elementwise(self, node: fx.Node) -> Channels | None:
        """Broadcasting: channels that meet are tied; a single channel spreads over the other operand's."""
        rank = len(self.shapes[node])
        operands = [n for n in node.all_input_nodes if n in self.shapes]
        places = [
            (value.dim + rank - len(self.shapes[n]), value.labels)
            for n in operands
            if (value := self.values[n]) is not None
        ]
        width = max(len(labels) for _, labels in places)
        wide = [(dim, labels) for dim, labels in places if len(labels) == width]
        unlabelled = [self.shapes[n] for n in operands if self.values[n] is None]
        dim = wide[0][0]
        scalar = all(len(shape) < rank - dim or shape[len(shape) - rank + dim] == 1 for shape in unlabelled)
        if any(place != dim for place, _ in wide) or not scalar or self.shapes[node][dim] != width:
            return self._unknown(node)
        for _, labels in wide[1:]:
            self.tie(wide[0][1], labels)
        return Channels(dim, wide[0][1])

    def _concatenate(self, node: fx.Node) -> Channels | None:
        tensors = node.args[0] if isinstance(node.args[0], Sequence) else ()
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        values = [self.values[n] for n in tensors if isinstance(n, fx.Node)]
        known = [value for value in values if value is not None]
        if not isinstance(dim, int) or len(known) != len(tensors) or not known:
            return self._unknown(node)
        dim %= len(self.shapes[node])
        if any(value.dim != known[0].dim for value in known):
            return self._unknown(node)
        if dim == known[0].dim:
            return Channels(dim, np.concatenate([value.labels for value in known]))
        for value in known[1:]:
            self.tie(known[0].labels, value.labels)
        return known[0]

    def _reduce(self, node: fx.Node) -> Channels | None:
        source = node.all_input_nodes[0]
        value = self.values[source]
        assert value is not None
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        rank = len(self.shapes[source])
        reduced = {d % rank for d in ([dims] if isinstance(dims, int) else dims or ())}
        if not reduced or value.dim in reduced:
            return self._unknown(node)
        kept = len(self.shapes[node]) == rank
        return Channels(value.dim if kept else value.dim - sum(d < value.dim for d in reduced), value.labels)

    def _permute(self, node: fx.Node) -> Channels | None:
        source = node.all_input_nodes[0]
        value, rank = self.values[source], len(self.shapes[source])
        assert value is not None
        given = [*node.args[1:], *node.kwargs.values()]
        flat: list[Any] = list(given[0]) if len(given) == 1 and isinstance(given[0], Sequence) else given
        if not all(isinstance(d, int) for d in flat):
            return self._unknown(node)
        order = [d % rank for d in flat]
        if "permute" not in str(getattr(node.target, "__name__", node.target)):
            order = list(range(rank))
            a, b = (d % rank for d in flat)
            order[a], order[b] = order[b], order[a]
        return Channels(order.index(value.dim), value.labels, value.repeat)

    def _chunk(self, node: fx.Node) -> Channels | None:
        """Equal pieces of the channels: those at one place in each stay together, so that pieces remain equal."""
        source = node.all_input_nodes[0]
        value = self.values[source]
        name = str(getattr(node.target, "__name__", node.target))
        given: dict[str, Any] = dict(zip(("input", "size", "dim"), node.args, strict=False)) | dict(node.kwargs)
        sizes = [given[key] for key in ("size", "chunks", "split_size", "split_size_or_sections") if key in given]
        dim = given.get("dim", 0)
        if value is None or name not in ("chunk", "split") or not all(isinstance(n, int) for n in (*sizes, dim)):
            return self._unknown(node)
        width = self.shapes[source][value.dim]
        count = sizes[0] if name == "chunk" else width // max(1, sizes[0])
        if dim % len(self.shapes[source]) != value.dim or count < 1 or width % count or value.repeat > 1:
            return self._unknown(node)
        node.op, node.target, node.kwargs = "call_function", torch.chunk, {}
        node.args = (source, count, value.dim)  # a size written as a number would not fit a narrower student
        parts = value.labels.reshape(count, -1)
        self._tie_rows(parts)
        self.pieces[node] = [Channels(value.dim, labels) for labels in parts]
        return None

    def _piece(self, node: fx.Node) -> Channels | None:
        pieces = [piece for n in node.all_input_nodes for piece in self.pieces.get(n, ())]
        if node.target is operator.getitem and isinstance(node.args[1], int):
            return pieces[node.args[1]]
        self.pins += [piece.labels for piece in pieces]
        return self._unknown(node)

    def _tie_rows(self, labels: np.ndarray) -> None:
        for row in labels[1:]:
            self.tie(labels[0], row)

    def _shuffle(self, node: fx.Node) -> Channels | None:
        value, groups = self.values[node.all_input_nodes[0]], node.args[1] if len(node.args) > 1 else None
        if value is None or value.dim != 1 or value.repeat > 1 or not isinstance(groups, int):
            return self._unknown(node)
        parts = value.labels.reshape(groups, -1)
        self._tie_rows(parts)
        return Channels(1, parts.T.flatten())

    def _fold(self, node: fx.Node) -> bool:
        """Whether this is the first view of a channel shuffle, (N, C, ...) -> (N, a, b, ...) with C = a·b."""
        source = node.all_input_nodes[0]
        value, before, after = self.values[source], self.shapes[source], self.shapes[node]
        splits = len(after) == len(before) + 1 and after[1] * after[2] == before[1] and after[3:] == before[2:]
        if value is None or value.dim != 1 or value.repeat > 1 or not splits:
            return False
        if node.target not in VIEWS or not _is_computed(node, 2):
            return False
        self.folded[node] = value.labels.reshape(after[1], after[2])
        self._tie_rows(self.folded[node])
        return True

    def _unfold(self, node: fx.Node) -> Channels | None:
        """What may come between the two views of a channel shuffle, and the second of them."""
        source = next(n for n in node.all_input_nodes if n in self.folded)
        labels, before, after = self.folded[source], self.shapes[source], self.shapes.get(node, ())
        if node.target in ("contiguous", "clone"):
            self.folded[node] = labels
            return None
        if node.target in (torch.transpose, "transpose") and set(node.args[1:]) == {1, 2}:
            self.folded[node] = labels.T
            return None
        if node.target in VIEWS and after == (before[0], labels.size, *before[3:]) and _is_computed(node, 1):
            return Channels(1, labels.flatten())
        self.pins.append(labels.flatten())
        return self._unknown(node)

    def _flatten(self, node: fx.Node) -> Channels | None:
        """Whatever comes to flatten(1): each channel then stands at all of its positions."""
        source = node.all_input_nodes[0]
        value, before, after = self.values[source], self.shapes[source], self.shapes[node]
        if node.op == "call_module" or node.target in (*VIEWS, torch.flatten, "flatten"):
            flat = len(after) == 2 and after[0] == before[0] and after[1] == math.prod(before[1:])
            if flat and value is not None and value.dim == 1:
                if node.op != "call_module":  # sizes written as numbers would not fit a narrower student
                    node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (source, 1), {}
                positions = math.prod(before[2:])
                return Channels(1, np.repeat(value.labels, positions), value.repeat * positions)
        return self._unknown(node)


def _is_computed(node: fx.Node, dim: int) -> bool:
    """Whether a view's size along `dim` follows from its input's, and is not written as a number."""
    given: Any = node.args[1:] if len(node.args) > 2 else node.args[1]
    size = given[dim] if isinstance(given, Sequence) and len(given) > dim else 0
    return isinstance(size, fx.Node) or bool(size == -1)


def components(count: int, ties: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """For each label the smallest label it is tied to, directly or not. (count,) int64."""
    root = np.arange(count)
    if not ties:
        return root
    a, b = (np.concatenate(side) for side in zip(*ties, strict=True))
    while True:
        low = np.minimum(root[a], root[b])
        if np.array_equal(low, root[a]) and np.array_equal(low, root[b]):
            return root
        for ends in (a, b):
            np.minimum.at(root, root[ends], low)
        while not np.array_equal(root, root[root]):
            root = root[root]
