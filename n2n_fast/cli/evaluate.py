"""The accuracy of a run's student, which is a program from a file, on the data of the run or on other data."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from n2n_fast.files.errors import BadInput, first_line, raise_device_fault
from n2n_fast.search.checkpoint import read_settings
from n2n_fast.search.result import load_student
from n2n_fast.training.datasets import load


def student_accuracy(run: Path, data: str | None, download: bool, device: torch.device) -> dict[str, Any]:
    """Name of the data and of the split, its number of images, and the accuracy: on the test split, if there is one.

    data: default: the run's own; in any case it is preprocessed as in the run. Raises BadInput.
    """
    student = load_student(run).to(device)
    own, preprocessing = _data_settings(run)
    images = load(data or own, **preprocessing, download=download, device=device)
    split, name = (images.validation, "validation") if images.test is None else (images.test, "test")
    correct = 0
    for batch, labels in split.batches(512):
        logits = _logits(student, batch)
        if logits.shape[1] != images.classes:
            raise BadInput(f"the student tells {logits.shape[1]} classes apart, {images.name} has {images.classes}")
        correct += int((logits.argmax(1) == labels).sum())
    return {"data": images.name, "split": name, "images": len(split), "accuracy": correct / len(split)}


def _data_settings(run: Path) -> tuple[str, dict[str, Any]]:
    """What a run's config.json says of its data: its name, and how images are preprocessed."""
    try:
        settings = read_settings(run)["data"]
        name, how = settings["name"], {key: settings[key] for key in ("image_size", "channels", "mean", "std")}
        sizes, numbers = (how["image_size"], how["channels"]), (*how["mean"], *how["std"])
        if not isinstance(name, str) or not all(type(size) is int for size in sizes):
            raise TypeError
        if not (how["mean"] and how["std"] and all(type(n) in (int, float) and abs(n) < 1e9 for n in numbers)):
            raise TypeError
    except (KeyError, TypeError):
        raise BadInput(f"{run / 'config.json'}: not written by n2n-fast run") from None
    return name, how


@torch.no_grad()
def _logits(student: nn.Module, batch: Tensor) -> Tensor:
    try:
        logits = student(batch)
    except Exception as error:  # noqa: BLE001 - a student from a file can be any program
        raise_device_fault(error)
        raise BadInput(f"the student does not take images of {tuple(batch.shape)} ({first_line(error)})") from None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(batch):
        raise BadInput("the student gives no logits; give the run of another")
    return logits
