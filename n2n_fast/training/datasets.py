"""Data sets by name: the digits of the package, torchvision's, folders of images and .npz files."""

import contextlib
import gzip
import io
import os
import re
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from n2n_fast.files.errors import BadInput, described
from n2n_fast.training.arrays import read_npz
from n2n_fast.training.data import Augmentation, ImageData, assemble
from n2n_fast.training.folders import read_folder
from n2n_fast.training.splits import Part, Parts, keys_of

NATURAL = "natural"  # the order of names in which 2 comes before 10
LARGEST_SIZE = 4096  # pixels
DIGIT_NAMES = tuple("0123456789")


@dataclass(frozen=True)
class _Request:
    """What a reader is asked for. where: the part of the spec behind the colon. others: paths of further parts."""

    name: str
    where: Path
    image_size: tuple[int, int] | None
    channels: int | None
    download: bool
    skip_bad: bool
    others: dict[str, Path]
    spec: str

    def check_memory(self, needed: int) -> None:
        """Refuse `needed` bytes that are more than half of this machine's memory."""
        limit = _memory_bytes() // 2
        if needed > limit:
            raise BadInput(
                f"{self.spec}: {needed / 1e9:.1f} GB are needed for the images but half of memory is"
                f" {limit / 1e9:.1f} GB; use a smaller --image-size or fewer images"
            )


@dataclass(frozen=True)
class _Content:
    """What a reader gives: parts, unchecked, the names of the classes where it knows them, and notes."""

    parts: Parts
    class_names: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Source:
    """A kind of data set; mean and std are the published ones, crop is a share of the image size."""

    read: Callable[[_Request], _Content]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    crop: float = 0.0
    flip: bool = False
    path: str = "DIR"
    downloadable: bool = False
    grey_mean_std: tuple[float, float] | None = field(default=None)

    def moments(self, stored: int, channels: int | None) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """The published mean and deviation, for so many channels stored and, or None, asked for."""
        if self.grey_mean_std is not None and stored == 1 and channels != 3:
            return self.grey_mean_std[:1], self.grey_mean_std[1:]
        return self.mean, self.std

    def augmentation(self, images: Tensor) -> Augmentation | None:
        """That of images (N, C, H, W), by their short side."""
        if images.ndim != 4 or not (self.crop or self.flip):
            return None
        return Augmentation(max(1, round(self.crop * min(images.shape[2:]))) if self.crop else 0, self.flip)


def load(
    spec: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    classes: int | None = None,
    class_order: str | Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    download: bool = False,
    validation: float | str | Path | None = None,
    test: float | str | Path | None = None,
    skip_bad: bool = False,
    device: torch.device | str = "cpu",
) -> ImageData:
    """Read digits, cifar10:DIR, cifar100:DIR, svhn:DIR, fashion-mnist:DIR, imagefolder:DIR or npz:FILE; or BadInput.

    image_size: pixels, (height, width) or of a square, that images cover and are cropped to. channels: of a batch; grey
    images can be 3. classes: where labels do not show their number. class_order: names in the order of the teacher's
    outputs, or "natural": 2 before 10. mean, std: of pixels in 0..1, one or one a channel. validation, test: a folder
    or .npz file, or a share or number of the training images (`from_tensors`). skip_bad: go on without broken images.
    """
    further = {"validation": validation, "test": test}
    others = {part: Path(value).expanduser() for part, value in further.items() if isinstance(value, str | Path)}
    shares = {part: None if part in others else value for part, value in further.items()}
    source, request = _parse(spec, image_size, channels, download, skip_bad, others)
    content = source.read(request)
    parts = {part: _resized(request, value) for part, value in content.parts.named.items()}
    names, parts = _ordered(spec, content.class_names, parts, class_order)
    images = parts["train"].images
    published = source.moments(images.shape[1], channels)
    more: dict[str, Any] = {"class_names": names, "notes": content.notes, **shares}
    more |= {"mean": mean or published[0], "std": std or published[1], "channels": channels}
    more |= {"classes": classes or len(names) or None, "augmentation": source.augmentation(images)}
    return assemble(spec, Parts(**parts), **more).to(device)


