"""A teacher as an fx graph: traced once, without in-place operators, its tensors' shapes known."""

import contextlib
import importlib
import inspect
import operator
import re
import traceback
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from n2n_fast.files.errors import BadInput, first_line, raise_device_fault

STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"  # known by name: importing torchvision takes as long as torch
ROUNDING = 1e-3  # of the largest logit: what TF32 makes of the same operations, once they are ordered otherwise
OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
}


class ChannelScale(nn.Module):
    """x times a number for each channel: what a teacher writes as a parameter multiplied with a tensor."""

    def __init__(self, scale: Tensor) -> None:
        """scale: the teacher's, of which all dimensions but one are 1."""
        super().__init__()
        self.weight = nn.Parameter(scale.detach().reshape(-1), scale.requires_grad)
        self.view = tuple(-1 if size == scale.numel() else 1 for size in scale.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, ...), with the channels where the scale has them."""
        return x * self.weight.view(self.view)


class ChannelShift(ChannelScale):
    """x plus a number for each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, ...), with the channels where the shift has them."""
        return x + self.weight.view(self.view)


def is_dropout(module: nn.Module) -> bool:
    """Whether a module drops out in training and does nothing in evaluation."""
    named = any(kind.__module__ == STOCHASTIC_DEPTH for kind in type(module).__mro__)
    return named or isinstance(module, nn.modules.dropout._DropoutNd)


class _Proxy(fx.Proxy):
    """A proxy that knows `+=` from `+`: other names of the same tensor see what the former did."""


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", operation, (proxy, other), {})


for _operation in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_Proxy, f"__{_operation.__name__}__", _in_place(_operation))


class _Tracer(fx.Tracer):
    """fx's tracer, with the modules named in `leaf` treated as opaque layers, and norms of any kind as layers."""

    def __init__(self, leaf: Iterable[str]) -> None:
        super().__init__()
        self.leaf = frozenset(leaf)
        self.inside: list[str] = []  # the modules being traced, the innermost last; where tracing fails they remain

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, (nn.LayerNorm, ChannelScale))
            or parametrize.is_parametrized(m)
            or module_qualified_name in self.leaf
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result


def trace(teacher: nn.Module, example: Tensor, leaf: Iterable[str] = ()) -> fx.GraphModule:
    """The teacher as an fx graph without in-place operators, identities or sizes frozen into views, its code not yet
    compiled anew; of several outputs it gives the logits.

    Shares the teacher's tensors, not its modules, and leaves it untouched, but for lazy modules: these are initialised
    by the example. Raises BadInput where fx cannot follow.
    """
    unknown = sorted(set(leaf) - {name for name, _ in teacher.named_modules()})
    if unknown:
        raise BadInput(f"leaf: the teacher has no submodule {unknown[0]!r}")
    if any(isinstance(module, LazyModuleMixin) for module in teacher.modules()):
        run(teacher, example)
    tracer = _Tracer(leaf)
    try:
        with evaluating(teacher):
            graph = tracer.trace(teacher)
    except Exception as error:  # noqa: BLE001 - the user's own forward may raise anything
        raise_device_fault(error)
        where, advice = "", "put what branches on data in a submodule, and name it as `leaf`"
        if tracer.inside:
            where, advice = f" in {tracer.inside[-1]!r}", f"name {tracer.inside[-1]!r} as `leaf`"
        reason = f"{first_line(error)}, {_origin(error)}"
        raise BadInput(f"the teacher's forward cannot be traced{where} ({reason}); {advice}") from None
    traced = fx.GraphModule(teacher, graph)
    with torch.no_grad(), evaluating(teacher):
        for name in {str(node.target) for node in graph.nodes if node.op == "call_module"}:
            traced.set_submodule(name, _plain(traced.get_submodule(name)))
    output = traced.graph.output_node()
    output.args = (logits_of(output.args[0]),)
    _rewrite_in_place(traced)
    _make_dropouts_modules(traced)
    _make_scales_modules(traced)
    _erase_identities(traced)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    return traced.eval()


def unused(traced: fx.GraphModule, teacher: nn.Module) -> list[str]:
    """The teacher's outermost submodules of which evaluation uses nothing: auxiliary heads, what is never called."""
    used = {name for name, _ in traced.named_modules()}
    known = tuple(f"{node.target}." for node in traced.graph.nodes if node.op == "call_module")
    idle: list[str] = []
    for name, module in teacher.named_modules():
        if name not in used and not name.startswith(known) and next(module.parameters(), None) is not None:
            idle.append(name)
            known += (f"{name}.",)
    return idle


def _plain(module: nn.Module) -> nn.Module:
    """A shallow copy in which what is computed from other tensors (weight norm, pruning masks) is a parameter."""
    copied = shallow_copy(module)
    computed = []
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", getattr(hook, "_tensor_name", None))
        if f"{name}_orig" in module._parameters or f"{name}_g" in module._parameters:
            hook(module, ())  # in evaluation mode it computes, and changes nothing
            computed.append(str(name))
    if parametrize.is_parametrized(module):
        copied.__class__ = parametrize.type_before_parametrizations(module)
        computed += list(module.parametrizations)  # type: ignore[arg-type]
        del copied._modules["parametrizations"]
    for name in computed:
        for tensors in (copied._parameters, copied._buffers):
            for part in [part for part in tensors if part.startswith(f"{name}_")]:
                del tensors[part]
        copied.__dict__.pop(name, None)
        copied._parameters[name] = nn.Parameter(getattr(module, name).detach())
    return copied


