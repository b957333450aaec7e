"""``materialize``: a student's weights cut out of a teacher's, all in one native call."""

from __future__ import annotations

import functools
import math
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from n2n_fast.native import _C
from n2n_fast.native.boundary import is_native, on_short_path, register

KernelSize = tuple[int, int] | None
Keep = Sequence[Tensor | None]
Kernels = Sequence[KernelSize] | None

_ALIGNMENT = 64  # bytes; where each result starts in the flat buffer
_PIECE = np.dtype(  # struct Piece of csrc/materialize.h
    [("source", np.int64), ("size", np.int64, 4), ("kept", np.int64, 4), ("keep", np.int64, 2), ("offset", np.int64)]
)


@dataclass(frozen=True)
class _Layout:
    """Where the results lie in the flat buffer; offsets and numel in elements."""

    shapes: list[tuple[int, ...]]
    offsets: list[int]
    numel: int


def materialize(
    weights: Sequence[Tensor], keep_out: Keep, keep_in: Keep, kernel_size: Kernels = None, out: Tensor | None = None
) -> list[Tensor]:
    """Cut a student's weights out of a teacher's, all in one native call.

    Result ``k`` is ``weights[k]`` with the output channels ``keep_out[k]`` and the input channels ``keep_in[k]``, in
    that order, its kernels cropped at the centre to ``kernel_size[k]``. The results are contiguous views of one flat
    buffer; each starts at a multiple of 64 bytes and has a version counter of its own, so that writing into one (the
    running mean of a normalisation, say) does not invalidate what autograd saved of another. Gradients do not flow:
    results do not require grad.

    Args:
        weights: (O,), (O, I) or (O, I, kh, kw) each; one dtype, one device. Contiguous ones are read in place.
        keep_out: for each weight, a 1-D int64 (or int32) tensor of indices below O, or None for all. Indices may
            repeat, come in any order, and be none at all.
        keep_in: the same for I; None for weights of one dimension.
        kernel_size: for each weight, (kh', kw') with kh - kh' and kw - kw' even, or None for the whole kernel.
        out: flat buffer to write into, (at least ``materialize_numel(...)``,), contiguous, of the weights' dtype and
            device; what lies beyond the results is set to zero. Default: a new one.

    Index tensors belong on the CPU, where they are checked. For weights on another device they may also be on that
    device, but are then fetched first, which waits for it.

    Raises:
        ValueError: naming the argument, what was expected and what came; nothing has been written then.
    """
    layout = _layout(weights, keep_out, keep_in, kernel_size, out)
    if len(weights) == 0:
        return []
    flat = weights[0].new_empty(layout.numel) if out is None else out
    if on_short_path([*weights, *keep_out, *keep_in, flat]):
        _fill(flat, layout, weights, keep_out, keep_in)
        return _detached_views(flat, layout)
    kernels = [None] * len(weights) if kernel_size is None else kernel_size
    sides = [side for size in kernels for side in size or (0, 0)]
    torch.ops.n2n_fast.materialize([w.detach() for w in weights], list(keep_out), list(keep_in), sides, flat)
    return _views(flat, layout)


def materialize_numel(weights: Sequence[Tensor], keep_out: Keep, keep_in: Keep, kernel_size: Kernels = None) -> int:
    """Return the number of elements that ``out`` needs for these arguments of ``materialize``.

    Raises:
        ValueError: as ``materialize``, except for the range of indices.
    """
    return _layout(weights, keep_out, keep_in, kernel_size).numel


def materialize_reference(
    weights: Sequence[Tensor], keep_out: Keep, keep_in: Keep, kernel_size: Kernels = None, out: Tensor | None = None
) -> list[Tensor]:
    """Do what ``materialize`` does, in plain torch."""
    layout = _layout(weights, keep_out, keep_in, kernel_size, out)
    if len(weights) == 0:
        return []
    flat = weights[0].new_empty(layout.numel) if out is None else out
    _fill_reference(flat, layout, weights, keep_out, keep_in)
    return _detached_views(flat, layout)


