"""Image data as tensors on the device: splits, augmentation, batches with the teacher's logits, and the readers."""

import contextlib
import functools
import gzip
import io
import math
import os
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from n2n_fast.errors import BadInput, first_line
from n2n_fast.reading import FREE_BYTES

VALIDATION_SHARE = 0.1
VALIDATION_LIMIT = 5000
TEST_SHARE = 0.2  # of a set that comes without a test split
KEPT_NUMBERS = 2**26  # of prepared batches that are held for the next student
KEPT_LOGITS = 2**28
MOST_UNPACKED = 200  # times the length of an .npz file: images do not compress like that


# ---------------------------------------------------------------------------------------------------------------------
# Splits


@dataclass(frozen=True)
class Split:
    """Labelled images on one device, normalised only when a batch is taken.

    images: (N, C, H, W) uint8 in 0..255, or float32 taken as it is; labels: (N,) int64;
    mean, std: (channels,) float32, of pixels in 0..1 where the images are uint8. Grey images (C = 1) with a mean of
    three channels give batches of three equal channels before normalisation.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Channels of a batch, which may be more than are stored."""
        return max(self.images.shape[1], self.mean.numel())

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def normalise(self, images: Tensor) -> Tensor:
        """Stored images (n, C, H, W) -> float32 (n, channels, H, W) with the mean taken off, in units of std."""
        unit = 255.0 if images.dtype == torch.uint8 else 1.0
        scale = (1 / (unit * self.std)).view(-1, 1, 1)
        shift = (self.mean / self.std).view(-1, 1, 1)
        return images.float() * scale - shift

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """index: (n,) int64 -> normalised float32 images (n, channels, H, W), labels (n,)."""
        return self.normalise(self.images[index]), self.labels[index]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, `batch_size` at a time, as `batch` gives them."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.normalise(self.images[part]), self.labels[part]

    def subset(self, index: Tensor) -> "Split":
        """The images at index (n,), in that order."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> "Split":
        """The same split on another device."""
        return Split(*(tensor.to(device) for tensor in (self.images, self.labels, self.mean, self.std)))


@dataclass(frozen=True)
class Augmentation:
    """Random shift-crop and horizontal flip of a batch; crop: pixels of zero padding on each side."""

    crop: int = 0
    flip: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """images: (n, C, H, W) of any dtype and device -> the same shape. `generator` lives on the CPU.

        Drawing on the CPU makes the batches of a seed the same on every device.
        """
        return self.apply(images, self.draw(len(images), generator))

    @property
    def views(self) -> int:
        """How many versions of an image are enough: both sides, and some places of the window."""
        return 4 if self.crop else 2 if self.flip else 1

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Top, left and whether mirrored of `count` images, (3, count) int64."""
        return torch.cat(
            [
                torch.randint(2 * self.crop + 1, (2, count), generator=generator),
                torch.randint(2, (1, count), generator=generator),
            ]
        )

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """images: (n, C, H, W) as `draws`, (3, n), say."""
        top, left, mirrored = draws.to(images.device)
        if self.crop:
            images = _crop(images, self.crop, top, left)
        if self.flip:
            images = torch.where(mirrored.bool().view(-1, 1, 1, 1), images.flip(-1), images)
        return images


def _crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad images (n, C, H, W) by zeros and cut a window of (H, W) at (top, left), each (n,), from every one."""
    height, width = images.shape[2:]
    padded = nn.functional.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


@dataclass(frozen=True)
class ImageData:
    """A data set, its training data split once into train and validation; test is None where there is none."""

    name: str
    train: Split
    validation: Split
    test: Split | None
    classes: int
    augmentation: Augmentation | None = None

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data on another device."""
        test = None if self.test is None else self.test.to(device)
        return replace(self, train=self.train.to(device), validation=self.validation.to(device), test=test)


