"""Kinds of modules, and the kernels of those that have one."""

import functools
from typing import Any

from torch import nn

from n2n_fast.networks.rewriting import ChannelScale, is_dropout

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVS, *TRANSPOSED, nn.Linear)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
NORMS = (*BATCH_NORMS, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)
ADAPTIVE_POOLS = (nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd)
POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, *ADAPTIVE_POOLS)
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.PReLU, nn.RReLU),
)
KINDS = ("conv", "depthwise", "linear", "norm", "activation", "pool", "reshape", "dropout", "opaque")


def kind_of(module: nn.Module, opaque: bool) -> str:
    """Which of KINDS a module is; opaque: whether it is not understood."""
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return "depthwise" if module.groups == module.in_channels > 1 else "conv"
    if is_dropout(module):
        return "dropout"
    table: tuple[tuple[tuple[type, ...], str], ...] = (
        ((nn.Linear,), "linear"),
        ((*NORMS, ChannelScale), "norm"),
        (ACTIVATIONS, "activation"),
        (POOLS, "pool"),
    )
    return next((kind for types, kind in table if isinstance(module, types)), "opaque" if opaque else "reshape")


def kernel_size(module: nn.Module) -> tuple[int, ...]:
    """Kernel size of a convolution or pool, one int per spatial dimension; () for other modules."""
    value = getattr(module, "kernel_size", ())
    if isinstance(value, int):
        return (value,) * (1 if "1d" in type(module).__name__ else 3 if "3d" in type(module).__name__ else 2)
    return tuple(value)


def stride(module: nn.Module) -> tuple[int, ...]:
    """Stride of a convolution or pool, one int per spatial dimension; () for other modules."""
    return _ints(getattr(module, "stride", ()), len(kernel_size(module)))


def padding(module: nn.Module) -> tuple[int, ...]:
    """Padding of a convolution or pool, one int per spatial dimension; () for other modules."""
    kernel, value = kernel_size(module), getattr(module, "padding", ())
    if value == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(_ints(module.dilation, len(kernel)), kernel, strict=True))
    return (0,) * len(kernel) if isinstance(value, str) else _ints(value, len(kernel))


def _ints(value: Any, count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    return tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else ()


def smallest_kernel(module: nn.Module) -> tuple[int, ...]:
    """The smallest kernel to which a convolution can be cropped at its centre without changing its output's size."""
    kernel = kernel_size(module)
    if not isinstance(module, nn.Conv2d):
        return kernel
    sizes = zip(kernel, padding(module), module.dilation, strict=True)
    return tuple(max(1, k - 2 * (p // d)) if k % 2 else k for k, p, d in sizes)


@functools.lru_cache(maxsize=4096)
def crop(kernel: tuple[int, ...], smallest: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """`kernel` shrunk by `ratio` in each dimension, rounded and then down to an odd size, at least `smallest`."""
    sizes = (max(s, round(k * ratio)) for k, s in zip(kernel, smallest, strict=True))
    return tuple(n if (k - n) % 2 == 0 else n - 1 for k, n in zip(kernel, sizes, strict=True))
