"""Data on the command line: the options that say how images are read, and what they were taken to be."""

from pathlib import Path
from typing import Any

import click

from n2n_fast.cli.options import Decorator, numbers, option, options
from n2n_fast.training.data import ImageData
from n2n_fast.training.datasets import NATURAL, load

DIGITS = "digits"
DIGITS_VALIDATION = 0.2
SPECS = "digits, cifar10:DIR, cifar100:DIR, svhn:DIR, fashion-mnist:DIR, imagefolder:DIR or npz:FILE."
LONGEST = 5  # digits of a height or width
APART = 0.5  # by which share of its range images may reach beyond those expected, or not so far
NAMES_SHOWN = 3  # of the first and of the last classes

data_option = option("--data SPEC", SPECS, default=DIGITS, show_default=True)


def sides(_: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """(height, width) of --image-size, PX or HxW."""
    if value is None:
        return None
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and len(part) <= LONGEST and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is no size; give PX, or HEIGHTxWIDTH", param=option)
    return int(parts[0]), int(parts[-1])


def share_or_path(_: click.Context, option: click.Parameter, value: str | None) -> float | str | None:
    """A share or a number of images, or the path of a part."""
    if value is None:
        return None
    if not value:
        raise click.BadParameter("is empty; give a share, a number of images, or a path", param=option)
    try:
        return float(value)
    except ValueError:
        return str(Path(value).expanduser().absolute())


def image_options(shown: bool) -> Decorator:
    """How images are read."""
    part = "images: a path, or a share or number of the training images."
    return options(
        option("--mean M[,M,M]", "Pixel mean, 0 to 1; default: the set's own.", shown, callback=numbers),
        option("--std S[,S,S]", "Pixel deviation; default: the set's own.", shown, callback=numbers),
        option("--image-size PX", "Resize images to PX x PX, or HEIGHTxWIDTH.", shown, callback=sides),
        option("--validation PART", f"Validation {part}", shown, callback=share_or_path),
        option("--test PART", f"Test {part}", shown, callback=share_or_path),
        option("--class-order NAMES", f"Classes as the teacher numbers them, or {NATURAL}: 2 before 10.", shown),
        option("--skip-bad", "Go on without images that cannot be read.", shown),
        option("--download", "Fetch a missing data set (cifar, svhn, fashion-mnist).", shown),
    )


def read_data(values: dict[str, Any], channels: int | None) -> ImageData:
    """The data that a command's options name, with so many input channels."""
    names = ("image_size", "mean", "std", "test", "skip_bad", "download", "device")
    named = {name: values[name] for name in names if name in values}
    validation, order = values.get("validation"), values.get("class_order")
    if values["data"] == DIGITS and validation is None:
        validation = DIGITS_VALIDATION
    if isinstance(order, str) and order != NATURAL:
        order = order.split(",")
    return load(values["data"], channels=channels, validation=validation, class_order=order, **named)


def whole_spec(spec: str) -> str:
    """A spec that means the same in any directory."""
    kind, colon, path = spec.partition(":")
    return f"{kind}:{Path(path).expanduser().absolute()}" if colon else spec


def tell_data(images: ImageData) -> None:
    """Say on stderr what data were taken to be."""
    click.echo("\n".join(data_lines(images.described())), err=True)


def other_pixels(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """What tells images apart that reach, once normalised, over another range than others; both as described."""
    (low, high), (least, most) = (
        [(end / unit - of["mean"][0]) / of["std"][0] for end in of["range"]]
        for of, unit in ((of, 255 if of["dtype"] == "uint8" else 1) for of in (there, here))
    )
    if max(abs(low - least), abs(high - most)) <= APART * (high - low):
        return None
    text, of_theirs = (
        f"{of['dtype']} in {of['range'][0]:.4g}..{of['range'][1]:.4g}, normalised by mean {of['mean'][0]:.3f}, "
        f"deviation {of['std'][0]:.3f}"
        for of in (here, there)
    )
    return f"pixels are {text}; expected {of_theirs}"


def data_lines(described: dict[str, Any]) -> list[str]:
    """What `ImageData.described` says, in lines."""
    names, (height, width), low_high = described["classes"], described["image_size"], described["range"]
    shown = names if len(names) <= 2 * NAMES_SHOWN else [*names[:NAMES_SHOWN], "...", *names[-NAMES_SHOWN:]]
    low, high = (f"{number:.4g}" for number in low_high)
    mean, std = (", ".join(f"{number:.3f}" for number in described[name]) for name in ("mean", "std"))
    channels = f"{described['channels']} channel{'s' if described['channels'] > 1 else ''}"
    pixels = f"{height}x{width} pixels (height x width), {channels}, {described['dtype']} in {low}..{high}"
    return [
        f"data: {described['name']}, {len(names)} classes ({', '.join(shown)})",
        f"  {pixels}, normalised by mean {mean}, deviation {std}",
        *(f"  {part}: {of['images']:,} images, {of['from']}" for part, of in described["parts"].items()),
        *(f"  {note}" for note in described["notes"]),
    ]
