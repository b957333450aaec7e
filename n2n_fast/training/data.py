"""Image data as tensors on the device: its parts, their normalisation and augmentation, accuracy on them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from n2n_fast.files.errors import BadInput
from n2n_fast.training.splits import Part, Parts, complete, digest_of, in_two_parts, keys_of

NORMALISED = 16.0  # numbers that no normalised image exceeds


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
    """A data set in its three parts; test is None where there is none.

    class_names: one a class. origins: where each part comes from, by its name. notes: lines on what was scaled, skipped
    or is there twice. digest: of the content of all parts. cut_from_train: the parts that were training images.
    value_range: of the stored training images.
    """

    name: str
    train: Split
    validation: Split
    test: Split | None
    classes: int
    augmentation: Augmentation | None = None
    class_names: tuple[str, ...] = ()
    origins: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    digest: str = ""
    cut_from_train: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data on another device."""
        test = None if self.test is None else self.test.to(device)
        return replace(self, train=self.train.to(device), validation=self.validation.to(device), test=test)

    @property
    def parts(self) -> dict[str, Split]:
        """The parts that there are, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}

    def described(self) -> dict[str, Any]:
        """What the data were taken to be, as JSON has it.

        image_size: (height, width); range: of the stored numbers; mean, std: by which they are normalised.
        """
        train = self.train
        return {
            "name": self.name,
            "digest": self.digest,
            "classes": list(self.class_names),
            "parts": {name: {"images": len(s), "from": self.origins.get(name, "")} for name, s in self.parts.items()},
            "image_size": list(train.image_size),
            "channels": train.channels,
            "dtype": _name(train.images.dtype),
            "range": list(self.value_range or (float(train.images.min()), float(train.images.max()))),
            "mean": train.mean.tolist(),
            "std": train.std.tolist(),
            "notes": list(self.notes),
        }


Labelled = tuple[Tensor, Tensor]


def from_tensors(
    name: str,
    train: Labelled,
    test: Labelled | float | None = None,
    *,
    validation: Labelled | float | None = None,
    classes: int | None = None,
    class_names: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels: int | None = None,
    augmentation: Augmentation | None = None,
    device: torch.device | str = "cpu",
) -> ImageData:
    """Check images (N, C, H, W; uint8 or float) with integer labels (N,), and cut the parts that are missing.

    test, validation: images with labels, or a share below 1 or a number of images of `train`. By default the test part
    is half of the validation part or a fifth of `train`, and the validation part a tenth of the rest, at most 5,000;
    what is cut depends on the images alone. Without `mean` and `std` those of uint8 images are measured, while float
    images are taken as already normalised; those in 0..255 are scaled to 0..1. Raises BadInput.
    """
    given = {"train": train, "validation": validation, "test": test}
    shares = {part: value for part, value in given.items() if isinstance(value, int | float)}
    parts = {part: Part(*value, part) for part, value in given.items() if isinstance(value, tuple)}
    return assemble(
        name,
        Parts(**parts),
        validation=shares.get("validation"),
        test=shares.get("test"),
        classes=classes,
        class_names=class_names,
        mean=mean,
        std=std,
        channels=channels,
        augmentation=augmentation,
    ).to(device)


def assemble(
    name: str,
    parts: Parts,
    *,
    validation: float | None = None,
    test: float | None = None,
    classes: int | None = None,
    class_names: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels: int | None = None,
    augmentation: Augmentation | None = None,
    notes: Sequence[str] = (),
) -> ImageData:
    """The data set of parts as they were read; as `from_tensors`."""
    checked = {part: _checked(f"{name}, {part}", value) for part, value in parts.named.items()}
    _check_alike(name, checked)
    classes = _check_classes(name, [value.labels for value in checked.values()], classes)
    checked, scaled = _scaled(name, checked)
    moments = _moments(name, checked["train"].images, mean, std, channels)
    whole = complete(name, Parts(**checked), validation, test)
    splits = {part: Split(value.images, value.labels, *moments) for part, value in whole.named.items()}
    return ImageData(
        name,
        splits["train"],
        splits["validation"],
        splits.get("test"),
        classes,
        augmentation,
        tuple(class_names) or tuple(map(str, range(classes))),
        {part: value.origin for part, value in whole.named.items()},
        (*notes, *scaled, *in_two_parts(whole)),
        digest_of(whole),
        tuple(part for part, value in whole.named.items() if value.cut_from == parts.train.origin),
        (float(splits["train"].images.min()), float(splits["train"].images.max())),
    )


def _check_alike(name: str, parts: dict[str, Part]) -> None:
    """Raise BadInput where the parts' images are not of one shape and type."""
    kinds = {part: (*value.images.shape[1:], _name(value.images.dtype)) for part, value in parts.items()}
    for part, kind in kinds.items():
        if kind != kinds["train"]:
            raise BadInput(
                f"{name}: train images are {kinds['train'][:3]} but {kind[:3]} in {part} (channels, height, width), of"
                f" {kinds['train'][3]} and {kind[3]}; make them equal"
            )


