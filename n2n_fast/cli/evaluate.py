"""The accuracy of a run's student, which is a program from a file, on the data of the run or on other data."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from n2n_fast.cli.data import read_data
from n2n_fast.files.errors import BadInput, first_line, raise_device_fault
from n2n_fast.search.checkpoint import read_settings
from n2n_fast.search.result import load_student
from n2n_fast.training.answers import answers
from n2n_fast.training.data import ImageData

HOW = ("image_size", "channels", "mean", "std")
WHICH: dict[str, tuple[type, ...]] = {  # options of `run` that say which images are in which part, and their types
    "validation": (float, str),
    "test": (float, str),
    "class_order": (str,),
    "skip_bad": (bool,),
}


def student_accuracy(run: Path, data: str | None, download: bool, device: torch.device) -> dict[str, Any]:
    """The data, as described, and accuracies on the test split, or the validation split where there is none.

    data: default: the run's own; in any case preprocessed as in the run. warnings: how they differ from the run's.
    Raises BadInput.
    """
    student = load_student(run).to(device)
    own, noted = _data_settings(run)
    options = {**noted, "data": data or noted["data"], "download": download, "device": device}
    images = read_data(options, own["channels"])
    split, name = (images.validation, "validation") if images.test is None else (images.test, "test")
    found = answers(_Checked(student, images), split, images.classes)
    return {
        "data": images.described(),
        "split": name,
        "images": len(split),
        "accuracy": found.accuracy,
        "standard_error": found.standard_error,
        "balanced_accuracy": found.balanced_accuracy,
        "warnings": _differences(own, images, data is None),
    }


def _data_settings(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run's config.json says of its data, and the options with which they are read."""
    try:
        settings = read_settings(run)
        own, command = settings["data"], settings.get("command", {})
        how = {key: own[key] for key in HOW}
        noted = {**{key: command.get(key) for key in WHICH}, **how}
        noted["data"] = command["data"] if "data" in command else settings["data_read"]["name"]
        noted["image_size"] = tuple(how["image_size"])
        sizes, numbers = (*noted["image_size"], how["channels"]), (*how["mean"], *how["std"], *own["range"])
        if not isinstance(noted["data"], str) or not all(type(size) is int for size in sizes):
            raise TypeError
        if len(noted["image_size"]) != 2 or len(own["range"]) != 2:
            raise TypeError
        if not isinstance(own["digest"], str) or not isinstance(own["dtype"], str):
            raise TypeError
        if not all(noted[key] is None or type(noted[key]) in types for key, types in WHICH.items()):
            raise TypeError
        if not (how["mean"] and how["std"] and all(type(n) in (int, float) and abs(n) < 1e9 for n in numbers)):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{run / 'config.json'}: not written by n2n-fast run") from None
    return own, noted


def _differences(own: dict[str, Any], images: ImageData, same: bool) -> list[str]:
    """How images differ from those of the run; same: they should be these very ones."""
    if same:
        return [] if own["digest"] == images.digest else ["the images are not those of the run"]
    here, lines = images.described(), []
    (low, high), (least, most) = own["range"], here["range"]
    if own["dtype"] != here["dtype"] or high - low > 2 * (most - least) or most - least > 2 * (high - low):
        there = f"{own['dtype']} in {low:.4g}..{high:.4g}"
        lines.append(f"pixels are {here['dtype']} in {least:.4g}..{most:.4g}, where the run had {there}")
    if own.get("classes") != here["classes"]:
        lines.append("the classes have other names than in the run, or another order")
    return lines


class _Checked(nn.Module):
    """A student from a file, which can be any program; BadInput where it does not take the images."""

    def __init__(self, student: nn.Module, images: ImageData) -> None:
        super().__init__()
        self._student, self._images = [student], images  # in a list: an exported program has no modes to switch

    def forward(self, batch: Tensor) -> Tensor:
        try:
            logits = self._student[0](batch)
        except Exception as error:  # noqa: BLE001 - whatever a program from a file raises
            raise_device_fault(error)
            raise BadInput(f"the student does not take images of {tuple(batch.shape)} ({first_line(error)})") from None
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(batch):
            raise BadInput("the student gives no logits; give the run of another")
        if logits.shape[1] != self._images.classes:
            raise BadInput(
                f"the student tells {logits.shape[1]} classes apart, {self._images.name} has {self._images.classes}"
            )
        return logits
