"""Channel labels, followed through a traced graph: which channels of which tensors must stay together.

Every channel of every tensor carries a *label*. A convolution makes new ones, a norm passes its input's through,
``add`` ties two of them together, ``cat`` puts them side by side. What an operation that is not understood touches is
pinned: it stays at full width.
"""

import functools
import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from n2n_fast.files.errors import raise_device_fault
from n2n_fast.networks import trials
from n2n_fast.networks.tracing import ChannelScale, is_dropout

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVS, *TRANSPOSED, nn.Linear)
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
VIEWS = (torch.reshape, "view", "reshape")
MAX_PIECES = 16  # into which unequal parts of channels are cut


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
    """Labels on both sides of a layer, and the positions per image at which it is computed (summed over its calls).

    input and output are None for layers without channels of their own: those that reshape, and opaque ones.
    repeat: of the input.
    """

    input: np.ndarray | None
    output: np.ndarray | None
    positions: int
    repeat: int = 1
    opaque: bool = False


class ChannelLabels:
    """Follows channel labels through a traced graph; see above.

    shapes, numbers: of the graph's nodes, for one example. held: names of nodes whose inputs are pinned, and of
    modules that are opaque. values: of each node, None where there are no channels. folded: nodes on the way through a
    channel shuffle, their labels along dimensions 1 and 2.
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        shapes: dict[fx.Node, tuple[int, ...]],
        numbers: dict[fx.Node, Any],
        held: Collection[str] = (),
    ) -> None:
        self.traced, self.shapes, self.numbers, self.held = traced, shapes, numbers, held
        self.count = 0
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.pins: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []
        self.layers: dict[str, LayerChannels] = {}
        self.values: dict[fx.Node, Channels | None] = {}
        self._reasons: dict[str, list[str]] = {}  # what is not understood, and where
        self._pieces: dict[fx.Node, list[tuple[int, int]]] = {}  # of a chunk, those that each of the cut parts holds
        self._several: set[fx.Node] = set()  # give several tensors
        self.folded: dict[fx.Node, np.ndarray] = {}
        for node in traced.graph.nodes:
            self.values[node] = self._visit(node)

    @property
    def warnings(self) -> list[str]:
        """What holds channels at full width, a line for each kind."""
        return [
            f"{what} ({places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}): "
            "the channels it touches stay at full width"
            for what, places in self._reasons.items()
        ]

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

    def tie_rows(self, labels: np.ndarray) -> None:
        for row in labels[1:]:
            self.tie(labels[0], row)

    def pin(self, node: fx.Node, what: str) -> None:
        """Hold at full width whatever reaches `node`, since `what`."""
        reached = [value.labels for n in node.all_input_nodes if (value := self.values[n]) is not None]
        if reached:
            self.pins += reached
            self._reasons.setdefault(what, []).append(str(node.target) if node.op == "call_module" else node.name)

    def unknown(self, node: fx.Node, what: str = "") -> Channels | None:
        """Pin what reaches `node`; what leaves it is of fixed width too, wherever its channels may lie."""
        self.pin(node, what or f"{_name(node)} is not understood")
        rank = len(self.shapes.get(node, ()))
        dims = [
            value.dim for n in node.all_input_nodes if (value := self.values[n]) and len(self.shapes.get(n, ())) == rank
        ]
        dim = dims[0] if dims else 1 if rank in (2, 4) else None
        return None if dim is None else Channels(dim, self.pinned(self.shapes[node][dim]))

    def channels_read(self, node: fx.Node, dim: int, size: int) -> np.ndarray:
        """Labels of the channels that `node` reads if they lie along `dim`; otherwise all that it reads is pinned."""
        source = node.all_input_nodes[0]
        value = self.values[source]
        if value is not None and value.dim == dim % len(self.shapes[source]) and len(value.labels) == size:
            return value.labels
        self.pin(node, f"{type(self.traced.get_submodule(str(node.target))).__name__} runs across channels")
        return self.pinned(size)

    # One rule per kind of node

    def _visit(self, node: fx.Node) -> Channels | None:
        if node.op == "placeholder":
            shape = self.shapes.get(node, ())
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
        held = node.name in self.held or node.target in self.held
        if len(node.all_input_nodes) != 1 or node not in self.shapes or held:
            return self._opaque(node)
        value = self.values[node.all_input_nodes[0]]
        if isinstance(module, (*CONVS, *TRANSPOSED)):
            return self._weighted(node, 1, module.in_channels, module.out_channels, module.groups)
        if isinstance(module, nn.Linear):
            return self._weighted(node, -1, module.in_features, module.out_features, 1)
        if value is None:
            return self._opaque(node)
        if isinstance(module, NORMS):
            return self._norm(node, module, value)
        if isinstance(module, ChannelScale):
            return self._scale(node, module, value)
        if isinstance(module, (*ACTIVATIONS, *POOLS)) or is_dropout(module):
            self._record(node, value.labels, value.labels)
            return value
        if module._parameters or module._buffers or module._modules:
            return self._opaque(node)
        return self._reshaping(node, value)

    def _reshaping(self, node: fx.Node, value: Channels) -> Channels | None:
        """A module without tensors: flatten, pixel shuffle, padding, upsampling, an unusual activation."""
        result = self._flatten(node) or self._tried(node)
        if result is None and not self._reduces(node):
            return self._opaque(node)
        same = self.shapes[node] == self.shapes[node.all_input_nodes[0]]
        if result is not None and result.dim == value.dim and same:
            self._record(node, value.labels, result.labels)
        else:
            self._record(node, None, None)
        return result

    def _weighted(self, node: fx.Node, dim: int, inputs: int, outputs: int, groups: int) -> Channels:
        """Convolutions and linear layers. A grouped convolution keeps or drops whole convolution groups."""
        given = self.channels_read(node, dim, inputs)
        known = self.layers.get(str(node.target))
        made = known.output if known is not None and known.output is not None else self.fresh(outputs)
        if groups > 1:
            first = given[:: inputs // groups]
            self.tie(given, np.repeat(first, inputs // groups))
            self.tie(made, np.repeat(first, outputs // groups))
        self._record(node, given, made)
        return Channels(dim % len(self.shapes[node]), made)

    def _norm(self, node: fx.Node, module: nn.Module, value: Channels) -> Channels | None:
        shape, dim = self.shapes[node], 1
        if isinstance(module, nn.LayerNorm):  # a subclass may normalise over another dimension than the last
            dim = len(shape) - 1 if type(module) is nn.LayerNorm else value.dim
        whole = isinstance(module, nn.LayerNorm) and tuple(module.normalized_shape) != (shape[dim],)
        if value.dim != dim or whole:
            return self._opaque(node)
        if isinstance(module, nn.GroupNorm):
            block = module.num_channels // module.num_groups
            self.tie(value.labels, np.repeat(value.labels[::block], block))
        self._record(node, value.labels, value.labels)
        return value

    def _scale(self, node: fx.Node, module: ChannelScale, value: Channels) -> Channels | None:
        source = node.all_input_nodes[0]
        dim = len(self.shapes[source]) - len(module.view) + module.view.index(-1)
        if value.dim != dim or self.shapes[source] != self.shapes[node]:
            return self._opaque(node, "a parameter lies across channels")
        self._record(node, value.labels, value.labels)
        return value

    def _opaque(self, node: fx.Node, what: str = "") -> Channels | None:
        self._record(node, None, None, opaque=True)
        return self.unknown(
            node, what or f"{type(self.traced.get_submodule(str(node.target))).__name__} is not understood"
        )

    def _record(
        self, node: fx.Node, given: np.ndarray | None, made: np.ndarray | None, *, opaque: bool = False
    ) -> None:
        """Note a layer's channels; weights that are used again tie the channels of both calls."""
        module = self.traced.get_submodule(str(node.target))
        positions = 0
        if given is not None and made is not None and len(made):
            side, width = (node.all_input_nodes[0], len(given)) if isinstance(module, TRANSPOSED) else (node, len(made))
            positions = math.prod(self.shapes[side][1:]) // width
        known = self.layers.get(str(node.target))
        if known is None:
            value = self.values[node.all_input_nodes[0]] if node.all_input_nodes else None
            repeat = value.repeat if value else 1
            self.layers[str(node.target)] = LayerChannels(given, made, positions, repeat, opaque)
            return
        known.positions += positions
        known.opaque |= opaque
        if not list(module.parameters()):
            return
        for before, now in ((known.input, given), (known.output, made)):
            if before is not None and now is not None and before is not now:
                self.tie(before, now)

    def _function(self, node: fx.Node) -> Channels | None:
        inputs = node.all_input_nodes
        if node in self.numbers or node.target in ("size", "dim", getattr):
            return None
        if any(n in self.folded for n in inputs):
            return self._unfold(node)
        if any(n in self._pieces for n in inputs):
            return self._piece(node)
        labelled = [n for n in inputs if self.values[n] is not None or n in self._several]
        if not labelled:
            return None
        if node.name in self.held:
            for source in self._sizes_from(node):
                self.pins.append(source.labels)
            return self.unknown(node, f"{_name(node)} has sizes of its own")
        value = self.values[labelled[0]]
        if node.target in POINTWISE and len(inputs) == 1 and value is not None:
            return value
        if node.target in CONCATENATIONS:
            return self._concatenate(node)
        rank = max(len(self.shapes.get(n, ())) for n in inputs)
        if node.target in ELEMENTWISE and len(self.shapes.get(node, ())) == rank:
            return self._elementwise(node)
        if node.target is torch.stack:
            return self._stack(node)
        if node not in self.shapes:
            return self._several_tensors(node)
        if self._fold(node):
            return None
        result = self._flatten(node) or self._tried(node)
        return result if result is not None or self._reduces(node) else self.unknown(node)

    def _sizes_from(self, node: fx.Node) -> list[Channels]:
        """The channels of tensors whose sizes this node uses."""
        found, waiting = [], [n for n in node.all_input_nodes if n in self.numbers]
        while waiting:
            for n in waiting.pop().all_input_nodes:
                if n in self.numbers:
                    waiting.append(n)
                elif (value := self.values[n]) is not None:
                    found.append(value)
        return found

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
        if any(place != dim for place, _ in wide) or self.shapes[node][dim] != width:
            return self.unknown(node)
        if any(len(shape) >= rank - dim and shape[len(shape) - rank + dim] > 1 for shape in unlabelled):
            self.pin(node, f"{_name(node)} meets a tensor of fixed width")
        for _, labels in wide[1:]:
            self.tie(wide[0][1], labels)
        return Channels(dim, wide[0][1])

    def _concatenate(self, node: fx.Node) -> Channels | None:
        tensors: Any = node.args[0] if node.args and isinstance(node.args[0], Sequence) else ()
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        known = [value for n in tensors if isinstance(n, fx.Node) and (value := self.values[n]) is not None]
        if not isinstance(dim, int) or not known or any(value.dim != known[0].dim for value in known):
            return self.unknown(node)
        dim %= len(self.shapes[node])
        if dim == known[0].dim:  # what has no labels is of fixed width
            values = [(self.values[n], self.shapes[n][dim]) for n in tensors]
            return Channels(dim, np.concatenate([v.labels if v else self.pinned(size) for v, size in values]))
        if len(known) < len(tensors):
            self.pin(node, f"{_name(node)} meets a tensor of fixed width")
        self.tie_rows(np.stack([value.labels for value in known]))
        return known[0]

    def _stack(self, node: fx.Node) -> Channels | None:
        tensors: Any = node.args[0] if isinstance(node.args[0], Sequence) else ()
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        known = [value for n in tensors if isinstance(n, fx.Node) and (value := self.values[n]) is not None]
        same = all(value.dim == known[0].dim for value in known)
        if not isinstance(dim, int) or not same or len(known) < len(tensors):
            return self.unknown(node)
        self.tie_rows(np.stack([value.labels for value in known]))
        return Channels(known[0].dim + (dim % len(self.shapes[node]) <= known[0].dim), known[0].labels)

    # Pieces of the channels: chunk, split, slices

    def _several_tensors(self, node: fx.Node) -> Channels | None:
        """Chunk and split; of others, such as a maximum with its index, each tensor is tried by itself."""
        cut = self._cut(node)
        if cut is None:
            self._several.add(node)
            return next((value for n in node.all_input_nodes if (value := self.values[n]) is not None), None)
        source, parts, dim = cut
        value = self.values[source]
        assert value is not None
        step = math.gcd(*parts)
        count = sum(parts) // step
        unpacked = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
        if value.repeat > 1 or (len(set(parts)) > 1 and (not unpacked or count > MAX_PIECES)):
            self._several.add(node)
            return value
        # sizes written as numbers would not fit a narrower student
        node.op, node.target, node.args, node.kwargs = "call_function", torch.chunk, (source, count, dim), {}
        self.tie_rows(value.labels.reshape(count, -1))
        ends = np.cumsum(parts) // step
        self._pieces[node] = [(int(end - part // step), int(end)) for end, part in zip(ends, parts, strict=True)]
        return value

    def _cut(self, node: fx.Node) -> tuple[fx.Node, list[int], int] | None:
        """(tensor, widths of the parts, dimension) where this node cuts the channels in parts."""
        given: dict[str, Any] = dict(zip(("input", "sizes", "dim"), node.args, strict=False)) | dict(node.kwargs)
        source: fx.Node | Any = given.get("input")
        dim = given.get("dim", 0)
        found = [given[key] for key in ("sizes", "chunks", "split_size", "split_size_or_sections") if key in given]
        if _name(node) not in ("chunk", "split") or not found or not isinstance(source, fx.Node):
            return None
        value = self.values[source]
        if value is None or not isinstance(dim, int) or dim % len(self.shapes[source]) != value.dim:
            return None
        size: Any = fx.map_arg(found[0], lambda n: self.numbers.get(n, 0))
        width = len(value.labels)
        if isinstance(size, int) and size > 0:
            size = -(-width // size) if _name(node) == "chunk" else size
            parts = [min(size, width - start) for start in range(0, width, size)]
        else:
            parts = list(size) if isinstance(size, Sequence) else []
        return (source, parts, value.dim) if parts and min(parts) > 0 and sum(parts) == width else None

    def _piece(self, node: fx.Node) -> Channels | None:
        """One of the parts that a chunk was made of."""
        source = next(n for n in node.all_input_nodes if n in self._pieces)
        whole = self.values[source]
        index = node.args[1] if node.target is operator.getitem else None
        if not isinstance(index, int) or whole is None:
            return self.unknown(node)
        return self._take(node, source, whole, *self._pieces[source][index])

    def _take(self, node: fx.Node, chunk: fx.Node, whole: Channels, start: int, end: int) -> Channels:
        """Make of `node` the pieces `start` to `end` of a chunk of `whole`."""
        parts = whole.labels.reshape(int(chunk.args[1]), -1)  # type: ignore[arg-type]
        node.op, node.kwargs = "call_function", {}
        if end - start == 1:
            node.target, node.args = operator.getitem, (chunk, start)
        else:
            with self.traced.graph.inserting_before(node):
                taken = [self.traced.graph.call_function(operator.getitem, (chunk, i)) for i in range(start, end)]
            for i, piece in enumerate(taken):
                self.values[piece] = Channels(whole.dim, parts[start + i])
                self.shapes[piece] = (
                    *self.shapes[node][: whole.dim],
                    parts.shape[1],
                    *self.shapes[node][whole.dim + 1 :],
                )
            node.target, node.args = torch.cat, (taken, whole.dim)
        return Channels(whole.dim, parts[start:end].flatten())

    def _slice(self, node: fx.Node, value: Channels, start: int, size: int) -> Channels | None:
        """Some channels in a row: pieces of a chunk, so that they remain the same part of a narrower tensor."""
        source, width = node.all_input_nodes[0], len(value.labels)
        step = math.gcd(start, size, width)
        kept = list(self.shapes[source])
        kept[value.dim] = size
        if width // step > MAX_PIECES or tuple(kept) != self.shapes[node] or value.repeat > 1:
            return None
        with self.traced.graph.inserting_before(node):
            chunk = self.traced.graph.call_function(torch.chunk, (source, width // step, value.dim))
        self.values[chunk] = value
        self.tie_rows(value.labels.reshape(width // step, -1))
        return self._take(node, chunk, value, start // step, (start + size) // step)

    # Channel shuffle, flatten

    def _fold(self, node: fx.Node) -> bool:
        """Whether this is the first view of a channel shuffle, (N, C, ...) -> (N, a, b, ...) with C = a·b."""
        source = node.all_input_nodes[0]
        value, before, after = self.values[source], self.shapes.get(source, ()), self.shapes[node]
        splits = len(after) == len(before) + 1 and after[1] * after[2] == before[1] and after[3:] == before[2:]
        if value is None or value.dim != 1 or value.repeat > 1 or not splits:
            return False
        if (
            node.target not in VIEWS
            or not all(_swaps(user, len(after)) for user in node.users)
            or not _follows(node, 2)
        ):
            return False
        self.folded[node] = value.labels.reshape(after[1], after[2])
        self.tie_rows(self.folded[node])
        return True

    def _unfold(self, node: fx.Node) -> Channels | None:
        """What may come between the two views of a channel shuffle, and the second of them."""
        source = next(n for n in node.all_input_nodes if n in self.folded)
        labels, before, after = self.folded[source], self.shapes[source], self.shapes.get(node, ())
        if node.target in ("contiguous", "clone"):
            self.folded[node] = labels
            return None
        if _swaps(node, len(before)):
            self.folded[node] = labels.T
            return None
        if node.target in VIEWS and after == (before[0], labels.size, *before[3:]) and _follows(node, 1):
            return Channels(1, labels.flatten())
        self.pins.append(labels.flatten())
        return self.unknown(node)

    def _flatten(self, node: fx.Node) -> Channels | None:
        """Whatever comes to flatten(1): each channel then stands at all of its positions."""
        source = node.all_input_nodes[0]
        value, before, after = self.values[source], self.shapes.get(source, ()), self.shapes[node]
        flat = len(after) == 2 and after[0] == before[0] and after[1] == math.prod(before[1:])
        flattens = node.op == "call_module" or node.target in (*VIEWS, torch.flatten, "flatten")
        if not flat or not flattens or value is None or value.dim != 1:
            return None
        if node.op != "call_module":  # sizes written as numbers would not fit a narrower student
            node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (source, 1), {}
        positions = math.prod(before[2:])
        return Channels(1, np.repeat(value.labels, positions), value.repeat * positions)

    # Operations that need not be known: what they do to labels tells

    def _tried(self, node: fx.Node) -> Channels | None:
        """Where the channels are after an operation that moves them or treats each by itself; None for others."""
        call = self._callable(node)
        if call is None:
            return None
        source, function = call
        value, shape = self.values[source], self.shapes[source]
        if value is None or value.repeat > 1:
            return None
        try:
            with torch.no_grad():
                moved = trials.moved(function, shape, value.dim)
                if moved is not None:
                    return self._after_move(node, value, moved)
                dim = trials.separate(function, shape, value.dim)
        except Exception as error:  # noqa: BLE001 - whatever it raises, it is not understood
            raise_device_fault(error)
            return None
        return None if dim is None else Channels(dim, value.labels)

    def _reduces(self, node: fx.Node) -> bool:
        """Whether an operation gives the same shape for any number of channels: it takes their mean, their maximum."""
        call = self._callable(node)
        value = None if call is None else self.values[call[0]]
        if call is None or value is None:
            return False
        try:
            with torch.no_grad():
                return trials.reduces(call[1], self.shapes[call[0]], value.dim)
        except Exception as error:  # noqa: BLE001 - whatever it raises, it is not understood
            raise_device_fault(error)
            return False

    def _callable(self, node: fx.Node) -> tuple[fx.Node, Callable[[Tensor], Any]] | None:
        """(tensor, operation on it) of a node of one tensor with channels."""
        labelled = [n for n in node.all_input_nodes if self.values[n] is not None]
        several = [n for n in node.all_input_nodes if n in self._several]
        if several:
            inner = self._callable(several[0])
            if inner is None or node.target is not operator.getitem or not isinstance(node.args[1], int):
                return None
            source, function = inner
            return source, lambda x: function(x)[node.args[1]]
        others = [n for n in node.all_input_nodes if n not in labelled]
        if len(labelled) != 1 or any(n not in self.numbers for n in others):
            return None
        return labelled[0], functools.partial(self._call, node, labelled[0])

    def _call(self, node: fx.Node, source: fx.Node, x: Tensor) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: x if n is source else self.numbers[n])
        if node.op == "call_module":
            return self.traced.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _after_move(self, node: fx.Node, value: Channels, moved: np.ndarray) -> Channels | None:
        """moved: for each number of the result the position of the channel it comes from, -1 for a filler."""
        varying = [d for d in range(moved.ndim) if (np.diff(moved, axis=d) != 0).any()]
        if not varying and len(value.labels) == 1 and moved.ndim > 1:
            varying = [min(value.dim, moved.ndim - 1)]
        if not varying or 0 in varying:
            return None
        dim = 1 if 1 in varying else varying[-1]
        rows = np.moveaxis(moved, dim, 0).reshape(moved.shape[dim], -1)
        members = [np.unique(row[row >= 0]) for row in rows]
        joined, width = np.concatenate(members), len(value.labels)
        if len(varying) == 1 and len(joined) < width and (np.diff(joined) == 1).all():
            return self._slice(node, value, int(joined[0]), len(joined))
        columns = int(joined[1]) if len(joined) == width > 1 and joined[1] > 0 and width % joined[1] == 0 else 1
        shuffled = np.array_equal(joined, np.arange(width).reshape(-1, columns).T.flatten())
        in_order = (np.diff(joined) >= 0).all() or np.array_equal(
            joined, np.tile(np.arange(width), len(joined) // width)
        )
        if any(len(m) == 0 for m in members) or len(np.unique(joined)) < width or not (in_order or shuffled):
            return None
        if shuffled and not in_order:
            self.tie_rows(value.labels.reshape(-1, columns))
        for m in members:
            self.tie(value.labels[m[:-1]], value.labels[m[1:]])
        if node.target in VIEWS and self.shapes[node][0] == self.shapes[node.all_input_nodes[0]][0]:
            _free_size(node, dim)
        return Channels(dim, value.labels[[m[0] for m in members]])


def _name(node: fx.Node) -> str:
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))


def _free_size(node: fx.Node, dim: int) -> None:
    """Let a view's size along `dim` follow from the others, if that can be written."""
    spread = not (len(node.args) == 2 and isinstance(node.args[1], Sequence))
    sizes: list[Any] = list(node.args[1:] if spread else node.args[1])  # type: ignore[arg-type]
    if dim >= len(sizes) or sizes[dim] == -1:
        return
    if sizes[0] == -1:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        with node.graph.inserting_before(node):
            sizes[0] = node.graph.call_method("size", (source, 0))
    if -1 not in sizes:
        sizes[dim] = -1
        node.args = (node.args[0], *sizes) if spread else (node.args[0], sizes)


def _swaps(node: fx.Node, rank: int) -> bool:
    """Whether a node swaps dimensions 1 and 2 of a tensor."""
    order: Any = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], Sequence) else node.args[1:]
    swapped = [0, 2, 1, *range(3, rank)]
    return (_name(node), list(order)) in (("transpose", [1, 2]), ("transpose", [2, 1]), ("permute", swapped))


def _follows(node: fx.Node, dim: int) -> bool:
    """Whether a view's size along `dim` follows from its input's, now that it is no number if that could be helped."""
    _free_size(node, dim)
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