def _checked(name: str, part: Part) -> Part:
    """The same images as uint8 or float32, with labels as int64 and keys; or BadInput."""
    images, labels = part.images, part.labels
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
    keys = keys_of(images) if part.keys is None else part.keys
    if images.dtype.is_floating_point:
        images = images.float()
        if not bool(images.isfinite().all()):
            bad = int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
            raise BadInput(f"{name}: image {bad} holds NaN or infinite values; remove or repair it")
    elif images.dtype != torch.uint8:
        raise BadInput(f"{name}: images are {_name(images.dtype)}; store them as uint8 (0..255) or float32")
    return replace(part, images=images, labels=labels.long(), keys=keys)


def _scaled(name: str, parts: dict[str, Part]) -> tuple[dict[str, Part], list[str]]:
    """Float images in 0..255 as such in 0..1, and a line that says so; BadInput for a range that means nothing."""
    if not parts["train"].images.dtype.is_floating_point:
        return parts, []
    low = min(float(part.images.min()) for part in parts.values())
    high = max(float(part.images.max()) for part in parts.values())
    span = f"{low:.4g}..{high:.4g}"
    if low >= -NORMALISED and high <= NORMALISED:
        inside = low >= 0 and high <= 1
        return parts, [f"float images in {span}: taken as {'pixels in 0..1' if inside else 'already normalised'}"]
    if low < 0 or high > 255:
        raise BadInput(
            f"{name}: float images reach over {span}; scale them to 0..1 or 0..255, or normalise them"
            f" (-{NORMALISED:.0f}..{NORMALISED:.0f})"
        )
    scaled = {part: replace(value, images=value.images / 255) for part, value in parts.items()}
    return scaled, [f"float images in {span}: scaled from 0..255 to 0..1"]


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def logits_of_batches(model: nn.Module, split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (n, classes) and labels (n,) of all images, in eval mode; the model's mode is put back.

    Batches have at most `batch_size` images, and as far as can be one size: a GPU plans anew for each.
    """
    training = model.training
    model.eval()
    count = max(1, -(-len(split) // batch_size))
    for images, labels in split.batches(-(-len(split) // count)):
        yield model(images.contiguous(memory_format=torch.channels_last)), labels
    model.train(training)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, batch_size: int = 512, *, strict: bool = False) -> float:
    """Share of `split` that `model` classifies rightly, in 0..1, in eval mode; the model's mode is put back.

    An image whose logits are not all finite is not classified rightly; strict: such a one raises ArithmeticError.
    """
    correct, finite = torch.zeros(2, dtype=torch.int64, device=split.labels.device)
    for logits, labels in logits_of_batches(model, split, batch_size):
        is_finite = logits.isfinite().all(1)
        correct += ((logits.argmax(1) == labels) & is_finite).sum()
        finite += is_finite.sum()
    if strict and int(finite) < len(split):
        raise ArithmeticError(f"the logits of {len(split) - int(finite)} of {len(split)} images are not finite")
    return int(correct) / len(split)