def from_tensors(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None = None,
    *,
    classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels: int | None = None,
    augmentation: Augmentation | None = None,
    validation: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ImageData:
    """Check images (N, C, H, W; uint8 or float) with integer labels (N,) and split them by `seed`.

    Without `test` a fifth of `train` becomes the test split before anything else. Without `mean` and `std` those of
    uint8 images are measured, while float images are taken as already normalised. validation: a share below 1, or a
    number of images; a tenth, at most 5,000, by default. Raises BadInput.
    """
    parts = [_checked(f"{name}, train", *train)]
    if test is not None:
        parts.append(_checked(f"{name}, test", *test))
        if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
            shapes = " but ".join(str(tuple(images.shape[1:])) for images, _ in parts)
            raise BadInput(f"{name}: train images are {shapes} in test (channels, height, width); make them equal")
    classes = _check_classes(name, [labels for _, labels in parts], classes)
    moments = _moments(name, parts[0][0], mean, std, channels)
    whole = Split(*parts[0], *moments)
    if test is None:
        rest, kept = _split_off(whole, max(1, round(TEST_SHARE * len(whole))), seed)
    else:
        rest, kept = whole, Split(*parts[1], *moments)
    learn, held_out = _split_off(rest, _validation_count(name, validation, len(rest)), seed + 1)
    return ImageData(name, learn, held_out, kept, classes, augmentation).to(device)


def _checked(name: str, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same images as uint8 or float32 and labels as int64, or BadInput."""
    if images.ndim != 4:
        raise BadInput(f"{name}: images have shape {tuple(images.shape)}; expected (N, C, H, W)")
    if labels.ndim != 1:
        raise BadInput(f"{name}: labels have shape {tuple(labels.shape)}; expected one integer for each image")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise BadInput(f"{name}: labels are {_name(labels.dtype)}; store them as integers 0..classes-1")
    if len(images) != len(labels):
        raise BadInput(f"{name}: {len(images)} images but {len(labels)} labels; each image needs one label")
    if images.numel() == 0:
        raise BadInput(f"{name}: no images, the shape is {tuple(images.shape)}; hand over at least two classes of them")
    if images.dtype.is_floating_point:
        images = images.float()
        if not bool(images.isfinite().all()):
            bad = int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
            raise BadInput(f"{name}: image {bad} holds NaN or infinite values; remove or repair it")
    elif images.dtype != torch.uint8:
        raise BadInput(f"{name}: images are {_name(images.dtype)}; store them as uint8 (0..255) or float32")
    return images, labels.long()


def _check_classes(name: str, labels: list[Tensor], classes: int | None) -> int:
    """Number of classes, given or one more than the largest label; BadInput where the labels do not fit it."""
    low = min(int(part.min()) for part in labels)
    high = max(int(part.max()) for part in labels)
    if low < 0:
        raise BadInput(f"{name}: label {low} is negative; number the classes from 0")
    if classes is None:
        classes = high + 1
        if classes > sum(len(part) for part in labels):
            raise BadInput(f"{name}: label {high} is out of range, being no less than the number of images")
    if high >= classes:
        raise BadInput(f"{name}: label {high} is out of range for {classes} classes; number the classes from 0")
    present = int((labels[0].bincount() > 0).sum())
    if present < 2:
        raise BadInput(f"{name}: {present} class in the training data; at least 2 are needed")
    return classes


def _moments(
    name: str, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int | None
) -> tuple[Tensor, Tensor]:
    """Mean and deviation, each (channels of a batch,) float32, from what was given or from images (N, C, H, W)."""
    stored = images.shape[1]
    wanted = _batch_channels(name, stored, channels, mean, std)
    if mean is None or std is None:
        measured = _measure(images) if images.dtype == torch.uint8 else ([0.0] * stored, [1.0] * stored)
        mean, std = mean or measured[0], std or measured[1]
    for label, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, wanted):
            raise BadInput(f"{name}: {label} has {len(values)} values for {wanted} channels; give 1 or {wanted}")
        if not all(math.isfinite(value) for value in values) or (label == "std" and min(values) <= 0):
            allowed = "positive numbers" if label == "std" else "finite numbers"
            raise BadInput(f"{name}: {label} is {', '.join(map(str, values))}; give {allowed}")
    return torch.tensor(mean).float().expand(wanted).clone(), torch.tensor(std).float().expand(wanted).clone()


def _batch_channels(
    name: str, stored: int, channels: int | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> int:
    """Channels that batches shall have; only grey images can be given other than their own."""
    if channels is None:
        channels = 3 if stored == 1 and 3 in (len(mean or ()), len(std or ())) else stored
    if channels != stored and (stored, channels) != (1, 3):
        raise BadInput(
            f"{name}: images have {stored} channels but {channels} are asked for; only grey images can be given"
            f" other than their own, as 3; use a teacher with {stored} input channels"
        )
    return channels


def _measure(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel of uint8 images (N, C, H, W), in 0..1, from exact integer histograms."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten().int(), minlength=256).double().cpu() / channel.numel()
        centre = float((share * levels).sum())
        means.append(centre)
        deviations.append(max(float((share * (levels - centre) ** 2).sum()) ** 0.5, 1 / 255))
    return means, deviations


def _validation_count(name: str, validation: float | None, total: int) -> int:
    """Images to hold out of `total` for validation."""
    if total < 2:
        raise BadInput(f"{name}: too few images to split, {total} is left for training and validation; add some")
    if validation is None:
        return max(1, min(round(VALIDATION_SHARE * total), VALIDATION_LIMIT))
    count = round(validation * total) if 0 < validation < 1 else validation
    if not 0 < count < total or count != int(count):
        raise BadInput(
            f"{name}: validation is {validation}; give a share between 0 and 1 or a number of the {total} images"
        )
    return int(count)


def _split_off(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Split at random into (the rest, `count` images), each class in proportion.

    In a shuffled order sorted by class, every (N / count)-th image is taken.
    """
    shuffled = torch.randperm(len(split), generator=_generator(seed))
    labels = split.labels.cpu()
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    taken = (torch.arange(count, dtype=torch.float64).add(0.5) * (len(split) / count)).long()
    chosen = torch.zeros(len(split), dtype=torch.bool)
    chosen[by_class[taken]] = True
    index = chosen.to(split.images.device)
    return split.subset(~index), split.subset(index)


def _generator(*path: int) -> torch.Generator:
    """A CPU generator whose stream is settled by these numbers and unrelated to that of any others."""
    state = np.random.SeedSequence([number % 2**64 for number in path]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, batch_size: int = 512, *, strict: bool = False) -> float:
    """Share of `split` that `model` classifies rightly, in 0..1, in eval mode; the model's mode is put back.

    An image whose logits are not all finite is not classified rightly; strict: such a one raises ArithmeticError.
    """
    training = model.training
    model.eval()
    correct, finite = torch.zeros(2, dtype=torch.int64, device=split.labels.device)
    for images, labels in split.batches(batch_size):
        logits = model(images.contiguous(memory_format=torch.channels_last))
        is_finite = logits.isfinite().all(1)
        correct += ((logits.argmax(1) == labels) & is_finite).sum()
        finite += is_finite.sum()
    model.train(training)
    if strict and int(finite) < len(split):
        raise ArithmeticError(f"the logits of {len(split) - int(finite)} of {len(split)} images are not finite")
    return int(correct) / len(split)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class TeacherLogits:
    """A teacher's logits: computed for any images, and once for the whole of `split` where those are asked for.

    Keep one for as long as the teacher and the split stay the same, and hand it to every `Batches`.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], split: Split, batch_size: int = 512) -> None:
        """forward: images (n, C, H, W) float32 -> logits (n, classes), of a model in eval mode."""
        self._forward = forward
        self._split = split
        self._batch_size = batch_size
        self._whole: Tensor | None = None
        self._views: dict[tuple[int, int], Tensor] = {}
        self.of_steps: dict[tuple[int, int | None, int], Tensor] = {}  # by seed, views and step of a schedule

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images: (n, C, H, W) normalised -> logits (n, classes) without gradient."""
        return self._forward(images).detach()

    @functools.cached_property
    def classes(self) -> int:
        """How many logits an image has."""
        return self(self._split.batch(torch.zeros(1, dtype=torch.long))[0]).shape[1]

    def whole(self) -> Tensor:
        """Logits of the whole split without augmentation, (N, classes), computed on the first call."""
        if self._whole is None:
            parts = self._split.batches(self._batch_size)
            self._whole = torch.cat([self(images.contiguous(memory_format=torch.channels_last)) for images, _ in parts])
        return self._whole

    def of_view(self, schedule: "Schedule", view: int) -> Tensor:
        """Logits of the schedule's whole split in one of its views, (N, classes), computed on the first call."""
        key = schedule.seed, view
        if key not in self._views:
            parts = torch.split(torch.arange(len(schedule.split)), self._batch_size)
            self._views[key] = torch.cat([self(schedule.images(part, view)) for part in parts])
        return self._views[key]


@dataclass(frozen=True)
class Schedule:
    """The training batches of `epochs` (may be fractional) over a split: settled by the seed, the same each time.

    Each epoch is shuffled anew and drops its last incomplete batch, unless the split is smaller than a batch. A longer
    schedule of the same seed begins as a shorter one.
    views: the augmented versions of an image that epochs take turns with, so that a teacher needs to see each only
    once; None: another version each time.
    """

    split: Split
    epochs: float
    batch_size: int
    augmentation: Augmentation | None
    seed: int
    views: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be iterated."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size}; expected at least 1")
        if not 0 <= self.epochs < math.inf:
            raise ValueError(f"epochs: {self.epochs}; expected a finite number of at least 0")

    def __len__(self) -> int:
        """Number of steps: at least one where epochs > 0."""
        return max(1, round(self.epochs * self.steps_per_epoch)) if self.epochs else 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches that one pass over the split gives."""
        return max(1, len(self.split) // self.batch_size)

    def view_of(self, step: int) -> int | None:
        """The view that a step, counted from 0, takes."""
        return None if self.views is None else step // self.steps_per_epoch % self.views

    def indices(self, start: int = 0) -> Iterator[Tensor]:
        """For each step from `start` on the places in the split, (n,) int64 on its device."""
        shuffled: Tensor | None = None
        for step in range(start, len(self)):
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0 or shuffled is None:
                shuffled = torch.randperm(len(self.split), generator=_generator(self.seed, 0, epoch))
                shuffled = shuffled.to(self.split.images.device)
            yield shuffled[place * self.batch_size : (place + 1) * self.batch_size]

    def images(self, index: Tensor, view: int) -> Tensor:
        """Images at index (n,) in a view, normalised, (n, C, H, W) float32."""
        images = self.split.images[index]
        if self.augmentation is not None:
            images = self.augmentation.apply(images, self._draws(view)[:, index.cpu()])
        return self.split.normalise(images).contiguous()

    def _draws(self, view: int) -> Tensor:
        """How a view changes each image of the split, (3, N); two views in turn mirror what the other does not."""
        assert self.augmentation is not None
        draws = self.augmentation.draw(len(self.split), _generator(self.seed, 2, view // 2))
        if view % 2:
            others = self.augmentation.draw(len(self.split), _generator(self.seed, 3, view // 2))
            draws = torch.cat([others[:2], 1 - draws[2:]])
        return draws

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield index (n,), images (n, C, H, W) float32, augmented and normalised, and labels (n,)."""
        return self.after(0)

    def after(self, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same from step `start` on, counted from 0."""
        for step, index in enumerate(self.indices(start), start):
            view = self.view_of(step)
            if view is None:
                images = self.split.images[index]
                if self.augmentation is not None:
                    images = self.augmentation(images, _generator(self.seed, 1, step))
                images = self.split.normalise(images).contiguous()
            else:
                images = self.images(index, view)
            yield index, images, self.split.labels[index]


class Batches:
    """A schedule of training batches with the teacher's logits, the very same for every student that iterates it.

    A `TeacherLogits` runs once for each view of the whole split where a pass over it is asked for; otherwise the
    teacher runs once a step, on the first pass. Other schedules of the same seed reuse either.
    """

    def __init__(
        self,
        split: Split,
        teacher_logits: Callable[[Tensor], Tensor] | None,
        epochs: float,
        batch_size: int,
        augmentation: Augmentation | None,
        seed: int,
        *,
        views: int | None = None,
        keep: bool = False,
    ) -> None:
        """teacher_logits: images (n, C, H, W) -> logits (n, classes), best a `TeacherLogits` of this split; or none.

        views: of the schedule. keep: hold the prepared batches for the next pass, as far as KEPT_NUMBERS allow.
        """
        self.schedule = Schedule(split, epochs, batch_size, augmentation, seed, views)
        self._teacher_logits = teacher_logits
        self._memo: dict[tuple[int, int | None, int], Tensor] = {}
        if isinstance(teacher_logits, TeacherLogits):
            self._memo = teacher_logits.of_steps
        numbers = len(self.schedule) * batch_size * split.channels * math.prod(split.image_size)
        self._keep = keep and numbers <= KEPT_NUMBERS
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.schedule)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield images (n, C, H, W) float32, labels (n,) int64 and teacher logits (n, classes) or None."""
        return self.after(0)

    def after(self, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The same from step `start` on, counted from 0."""
        for step, (index, images, labels) in enumerate(self._prepared(start), start):
            yield images, labels, self._logits(step, index, images)

    def _prepared(self, start: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        if self._keep and not self._kept:
            self._kept = list(self.schedule)
        return self._kept[start:] if self._kept else self.schedule.after(start)

    def _logits(self, step: int, index: Tensor, images: Tensor) -> Tensor | None:
        teacher, schedule = self._teacher_logits, self.schedule
        if teacher is None:
            return None
        if isinstance(teacher, TeacherLogits):
            if schedule.augmentation is None:
                return teacher.whole()[index]
            view = schedule.view_of(step)
            if view is not None and self._covers_views(teacher):
                return teacher.of_view(schedule, view)[index]
        key = schedule.seed, schedule.views, step
        if key in self._memo:
            return self._memo[key]
        with torch.no_grad():
            logits = teacher(images).detach()
        if logits.numel() * len(schedule) <= KEPT_LOGITS:
            self._memo[key] = logits
        return logits

    def _covers_views(self, teacher: "TeacherLogits") -> bool:
        """Whether the schedule is long enough for whole views, and these small enough to be kept."""
        schedule = self.schedule
        numbers = len(schedule.split) * teacher.classes * (schedule.views or 0)
        return len(schedule) >= schedule.steps_per_epoch and numbers <= KEPT_LOGITS


# ---------------------------------------------------------------------------------------------------------------------
# Reading


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
    """Read `digits`, `cifar10:DIR`, `cifar100:DIR`, `svhn:DIR`, `fashion-mnist:DIR`, `imagefolder:DIR` or `npz:FILE`.

    image_size: pixels of the square that images are resized to, short side first, then cropped at the centre.
    channels: of a batch; grey images can be asked for as 3. classes: where the labels do not show their number.
    mean, std: of pixels in 0..1, one or one for each channel, in place of the published ones.
    validation, seed: see `from_tensors`. Raises BadInput.
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
    rest, test = _split_off(Split(*part, nothing, nothing), round(TEST_SHARE * len(part[1])), seed)
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
    with resources.files("n2n_fast").joinpath("digits.npz").open("rb") as file:
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
