"""What the stages of a search share, and what those that are done have left."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, fx, nn

from n2n_fast.files.safe_load import parse_json, understood
from n2n_fast.files.states import checked
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.checkpoint import CHECKPOINT, RunDirectory
from n2n_fast.search.config import STAGES, SearchConfig
from n2n_fast.search.evaluation import Recipe, Training
from n2n_fast.search.pareto import Point
from n2n_fast.search.progress import SearchProgress
from n2n_fast.search.reward import Constraints, RewardFunction
from n2n_fast.search.teacher import Teacher, digest, restored
from n2n_fast.search.workers import Executor
from n2n_fast.training.data import ImageData


@dataclass(frozen=True)
class FinishedStage:
    """What a stage ended with. architecture: JSON. accuracies: of anchors that got the final training too, pairs of
    the accuracy after an anchor's training and after that. points: every student that was evaluated.
    """

    name: str
    architecture: str
    student: dict[str, Tensor]
    policy: dict[str, Tensor]
    accuracies: list[tuple[float, float]]
    points: list[Point]

    def to_record(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {**vars(self), "points": json.dumps([asdict(point) for point in self.points])}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "FinishedStage":
        """The inverse of `to_record`; raises ValueError and the like for anything else."""
        record = dict(record)
        pairs = [(checked(full, float), checked(final, float)) for full, final in record["accuracies"]]
        points = [Point(**point) for point in parse_json(record["points"])]
        return cls(**{**record, "accuracies": pairs, "points": points})

    def restored(self, space: ArchitectureSpace) -> tuple[Architecture, fx.GraphModule]:
        """Its architecture in its space, and the trained student; raises ValueError and the like if it is of none."""
        arch = space.member(Architecture.from_json(self.architecture))
        return arch, restored(space, arch, self.student)


@dataclass(frozen=True)
class Search:
    """What the stages of a search share. policies: of another run, by stage. training, reward: the user's own."""

    config: SearchConfig
    data: ImageData
    teacher: Teacher
    constraints: Constraints
    finished: list[FinishedStage]
    directory: RunDirectory
    progress: SearchProgress
    executor: Executor
    policies: Mapping[str, Any]
    training: Training | None
    reward: RewardFunction | None

    def save(self, stage: Mapping[str, Any] | None) -> None:
        """Write the checkpoint, from which the search goes on as if nothing had happened.

        stage: the state of the one at hand. Raises Interrupted after that where the search was asked to stop.
        """
        self.directory.save({"finished": [done.to_record() for done in self.finished], "stage": stage})
        self.directory.stop_if_asked()

    @property
    def stage_at_hand(self) -> dict[str, Any] | None:
        """The state of the stage at hand in the checkpoint that the run goes on from."""
        return None if self.directory.checkpoint is None else self.directory.checkpoint["stage"]

    def recipe(self, stage: str) -> Recipe:
        """What makes a stage's evaluator in another process."""
        earlier = tuple((done.architecture, done.student) for done in self.finished)
        return Recipe(
            stage, self.teacher.given, self.data, self.teacher.calibration, self.config, earlier, self.training
        )


def settings_of(teacher: nn.Module, data: ImageData, config: SearchConfig) -> dict[str, Any]:
    """What config.json says of a run; the data's preprocessing, by which `evaluate` shows the student images."""
    split = data.train
    preprocessing = {
        "name": data.name,
        "image_size": split.image_size[0],
        "channels": split.channels,
        "mean": split.mean.tolist(),
        "std": split.std.tolist(),
    }
    return {**asdict(config), "data": preprocessing, "teacher": digest(teacher)}


def limits_of(config: SearchConfig, teacher: Teacher, progress: SearchProgress) -> Constraints:
    """The limits on students, that on the drop of accuracy below the teacher's among them; tells of the teacher."""
    for warning in teacher.space.warnings:
        progress.message(f"warning: {warning}")
    timed = "" if teacher.cost.latency is None else f", {teacher.cost.latency:.2f} ms"
    progress.message(f"teacher: {teacher.cost.params:,} params{timed}, validation accuracy {teacher.accuracy:.2%}")
    least = config.min_accuracy
    if config.max_drop is not None:
        least = max(least or 0.0, teacher.accuracy - config.max_drop / 100)
    return Constraints(config.max_params, config.max_macs, config.max_latency, least)


def finished_stages(directory: RunDirectory, config: SearchConfig) -> list[FinishedStage]:
    """The stages that the run's checkpoint has finished. Raises BadInput where it is not of such a run."""
    if directory.checkpoint is None:
        return []
    with understood(directory.path / CHECKPOINT):
        finished = [FinishedStage.from_record(record) for record in directory.checkpoint["finished"]]
        at_hand = directory.checkpoint["stage"]
        names = [done.name for done in finished] + ([] if at_hand is None else [dict(at_hand)["name"]])
        if names != list(STAGES[config.stages][: len(names)]):
            raise ValueError(f"of the stages {names!s:.80}")
        return finished