def logits_of(output: Any) -> Any:
    """The logits among what a forward gives: the first of several, or the one called so."""
    while not isinstance(output, (Tensor, fx.Node)):
        if isinstance(output, dict):
            named = [output[key] for key in ("logits", "out", "output") if key in output]
            output = (named or list(output.values()) or [None])[0]
        elif isinstance(output, (tuple, list)) and output:
            output = output[0]
        else:
            raise BadInput(f"the teacher gives {type(output).__name__} where logits (N, classes) were expected")
    return output


def _origin(error: Exception) -> str:
    """File name and line of the innermost frame outside torch that led to the error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not re.search("/torch/|/n2n_fast/", f.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown line"


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
    kinds: dict[Any, type] = {F.dropout: nn.Dropout}
    kinds |= {F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d}
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in kinds:
            make, names = kinds[node.target], ["p"]
        elif getattr(node.target, "__module__", None) == STOCHASTIC_DEPTH:
            make, names = importlib.import_module(STOCHASTIC_DEPTH).StochasticDepth, ["p", "mode"]
        else:
            continue
        call = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        call.apply_defaults()
        if isinstance(call.arguments["input"], fx.Node):
            layer = make(*(call.arguments[name] for name in names)).eval()
            _become_layer(traced, node, f"functional_{node.name}", layer, call.arguments["input"])


def _make_scales_modules(traced: fx.GraphModule) -> None:
    """A parameter that scales or shifts channels (ConvNeXt's layer scale) becomes a layer, which can be cut."""
    kinds = dict.fromkeys((operator.mul, torch.mul, "mul"), ChannelScale)
    kinds |= dict.fromkeys((operator.add, torch.add, "add"), ChannelShift)
    reads = Counter(str(node.target) for node in traced.graph.nodes if node.op == "get_attr")
    for node in list(traced.graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in kinds or node.kwargs:
            continue
        scales = [n for n in node.args if isinstance(n, fx.Node) and n.op == "get_attr" and len(n.users) == 1]
        others = [n for n in node.args if isinstance(n, fx.Node) and n.op != "get_attr"]
        if len(node.args) != 2 or len(scales) != 1 or len(others) != 1 or reads[str(scales[0].target)] > 1:
            continue
        path, _, name = str(scales[0].target).rpartition(".")
        owner = traced.get_submodule(path)
        scale = getattr(owner, name)
        if not isinstance(scale, nn.Parameter) or scale.numel() != max(scale.shape, default=0) or scale.numel() < 2:
            continue
        delattr(owner, name)
        path = f"{path}.{name}_of_channels".lstrip(".")
        _become_layer(traced, node, path, kinds[node.target](scale), others[0])
        traced.graph.erase_node(scales[0])


def _become_layer(traced: fx.GraphModule, node: fx.Node, path: str, layer: nn.Module, source: fx.Node) -> None:
    """Let a node call a new layer on what `source` gives."""
    traced.add_submodule(path, layer)
    node.op, node.target, node.args, node.kwargs = "call_module", path, (source,), {}


def _erase_identities(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def bare_copy(module: nn.Module) -> nn.Module:
    """A module in eval mode that shares the tensors and children of `module`, but no hooks, and has dictionaries of its
    own for all three.
    """
    copied: nn.Module = module.__class__.__new__(module.__class__)
    attributes = copied.__dict__
    attributes.update(module.__dict__, training=False)
    for name in ("_parameters", "_buffers", "_modules"):
        attributes[name] = attributes[name].copy()
    for name in _HOOKS:
        attributes[name] = OrderedDict()
    return copied


_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "_hooks" in name and isinstance(value, dict))


def shallow_copy(module: nn.Module) -> nn.Module:
    """A bare copy whose children are shallow copies too: only tensors are shared."""
    copied = bare_copy(module)
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


class _Values(fx.Interpreter):
    """Runs the graph once and notes the shape of every tensor on the way, and what else comes up: numbers, sizes."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced, garbage_collect_values=True)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.numbers: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        elif not any(isinstance(part, Tensor) for part in (result if isinstance(result, (tuple, list)) else ())):
            self.numbers[n] = result
        return result


def run(teacher: nn.Module, example: Tensor) -> Any:
    """What the teacher gives in evaluation mode; BadInput where it does not take such images."""
    try:
        with torch.no_grad(), evaluating(teacher):
            return teacher(example)
    except (RuntimeError, ValueError, TypeError) as error:
        raise_device_fault(error)
        shape = "x".join(map(str, example.shape[1:]))
        raise BadInput(f"the teacher does not accept images of {shape}: {first_line(error)}") from None


def values_of(
    traced: fx.GraphModule, teacher: nn.Module, example: Tensor
) -> tuple[dict[fx.Node, tuple[int, ...]], dict[fx.Node, Any]]:
    """Shapes of all tensors, and all numbers, for the example; checks that the graph computes what the teacher does."""
    expected = run(teacher, example)
    interpreter = _Values(traced)
    with torch.no_grad():
        got = interpreter.run(example)
    expected = logits_of(expected)
    if isinstance(expected, Tensor) and bool(expected.isfinite().all()) and not _alike(expected, got):
        raise BadInput(
            "the traced teacher computes something else than the teacher: its forward depends on hidden state"
        )
    return interpreter.shapes, interpreter.numbers


def _alike(expected: Tensor, got: Any) -> bool:
    """Whether logits differ by rounding alone, which GPUs and threads do not always repeat. expected: all finite."""
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return False
    eps = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    allowed = max(ROUNDING, 4 * eps) * float(expected.float().abs().max()) if expected.numel() else 0.0
    return torch.allclose(got.float(), expected.float(), rtol=0, atol=allowed)
