"""A traced graph made fit for students: plain layers, nothing in place, what can be cut as layers of their own."""

import importlib
import inspect
import operator
from collections import Counter, OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"  # known by name: importing torchvision takes as long as torch
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


def rewrite(traced: fx.GraphModule) -> None:
    """Rewrite the graph of a teacher in evaluation mode; its layers become copies that share the teacher's tensors."""
    for name in {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}:
        traced.set_submodule(name, _plain(traced.get_submodule(name)))
    _rewrite_in_place(traced)
    _make_dropouts_modules(traced)
    _make_scales_modules(traced)
    _erase_identities(traced)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()


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


def _rewrite_in_place(traced: fx.GraphModule) -> None:
    """Make every in-place operator out of place; what read the changed tensor afterwards reads the new one."""
    modules = {name for name, module in traced.named_modules() if getattr(module, "inplace", False)}
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in traced.graph.nodes:
        if _become_out_of_place(node, modules):
            node.args[0].replace_all_uses_with(node, lambda user, node=node: order[user] > order[node])
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
