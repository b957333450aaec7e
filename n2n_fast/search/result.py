"""The end of a stage and of a search: the best trained fully, then measured once, and written."""

import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from n2n_fast.files.errors import BadInput, first_line, raise_device_fault
from n2n_fast.files.safe_pt2 import read_student
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.student import independent_copy
from n2n_fast.search.pareto import Point, front
from n2n_fast.search.reward import Cost
from n2n_fast.search.shared import FinishedStage, Search
from n2n_fast.search.stage import Final, Stage
from n2n_fast.search.teacher import latency_of
from n2n_fast.training.data import ImageData, accuracy
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
class Chosen:
    """What one stage ended with: the architecture in its space."""

    stage: str
    space: ArchitectureSpace
    architecture: Architecture


def train_best(stage: Stage) -> FinishedStage:
    """Train the best of a stage fully, and keep the best of these. Raises BadInput where all trainings diverge.

    Each is chosen when the one before it is known. In a stage before the last there is only one, of which the removals
    count: it is trained at full width, and may be the teacher itself.
    """
    count = stage.config.keep_top if stage.is_last else 1
    tried, diverged = {final.key for final in stage.finals}, 0
    while len(stage.finals) < count and diverged <= MOST_DIVERGED:
        arch = next((j.architecture for j in stage.ranked() if j.architecture.key not in tried), None)
        if arch is None:
            break
        tried.add(arch.key)
        number, whole = len(stage.finals), _as_passed_on(stage, arch)
        full_accuracy, student = _train_final(stage, whole, f" {number + 1}" if count > 1 else "")
        if full_accuracy is None or student is None:
            diverged += 1
            continue
        described = {"architecture": whole.key, "params": whole.params, "macs": whole.macs}
        stage.log("final", index=number, **described, full_accuracy=full_accuracy)
        stage.finals.append(Final(arch.key, full_accuracy, independent_copy(student).state_dict()))
        stage.learn_accuracies()
        stage.save()
    if not stage.finals:
        raise BadInput("the training of the best student diverged; lower --final-learning-rate")
    best = max(stage.finals, key=lambda final: stage.judge_at(final.key, final.full_accuracy).rank)
    arch = _as_passed_on(stage, stage.evaluated[best.key][0])
    policy, accuracies, points = stage.policy.state_dict(), stage.accuracies(), _points(stage)
    return FinishedStage(stage.name, arch.to_json(), best.student, policy, accuracies, points)


def _train_final(stage: Stage, arch: Architecture, which: str) -> tuple[float | None, fx.GraphModule | None]:
    """The trained student and its accuracy, as `Stage.train` gives them."""
    if not stage.is_last and arch == stage.space.teacher:  # nothing is removed, nothing to train
        return stage.search.teacher.accuracy, stage.space.build(arch, "sliced")
    epochs = stage.config.final_epochs if stage.is_last else stage.config.stage_epochs
    return stage.train(arch, epochs, f"the best{which} of {stage.name}")


def _as_passed_on(stage: Stage, arch: Architecture) -> Architecture:
    """An architecture as the next stage gets it: where one follows, only its removals count."""
    return arch if stage.is_last else stage.space.remove(stage.space.teacher, arch.keep)


def _points(stage: Stage) -> list[Point]:
    """Every evaluated student with the best that is known of its accuracy."""
    known = {}
    for key, full_accuracy, final_accuracy in stage.anchors:
        if full_accuracy is not None:
            known[key] = full_accuracy if final_accuracy is None else final_accuracy
    points = []
    for key, full_accuracy, _ in stage.finals:
        whole = _as_passed_on(stage, arch := stage.evaluated[key][0])
        if whole == arch:
            known[key] = full_accuracy
        else:
            points.append(Point(stage.name, whole.key, whole.params, whole.macs, full_accuracy, True))
    for key, (arch, _) in stage.evaluated.items():
        judged = stage.judge(key)
        if judged is not None:
            accuracy = known.get(key, judged.accuracy)
            points.append(Point(stage.name, key, arch.params, arch.macs, accuracy, key in known))
    return points


def finish(search: Search, student: nn.Module, chosen: Sequence[Chosen]) -> Result:
    """Measure teacher and student, the test split among it for the first time, and write the artifacts.

    student: of the last stage, trained. chosen: what each stage ended with.
    """
    directory, data, progress = search.directory, search.data, search.progress
    points = [point for done in search.finished for point in done.points]
    student, arch = independent_copy(student), chosen[-1].architecture
    saved = independent_copy(student).cpu()  # torch.export.load has no map_location: files are made on the CPU
    progress.message("measuring teacher and student")
    table: dict[str, Any] = {
        "data": data.name,
        "teacher": _measured(search.teacher.module, chosen[0].space.teacher, data),
        "student": _measured(student, arch, data),
    }
    table["compression"] = table["teacher"]["params"] / max(1, arch.params)
    cost = Cost(arch.params, arch.macs, latency_of(student, data, search.config))
    table["gaps"] = search.constraints.gaps(cost, table["student"]["validation_accuracy"])
    table["feasible"] = not table["gaps"]
    directory.write_json("architecture.json", [_described(stage) for stage in chosen])
    directory.write_tensors("student.pt", saved.state_dict())
    directory.write_json("front.json", {by: [asdict(p) for p in front(points, by)] for by in ("params", "macs")})
    index = torch.arange(2, device=data.validation.labels.device) % len(data.validation)
    try:
        directory.write("student.pt2", _exported(saved, data.validation.batch(index)[0].cpu()))
    except Exception as error:  # noqa: BLE001 - what a leaf's own code raises; nothing else may be lost by it
        raise_device_fault(error)
        progress.message(
            f"warning: student.pt2 was not written, torch.export does not take the student ({first_line(error)}); "
            "its weights are in student.pt"
        )
    directory.write_json("result.json", table)
    return Result(student, table, table["feasible"], directory.path)


def _described(stage: Chosen) -> dict[str, Any]:
    """An architecture, and for readers each layer's output channels and kernel: before the stage, after it."""
    space, arch = stage.space, stage.architecture
    columns = (arch.keep, space.widths(space.teacher), space.widths(arch), space.teacher.kernels, arch.kernels)
    sizes = [
        {"kind": layer.kind, "kept": kept, "channels": [before, after], "kernel": [kernel, cropped]}
        for layer, kept, before, after, kernel, cropped in zip(space.layers, *columns, strict=True)
    ]
    return {"stage": stage.stage, "layers": [layer.name for layer in space.layers], **asdict(arch), "sizes": sizes}


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
        "validation_accuracy": accuracy(model, split),
        "test_accuracy": None if data.test is None else accuracy(model, data.test),
    }


def _exported(student: nn.Module, example: Tensor) -> bytes:
    file = io.BytesIO()
    torch.export.save(exported_program(student.eval(), example), file)
    return file.getvalue()


def exported_program(student: nn.Module, example: Tensor, any_batch: bool = True) -> torch.export.ExportedProgram:
    """The student by torch.export. example: (N, C, H, W); any_batch: for any number of images, else for N."""
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    return torch.export.export(student, (example.contiguous(),), dynamic_shapes=shapes)


def load_student(run: str | os.PathLike[str]) -> nn.Module:
    """The student of a run directory, ready for inference; needs neither the teacher nor its class.

    Takes images (N, C, H, W) preprocessed as the teacher's. No code in the file is run. Raises BadInput where there is
    no finished run, or a student that is damaged or asks for more than operators on tensors.
    """
    path = Path(run) / "student.pt2"
    if not path.is_file():
        raise BadInput(f"{run}: no student.pt2 in it; give the directory of a finished run")
    return read_student(path)
