"""A traced teacher: its layers, the channel groups that tie them together, and the cost of any architecture made of it.

Every channel of every tensor carries a *label*. Labels are followed through the traced graph: a convolution makes new
ones, a norm passes its input's through, ``add`` ties two of them together, ``cat`` puts them side by side. What is
tied is one *unit*, kept or dropped as a whole; units that occur equally often on every weight's axes form one *group*,
of which any number may be kept. So an architecture is a number of units per group, and every shape follows from it.
"""

import contextlib
import hashlib
import json
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from n2n_fast.errors import BadInput

KINDS = ("conv", "depthwise", "linear", "norm", "activation", "pool", "reshape", "dropout", "opaque")
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
DROPOUTS = (nn.modules.dropout._DropoutNd,)

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
REDUCTIONS = {torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin"}
OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
}


@dataclass(frozen=True)
class Layer:
    """One leaf module of the teacher, with the features x_t the policies see (section 3.1 of the paper).

    name: the module's path in the teacher. kernel_size, stride, padding: one int per spatial dimension, () without.
    out_channels: width of its output. skip_start, skip_end: layers since the innermost enclosing branch began and
    until it ends, 0 outside. removable: stage 1 may remove it. shrinkable: stage 2 may choose its channels or kernel.
    note: why it is not removable, empty if it is.
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
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"not an architecture written by n2n-fast: {error!r}") from None

    @property
    def key(self) -> str:
        """A short hash that names this architecture within its space."""
        content = json.dumps([self.keep, self.widths, self.kernels]).encode()
        return hashlib.sha256(content).hexdigest()[:12]


def _checked(value: Any, kind: type, least: int | None = None) -> Any:
    """Return `value` if it is exactly of this type and not below `least`; ValueError otherwise."""
    wrong: bool = type(value) is not kind or (least is not None and value < least)
    if wrong:
        raise ValueError(f"{value!r} where a {kind.__name__} was expected")
    return value


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


# --------------------------------------------------------------------------------------------------------------------
# Tracing


class _Tracer(fx.Tracer):
    """fx's tracer, with the modules named in `leaf` treated as opaque layers."""

    def __init__(self, leaf: Iterable[str]) -> None:
        super().__init__()
        self.leaf = frozenset(leaf)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaf or super().is_leaf_module(m, module_qualified_name)


def trace(teacher: nn.Module, leaf: Iterable[str] = ()) -> fx.GraphModule:
    """The teacher as an fx graph without in-place operators, identities or sizes frozen into views.

    Shares the teacher's tensors, not its modules, and leaves it untouched. Raises BadInput where fx cannot follow.
    """
    try:
        with evaluating(teacher):
            graph = _Tracer(leaf).trace(teacher)
    except Exception as error:  # noqa: BLE001 - the user's own forward may raise anything
        raise BadInput(
            f"the teacher's forward cannot be traced ({_first_line(error)}, {_origin(error)}); "
            "name the submodule that branches on data as `leaf`"
        ) from None
    traced = fx.GraphModule(teacher, graph)
    for name in {str(node.target) for node in graph.nodes if node.op == "call_module"}:
        set_submodule(traced, name, shallow_copy(traced.get_submodule(name)))
    _rewrite_in_place(traced)
    _make_dropouts_modules(traced)
    _erase_identities(traced)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _origin(error: Exception) -> str:
    """File name and line of the innermost frame outside torch that led to the error."""
    place, step = "unknown line", error.__traceback__
    while step is not None:
        path = step.tb_frame.f_code.co_filename
        if "/torch/" not in path and not path.endswith("n2n_fast/graph.py"):
            place = f"{path.rsplit('/', 1)[-1]}:{step.tb_lineno}"
        step = step.tb_next
    return place


