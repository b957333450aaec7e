"""The accuracy of a run's student, which is a program from a file, on the data of the run or on other data."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from n2n_fast.cli.data import other_pixels, read_data, tell_data
from n2n_fast.cli.export import Forward, check_onnx, run_by_onnx
from n2n_fast.files.errors import BadInput, first_line, raise_device_fault
from n2n_fast.files.inputs import FIELDS, input_of
from n2n_fast.files.safe_load import parse_json
from n2n_fast.search.checkpoint import SETTINGS, read_settings
from n2n_fast.search.result import load_student
from n2n_fast.training.answers import answers
from n2n_fast.training.data import ImageData

WHICH: dict[str, tuple[type, ...]] = {  # options of `run` that say which images are in which part, and their types
    "validation": (float, str),
    "test": (float, str),
    "class_order": (str,),
    "skip_bad": (bool,),
}


def student_accuracy(run: Path, data: str | None, download: bool, device: torch.device) -> dict[str, Any]:
    """The data, as described, and accuracies on the test split, or the validation split where there is none.

    run: a directory, or the file of a student alone. data: default: the run's own; in any case preprocessed as in the
    run, and its classes numbered so where they have the same names. warnings: how they differ from the run's. Raises
    BadInput.
    """
    student, own, noted, device = (_in_run if (run / SETTINGS).is_file() else _in_file)(run, device)
    if data is None and "data" not in noted:
        raise BadInput(f"{run}: is a student alone; give its data too, --data SPEC")
    options = {**noted, "data": data or noted["data"], "download": download, "device": device}
    images = read_data(options, own["channels"])
    if list(images.class_names) != own["classes"] and sorted(images.class_names) == sorted(own["classes"]):
        images = read_data({**options, "class_order": own["classes"]}, own["channels"])
    tell_data(images)
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


Student = tuple[Forward, dict[str, Any], dict[str, Any], torch.device]  # what it takes, options of its data, where


def _in_file(path: Path, device: torch.device) -> Student:
    """A student in a file that says itself what it takes."""
    if path.suffix == ".onnx":
        takes, forward = _in_onnx(path)
        device = torch.device("cpu")
    else:
        student = load_student(path)
        takes, forward = student.meta["input"], student.to(device)
    if takes is None:
        raise BadInput(f"{path}: does not say what images it takes; give its run, or export it again")
    return forward, takes, {**takes, "image_size": tuple(takes["image_size"])}, device


def _in_onnx(path: Path) -> tuple[dict[str, Any] | None, Forward]:
    """What a file of ONNX says that it takes, and what it computes."""
    check_onnx(f"{path}:")
    import onnx

    content = path.read_bytes()
    try:
        props = {each.key: each.value for each in onnx.load_from_string(content).metadata_props if each.key in FIELDS}
        takes = input_of({name: parse_json(text) for name, text in props.items()}) if props else None
        return takes, run_by_onnx(content)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001 - whatever protobuf and onnxruntime raise
        raise_device_fault(error)
        raise BadInput(f"{path}: not a readable student ({first_line(error)}); export it again") from None


def _in_run(run: Path, device: torch.device) -> Student:
    """The student of a run, and what config.json says of its data."""
    student, settings = load_student(run).to(device), read_settings(run)
    try:
        own, command = settings["data"], settings.get("command", {})
        takes = input_of(own)
        noted = {**{key: command.get(key) for key in WHICH}, **takes, "image_size": tuple(takes["image_size"])}
        noted["data"] = command["data"] if "data" in command else settings["data_read"]["name"]
        if not isinstance(noted["data"], str) or not isinstance(own["digest"], str):
            raise TypeError
        if not all(noted[key] is None or type(noted[key]) in types for key, types in WHICH.items()):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{run / SETTINGS}: not written by n2n-fast run") from None
    except BadInput as error:
        raise BadInput(f"{run / SETTINGS}: {error}") from None
    return student, own, noted, device


def _differences(own: dict[str, Any], images: ImageData, same: bool) -> list[str]:
    """How images differ from those of the run; same: they should be these very ones."""
    if same:
        return [] if own["digest"] == images.digest else ["the images are not those of the run"]
    here = images.described()
    lines = [f"{text} as in the run"] if (text := other_pixels(own, here)) else []
    if own.get("classes") != here["classes"]:
        lines.append("the classes have other names than in the run, or another order")
    return lines


class _Checked(nn.Module):
    """A student from a file, which can be any program; BadInput where it does not take the images."""

    def __init__(self, student: Forward, images: ImageData) -> None:
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
