"""``materialize``: a student's weights cut out of a teacher's, all in one native call."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from n2n_fast.native import _C
from n2n_fast.native.boundary import is_native, on_short_path, register

KernelSize = tuple[int, int] | None

_ALIGNMENT = 64  # bytes; where each result starts in the flat buffer


@dataclass(frozen=True)
class _Layout:
    """Where the results lie in the flat buffer; offsets and numel in elements."""

    shapes: list[tuple[int, ...]]
    offsets: list[int]
    numel: int


def materialize(
    weights: Sequence[Tensor],
    keep_out: Sequence[Tensor | None],
    keep_in: Sequence[Tensor | None],
    kernel_size: Sequence[KernelSize] | None = None,
    out: Tensor | None = None,
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
    if len(weights) == 0:
        _check_lengths(weights, keep_out, keep_in, kernel_size)
        return []
    layout = _check_materialize(weights, keep_out, keep_in, kernel_size)
    if out is not None:
        _check_out(out, weights[0], layout.numel)
    if on_short_path([*weights, *keep_out, *keep_in, out]):
        flat = weights[0].new_empty(layout.numel) if out is None else out
        _fill(flat, weights, keep_out, keep_in, kernel_size, layout)
        return _detached_views(flat, layout)
    arguments = ([w.detach() for w in weights], list(keep_out), list(keep_in), _flat_kernels(weights, kernel_size))
    if out is None:
        return _views(torch.ops.n2n_fast.materialize(*arguments), layout)
    torch.ops.n2n_fast.materialize_out(*arguments, out)
    return _views(out, layout)


def materialize_numel(
    weights: Sequence[Tensor],
    keep_out: Sequence[Tensor | None],
    keep_in: Sequence[Tensor | None],
    kernel_size: Sequence[KernelSize] | None = None,
) -> int:
    """Return the number of elements that ``out`` needs for these arguments of ``materialize``.

    Raises:
        ValueError: as ``materialize``, except for the range of indices.
    """
    if len(weights) == 0:
        return 0
    return _check_materialize(weights, keep_out, keep_in, kernel_size).numel


def materialize_reference(
    weights: Sequence[Tensor],
    keep_out: Sequence[Tensor | None],
    keep_in: Sequence[Tensor | None],
    kernel_size: Sequence[KernelSize] | None = None,
    out: Tensor | None = None,
) -> list[Tensor]:
    """Do what ``materialize`` does, in plain torch."""
    if len(weights) == 0:
        return []
    layout = _check_materialize(weights, keep_out, keep_in, kernel_size)
    if out is not None:
        _check_out(out, weights[0], layout.numel)
    flat = weights[0].new_empty(layout.numel) if out is None else out
    _fill_reference(flat, weights, keep_out, keep_in, kernel_size, layout)
    return _detached_views(flat, layout)


def _check_materialize(
    weights: Sequence[Tensor],
    keep_out: Sequence[Tensor | None],
    keep_in: Sequence[Tensor | None],
    kernel_size: Sequence[KernelSize] | None,
) -> _Layout:
    """Validate everything but the values of indices, and lay the results out."""
    _check_lengths(weights, keep_out, keep_in, kernel_size)
    dtype, device = weights[0].dtype, weights[0].device
    step = max(1, _ALIGNMENT // dtype.itemsize)
    shapes: list[tuple[int, ...]] = []
    offsets: list[int] = []
    offset = 0
    for k, weight in enumerate(weights):
        if weight.dtype is not dtype or weight.device != device:
            _refuse_mixture(k, weight, weights[0])
        shape = tuple(weight.shape)
        dims = len(shape)
        if dims not in (1, 2, 4):
            raise ValueError(f"weights[{k}]: expected 1, 2 or 4 dimensions, got shape {shape}")
        rows, columns = keep_out[k], keep_in[k]
        kept: tuple[int, ...] = (shape[0] if rows is None else _check_keep("keep_out", k, rows, device),)
        if dims > 1:
            kept += (shape[1] if columns is None else _check_keep("keep_in", k, columns, device),)
        elif columns is not None:
            raise ValueError(f"keep_in[{k}]: expected None, since weights[{k}] has one dimension, got a tensor")
        crop = None if kernel_size is None else kernel_size[k]
        kept += shape[2:] if crop is None else _check_crop(k, shape, crop)
        numel = 1
        for size in kept:
            numel *= size
        shapes.append(kept)
        offsets.append(offset)
        offset += (numel + step - 1) // step * step
    return _Layout(shapes, offsets, offset)


def _check_lengths(
    weights: Sequence[Tensor],
    keep_out: Sequence[Tensor | None],
    keep_in: Sequence[Tensor | None],
    kernel_size: Sequence[KernelSize] | None,
) -> None:
    for name, entries in (("keep_out", keep_out), ("keep_in", keep_in), ("kernel_size", kernel_size)):
        if entries is not None and len(entries) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)} entries, one for each of weights, got {len(entries)}")


def _refuse_mixture(k: int, weight: Tensor, first: Tensor) -> None:
    raise ValueError(
        f"weights[{k}]: expected {first.dtype} on {first.device}, as weights[0], got {weight.dtype} on {weight.device}"
    )


def _check_keep(name: str, k: int, index: Tensor, device: torch.device) -> int:
    """Validate an index tensor but for its values; return its length."""
    if index.dtype is not torch.int64 and index.dtype is not torch.int32:
        raise ValueError(f"{name}[{k}]: expected int64 or int32 indices, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"{name}[{k}]: expected one dimension, got shape {tuple(index.shape)}")
    if index.device.type != "cpu" and index.device != device:
        raise ValueError(f"{name}[{k}]: expected a tensor on cpu or {device}, got one on {index.device}")
    return index.shape[0]


def _check_crop(k: int, shape: tuple[int, ...], crop: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 4:
        raise ValueError(f"kernel_size[{k}]: expected None, since weights[{k}] has no kernel, got {tuple(crop)}")
    height, width = crop
    if not all(0 < to <= of and (of - to) % 2 == 0 for to, of in ((height, shape[2]), (width, shape[3]))):
        raise ValueError(
            f"kernel_size[{k}]: {(height, width)} cannot be cropped at the centre of the {shape[2:]} kernels of "
            f"weights[{k}]; both differences must be even and not negative"
        )
    return height, width


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
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return tuple(strides[::-1])


def _fill(
    flat: Tensor,
    weights: Sequence[Tensor],
    keep_out: Sequence[Tensor | None],
    keep_in: Sequence[Tensor | None],
    kernel_size: Sequence[KernelSize] | None,
    layout: _Layout,
) -> None:
    """Write the results into `flat`, natively where there is a kernel; the arguments are valid but for index values."""
    device = flat.device
    if not is_native(device, flat.dtype) or flat.shape[0] == 0:
        _fill_reference(flat, weights, keep_out, keep_in, kernel_size, layout)
        return
    weights = [w if w.is_contiguous() else w.contiguous() for w in weights]
    rows, columns = [_host_index(i) for i in keep_out], [_host_index(i) for i in keep_in]
    _launch(_table(weights, rows, columns, layout), len(weights), flat)


def _launch(table: _C.Table, count: int, flat: Tensor) -> None:
    """Run the kernel on a table of `count` pieces; what the table points to must outlive the call."""
    device, element_bytes = flat.device, flat.element_size()
    if device.type == "cpu":
        _C.materialize_cpu(table, element_bytes, flat.data_ptr(), flat.shape[0], torch.get_num_threads())
        return
    with torch.cuda.device(device):
        packed = torch.empty(_C.materialize_pack_words(table), dtype=torch.int64, pin_memory=True)
        blocks = _C.materialize_pack(table, element_bytes, flat.shape[0], packed.data_ptr())
        on_device = packed.to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device).cuda_stream
        _C.materialize_cuda(on_device.data_ptr(), count, blocks, element_bytes, flat.data_ptr(), stream)


def _host_index(index: Tensor | None) -> Tensor | None:
    """Return the indices as contiguous int64 on the CPU."""
    if index is None or (index.dtype is torch.int64 and index.is_cpu and index.is_contiguous()):
        return index
    return index.to("cpu", torch.int64).contiguous()


def _table(
    weights: Sequence[Tensor], rows: Sequence[Tensor | None], columns: Sequence[Tensor | None], layout: _Layout
) -> array[int]:
    """Describe each weight in twelve integers: ``struct Piece`` of csrc/materialize.h."""
    table: list[int] = []
    for weight, row, column, kept, offset in zip(weights, rows, columns, layout.shapes, layout.offsets, strict=True):
        source, result = tuple(weight.shape), kept
        if len(source) < 4:
            source, result = (*source, 1, 1, 1)[:4], (*kept, 1, 1, 1)[:4]
        row_address = 0 if row is None else row.data_ptr()
        column_address = 0 if column is None else column.data_ptr()
        table += (weight.data_ptr(), *source, row_address, result[0], column_address, *result[1:], offset)
    return array("q", table)


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
            if len(entries) != len(weights):
                raise ValueError(
                    f"{name}: expected {len(weights)} entries, one for each of weights, got {len(entries)}"
                )
        if weights:  # check dtypes, devices and dimensions
            _check_materialize(weights, [None] * len(weights), [None] * len(weights), None)
        self.weights = [weight.detach().contiguous() for weight in weights]
        self._dims = [weight.ndim for weight in weights]
        self._sizes = np.array([(*weight.shape, 1, 1, 1)[:4] for weight in weights], dtype=np.int64).reshape(-1, 4)
        numel = sum(-(-weight.numel() * weight.element_size() // _ALIGNMENT) for weight in self.weights) * _ALIGNMENT
        self._memory = _RecycledMemory(numel)
        self._axes = np.array(
            [(out, -1 if axis is None else axis) for out, axis in zip(out_axes, in_axes, strict=True)], dtype=np.int64
        ).reshape(-1, 2)

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
        indices, starts, length = _joined(kept)
        address = np.where(length < 0, 0, indices.ctypes.data + indices.itemsize * starts)
        positions, sizes, axes = chosen.tolist(), self._sizes[chosen], self._axes[chosen]
        weights = [self.weights[i] for i in positions]
        channels = np.where(length[axes] < 0, sizes[:, :2], length[axes])
        crop = sizes[:, 2:] if kernel_size is None else kernel_size
        _check_crops(sizes[:, 2:], crop)
        table = np.empty(len(chosen), dtype=_PIECE)
        table["source"] = [weight.data_ptr() for weight in weights]
        table["size"], table["crop"] = sizes, crop
        table["keep_out"], table["keep_in"] = address[axes].T
        table["kept_out"], table["kept_in"] = channels.T
        step = max(1, _ALIGNMENT // weights[0].element_size())
        padded = -(-channels.prod(1) * crop.prod(1) // step) * step
        ends = padded.cumsum()
        table["offset"] = ends - padded
        whole = np.concatenate([channels, crop], 1).tolist()
        shapes = [tuple(shape[: self._dims[i]]) for i, shape in zip(positions, whole, strict=True)]
        layout = _Layout(shapes, table["offset"].tolist(), int(ends[-1]))
        if out is not None:
            _check_out(out, weights[0], layout.numel)
        flat = self._memory.empty_like(weights[0], layout.numel) if out is None else out
        if is_native(flat.device, flat.dtype) and layout.numel > 0:
            _launch(table.view(np.int64), len(chosen), flat)
        else:
            tensors = [None if index is None else torch.from_numpy(index) for index in (*kept, None)]
            keep_out, keep_in = ([tensors[axis] for axis in side] for side in axes.T)
            kernels = [
                (h, w) if self._dims[i] == 4 else None for i, (h, w) in zip(positions, crop.tolist(), strict=True)
            ]
            _fill_reference(flat, weights, keep_out, keep_in, kernels, layout)
        return _detached_views(flat, layout)


_Block = tuple[np.ndarray, "weakref.ref[np.ndarray]"]  # memory, and the part of it that a tensor lives on


class _RecycledMemory:
    """Memory of the CPU for flat buffers, used again once no tensor is left on it.

    What comes fresh from the system is zeroed page by page when it is first touched, which costs as much as filling it.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: bytes of the largest buffer that is worth keeping; untouched, they take no memory."""
        self._capacity = capacity
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[_RecycledMemory], tuple[int]]:
        """A copy begins without memory."""
        return _RecycledMemory, (self._capacity,)

    def empty_like(self, like: Tensor, numel: int) -> Tensor:
        """An uninitialised tensor (numel,) of the dtype and device of `like`."""
        size = numel * like.element_size()
        if not like.is_cpu or not 0 < size <= self._capacity:  # a GPU's allocator recycles by itself
            return like.new_empty(numel)
        with self._lock:
            busy: list[_Block] = []
            free: list[_Block] = []
            for entry in self._blocks:
                (free if entry[1]() is None else busy).append(entry)
            block = free.pop()[0] if free else _aligned(self._capacity)
            part = block[:size]  # held by the tensor's storage for as long as that lives
            self._blocks = [*busy, *free[:1], (block, weakref.ref(part))]
        return torch.from_numpy(part).view(like.dtype)


def _aligned(size: int) -> np.ndarray:
    """Uninitialised bytes that start at a multiple of the alignment, (size,) uint8."""
    raw = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]


_PIECE = np.dtype(  # struct Piece of csrc/materialize.h
    [
        ("source", np.int64),
        ("size", np.int64, 4),
        ("keep_out", np.int64),
        ("kept_out", np.int64),
        ("keep_in", np.int64),
        ("kept_in", np.int64),
        ("crop", np.int64, 2),
        ("offset", np.int64),
    ]
)


def _joined(kept: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All indices in one array; of each entry of `kept`, and of a None behind them, its start and length, or -1."""
    for axis, index in enumerate(kept):
        if index is not None and (index.dtype != np.int64 or index.ndim != 1):
            raise ValueError(
                f"kept[{axis}]: expected one dimension of int64 indices, got {index.dtype} of shape {index.shape}"
            )
    joined = np.concatenate([np.empty(0, np.int64), *(index for index in kept if index is not None)])
    length = np.array([-1 if index is None else len(index) for index in (*kept, None)])
    ends = length.clip(0).cumsum()
    return joined, ends - length.clip(0), length


