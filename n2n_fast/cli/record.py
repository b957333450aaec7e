"""What a run directory tells, read back: the history of each stage, and what came of it once it is finished."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from n2n_fast.files.errors import BadInput
from n2n_fast.search.pareto import Point
from n2n_fast.search.predictor import AccuracyPredictor

Line = dict[str, Any]


@dataclass(frozen=True)
class StageRecord:
    """One stage's lines of history.jsonl. predictors: how many rollouts were done
    when the accuracy predictor learned, and the predictor.
    """

    name: str
    rollouts: list[Line] = field(default_factory=list)
    anchors: list[Line] = field(default_factory=list)
    finals: list[Line] = field(default_factory=list)
    predictors: list[tuple[int, AccuracyPredictor]] = field(default_factory=list)

    @property
    def predictor(self) -> AccuracyPredictor:
        """The predictor as it last learned."""
        return self.predictors[-1][1] if self.predictors else AccuracyPredictor()

    def best(self) -> list[float | None]:
        """After each rollout the reward of the best so far, feasible before infeasible; None: nothing evaluated yet."""
        found: list[float | None] = []
        best: tuple[bool, float] | None = None
        for line in self.rollouts:
            if line["predicted_accuracy"] is not None:
                this = line["feasible"], line["reward"]
                best = this if best is None else max(best, this)
            found.append(None if best is None else best[1])
        return found

    def points(self) -> list[Point]:
        """Every evaluated student once, with what is known or else predicted of it at last."""
        known = {line["architecture"]: line["full_accuracy"] for line in (*self.anchors, *self.finals)}
        known |= {line["architecture"]: line["final_accuracy"] for line in self.anchors if line["final_accuracy"]}
        points = {}
        for line in (*self.rollouts, *self.anchors):
            key, short = line["architecture"], line["short_accuracy"]
            if short is not None and key not in points:
                found = known.get(key)
                accuracy = self.predictor(short)[0] if found is None else found
                points[key] = Point(self.name, key, line["params"], line["macs"], accuracy, found is not None)
        return list(points.values())


@dataclass(frozen=True)
class LayerRecord:
    """A layer of the teacher and what the student has of it, if it is kept. Channels: of its output; None: none."""

    name: str
    kind: str
    kept: bool
    teacher_channels: int | None
    channels: int | None
    teacher_kernel: tuple[int, ...]
    kernel: tuple[int, ...]


@dataclass(frozen=True)
class RunRecord:
    """A run. table: as in result.json; None, and no layers, as long as the run is not finished."""

    path: Path
    stages: list[StageRecord]
    settings: Line
    table: Line | None
    layers: list[LayerRecord]

    def points(self) -> list[Point]:
        """Every evaluated student of all stages."""
        return [point for stage in self.stages for point in stage.points()]


def read_record(path: Path) -> RunRecord:
    """Read a run directory, one of an unfinished run as well. Raises BadInput where it is none."""
    if not (path / "history.jsonl").is_file():
        raise BadInput(f"{path}: no history.jsonl in it; give the directory of a run")
    try:
        stages = _stages(_lines(path / "history.jsonl"))
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path / 'history.jsonl'}: not written by n2n-fast run") from None
    if not any(stage.rollouts or stage.anchors for stage in stages):
        raise BadInput(f"{path}: nothing was evaluated in this run yet")
    try:
        layers = _layers(_json(path / "architecture.json") or [])
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path / 'architecture.json'}: not written by n2n-fast run") from None
    return RunRecord(path, stages, _json(path / "config.json") or {}, _json(path / "result.json"), layers)


def _json(path: Path) -> Any:
    """What a file of JSON holds; None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise BadInput(f"{path}: not written by n2n-fast run") from None


def _lines(path: Path) -> Iterator[Line]:
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):  # the last one may be half written
            yield json.loads(line)


def _stages(lines: Iterator[Line]) -> list[StageRecord]:
    stages: dict[str, StageRecord] = {}
    for line in lines:
        stage = stages.setdefault(line["stage"], StageRecord(line["stage"]))
        if line["kind"] == "predictor":
            numbers = {f.name: line[f.name] for f in fields(AccuracyPredictor)}
            stage.predictors.append((len(stage.rollouts), AccuracyPredictor(**numbers)))
        elif line["kind"] in ("rollout", "anchor", "final"):
            {"rollout": stage.rollouts, "anchor": stage.anchors, "final": stage.finals}[line["kind"]].append(line)
    return list(stages.values())


def _layers(stages: list[Line]) -> list[LayerRecord]:
    """The first stage's layers beside what the last stage left of them; none where sizes were not noted."""
    if not stages or "sizes" not in stages[0]:
        return []
    left: dict[str, Line] = {}
    for stage in stages:
        left = {
            name: size for name, size in zip(stage["layers"], stage["sizes"], strict=True) if size["kept"]
        }  # the second stage knows only what the first one kept
    rows = []
    for name, size in zip(stages[0]["layers"], stages[0]["sizes"], strict=True):
        after = left.get(name, size)
        rows.append(
            LayerRecord(
                name=name,
                kind=size["kind"],
                kept=name in left,
                teacher_channels=size["channels"][0],
                channels=after["channels"][1],
                teacher_kernel=tuple(size["kernel"][0]),
                kernel=tuple(after["kernel"][1]),
            )
        )
    return rows
