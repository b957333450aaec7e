"""What code asks of a device, counted on a CPU: kernels, values read back, tensors sent."""

import contextlib
from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "equal",
    "allclose",
}


class Kernels(TorchDispatchMode):
    """Counts operators by name, but for those that only look at a tensor in another way or ask for memory."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        looks = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if not looks and func.namespace != "profiler" and "empty" not in func.name():
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Traffic(TorchFunctionMode):
    """Counts calls that wait for a device's values, and keeps what is sent to a device."""

    def __init__(self):
        super().__init__()
        self.reads = Counter()
        self.sent = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS:
            self.reads[name] += 1
        places = [*args[1:], *(kwargs or {}).values()]
        if func is Tensor.to and any(isinstance(place, (torch.device, str, Tensor)) for place in places):
            self.sent.append(args[0].detach().numpy().tobytes())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted():
    """(kernels, traffic) of the block; reads within torch's own code count as kernels."""
    with Traffic() as traffic, Kernels() as kernels:
        yield kernels.calls, traffic
