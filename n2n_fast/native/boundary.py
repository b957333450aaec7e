"""The boundary: how the native module was built, which tensors its kernels take, how operators are told to torch.

Each operator has three faces: a public function, whose eager call takes a short path straight to the kernel; a
``torch.ops.n2n_fast`` operator, which is what ``torch.compile`` and ``torch.export`` see; and a reference in plain
torch, which tests compare with and which serves dtypes and devices without a kernel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from n2n_fast.native import _C
except ImportError as error:
    if importlib.util.find_spec("n2n_fast.native._C") is not None:
        raise
    raise ImportError(
        f"n2n_fast was imported from {Path(__file__).parent.parent}, where its native core is not built; to use "
        "the installed package start Python elsewhere, or without -m; to build it there: pip install -e ."
    ) from error

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
HAS_CUDA = _C.build_info()["cuda"]


def build_info() -> _C.BuildInfo:
    """Tell how the native module was built.

    Returns:
        ``compiler``; ``cuda``, whether the CUDA kernels were compiled, with ``cuda_version`` and ``cuda_archs``;
        ``simd``, the instruction levels compiled, and ``simd_used``, the one this machine runs.
    """
    return _C.build_info()


def is_native(tensor: Tensor) -> bool:
    """Tell whether there is a kernel for tensors of its dtype and device."""
    return tensor.dtype in DTYPE_CODES and (tensor.is_cpu or (tensor.is_cuda and HAS_CUDA))


def on_short_path(tensors: Sequence[Tensor | None]) -> bool:
    """Tell whether nothing but autograd watches these tensors: no compiler, no mode, no subclass, no meta device."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(t is None or (type(t) in PLAIN_TYPES and not t.is_meta) for t in tensors)


def register(name: str, schema: str, real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``torch.ops.n2n_fast.NAME``; fake: the same without values."""
    torch.library.define(f"n2n_fast::{name}", schema)
    torch.library.impl(f"n2n_fast::{name}", "default", real)
    torch.library.register_fake(f"n2n_fast::{name}", fake)