def _layout(
    weights: Sequence[Tensor], keep_out: Keep, keep_in: Keep, kernel_size: Kernels, out: Tensor | None = None
) -> _Layout:
    """Validate everything but the values of indices, and lay the results out."""
    for name, entries in (("keep_out", keep_out), ("keep_in", keep_in), ("kernel_size", kernel_size)):
        if entries is not None:
            _check_length(name, entries, weights)
    shapes: list[tuple[int, ...]] = []
    offsets: list[int] = []
    numel = 0
    for k, weight in enumerate(weights):
        first = weights[0]
        if weight.dtype is not first.dtype or weight.device != first.device:
            raise ValueError(
                f"weights[{k}]: expected {first.dtype} on {first.device}, as weights[0], "
                f"got {weight.dtype} on {weight.device}"
            )
        crop = None if kernel_size is None else kernel_size[k]
        shapes.append(_result_shape(k, weight, keep_out[k], keep_in[k], crop))
        offsets.append(numel)
        step = _ALIGNMENT // weight.dtype.itemsize
        numel += (math.prod(shapes[k]) + step - 1) // step * step
    if out is not None and len(weights) > 0:
        _check_out(out, weights[0], numel)
    return _Layout(shapes, offsets, numel)


def _result_shape(
    k: int, weight: Tensor, rows: Tensor | None, columns: Tensor | None, crop: KernelSize
) -> tuple[int, ...]:
    shape = tuple(weight.shape)
    if len(shape) not in (1, 2, 4):
        raise ValueError(f"weights[{k}]: expected 1, 2 or 4 dimensions, got shape {shape}")
    kept = [shape[0] if rows is None else _checked_count("keep_out", k, rows, weight.device)]
    if len(shape) > 1:
        kept.append(shape[1] if columns is None else _checked_count("keep_in", k, columns, weight.device))
    elif columns is not None:
        raise ValueError(f"keep_in[{k}]: expected None, since weights[{k}] has one dimension, got a tensor")
    if crop is None:
        return (*kept, *shape[2:])
    if len(shape) != 4:
        raise ValueError(f"kernel_size[{k}]: expected None, since weights[{k}] has no kernel, got {tuple(crop)}")
    _check_crop(k, shape[2:], crop)
    return (*kept, *crop)


