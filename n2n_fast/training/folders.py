"""Folders of images: a folder for each class, in parts or in none."""

import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from n2n_fast.files.errors import BadInput, described
from n2n_fast.training.splits import Part, Parts, key_of

PART_NAMES = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
LARGEST_SIDE = 224  # pixels, where no size is asked for
SHOWN = 20  # files that cannot be used, by name


class Unusable(Exception):
    """An image file that cannot be used; says why."""


@dataclass
class Bad:
    """What cannot be used, and why; reading goes on without it where `skip` is set."""

    skip: bool
    lines: list[str] = field(default_factory=list)
    deep: int = 0  # images of 16 bits a pixel, which are scaled

    def notes(self, root: Path) -> list[str]:
        """A line on what was skipped. Raises BadInput where it may not be."""
        if not self.lines:
            return []
        more = f" and {len(self.lines) - SHOWN} more" if len(self.lines) > SHOWN else ""
        text = f"{'; '.join(self.lines[:SHOWN])}{more}"
        if not self.skip:
            raise BadInput(f"{root}: {text}; repair or remove them, or add --skip-bad to go on without")
        return [f"skipped: {text}"]


@dataclass(frozen=True)
class Listing:
    """The image files of a part: pairs of a path and a class."""

    folder: Path
    files: list[tuple[Path, int]]


def read_folder(
    root: Path,
    image_size: tuple[int, int] | None,
    channels: int,
    skip_bad: bool,
    check_memory: Callable[[int], None],
    others: dict[str, Path],
) -> tuple[Parts, list[str], list[str]]:
    """Decode `root`/train, /val and /test (of any case), or one folder of class folders; parts, classes and notes.

    image_size: (height, width); default: the commonest short side, both ways, at most 224. channels: 1 or 3. others:
    folders of further parts, by part. check_memory: is told how many bytes are needed. Raises BadInput.
    """
    if not root.is_dir():
        raise BadInput(f"{root} is not a directory; give one that holds a folder of images for each class")
    bad = Bad(skip_bad)
    folders = {**_part_folders(root), **others}
    classes = _class_names(folders["train"])
    listings = {part: _listing(folder, classes, bad) for part, folder in folders.items()}
    sizes = _sizes([path for listing in listings.values() for path, _ in listing.files], bad)
    notes: list[str] = []
    if image_size is None:
        image_size, notes = _commonest([sizes[path] for path, _ in listings["train"].files if path in sizes])
    check_memory(sum(len(listing.files) for listing in listings.values()) * channels * image_size[0] * image_size[1])
    parts = {name: _decode(listing, sizes, image_size, channels, bad) for name, listing in listings.items()}
    if bad.deep:
        notes.append(f"{bad.deep} images of 16 bits a pixel, scaled to 8")
    return Parts(**parts), classes, [*notes, *bad.notes(root)]


def _part_folders(root: Path) -> dict[str, Path]:
    """The folders of the parts, by part; `root` itself is that of the training images where there is no such folder."""
    folders: dict[str, Path] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        part = next((part for part, names in PART_NAMES.items() if folder.name.lower() in names), None)
        if part in folders:
            raise BadInput(f"{root} holds {folders[part].name} and {folder.name}, which are one part; keep one")
        if part is not None:
            folders[part] = folder
    return folders if "train" in folders else {"train": root}


def _class_names(folder: Path) -> list[str]:
    """The class folders in the order of their names as text, as torchvision numbers them."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise BadInput(f"{folder} is no folder of class folders of images")
    return names


def _listing(folder: Path, classes: list[str], bad: Bad) -> Listing:
    """The image files of a part's class folders, in the order of their paths."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        raise BadInput(f"{folder} is not a directory; give one that holds a folder of images for each class")
    here = set(_class_names(folder))
    bad.lines += [f"{folder / name} is of no class of the training images" for name in sorted(here - set(classes))]
    files = []
    for label, name in enumerate(classes):
        paths = [
            Path(place) / file
            for place, _, found in sorted(os.walk(folder / name, followlinks=True))
            for file in sorted(found)
            if file.lower().endswith(IMG_EXTENSIONS)
        ]
        if not paths:
            bad.lines.append(f"{folder / name} {'holds no images' if name in here else 'is missing'}")
        files += [(path, label) for path in paths]
    return Listing(folder, files)


