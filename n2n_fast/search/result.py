"""The end of a stage and of a search: the best trained fully, then measured once, and written."""

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from n2n_fast.files.errors import BadInput, check_type, first_line, raise_device_fault
from n2n_fast.files.inputs import FIELDS, INPUT
from n2n_fast.files.safe_pt2 import read_student
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.student import independent_copy
from n2n_fast.search.imagination import believed
from n2n_fast.search.reward import Cost
from n2n_fast.search.stage import Final, Search, Stage
from n2n_fast.search.teacher import latency_of
from n2n_fast.training.answers import answers
from n2n_fast.training.data import ImageData, Split
from n2n_fast.training.distill import latency_ms

MOST_DIVERGED = 3  # full trainings, after which others are not tried either


@dataclass(frozen=True)
class Result:
    """What a search gives. student: trained, in eval mode. table: as in result.json. feasible: meets the limits."""

    student: nn.Module
    table: dict[str, Any]
    feasible: bool
    out: Path


@dataclass(frozen=True)
class Point:
    """A student of a search. accuracy: on validation; where it was not `trained` fully, what is expected of it."""

    stage: str
    architecture: str
    params: int
    macs: int
    accuracy: float
    trained: bool


def train_best(stage: Stage) -> None:
    """Train the best of a stage fully, which ends it. Raises BadInput where all trainings diverge.

    Each is chosen when the one before it is known. In a stage before the last there is only one, of which the removals
    count: it is trained at full width, and may be the teacher itself.
    """
    count = stage.config.keep_top if stage.is_last else 1
    tried, diverged = {final.key for final in stage.finals}, 0
    while len(stage.finals) < count and diverged <= MOST_DIVERGED:
        judged = (one for one in believed(stage) if one.architecture.key not in tried)
        best = max(judged, key=lambda one: one.rank, default=None)
        if best is None:
            break
        tried.add(best.architecture.key)
        number, whole = len(stage.finals), stage.passed_on(best.architecture)
        full_accuracy, student = _train_final(stage, whole, f" {number + 1}" if count > 1 else "")
        if full_accuracy is None or student is None:
            diverged += 1
            continue
        described = {"architecture": whole.key, "params": whole.params, "macs": whole.macs}
        stage.log("final", index=number, **described, full_accuracy=full_accuracy)
        state = independent_copy(student).state_dict()
        stage.finals.append(Final(best.architecture.key, full_accuracy, state))
        stage.learn_accuracies()
        stage.search.save()
    if not stage.finals:
        raise BadInput("the training of the best student diverged; lower --final-learning-rate")
    stage.done = True
    stage.search.save()


def _train_final(stage: Stage, arch: Architecture, which: str) -> tuple[float | None, fx.GraphModule | None]:
    """The trained student and its accuracy, as `Stage.train` gives them."""
    if not stage.is_last and arch == stage.space.teacher:  # nothing is removed, nothing to train
        return stage.search.teacher.accuracy, stage.space.build(arch, "sliced")
    epochs = stage.config.final_epochs if stage.is_last else stage.config.stage_epochs
    return stage.train(arch, epochs, f"the best{which} of {stage.name}")


def finish(search: Search, student: nn.Module) -> Result:
    """Measure teacher and student, the test split among it for the first time, and write the artifacts.

    student: of the last stage, trained.
    """
    directory, data, progress = search.directory, search.data, search.progress
    student, arch = independent_copy(student), search.stages[-1].result
    saved = independent_copy(student).cpu()  # torch.export.load has no map_location: files are made on the CPU
    progress.message("measuring teacher and student")
    table: dict[str, Any] = {
        "data": data.described(),
        "teacher": _measured(search.teacher.module, search.teacher.space.teacher, data),
        "student": _measured(student, arch, data),
    }
    table["teacher"]["may_have_seen"] = list(search.teacher.doubts)
    table["compression"] = table["teacher"]["params"] / max(1, arch.params)
    cost = Cost(arch.params, arch.macs, latency_of(student, data, search.config))
    table["gaps"] = search.constraints.gaps(cost, table["student"]["validation_accuracy"])
    table["feasible"] = not table["gaps"]
    directory.write_tensors("policies.pt", {stage.name: stage.policy.state_dict() for stage in search.stages})
    directory.write_json("architecture.json", [_described(stage) for stage in search.stages])
    directory.write_tensors("student.pt", saved.state_dict())
    takes = {name: table["data"][name] for name in FIELDS}
    directory.write_json(INPUT, takes)
    points = [point for stage in search.stages for point in _points(stage)]
    directory.write_json("front.json", {by: [asdict(p) for p in front(points, by)] for by in ("params", "macs")})
    index = torch.arange(2, device=data.validation.labels.device) % len(data.validation)
    example = data.validation.batch(index)[0].cpu()
    try:
        directory.write("student.pt2", program_bytes(exported_program(saved.eval(), example), takes))
    except Exception as error:  # noqa: BLE001 - what a leaf's own code raises; nothing else may be lost by it
        raise_device_fault(error)
        progress.message(
            f"warning: student.pt2 was not written, torch.export does not take the student ({first_line(error)}); "
            "its weights are in student.pt"
        )
    directory.write_json("result.json", table)
    return Result(student, table, table["feasible"], directory.path)


