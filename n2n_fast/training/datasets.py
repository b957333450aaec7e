"""Data sets by name: the digits of the package, torchvision's, folders of images and .npz files."""

import contextlib
import gzip
import io
import math
import os
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from n2n_fast.files.errors import BadInput, first_line
from n2n_fast.files.safe_load import FREE_BYTES
from n2n_fast.training.data import TEST_SHARE, Augmentation, ImageData, Split, from_tensors, split_off

MOST_UNPACKED = 200  # times the length of an .npz file: images do not compress like that


@dataclass(frozen=True)
class _Request:
    """What a reader is asked for; `where` is the part of the spec behind the colon."""

    name: str
    where: Path
    image_size: int | None
    channels: int | None
    download: bool


@dataclass(frozen=True)
class _Arrays:
    """What a reader gives: images (N, C, H, W) and labels (N,), unchecked; test is None where there is none."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None
    classes: int | None = None


@dataclass(frozen=True)
class _Source:
    """A kind of data set; mean and std are the published ones, crop is a share of the image size."""

    read: Callable[[_Request], _Arrays]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    crop: float = 0.0
    flip: bool = False
    path: str = "DIR"
    downloadable: bool = False
    test_seed: int | None = None
    grey_mean_std: tuple[float, float] | None = field(default=None)

    def augmentation(self, size: int) -> Augmentation | None:
        if not self.crop and not self.flip:
            return None
        return Augmentation(max(1, round(self.crop * size)) if self.crop else 0, self.flip)


def load(
    spec: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    download: bool = False,
    seed: int = 0,
    validation: float | None = None,
    device: torch.device | str = "cpu",
) -> ImageData:
    """Read digits, cifar10:DIR, cifar100:DIR, svhn:DIR, fashion-mnist:DIR, imagefolder:DIR or npz:FILE; or BadInput.

    image_size: pixels of the square that images are resized to, short side first, then cropped at the centre.
    channels: of a batch; grey images can be asked for as 3. classes: where the labels do not show their number. mean,
    std: of pixels in 0..1, one or one for each channel; default: the set's. validation, seed: as of `from_tensors`.
    """
    source, request = _parse(spec, image_size, channels, download)
    arrays = source.read(request)
    train, test = _resized(spec, arrays.train, image_size), arrays.test and _resized(spec, arrays.test, image_size)
    if test is None and source.test_seed is not None:
        train, test = _fixed_test(train, source.test_seed)
    published_mean, published_std = source.mean, source.std
    if source.grey_mean_std is not None and train[0].shape[1] == 1 and channels != 3:
        published_mean, published_std = ((value,) for value in source.grey_mean_std)
    return from_tensors(
        spec,
        train,
        test,
        classes=classes or arrays.classes,
        mean=mean or published_mean,
        std=std or published_std,
        channels=channels,
        augmentation=source.augmentation(min(train[0].shape[2:])) if train[0].ndim == 4 else None,
        validation=validation,
        seed=seed,
        device=device,
    )


def _parse(spec: str, image_size: int | None, channels: int | None, download: bool) -> tuple[_Source, _Request]:
    """Settle what `spec` asks for."""
    name, _, where = spec.partition(":")
    source = _SOURCES.get(name)
    known = ", ".join(f"{kind}:{entry.path}" if entry.path else kind for kind, entry in _SOURCES.items())
    if source is None:
        raise BadInput(f"{spec!r} is no known data set; give one of {known}")
    if bool(where) != bool(source.path):
        raise BadInput(f"{spec!r}: write it as {name}{':' + source.path if source.path else ''}")
    if image_size is not None and not 0 < image_size <= 4096:
        raise BadInput(f"image size {image_size} is out of range; give 1 to 4096 pixels")
    if download and not source.downloadable:
        able = ", ".join(kind for kind, entry in _SOURCES.items() if entry.downloadable)
        raise BadInput(f"{name} cannot be downloaded; leave out --download, which is for {able}")
    return source, _Request(name, Path(where).expanduser(), image_size, channels, download)


def _resized(spec: str, part: tuple[Tensor, Tensor], size: int | None) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) scaled so that the short side has `size` pixels, then cropped at the centre."""
    images, labels = part
    if size is None or images.ndim != 4 or not images.numel() or tuple(images.shape[2:]) == (size, size):
        return part
    from torchvision.transforms import functional

    itemsize = 1 if images.dtype == torch.uint8 else 4
    _check_memory(spec, len(images) * images.shape[1] * size * size * itemsize)
    if images.dtype != torch.uint8:
        images = images.float()
    chunks = [
        functional.center_crop(functional.resize(chunk, [size], antialias=True), [size, size])
        for chunk in (images[start : start + 4096] for start in range(0, len(images), 4096))
    ]
    return torch.cat(chunks), labels


