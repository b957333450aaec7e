"""Arrays of images and labels in a .npz file."""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from n2n_fast.files.errors import BadInput, described
from n2n_fast.files.safe_load import FREE_BYTES
from n2n_fast.training.splits import Part, Parts

MOST_UNPACKED = 200  # times the length of an .npz file: images do not compress like that
PART_NAMES = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}


def read_npz(path: Path, check_memory: Callable[[int], None]) -> tuple[Parts, list[str]]:
    """Arrays x or images with y or labels, or x_train, y_train, x_val, y_val, x_test, y_test; parts and notes.

    Raises BadInput.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            parts = _array_names(path, names)
            _check_headers(path, archive, [name for pair in parts.values() for name in pair], check_memory)
        with np.load(path, allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for pair in parts.values() for name in pair}
    except BadInput:
        raise
    except IsADirectoryError as error:
        raise BadInput(f"{path} is a directory; npz: takes a file") from error
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist; give the .npz file") from error
    except Exception as error:
        raise BadInput(f"{path} is no .npz file, or a damaged one ({described(error)}); save it anew") from error
    notes: list[str] = []
    return Parts(**{part: _part(path, *pair, loaded, notes) for part, pair in parts.items()}), notes


def _array_names(path: Path, names: set[str]) -> dict[str, tuple[str, str]]:
    """The names of images and labels, by part."""
    by_lower = {name.lower(): name for name in names}
    parts: dict[str, tuple[str, str]] = {}
    for part, endings in PART_NAMES.items():
        for images, labels in ((f"x_{ending}", f"y_{ending}") for ending in endings):
            if {images, labels} <= set(by_lower):
                if part in parts:
                    raise BadInput(
                        f"{path} holds {parts[part][0]} and {by_lower[images]}, which are one part; keep one"
                    )
                parts[part] = by_lower[images], by_lower[labels]
    if "train" in parts:
        return parts
    whole = [
        next((by_lower[name] for name in pair if name in by_lower), None) for pair in (("x", "images"), ("y", "labels"))
    ]
    if whole[0] is None or whole[1] is None:
        content = ", ".join(sorted(names)) or "nothing"
        raise BadInput(f"{path} holds {content}; name the arrays x and y, or x_train, y_train, x_test and y_test")
    return {"train": (whole[0], whole[1])}


def _check_headers(path: Path, archive: zipfile.ZipFile, names: list[str], check_memory: Callable[[int], None]) -> None:
    """Refuse arrays that would run code, are cut short or are too large, by their headers, before any is unpacked."""
    total, packed = 0, path.stat().st_size
    for name in names:
        entry = archive.getinfo(f"{name}.npy")
        if entry.file_size > max(FREE_BYTES, MOST_UNPACKED * packed):
            raise BadInput(f"{path}: array {name} would unpack from {packed:,} to {entry.file_size:,} bytes")
        with archive.open(entry) as file:
            shape, dtype = _npy_header(file)
            length = entry.file_size - file.tell()
        if dtype.hasobject:
            raise BadInput(f"{path}: array {name} holds Python objects, not numbers; save it with a numeric dtype")
        if length != math.prod(shape) * dtype.itemsize:
            raise BadInput(f"{path}: array {name} declares shape {shape} but holds {length} bytes; save it anew")
        total += math.prod(shape) * max(dtype.itemsize, 4 if dtype.kind == "f" else 1)
    check_memory(total)


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _part(path: Path, images_name: str, labels_name: str, arrays: dict[str, Any], notes: list[str]) -> Part:
    """One part as images (N, C, H, W) and labels (N,)."""
    images, labels = arrays[images_name], arrays[labels_name]
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and _channels_last(images.shape):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim != 4:
        raise BadInput(
            f"{path}: array {images_name} has shape {images.shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W)"
        )
    images = _in_8_bits(path, images_name, images, notes)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "u" and labels.size and labels.max() > np.iinfo(np.int64).max:
        raise BadInput(f"{path}: label {labels.max()} is out of range; number the classes from 0")
    if labels.dtype.kind in "iu":
        labels = labels.astype(np.int64)
    return Part(_tensor(path, images_name, images), _tensor(path, labels_name, labels), images_name)


def _in_8_bits(path: Path, name: str, images: Any, notes: list[str]) -> Any:
    """Whole numbers as uint8, of 16 bits scaled; others as float32."""
    kind = images.dtype.kind
    if kind == "f":
        with np.errstate(over="ignore"):  # what becomes infinite is refused later
            return images.astype(np.float32)
    if kind not in "iu" or images.dtype == np.uint8 or not images.size:
        return images
    low, high = int(images.min()), int(images.max())
    if images.dtype == np.uint16 and high > 255:
        notes.append(f"{name}: 16-bit images in {low}..{high}, scaled from 0..65535 to 8 bits")
        return (images.astype(np.float32) / 257).round().astype(np.uint8)
    if low < 0 or high > 255:
        raise BadInput(
            f"{path}: array {name} is {images.dtype} beyond 0..255 ({low}..{high}); store uint8, uint16 or float32"
        )
    return images.astype(np.uint8)


def _channels_last(shape: tuple[int, ...]) -> bool:
    """Whether (N, a, b, c) is (N, H, W, C): colour counts are 1 or 3, else the smaller end is the channels."""
    if (shape[1] in (1, 3)) != (shape[3] in (1, 3)):
        return shape[3] in (1, 3)
    return shape[3] < shape[1]


def _tensor(path: Path, name: str, array: Any) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise BadInput(f"{path}: array {name} is {array.dtype}; store numbers")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native))