def _points(stage: Stage) -> list[Point]:
    """Every evaluated student with the best that is known of its accuracy."""
    known = {key: full if final is None else final for key, full, final in stage.anchors}
    points = []
    for key, full_accuracy, _ in stage.finals:
        arch = stage.evaluated[key][0]
        if (whole := stage.passed_on(arch)) == arch:
            known[key] = full_accuracy
        else:
            points.append(Point(stage.name, whole.key, whole.params, whole.macs, full_accuracy, True))
    for key, (arch, _) in stage.evaluated.items():
        if (judged := stage.judge(key)) is not None:
            trained = known.get(key)
            expected = judged.accuracy if trained is None else trained
            points.append(Point(stage.name, key, arch.params, arch.macs, expected, trained is not None))
    return points


def front(points: Iterable[Point], by: str) -> list[Point]:
    """The Pareto front of accuracy against `by`, "params" or "macs", the cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (getattr(p, by), -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def _described(stage: Stage) -> dict[str, Any]:
    """An architecture, and for readers each layer's output channels and kernel: before the stage, after it."""
    space, arch = stage.space, stage.result
    columns = (arch.keep, space.widths(space.teacher), space.widths(arch), space.teacher.kernels, arch.kernels)
    sizes = [
        {"kind": layer.kind, "kept": kept, "channels": [before, after], "kernel": [kernel, cropped]}
        for layer, kept, before, after, kernel, cropped in zip(space.layers, *columns, strict=True)
    ]
    return {"stage": stage.name, "layers": [layer.name for layer in space.layers], **asdict(arch), "sizes": sizes}


def _measured(model: nn.Module, arch: Architecture, data: ImageData) -> dict[str, Any]:
    split = data.validation
    images = split.batch(torch.arange(64, device=split.labels.device) % len(split))[0]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return {
        "params": arch.params,
        "macs": arch.macs,
        "bytes": file.getbuffer().nbytes,
        "latency_ms": latency_ms(model, images[:1]),
        "latency_ms_64": latency_ms(model, images),
        **_accuracies("validation", model, data.validation, data.classes),
        **_accuracies("test", model, data.test, data.classes),
    }


def _accuracies(part: str, model: nn.Module, split: Split | None, classes: int) -> dict[str, Any]:
    """Accuracy, its standard error, and the mean of the classes' accuracies; None without images."""
    found = None if split is None else answers(model, split, classes)
    figures = ("accuracy", "standard_error", "balanced_accuracy")
    return {f"{part}_{figure}": None if found is None else getattr(found, figure) for figure in figures}


def exported_program(student: nn.Module, example: Tensor, any_batch: bool = True) -> torch.export.ExportedProgram:
    """The student by torch.export. example: (N, C, H, W); any_batch: for any number of images, else for N."""
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    return torch.export.export(student, (example.contiguous(),), dynamic_shapes=shapes)


def program_bytes(program: torch.export.ExportedProgram, takes: Mapping[str, Any] | None) -> bytes:
    """A .pt2 file that says what its program takes."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={} if takes is None else {INPUT: json.dumps(takes)})
    return file.getvalue()


def load_student(run: str | os.PathLike[str]) -> fx.GraphModule:
    """The student of a run directory or in a .pt2 file, ready for inference; needs neither the teacher nor its class.

    Takes images (N, C, H, W) preprocessed as the teacher's; meta["input"] of it says how, and what its classes are. No
    code in the file is run. Raises BadInput where there is no finished run, or a student that is damaged or asks for
    more than operators on tensors.
    """
    check_type("run", run, str | os.PathLike, "the path of a run directory")
    path = Path(run) if Path(run).is_file() else Path(run) / "student.pt2"
    if not path.is_file():
        raise BadInput(f"{run}: no student.pt2 in it; give the directory of a finished run")
    return read_student(path)