def _check_crops(kernels: np.ndarray, crops: np.ndarray) -> None:
    """Both (n, 2)."""
    cut = kernels - crops
    wrong = ((cut < 0) | (cut % 2 > 0) | (crops < 1)).any(1)
    if wrong.any():
        k = int(wrong.argmax())
        raise ValueError(
            f"kernel_size[{k}]: {tuple(crops[k].tolist())} cannot be cropped at the centre of the "
            f"{tuple(kernels[k].tolist())} kernels; both differences must be even and not negative"
        )


def _fill_reference(
    flat: Tensor,
    weights: Sequence[Tensor],
    keep_out: Sequence[Tensor | None],
    keep_in: Sequence[Tensor | None],
    kernel_size: Sequence[KernelSize] | None,
    layout: _Layout,
) -> None:
    results = []
    for k, weight in enumerate(weights):
        result = _select("keep_out", k, weight.detach(), 0, keep_out[k])
        result = _select("keep_in", k, result, 1, keep_in[k])
        crop = None if kernel_size is None else kernel_size[k]
        if crop is not None:
            top, left = (weight.shape[2] - crop[0]) // 2, (weight.shape[3] - crop[1]) // 2
            result = result[:, :, top : top + crop[0], left : left + crop[1]]
        results.append(result)
    flat.zero_()
    for view, result in zip(_views(flat, layout), results, strict=True):
        view.copy_(result)


