"""A teacher as an fx graph: traced once, its tensors' shapes known."""

import contextlib
import operator
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from n2n_fast.files.errors import BadInput, first_line, raise_device_fault
from n2n_fast.networks.rewriting import ChannelScale, rewrite

ROUNDING = 1e-3  # of the largest logit: what TF32 makes of the same operations, once they are ordered otherwise


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


def unwrapped(model: nn.Module) -> nn.Module:
    """The network within DataParallel, DistributedDataParallel, AveragedModel and what torch.compile gives."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel) or (
        "_orig_mod" in model._modules  # torch.compile's; its class would take a second to import
    ):
        model = model.get_submodule("_orig_mod" if "_orig_mod" in model._modules else "module")
    return model


def trace(teacher: nn.Module, example: Tensor, leaf: Iterable[str] = ()) -> fx.GraphModule:
    """The teacher as an fx graph without in-place operators and identities, its code not yet compiled anew; of several
    outputs it gives the logits.

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
    output = traced.graph.output_node()
    output.args = (logits_of(output.args[0]),)
    with torch.no_grad(), evaluating(teacher):
        rewrite(traced)
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
