"""A device that is not the CPU, on any machine: torch's meta device, of which copies to the CPU can be had."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ELSEWHERE = torch.device("meta")
CPU = torch.device("cpu")


class Fetching(TorchFunctionMode):
    """Within it, what is copied from the meta device to the CPU comes as ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = (CPU,) if func is Tensor.cpu else (*args[1:], *kwargs.values()) if func is Tensor.to else ()
        fetches = any(value in ("cpu", CPU) for value in wanted)
        if fetches and args[0].is_meta:
            return torch.ones_like(args[0], device=CPU)
        return func(*args, **kwargs)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in modules, data and nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, torch.nn.Module):
        return list(value.state_dict().values())
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]