def _sizes(paths: Sequence[Path], bad: Bad) -> dict[Path, tuple[int, int]]:
    """The width and height of each file whose header can be read and does not promise too much."""
    from PIL import Image

    sizes = {}
    with warnings.catch_warnings():  # which is for all threads: not where files are decoded
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for path in paths:
            try:
                with _open(path, path) as image:
                    bad.deep += _has_16_bits(image)
                    sizes[path] = image.size
            except Unusable as reason:  # noqa: PERF203
                bad.lines.append(f"{path} {reason}")
    return sizes


def _open(path: Path, content: Path | io.BytesIO) -> Any:
    """An image whose header was read from its file or from what stands in it."""
    from PIL import Image

    if path.name.startswith("._"):
        raise Unusable("is no image but what macOS keeps beside one")
    try:
        if path.stat().st_size == 0:
            raise Unusable("is empty")
        return Image.open(content)
    except FileNotFoundError:
        raise Unusable("is a link to nothing") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unusable(f"cannot be decoded ({described(error)})") from None


def _commonest(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], list[str]]:
    """The commonest short side as the size of a square; and a line on it where the images are of several sizes."""
    if not sizes:
        return (1, 1), []
    (short, _), *_ = sorted(Counter(min(size) for size in sizes).items(), key=lambda item: (-item[1], item[0]))
    side = min(LARGEST_SIDE, short)
    different = sorted(set(sizes))
    if different == [(side, side)]:
        return (side, side), []
    (a, b), (c, d) = different[0], different[-1]
    of = f"{a}x{b}" if len(different) == 1 else f"{len(different)} sizes from {a}x{b} to {c}x{d}"
    return (side, side), [f"images of {of} (width x height) are brought to {side}x{side}; --image-size sets another"]


def _decode(
    listing: Listing,
    sizes: dict[Path, tuple[int, int]],
    image_size: tuple[int, int],
    channels: int,
    bad: Bad,
) -> Part:
    """The images of a part, uint8, scaled to cover `image_size` and cropped at the centre.

    Keys are of the files, since decoders differ from machine to machine.
    """
    files = [(path, label) for path, label in listing.files if path in sizes]
    images = torch.empty(len(files), channels, *image_size, dtype=torch.uint8)
    keys, good = np.zeros(len(files), dtype=np.uint64), np.ones(len(files), dtype=bool)

    def decode(place: int) -> str | None:
        path = files[place][0]
        try:
            content = path.read_bytes()
            images[place] = _pixels(path, content, image_size, channels)
            keys[place] = key_of(content)
        except OSError as error:
            good[place] = False
            return f"{path} cannot be read ({error.strerror})"
        except Unusable as reason:
            good[place] = False
            return f"{path} {reason}"
        return None

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        bad.lines += [line for line in pool.map(decode, range(len(files))) if line]
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    names = [str(path.relative_to(listing.folder)) for path, _ in files]
    part = Part(images, labels, str(listing.folder), keys, names)
    return part if good.all() else part.subset(good)


def _has_16_bits(image: Any) -> bool:
    return bool(image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"))


def _pixels(path: Path, content: bytes, size: tuple[int, int], channels: int) -> Tensor:
    """uint8 (channels, height, width)."""
    from PIL import Image, ImageOps

    with _open(path, io.BytesIO(content)) as image:
        try:
            image.load()
            whole = image
            if _has_16_bits(image):
                whole = Image.fromarray((np.asarray(image).astype(np.uint32) / 257).round().astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise Unusable("has 32 bits a pixel, of a range that it does not tell; save it with 8 or 16")
            if channels == 1 and whole.mode not in ("1", "L", "LA"):
                raise Unusable("is no grey image but 1 channel is asked for; use a teacher with 3 input channels")
            whole = whole.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise Unusable(f"cannot be decoded ({described(error)})") from None
    fitted = ImageOps.fit(whole, (size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted).reshape(*size, channels)).permute(2, 0, 1)