def _select(name: str, k: int, weight: Tensor, dim: int, index: Tensor | None) -> Tensor:
    if index is None:
        return weight
    channels = weight.shape[dim]
    index = index.to(weight.device, torch.int64)
    if not index.is_meta:
        wrong = ((index < 0) | (index >= channels)).nonzero()
        if wrong.numel() > 0:
            side = "output" if dim == 0 else "input"
            value = int(index[wrong[0, 0]])
            raise ValueError(f"{name}[{k}]: index {value} out of range for {channels} {side} channels of weights[{k}]")
    return weight.index_select(dim, index)


def _flat_kernels(weights: Sequence[Tensor], kernel_size: Sequence[KernelSize] | None) -> list[int]:
    """Write kernel sizes as a schema can hold them: two integers each, 0 for None."""
    sizes = [None] * len(weights) if kernel_size is None else kernel_size
    return [side for size in sizes for side in (size or (0, 0))]


def _kernel_sizes(flat: Sequence[int]) -> list[KernelSize]:
    return [(h, w) if h else None for h, w in zip(flat[::2], flat[1::2], strict=True)]


_Weights = list[Tensor]
_Keeps = list[Tensor | None]


def _materialize_op(weights: _Weights, keep_out: _Keeps, keep_in: _Keeps, kernel_size: list[int]) -> Tensor:
    sizes = _kernel_sizes(kernel_size)
    layout = _check_materialize(weights, keep_out, keep_in, sizes)
    flat = weights[0].new_empty(layout.numel)
    _fill(flat, weights, keep_out, keep_in, sizes, layout)
    return flat