def _fixed_test(part: tuple[Tensor, Tensor], seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Split off the same test images whatever the run's seed."""
    nothing = torch.zeros(0)
    rest, test = split_off(Split(*part, nothing, nothing), round(TEST_SHARE * len(part[1])), seed)
    return (rest.images, rest.labels), (test.images, test.labels)


def _check_memory(spec: str, needed: int) -> None:
    """Refuse `needed` bytes that are more than half of this machine's memory."""
    limit = _memory_bytes() // 2
    if needed > limit:
        raise BadInput(
            f"{spec}: {needed / 1e9:.1f} GB are needed for the images but half of memory is {limit / 1e9:.1f} GB;"
            " use a smaller --image-size or fewer images"
        )


def _memory_bytes() -> int:
    try:
        return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not every system tells
        return sys.maxsize


def _read_digits(_: _Request) -> _Arrays:
    """Scikit-learn's digits, their levels 0..16 spread over 0..255."""
    with resources.files("n2n_fast.training").joinpath("digits.npz").open("rb") as file:
        arrays = np.load(io.BytesIO(file.read()), allow_pickle=False)
    levels = torch.from_numpy(arrays["images"]).float() * (255 / 16)
    return _Arrays((levels.round().byte().unsqueeze(1), torch.from_numpy(arrays["labels"]).long()), None, 10)


def _read_cifar(request: _Request) -> _Arrays:
    from torchvision import datasets

    kind: Any = datasets.CIFAR10 if request.name == "cifar10" else datasets.CIFAR100

    # The files may lie in the directory itself rather than in the folder of that name in it.
    class Flat(kind):  # type: ignore[misc]
        base_folder = ""

    here = (request.where / kind.train_list[0][0]).is_file()
    parts = _read_torchvision(request, lambda train, **options: (Flat if here else kind)(train=train, **options))
    tensors = [(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), part.targets) for part in parts]
    train, test = ((images, torch.tensor(labels, dtype=torch.int64)) for images, labels in tensors)
    return _Arrays(train, test, 10 if request.name == "cifar10" else 100)


def _read_svhn(request: _Request) -> _Arrays:
    from torchvision import datasets

    if not _importable("scipy.io"):
        raise BadInput("svhn is stored as MATLAB files, which scipy reads; pip install scipy")
    for folder in ("SVHN", "svhn"):
        if (request.where / folder / "train_32x32.mat").is_file():
            request = replace(request, where=request.where / folder)
    parts = _read_torchvision(
        request, lambda train, **options: datasets.SVHN(split="train" if train else "test", **options)
    )
    train, test = (
        (torch.from_numpy(np.ascontiguousarray(part.data)), torch.from_numpy(part.labels).long()) for part in parts
    )
    return _Arrays(train, test, 10)