def _checked_count(name: str, k: int, index: Tensor, device: torch.device) -> int:
    """Validate an index tensor but for its values; return how many it has."""
    if index.dtype is not torch.int64 and index.dtype is not torch.int32:
        raise ValueError(f"{name}[{k}]: expected int64 or int32 indices, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"{name}[{k}]: expected one dimension, got shape {tuple(index.shape)}")
    if index.device.type != "cpu" and index.device != device:
        raise ValueError(f"{name}[{k}]: expected a tensor on cpu or {device}, got one on {index.device}")
    return index.shape[0]


def _check_length(name: str, entries: Sequence[object], weights: Sequence[Tensor]) -> None:
    if len(entries) != len(weights):
        raise ValueError(f"{name}: expected {len(weights)} entries, one for each of weights, got {len(entries)}")


def _check_crop(k: int, kernel: Sequence[int], crop: Sequence[int]) -> None:
    if not all(0 < to <= of and (of - to) % 2 == 0 for of, to in zip(kernel, crop, strict=True)):
        raise ValueError(
            f"kernel_size[{k}]: {tuple(crop)} cannot be cropped at the centre of the {tuple(kernel)} kernels of "
            f"weights[{k}]; both differences must be even and not negative"
        )


def _check_out(out: Tensor, first: Tensor, numel: int) -> None:
    fits = out.dim() == 1 and out.is_contiguous() and out.dtype is first.dtype and out.device == first.device
    if not fits or out.shape[0] < numel:
        raise ValueError(
            f"out: expected a contiguous 1-D tensor of at least {numel} elements, {first.dtype} on {first.device}, "
            f"got shape {tuple(out.shape)}, {out.dtype} on {out.device}"
        )


def _views(flat: Tensor, layout: _Layout) -> list[Tensor]:
    """Return the results as views of a flat buffer that other code may watch: a compiler, a mode, autograd."""
    return [
        flat.narrow(0, offset, math.prod(shape)).view(shape)
        for shape, offset in zip(layout.shapes, layout.offsets, strict=True)
    ]


def _detached_views(flat: Tensor, layout: _Layout) -> list[Tensor]:
    """Return the same in half the time, each with a version counter of its own."""
    start = flat.storage_offset()  # as_strided counts from the beginning of the storage
    return [
        flat.as_strided(shape, _strides(shape), start + offset).data
        for shape, offset in zip(layout.shapes, layout.offsets, strict=True)
    ]


@functools.lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def _in_four(shapes: Iterable[Sequence[int]]) -> np.ndarray:
    """Shapes of at most four sizes, (n, 4)."""
    return np.array([(*shape, 1, 1, 1)[:4] for shape in shapes], dtype=np.int64).reshape(-1, 4)


def _fill(flat: Tensor, layout: _Layout, weights: Sequence[Tensor], keep_out: Keep, keep_in: Keep) -> None:
    """Write the results into `flat`, natively where there is a kernel; the arguments are valid but for index values."""
    if not is_native(flat):
        _fill_reference(flat, layout, weights, keep_out, keep_in)
        return
    weights = [w.contiguous() for w in weights]
    rows, columns = ([None if i is None else _host_index(i) for i in side] for side in (keep_out, keep_in))
    _launch(
        flat,
        source=[w.data_ptr() for w in weights],
        size=_in_four(w.shape for w in weights),
        kept=_in_four(layout.shapes),
        keep=[[0 if i is None else i.data_ptr() for i in pair] for pair in zip(rows, columns, strict=True)],
        offset=layout.offsets,
    )


def _host_index(index: Tensor) -> Tensor:
    """Return the indices as contiguous int64 on the CPU."""
    usable = index.dtype is torch.int64 and index.is_cpu and index.is_contiguous()
    return index if usable else index.to("cpu", torch.int64).contiguous()


def _launch(flat: Tensor, **pieces: Any) -> None:
    """Run the kernel on pieces, by field of `_PIECE`; what their addresses point to must outlive the call."""
    fields = np.empty(len(pieces["offset"]), dtype=_PIECE)
    for name, values in pieces.items():
        fields[name] = values
    table, device, element_bytes = fields.view(np.int64), flat.device, flat.element_size()
    if flat.is_cpu:
        _C.materialize_cpu(table, element_bytes, flat.data_ptr(), flat.shape[0], torch.get_num_threads())
        return
    with torch.cuda.device(device):
        packed = torch.empty(_C.materialize_pack_words(table), dtype=torch.int64, pin_memory=True)
        blocks = _C.materialize_pack(table, element_bytes, flat.shape[0], packed.data_ptr())
        on_device = packed.to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device).cuda_stream
        _C.materialize_cuda(on_device.data_ptr(), len(fields), blocks, element_bytes, flat.data_ptr(), stream)


