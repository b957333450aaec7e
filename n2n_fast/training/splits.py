"""Which images are for training, for validation and for the test.

The parts that a data set names are used as they are. What is missing is cut by the content of the images alone: the
same images give the same parts whatever their order, the seed, the command or the machine, and copies of one image
stay together.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from n2n_fast.files.errors import BadInput

VALIDATION_SHARE = 0.1
VALIDATION_LIMIT = 5000
TEST_SHARE = 0.2  # of the training images, where there is no other part
SHOWN = 3  # names of images that are in two parts


@dataclass(frozen=True)
class Part:
    """Images of one part of a data set, unchecked.

    images: (N, C, H, W); labels: (N,). keys: what tells each image's content, (N,) uint64; made of `images` where it is
    None. names: of the images, for messages; their numbers where it is empty. origin: where they come from. cut_from:
    the origin of the part that they were cut from, if they were.
    """

    images: Tensor
    labels: Tensor
    origin: str
    keys: np.ndarray | None = None
    names: Sequence[str] = ()
    cut_from: str = ""

    def subset(self, chosen: np.ndarray) -> "Part":
        """The images that are chosen, (N,) bool."""
        index = torch.from_numpy(chosen).to(self.images.device)
        keys = None if self.keys is None else self.keys[chosen]
        names = [name for name, taken in zip(self.names, chosen, strict=True) if taken] if self.names else ()
        labels = self.labels[index.to(self.labels.device)]
        return replace(self, images=self.images[index], labels=labels, keys=keys, names=names)


@dataclass(frozen=True)
class Parts:
    """The three parts of a data set; test is None where there is none."""

    train: Part
    validation: Part | None = None
    test: Part | None = None

    @property
    def named(self) -> dict[str, Part]:
        """Those that there are, by name."""
        return {name: part for name, part in vars(self).items() if part is not None}


def key_of(content: bytes) -> int:
    """A number of 64 bits for the content of an image: equal images have equal ones."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def keys_of(images: Tensor) -> np.ndarray:
    """`key_of` each image, (N,) uint64."""
    rows = images.detach().cpu().contiguous().flatten(1).numpy()
    return np.fromiter((key_of(row.tobytes()) for row in rows), dtype=np.uint64, count=len(rows))


def digest_of(parts: Parts) -> str:
    """A short hash of all parts: of the keys and labels of their images, in their order."""
    content = hashlib.sha256()
    for name, part in parts.named.items():
        assert part.keys is not None
        content.update(f"{name} {len(part.keys)}".encode())
        content.update(part.keys.astype("<u8").tobytes())
        content.update(part.labels.cpu().numpy().astype("<i8").tobytes())
    return content.hexdigest()[:16]


def cut(part: Part, count: int, what: str) -> tuple[Part, Part]:
    """(The rest, about `count` images), each class in proportion, by content alone; `what` names the latter's share.

    Of the distinct images, sorted by class and key, every (N / count)-th is taken, with all its copies. Classes come in
    the order of their smallest keys, so that their numbers do not matter.
    """
    assert part.keys is not None
    distinct, first = np.unique(part.keys, return_index=True)
    _, classes = np.unique(part.labels.cpu().numpy()[first], return_inverse=True)
    smallest = np.full(classes.max() + 1, distinct.max())
    np.minimum.at(smallest, classes, distinct)
    order = np.lexsort((distinct, smallest[classes]))
    wanted = min(max(1, round(count * len(distinct) / len(part.keys))), len(distinct) - 1)
    if wanted < 1:
        raise BadInput(f"{part.origin}: all images are the same; none can be set apart for {what}")
    places = ((np.arange(wanted) + 0.5) * (len(distinct) / wanted)).astype(np.int64)
    chosen = np.isin(part.keys, distinct[order[places]])
    taken = replace(part.subset(chosen), origin=f"{what} of {part.origin}, by content", cut_from=part.origin)
    return part.subset(~chosen), taken


def complete(name: str, parts: Parts, validation: float | None, test: float | None) -> Parts:
    """All parts, those that are missing or asked for as a share or a number cut from the others.

    A test part is cut from a validation part, of which it gets half, or else from the training images; a validation
    part is cut from what is left of these.
    """
    train, held_out, last = parts.train, parts.validation, parts.test
    if test is not None:
        train, last = cut(train, _count(name, "test", test, len(train.labels)), _share(test))
    elif last is None and held_out is not None and validation is None and len(held_out.labels) > 1:
        held_out, last = cut(held_out, len(held_out.labels) // 2, "half")
        held_out = replace(held_out, origin=f"the rest of {held_out.origin}")
    elif last is None:
        train, last = cut(train, max(1, round(TEST_SHARE * len(train.labels))), f"{TEST_SHARE:.0%}")
    if validation is not None or held_out is None:
        total = len(train.labels)
        count = max(1, min(round(VALIDATION_SHARE * total), VALIDATION_LIMIT))
        if validation is not None:
            count = _count(name, "validation", validation, total)
        if total < 2:
            raise BadInput(f"{name}: too few images to split, {total} is left for training and validation; add some")
        train, held_out = cut(train, count, f"{count / total:.0%}")
    return Parts(train, held_out, last)


def _share(value: float) -> str:
    return f"{value:.0%}" if value < 1 else f"{value:.0f} images"


def _count(name: str, part: str, value: float, total: int) -> int:
    """How many of `total` images a share, or a number, is."""
    count = round(value * total) if 0 < value < 1 else value
    if not 0 < count < total or count != int(count):
        raise BadInput(f"{name}: {part} is {value}; give a share between 0 and 1 or a number of the {total} images")
    return int(count)


def in_two_parts(parts: Parts) -> list[str]:
    """A line for each two parts that share images."""
    lines, named = [], list(parts.named.items())
    for n, (name, part) in enumerate(named):
        for other, another in named[n + 1 :]:
            assert part.keys is not None
            assert another.keys is not None
            both = np.flatnonzero(np.isin(another.keys, part.keys))
            if len(both):
                first = [another.names[i] if another.names else f"image {i}" for i in both[:SHOWN]]
                more = f" and {len(both) - SHOWN} more" if len(both) > SHOWN else ""
                verb = "image of {} is" if len(both) == 1 else "images of {} are"
                lines.append(f"{len(both)} {verb.format(other)} in {name} too: {', '.join(first)}{more}")
    return lines