def _importable(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


_FASHION_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def _read_fashion_mnist(request: _Request) -> _Arrays:
    from torchvision import datasets

    with contextlib.ExitStack() as stack:
        flat = request.where
        if not request.download or _fashion_file(flat, _FASHION_FILES[0]):
            layout = request.where / "FashionMNIST" / "raw"
            flat = layout if layout.is_dir() else flat
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if _lay_out_fashion(request, flat, root / "FashionMNIST" / "raw"):
                request = replace(request, where=root)
        parts = _read_torchvision(
            request, lambda train, **options: datasets.FashionMNIST(train=train, **options), shown=flat
        )
        train, test = ((part.data.unsqueeze(1), part.targets.long()) for part in parts)
    return _Arrays(train, test, 10)


def _fashion_file(folder: Path, name: str) -> Path | None:
    """Where the file lies in `folder`, compressed or not."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _lay_out_fashion(request: _Request, source: Path, target: Path) -> bool:
    """Put the four files of `source`, unpacked, where torchvision looks for them; False where one is missing."""
    found = [_fashion_file(source, name) for name in _FASHION_FILES]
    if any(path is None for path in found):
        return False
    target.mkdir(parents=True)
    for path, name in zip(found, _FASHION_FILES, strict=True):
        assert path is not None
        if path.suffix != ".gz":
            (target / name).symlink_to(path.resolve())
            continue
        try:
            with gzip.open(path) as packed, (target / name).open("wb") as plain:
                plain.write(packed.read(64 << 20))  # the largest of the four has 47 MB; more would be no such file
        except (OSError, EOFError, zlib.error) as error:
            raise _broken(request, path, error) from error
    return True


def _read_torchvision(request: _Request, make: Callable[..., Any], shown: Path | None = None) -> tuple[Any, Any]:
    """The train and the test set that `make(train=..., root=..., download=...)` gives, or BadInput."""
    shown = shown or request.where
    if request.where.exists() and not request.where.is_dir():
        raise BadInput(f"{request.where} is not a directory; give the one that holds {request.name}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's loaders trip numpy's deprecations
            train, test = (
                make(train=part, root=str(request.where), download=request.download) for part in (True, False)
            )
            return train, test
    except PermissionError as error:
        raise BadInput(f"{shown} cannot be read ({error.strerror}); make it readable") from error
    except Exception as error:  # torchvision lets many kinds through, for files that are not what they should be
        if "Dataset not found" in str(error):
            raise BadInput(
                f"no {request.name}, or a damaged one, in {shown}; give the directory that holds it,"
                " or add --download to fetch it there"
            ) from error
        raise _broken(request, shown, error) from error


def _broken(request: _Request, path: Path, error: Exception) -> BadInput:
    action = "downloaded into" if request.download else "read from"
    return BadInput(
        f"{request.name} cannot be {action} {path} ({_one_line(error)});"
        " remove what is there and add --download to fetch it anew"
    )


def _one_line(error: Exception) -> str:
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def _read_imagefolder(request: _Request) -> _Arrays:
    """DIR/train with DIR/test or DIR/val, or a bare folder of class folders; decoded once."""
    root = request.where
    if not root.is_dir():
        raise BadInput(f"{root} is not a directory; give one that holds a folder of images for each class")
    split = (root / "train").is_dir()
    train_files, names = _image_files(root / "train" if split else root)
    held = next((root / part for part in ("test", "val") if split and (root / part).is_dir()), None)
    test_files, test_names = _image_files(held) if held else ([], names)
    if test_names != names:
        odd = sorted(set(names) ^ set(test_names))[:3]
        raise BadInput(f"{held} and {root / 'train'} differ in their class folders ({', '.join(odd)}); make them equal")
    size = request.image_size or _natural_size(train_files[0][0])
    channels = 1 if request.channels == 1 else 3
    _check_memory(f"imagefolder:{root}", (len(train_files) + len(test_files)) * channels * size * size)
    train = _decode(train_files, size, channels)
    return _Arrays(train, _decode(test_files, size, channels) if test_files else None, len(names))


def _image_files(folder: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """(file, class) for each image below the class folders of `folder`, and the names of the classes."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{folder} is no folder of class folders of images ({_one_line(error)})") from error
    return found.samples, found.classes


def _natural_size(path: str) -> int:
    """The short side of the first image, but no more than the usual 224 pixels."""
    width, height = _open(path).size
    return min(224, int(width), int(height))


def _open(path: str) -> Any:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput(f"{path} cannot be decoded ({_one_line(error)}); remove or repair it") from error


def _decode(files: list[tuple[str, int]], size: int, channels: int) -> tuple[Tensor, Tensor]:
    """uint8 (N, channels, size, size): short side scaled to `size`, cropped at the centre; labels (N,)."""
    from PIL import Image, ImageOps

    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)
    for place, (path, _) in enumerate(files):
        image = _open(path)
        if channels == 1 and image.mode not in ("1", "L", "LA"):
            raise BadInput(f"{path} is no grey image but 1 channel is asked for; use a teacher with 3 input channels")
        fitted = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.Resampling.BILINEAR)
        images[place] = torch.from_numpy(np.array(fitted).reshape(size, size, channels)).permute(2, 0, 1)
    return images, torch.tensor([label for _, label in files])