def _fill_reference(flat: Tensor, layout: _Layout, weights: Sequence[Tensor], keep_out: Keep, keep_in: Keep) -> None:
    results = []
    for k, weight in enumerate(weights):
        result = _select("keep_out", k, weight.detach(), 0, keep_out[k])
        result = _select("keep_in", k, result, 1, keep_in[k])
        for dim, to in enumerate(layout.shapes[k][2:], 2):
            result = result.narrow(dim, (weight.shape[dim] - to) // 2, to)
        results.append(result)
    flat.zero_()
    for view, result in zip(_views(flat, layout), results, strict=True):
        view.copy_(result)


def _select(name: str, k: int, weight: Tensor, dim: int, index: Tensor | None) -> Tensor:
    if index is None:
        return weight
    channels = weight.shape[dim]
    index = index.to(weight.device, torch.int64)
    wrong = ((index < 0) | (index >= channels)).nonzero() if not index.is_meta else index[:0]
    if wrong.numel() > 0:
        side, value = ("output", "input")[dim], int(index[wrong[0, 0]])
        raise ValueError(f"{name}[{k}]: index {value} out of range for {channels} {side} channels of weights[{k}]")
    return weight.index_select(dim, index)


def _op_layout(weights: list[Tensor], keep_out: Keep, keep_in: Keep, sides: list[int], out: Tensor) -> _Layout:
    """sides: the height and width of each kernel, 0 where it is whole."""
    kernels = [(h, w) if h else None for h, w in zip(sides[::2], sides[1::2], strict=True)]
    return _layout(weights, keep_out, keep_in, kernels, out)


def _materialize_op(weights: list[Tensor], keep_out: Keep, keep_in: Keep, sides: list[int], out: Tensor) -> None:
    _fill(out, _op_layout(weights, keep_out, keep_in, sides, out), weights, keep_out, keep_in)


def _materialize_fake(weights: list[Tensor], keep_out: Keep, keep_in: Keep, sides: list[int], out: Tensor) -> None:
    _op_layout(weights, keep_out, keep_in, sides, out)


register(
    "materialize",
    "(Tensor[] weights, Tensor?[] keep_out, Tensor?[] keep_in, SymInt[] sides, Tensor(a!) out) -> ()",
    _materialize_op,
    _materialize_fake,
)


class WeightBank:
    """A teacher's tensors, described once, out of which many students are cut: ``materialize`` at less cost a call.

    Channels are kept by axis: all weights whose channels lie on one axis keep the same. Values may change between
    calls, shapes may not.

    Args:
        weights: (O,), (O, I) or (O, I, kh, kw) each; one dtype, one device. Those not contiguous are copied.
        out_axes, in_axes: for each weight, the axis of its O and of its I channels; an I that is always kept whole,
            as that of a vector, is None.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, weights: Sequence[Tensor], out_axes: Sequence[int], in_axes: Sequence[int | None]) -> None:
        for name, entries in (("out_axes", out_axes), ("in_axes", in_axes)):
            _check_length(name, entries, weights)
        whole = _layout(weights, [None] * len(weights), [None] * len(weights), None)
        self.weights = [weight.detach().contiguous() for weight in weights]
        self._dims = [weight.ndim for weight in weights]
        self._sizes = _in_four(weight.shape for weight in weights)
        self._axes = np.array([out_axes, [-1 if axis is None else axis for axis in in_axes]], dtype=np.int64).T
        self._memory = _RecycledMemory(whole.numel)

    def materialize(
        self,
        chosen: np.ndarray,
        kept: Sequence[np.ndarray | None],
        kernel_size: np.ndarray | None = None,
        out: Tensor | None = None,
    ) -> list[Tensor]:
        """Cut the weights `chosen` out, as ``materialize`` does.

        Args:
            chosen: positions among the weights, (n,).
            kept: for each axis the indices of the channels to keep, (channels,) int64, or None for all.
            kernel_size: (n, 2), the cropped kernels' sizes, both 1 for weights without kernels; default: uncropped.
            out: flat buffer to write into, as for ``materialize``.

        Raises:
            ValueError: naming the argument, what was expected and what came; nothing has been written then.
        """
        if len(chosen) == 0:
            return []
        if len(kept) <= self._axes.max():
            raise ValueError(f"kept: expected {self._axes.max() + 1} entries, one for each axis, got {len(kept)}")
        weights, axes = [self.weights[i] for i in chosen.tolist()], self._axes[chosen]
        _indices, addresses, lengths = _joined(kept)  # which live until the kernel has run
        results = self._results(chosen, lengths[axes], kernel_size)
        layout = self._layout(chosen, results)
        if out is not None:
            _check_out(out, weights[0], layout.numel)
        flat = self._memory.empty_like(weights[0], layout.numel) if out is None else out
        if is_native(flat):
            sources, sizes = [weight.data_ptr() for weight in weights], self._sizes[chosen]
            _launch(flat, source=sources, size=sizes, kept=results, keep=addresses[axes], offset=layout.offsets)
        else:
            tensors = [None if index is None else torch.from_numpy(index) for index in (*kept, None)]
            keep_out, keep_in = ([tensors[axis] for axis in side] for side in axes.T)
            _fill_reference(flat, layout, weights, keep_out, keep_in)
        return _detached_views(flat, layout)

    def _results(self, chosen: np.ndarray, lengths: np.ndarray, kernel_size: np.ndarray | None) -> np.ndarray:
        """The results' sizes, (n, 4); lengths: how many output and input channels are kept, (n, 2), -1 for all."""
        channels, kernels = self._sizes[chosen, :2], self._sizes[chosen, 2:]
        crops = kernels if kernel_size is None else kernel_size
        cut = kernels - crops
        for k in ((cut < 0) | (cut % 2 > 0) | (crops < 1)).any(1).nonzero()[0]:
            _check_crop(k, kernels[k].tolist(), crops[k].tolist())
        return np.concatenate([np.where(lengths < 0, channels, lengths), crops], 1)

    def _layout(self, chosen: np.ndarray, results: np.ndarray) -> _Layout:
        """Lay the results out, at once; the function `_layout` does so one by one."""
        step = _ALIGNMENT // self.weights[0].element_size()
        padded = -(-results.prod(1) // step) * step
        ends = padded.cumsum()
        shapes = [tuple(size[: self._dims[i]]) for i, size in zip(chosen.tolist(), results.tolist(), strict=True)]
        return _Layout(shapes, (ends - padded).tolist(), int(ends[-1]))


class _RecycledMemory:
    """Memory of the CPU for flat buffers, used again once no tensor is left on it.

    What comes fresh from the system is zeroed page by page when it is first touched, which costs as much as filling it.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: elements of the largest buffer that is worth keeping; untouched, they take no memory."""
        self._capacity = capacity
        self._free: deque[np.ndarray] = deque(maxlen=2)  # whose methods are atomic

    def __reduce__(self) -> tuple[type[_RecycledMemory], tuple[int]]:
        """A copy begins without memory."""
        return _RecycledMemory, (self._capacity,)

    def empty_like(self, like: Tensor, numel: int) -> Tensor:
        """An uninitialised tensor (numel,) of the dtype and device of `like`, which is of one dtype at every call."""
        if not like.is_cpu or not 0 < numel <= self._capacity:  # a GPU's allocator recycles by itself
            return like.new_empty(numel)
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(self._capacity * like.element_size() + _ALIGNMENT, dtype=np.uint8)
        start = -block.ctypes.data % _ALIGNMENT
        used = block[start : start + numel * like.element_size()]  # lives as long as the tensor's storage
        weakref.finalize(used, self._free.append, block)
        return torch.from_numpy(used).view(like.dtype)


def _joined(kept: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All indices in one array; of each entry of `kept`, and of a None behind them, address and length, or 0 and -1."""
    for axis, index in enumerate(kept):
        if index is not None and (index.dtype != np.int64 or index.ndim != 1):
            raise ValueError(
                f"kept[{axis}]: expected one dimension of int64 indices, got {index.dtype} of shape {index.shape}"
            )
    joined = np.concatenate([np.empty(0, np.int64), *(index for index in kept if index is not None)])
    lengths = np.array([-1 if index is None else len(index) for index in (*kept, None)])
    starts = lengths.clip(0).cumsum() - lengths.clip(0)
    return joined, np.where(lengths < 0, 0, joined.ctypes.data + joined.itemsize * starts), lengths