def _parse(
    spec: str,
    image_size: int | tuple[int, int] | None,
    channels: int | None,
    download: bool,
    skip_bad: bool,
    others: dict[str, Path],
) -> tuple[_Source, _Request]:
    """Settle what `spec` asks for."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size and (image_size[0], image_size[1])
    name, _, where = spec.partition(":")
    source = _SOURCES.get(name)
    known = ", ".join(f"{kind}:{entry.path}" if entry.path else kind for kind, entry in _SOURCES.items())
    if source is None:
        raise BadInput(f"{spec!r} is no known data set; give one of {known}")
    if bool(where) != bool(source.path):
        raise BadInput(f"{spec!r}: write it as {name}{':' + source.path if source.path else ''}")
    if size is not None and not all(0 < side <= LARGEST_SIZE for side in size):
        text = size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"
        raise BadInput(f"image size {text} is out of range; give 1 to {LARGEST_SIZE} pixels")
    if download and not source.downloadable:
        able = ", ".join(kind for kind, entry in _SOURCES.items() if entry.downloadable)
        raise BadInput(f"{name} cannot be downloaded; leave out --download, which is for {able}")
    for part, path in others.items():
        if name not in ("imagefolder", "npz"):
            raise BadInput(f"--{part} {path}: {name} has parts of its own; give a share or a number of images")
    return source, _Request(name, Path(where).expanduser(), size, channels, download, skip_bad, others, spec)


def _resized(request: _Request, part: Part) -> Part:
    """Images (N, C, H, W) scaled to cover the size asked for, then cropped at the centre."""
    images, size = part.images, request.image_size
    if size is None or images.ndim != 4 or not images.numel() or tuple(images.shape[2:]) == size:
        return part
    from torchvision.transforms import functional

    itemsize = 1 if images.dtype == torch.uint8 else 4
    request.check_memory(len(images) * images.shape[1] * size[0] * size[1] * itemsize)
    scale = max(wanted / side for wanted, side in zip(size, images.shape[2:], strict=True))
    covering = [max(wanted, int(side * scale)) for wanted, side in zip(size, images.shape[2:], strict=True)]
    keys = keys_of(images) if part.keys is None else part.keys
    chunks = [
        functional.center_crop(functional.resize(chunk, covering, antialias=True), list(size))
        for chunk in torch.split(images if images.dtype == torch.uint8 else images.float(), 4096)
    ]
    return replace(part, images=torch.cat(chunks), keys=keys)


def _ordered(
    spec: str, names: Sequence[str], parts: dict[str, Part], order: str | Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, Part]]:
    """Class names and parts with the classes numbered in this order."""
    if order is None:
        return tuple(names), parts
    if not names:
        names = tuple(map(str, range(1 + max(int(part.labels.max()) for part in parts.values()))))
    wanted = sorted(names, key=natural) if order == NATURAL else list(order)
    if sorted(wanted) != sorted(names):
        odd = ", ".join(sorted(set(wanted) ^ set(names))[:3]) or "a name twice"
        raise BadInput(f"{spec}: --class-order and the {len(names)} classes differ ({odd}); name each class once")
    number = torch.tensor([wanted.index(name) for name in names])
    return tuple(wanted), {key: replace(part, labels=number[part.labels.long()]) for key, part in parts.items()}


def natural(name: str) -> list[tuple[int, str]]:
    """A key by which names are sorted with their numbers as numbers."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _memory_bytes() -> int:
    try:
        return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not every system tells
        return sys.maxsize


def _read_digits(request: _Request) -> _Content:
    """Scikit-learn's digits, their levels 0..16 spread over 0..255."""
    with resources.files("n2n_fast.training").joinpath("digits.npz").open("rb") as file:
        arrays = np.load(io.BytesIO(file.read()), allow_pickle=False)
    levels = torch.from_numpy(arrays["images"]).float() * (255 / 16)
    images, labels = levels.round().byte().unsqueeze(1), torch.from_numpy(arrays["labels"]).long()
    return _Content(Parts(Part(images, labels, "digits")), DIGIT_NAMES)


def _read_cifar(request: _Request) -> _Content:
    from torchvision import datasets

    kind: Any = datasets.CIFAR10 if request.name == "cifar10" else datasets.CIFAR100

    # The files may lie in the directory itself rather than in the folder of that name in it.
    class Flat(kind):  # type: ignore[misc]
        base_folder = ""

    here = (request.where / kind.train_list[0][0]).is_file()
    parts = _read_torchvision(request, lambda train, **options: (Flat if here else kind)(train=train, **options))
    tensors = [(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), part.targets) for part in parts]
    train, test = ((images, torch.tensor(labels, dtype=torch.int64)) for images, labels in tensors)
    return _Content(_of_torchvision(request, train, test), parts[0].classes)


def _read_svhn(request: _Request) -> _Content:
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
    return _Content(_of_torchvision(request, train, test), DIGIT_NAMES)


def _importable(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


_FASHION_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def _read_fashion_mnist(request: _Request) -> _Content:
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
    return _Content(_of_torchvision(request, train, test), parts[0].classes)


def _of_torchvision(request: _Request, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Parts:
    return Parts(Part(*train, f"{request.name}, train"), test=Part(*test, f"{request.name}, test"))


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
        f"{request.name} cannot be {action} {path} ({described(error)});"
        " remove what is there and add --download to fetch it anew"
    )


def _read_imagefolder(request: _Request) -> _Content:
    channels = 1 if request.channels == 1 else 3
    parts, classes, notes = read_folder(
        request.where, request.image_size, channels, request.skip_bad, request.check_memory, request.others
    )
    return _Content(parts, classes, notes)


def _read_npz(request: _Request) -> _Content:
    parts, notes = read_npz(request.where, request.check_memory)
    for part, path in request.others.items():
        other, more = read_npz(path, request.check_memory)
        parts = replace(parts, **{part: replace(other.train, origin=str(path))})
        notes += more
    return _Content(parts, (), notes)


_SOURCES = {
    "digits": _Source(_read_digits, (0.3053,), (0.3760,), crop=1 / 8, path=""),
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