def _materialize_fake(weights: _Weights, keep_out: _Keeps, keep_in: _Keeps, kernel_size: list[int]) -> Tensor:
    layout = _check_materialize(weights, keep_out, keep_in, _kernel_sizes(kernel_size))
    return weights[0].new_empty(layout.numel)


def _materialize_out_op(
    weights: _Weights, keep_out: _Keeps, keep_in: _Keeps, kernel_size: list[int], out: Tensor
) -> None:
    sizes = _kernel_sizes(kernel_size)
    layout = _check_materialize(weights, keep_out, keep_in, sizes)
    _check_out(out, weights[0], layout.numel)
    _fill(out, weights, keep_out, keep_in, sizes, layout)


def _materialize_out_fake(
    weights: _Weights, keep_out: _Keeps, keep_in: _Keeps, kernel_size: list[int], out: Tensor
) -> None:
    layout = _check_materialize(weights, keep_out, keep_in, _kernel_sizes(kernel_size))
    _check_out(out, weights[0], layout.numel)


_CUT = "Tensor[] weights, Tensor?[] keep_out, Tensor?[] keep_in, SymInt[] kernel_size"
register("materialize", f"({_CUT}) -> Tensor", _materialize_op, _materialize_fake)
register("materialize_out", f"({_CUT}, Tensor(a!) out) -> ()", _materialize_out_op, _materialize_out_fake)