def _rewrite_in_place(traced: fx.GraphModule) -> None:
    """Make every in-place operator out of place; what read the changed tensor afterwards reads the new one."""
    modules = {name for name, module in traced.named_modules() if getattr(module, "inplace", False)}
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in traced.graph.nodes:
        if not _become_out_of_place(node, modules):
            continue
        changed = node.args[0]
        for user in list(changed.users):
            if order[user] > order[node]:
                user.replace_input_with(changed, node)
    for name in modules:
        traced.get_submodule(name).inplace = False  # type: ignore[assignment]


def _become_out_of_place(node: fx.Node, modules: set[str]) -> bool:
    """Rewrite an operator or method that works in place, and tell whether this node does; modules: those that do."""
    if node.op == "call_module":
        return node.target in modules
    if node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
        node.target = str(node.target)[:-1]
        return True
    if node.op == "call_function" and node.target in OUT_OF_PLACE:
        node.target = OUT_OF_PLACE[node.target]
        return True
    if node.op == "call_function" and node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    return False


def _make_dropouts_modules(traced: fx.GraphModule) -> None:
    """Functional dropout was traced for evaluation, hence for good; as modules, students drop out in training."""
    kinds = {F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d}
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target in kinds and isinstance(node.args[0], fx.Node):
            probability = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            name = f"functional_{node.name}"
            traced.add_submodule(name, kinds[node.target](probability).eval())
            node.op, node.target, node.args, node.kwargs = "call_module", name, node.args[:1], {}


