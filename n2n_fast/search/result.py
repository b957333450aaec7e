"""What a finished search leaves: the student, the table of teacher and student, the Pareto front."""

import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from n2n_fast.files.errors import BadInput, first_line, raise_device_fault
from n2n_fast.files.safe_pt2 import read_student
from n2n_fast.networks.graph import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.student import independent_copy
from n2n_fast.search.checkpoint import RunDirectory
from n2n_fast.search.config import SearchConfig
from n2n_fast.search.evaluation import latency_of
from n2n_fast.search.pareto import Point, front
from n2n_fast.search.reward import Constraints, Cost
from n2n_fast.training.data import ImageData, accuracy
from n2n_fast.training.distill import Progress, latency_ms


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


def finish(
    directory: RunDirectory,
    data: ImageData,
    config: SearchConfig,
    constraints: Constraints,
    teacher: nn.Module,
    student: nn.Module,
    chosen: Sequence[Chosen],
    points: Sequence[Point],
    progress: Progress,
) -> Result:
    """Measure teacher and student, the test split among it for the first time, and write the artifacts.

    points: every student that was evaluated.
    """
    student, arch = independent_copy(student), chosen[-1].architecture
    saved = independent_copy(student).cpu()  # torch.export.load has no map_location: files are made on the CPU
    progress.message("measuring teacher and student")
    table: dict[str, Any] = {
        "data": data.name,
        "teacher": _measured(teacher, chosen[0].space.teacher, data),
        "student": _measured(student, arch, data),
    }
    table["compression"] = table["teacher"]["params"] / max(1, arch.params)
    cost = Cost(arch.params, arch.macs, latency_of(student, data, config))
    table["gaps"] = constraints.gaps(cost, table["student"]["validation_accuracy"])
    table["feasible"] = not table["gaps"]
    directory.write_json("architecture.json", [_described(part) for part in chosen])
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


def _described(part: Chosen) -> dict[str, Any]:
    """An architecture, and for readers each layer's output channels and kernel: before the stage, after it."""
    space, arch = part.space, part.architecture
    columns = (arch.keep, space.widths(space.teacher), space.widths(arch), space.teacher.kernels, arch.kernels)
    sizes = [
        {"kind": layer.kind, "kept": kept, "channels": [before, after], "kernel": [kernel, cropped]}
        for layer, kept, before, after, kernel, cropped in zip(space.layers, *columns, strict=True)
    ]
    return {"stage": part.stage, "layers": [layer.name for layer in space.layers], **asdict(arch), "sizes": sizes}


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