def _read_npz(request: _Request) -> _Arrays:
    """Arrays x or images with y or labels, or x_train, y_train, x_test, y_test."""
    path = request.where
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            train, test = _npz_parts(path, names)
            wanted = [name for part in (train, test) if part for name in part]
            _check_npz(path, archive, wanted)
        with np.load(path, allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for name in wanted}
    except BadInput:
        raise
    except IsADirectoryError as error:
        raise BadInput(f"{path} is a directory; npz: takes a file") from error
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist; give the .npz file") from error
    except Exception as error:
        raise BadInput(f"{path} is no .npz file, or a damaged one ({_one_line(error)}); save it anew") from error
    parts = [(_images(path, *part, loaded)) for part in (train, test) if part]
    return _Arrays(parts[0], parts[1] if test else None)


def _npz_parts(path: Path, names: set[str]) -> tuple[tuple[str, str], tuple[str, str] | None]:
    """Which arrays are the images and labels of train and test."""
    if {"x_train", "y_train"} <= names:
        return ("x_train", "y_train"), (("x_test", "y_test") if {"x_test", "y_test"} <= names else None)
    images = next((name for name in ("x", "images") if name in names), None)
    labels = next((name for name in ("y", "labels") if name in names), None)
    if images is None or labels is None:
        held = ", ".join(sorted(names)) or "nothing"
        raise BadInput(f"{path} holds {held}; name the arrays x and y, or x_train, y_train, x_test and y_test")
    return (images, labels), None


def _check_npz(path: Path, archive: zipfile.ZipFile, names: list[str]) -> None:
    """Refuse arrays that would run code, are cut short or are too large, by their headers, before any is unpacked."""
    total, packed = 0, path.stat().st_size
    for name in names:
        entry = archive.getinfo(f"{name}.npy")
        if entry.file_size > max(FREE_BYTES, MOST_UNPACKED * packed):
            raise BadInput(f"{path}: array {name} would unpack from {packed:,} to {entry.file_size:,} bytes")
        with archive.open(entry) as file:
            shape, dtype = _npy_header(file)
            held = entry.file_size - file.tell()
        if dtype.hasobject:
            raise BadInput(f"{path}: array {name} holds Python objects, not numbers; save it with a numeric dtype")
        if held != math.prod(shape) * dtype.itemsize:
            raise BadInput(f"{path}: array {name} declares shape {shape} but holds {held} bytes; save it anew")
        total += math.prod(shape) * max(dtype.itemsize, 4 if dtype.kind == "f" else 1)
    _check_memory(f"npz:{path}", total)


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _images(path: Path, images_name: str, labels_name: str, arrays: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One part of an npz file as images (N, C, H, W) and labels (N,)."""
    images, labels = arrays[images_name], arrays[labels_name]
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and _channels_last(images.shape):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim != 4:
        raise BadInput(
            f"{path}: array {images_name} has shape {images.shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W)"
        )
    if images.dtype.kind in "iu" and images.dtype != np.uint8:
        if images.size and not 0 <= images.min() <= images.max() <= 255:
            raise BadInput(f"{path}: array {images_name} is {images.dtype} beyond 0..255; store uint8 or float32")
        images = images.astype(np.uint8)
    elif images.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what becomes infinite is refused later
            images = images.astype(np.float32)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "u" and labels.size and labels.max() > np.iinfo(np.int64).max:
        raise BadInput(f"{path}: label {labels.max()} is out of range; number the classes from 0")
    if labels.dtype.kind in "iu":
        labels = labels.astype(np.int64)
    return _tensor(path, images_name, images), _tensor(path, labels_name, labels)


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


_SOURCES = {
    "digits": _Source(_read_digits, (0.3053,), (0.3760,), crop=1 / 8, path="", test_seed=0),
    "cifar10": _Source(
        _read_cifar, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), crop=1 / 8, flip=True, downloadable=True
    ),
    "cifar100": _Source(
        _read_cifar, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), crop=1 / 8, flip=True, downloadable=True
    ),
    "svhn": _Source(_read_svhn, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), crop=1 / 8, downloadable=True),
    "fashion-mnist": _Source(_read_fashion_mnist, (0.2860,), (0.3530,), flip=True, downloadable=True),
    "imagefolder": _Source(
        _read_imagefolder,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        crop=1 / 8,
        flip=True,
        grey_mean_std=(0.449, 0.226),
    ),
    "npz": _Source(_read_npz, None, None, path="FILE"),
}