def _erase_identities(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module in eval mode that shares the tensors of `module`, but none of its dictionaries, children or hooks."""
    copied: nn.Module = module.__class__.__new__(module.__class__)
    for name, value in module.__dict__.items():
        is_hooks = "_hooks" in name and isinstance(value, dict)
        copied.__dict__[name] = type(value)() if is_hooks else value.copy() if isinstance(value, dict) else value
    copied.training = False
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else shallow_copy(child)
    return copied


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for as long as the context lasts; then each submodule has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` leads in `root`."""
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


class _Shapes(fx.Interpreter):
    """Runs the graph once and notes the shape of every tensor on the way."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced, garbage_collect_values=True)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def shapes_of(traced: fx.GraphModule, teacher: nn.Module, example: Tensor) -> dict[fx.Node, tuple[int, ...]]:
    """Shapes of all tensors for a batch of two; checks that the traced graph computes what the teacher does."""
    example = torch.cat([example[:1], example[:1]])
    interpreter = _Shapes(traced)
    try:
        with torch.no_grad(), evaluating(teacher):
            expected = teacher(example)
            got = interpreter.run(example)
    except (RuntimeError, ValueError, TypeError) as error:
        shape = "x".join(map(str, example.shape[1:]))
        raise BadInput(f"the teacher does not accept images of {shape}: {_first_line(error)}") from None
    if isinstance(expected, Tensor) and not torch.equal(expected, got) and bool(expected.isfinite().all()):
        raise BadInput(
            "the traced teacher computes something else than the teacher: its forward depends on hidden state"
        )
    return interpreter.shapes


# --------------------------------------------------------------------------------------------------------------------
# Labels


class _Labels:
    """Follows channel labels through a traced graph; see the module's docstring."""

    def __init__(self, traced: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> None:
        self.traced, self.shapes = traced, shapes
        self.count = 0
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.pins: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []
        self.warnings: list[str] = []
        self.layers: dict[str, LayerChannels] = {}
        self.values: dict[fx.Node, Channels | None] = {}
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
        dim = len(shape) - 1 if isinstance(module, nn.LayerNorm) else 1
        whole = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1
        if value is None or value.dim != dim or whole:
            return self._opaque(node, type(module).__name__)
        if isinstance(module, nn.GroupNorm):
            block = module.num_channels // module.num_groups
            self.tie(value.labels, np.repeat(value.labels[::block], block))
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
            return self._unknown(node)
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
        return self._flatten(node)

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

    def _flatten(self, node: fx.Node) -> Channels | None:
        """Whatever comes to flatten(1): each channel then stands at all of its positions."""
        source = node.all_input_nodes[0]
        value, before, after = self.values[source], self.shapes[source], self.shapes[node]
        views = (torch.flatten, torch.reshape, "flatten", "view", "reshape")
        if node.op == "call_module" or node.target in views:
            flat = len(after) == 2 and after[0] == before[0] and after[1] == math.prod(before[1:])
            if flat and value is not None and value.dim == 1:
                if node.op != "call_module":  # sizes written as numbers would not fit a narrower student
                    node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (source, 1), {}
                positions = math.prod(before[2:])
                return Channels(1, np.repeat(value.labels, positions), value.repeat * positions)
        return self._unknown(node)


def _components(count: int, ties: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
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


# --------------------------------------------------------------------------------------------------------------------
# The traced teacher


class TracedTeacher:
    """The teacher's graph, layers and channel groups.

    module: the traced graph, sharing the teacher's tensors. layers: one per leaf module, in order of first call.
    axes: the distinct channel axes of all layers, each an array of unit numbers; in_axis, out_axis: index of each
    layer's, -1 without. group_of: group of each unit. sizes, pinned: units per group, and whether all must stay.
    writers: for each group the weighted layers whose outputs it names. fittable: layers whose weights can be fitted to
    their inputs; repeats: how often each input channel stands in a row; norm_after: the batch norm that alone reads the
    output. largest_activation: numbers per image. warnings: what was not understood.
    """

    def __init__(self, teacher: nn.Module, example: Tensor, leaf: Iterable[str] = ()) -> None:
        if example.ndim < 3 or len(example) < 1:
            raise BadInput(f"example_input: expected (N, C, H, W) with N >= 1, got {tuple(example.shape)}")
        self.module = trace(teacher, leaf)
        shapes = shapes_of(self.module, teacher, example)
        labels = _Labels(self.module, shapes)
        self.module.recompile()  # flatten was made explicit
        self.warnings = tuple(labels.warnings)
        self.names = tuple(labels.layers)
        self.modules = tuple(self.module.get_submodule(name) for name in self.names)
        self._units(labels)
        self._costs(labels)
        calls: dict[str, list[fx.Node]] = {name: [] for name in self.names}
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                calls[str(node.target)].append(node)
        self.layers = self._layers(labels, shapes, calls)
        self._neighbours(labels, shapes, calls)

    def _units(self, labels: _Labels) -> None:
        """Number the units and gather them in groups; express every layer's axes in units."""
        root = _components(labels.count, labels.ties)
        sides = [side for layer in labels.layers.values() for side in (layer.input, layer.output)]
        used = np.unique(root[np.concatenate([s for s in sides if s is not None])]) if self.names else np.arange(0)
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

    def _costs(self, labels: _Labels) -> None:
        """Params of layer i: per_pair·in·out·kernel + per_channel·out + constant; MACs: positions·pairs·kernel."""
        count = len(self.names)
        self.per_pair, self.per_channel, self.constant = (np.zeros(count, dtype=np.int64) for _ in range(3))
        self.dense_input = np.zeros(count, dtype=bool)
        self.positions = np.array([layer.positions for layer in labels.layers.values()], dtype=np.int64)
        for i, module in enumerate(self.modules):
            if isinstance(module, (*CONVS, nn.Linear)):
                grouped = isinstance(module, CONVS) and module.groups > 1
                self.dense_input[i] = not grouped
                self.per_pair[i] = module.weight.shape[1] if grouped else 1
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

    def cost(self, keep: Sequence[bool], widths: Sequence[int], kernels: Sequence[tuple[int, ...]]) -> tuple[int, int]:
        """(params, MACs for one image) of an architecture, without building it."""
        width = np.append(self.occurrences @ np.asarray(widths, dtype=np.int64), 0)  # axis -1: no channels
        kernel = np.array([math.prod(k) for k in kernels], dtype=np.int64)
        out = width[self.out_axis]
        pairs = self.per_pair * out * np.where(self.dense_input, width[self.in_axis], 1) * kernel
        kept = np.asarray(keep, dtype=bool)
        params = int((pairs + self.per_channel * out + self.constant)[kept].sum()) + self.direct_params
        return params, int((pairs * self.positions)[kept].sum())

    # Layers and their features

    def _neighbours(
        self, labels: _Labels, shapes: dict[fx.Node, tuple[int, ...]], calls: dict[str, list[fx.Node]]
    ) -> None:
        """What fitting a layer's weights needs to know of its surroundings."""
        index = {name: i for i, name in enumerate(self.names)}
        self.largest_activation = max(math.prod(shape) // 2 for shape in shapes.values())
        self.repeats = [layer.repeat for layer in labels.layers.values()]
        self.fittable, self.norm_after = [], []
        for i, name in enumerate(self.names):
            call = calls[name][0]
            flat = not isinstance(self.modules[i], nn.Linear) or len(shapes[call.all_input_nodes[0]]) == 2
            self.fittable.append(bool(self.dense_input[i]) and len(calls[name]) == 1 and flat)
            users = [str(user.target) for user in call.users if user.op == "call_module"]
            norms = [index[user] for user in users if isinstance(self.modules[index[user]], BATCH_NORMS)]
            self.norm_after.append(norms[0] if norms and len(call.users) == 1 else None)

    def _layers(
        self, labels: _Labels, shapes: dict[fx.Node, tuple[int, ...]], calls: dict[str, list[fx.Node]]
    ) -> tuple[Layer, ...]:
        weighted = [i for i, module in enumerate(self.modules) if isinstance(module, (*CONVS, nn.Linear))]
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
                    kind=_kind(module),
                    kernel_size=kernel,
                    stride=_ints(getattr(module, "stride", ()), len(kernel)),
                    padding=_padding(module, kernel),
                    out_channels=_width(labels.layers[name], calls[name][0], shapes),
                    skip_start=skips[i][0],
                    skip_end=skips[i][1],
                    removable=not note,
                    shrinkable=i in deciders or smallest_kernel(module) != kernel,
                    note=note,
                )
            )
        return tuple(layers)

    def _why_fixed(self, i: int, calls: Sequence[tuple[fx.Node, dict[fx.Node, tuple[int, ...]]]]) -> str:
        """Why stage 1 may not remove layer i; empty if it may."""
        module = self.modules[i]
        if self.out_axis[i] < 0:
            return "reshapes" if isinstance(module, nn.Flatten) else "not understood"
        if isinstance(module, DROPOUTS):
            return "removing it changes nothing"
        for node, shapes in calls:
            before, after = shapes[node.all_input_nodes[0]], shapes[node]
            dim = len(after) - 1 if isinstance(module, (nn.Linear, nn.LayerNorm)) else 1
            spatial = [list(shape[:dim] + shape[dim + 1 :]) for shape in (before, after)]
            strided = any(s > 1 for s in _ints(getattr(module, "stride", ()), len(kernel_size(module))))
            adaptive = isinstance(module, POOLS) and hasattr(module, "output_size")
            if spatial[0] != spatial[1] or strided or adaptive:
                return "changes the resolution"
        weighted = isinstance(module, (*CONVS, nn.Linear))
        if weighted and self.output[self.group_of[self.axes[self.out_axis[i]]]].any():
            return "classifier"
        if self.relations(i) is None:
            return "its input and output channels cannot meet"
        return ""

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


def _kind(module: nn.Module) -> str:
    if isinstance(module, CONVS):
        return "depthwise" if module.groups == module.in_channels > 1 else "conv"
    table: tuple[tuple[tuple[type, ...], str], ...] = (
        ((nn.Linear,), "linear"),
        (NORMS, "norm"),
        (ACTIVATIONS, "activation"),
        (POOLS, "pool"),
        ((nn.Flatten,), "reshape"),
        (DROPOUTS, "dropout"),
    )
    return next((kind for types, kind in table if isinstance(module, types)), "opaque")


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
