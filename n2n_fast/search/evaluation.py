"""A student's evaluation: its accuracy after a few steps of training, and its full training (section 3.3)."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx, nn

from n2n_fast.files.errors import first_line
from n2n_fast.files.states import on_cpu
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.products import as_products
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.config import SearchConfig
from n2n_fast.search.teacher import giving_logits, latency_of, restored, space_of
from n2n_fast.training.batches import Batches, TeacherLogits
from n2n_fast.training.clock import now
from n2n_fast.training.data import ImageData, Split, accuracy
from n2n_fast.training.distill import BatchSource, Checkpointer, Progress, recalibrate, seeded, train
from n2n_fast.training.seeds import derived

Training = Callable[[nn.Module, float], object]  # trains a student in place, for so many epochs

FULL_RATE_STEPS = 400  # a full training that is shorter takes a lower learning rate

# What building, training and validating a student raise where numbers overflow; Diverged is an ArithmeticError.
NOT_FINITE = (ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Evaluation:
    """What a student shows. short_accuracy: after the few steps, on the images set aside for rollouts; None where
    `error` says why there is none. latency: ms, where the search asks for it. seconds: of each part of the work.
    """

    short_accuracy: float | None
    latency: float | None
    seconds: dict[str, float]
    error: str | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any], timed: bool) -> "Evaluation":
        """The inverse of `asdict`; ValueError or TypeError for anything else. timed: whether a latency is needed."""
        evaluation = cls(**record)
        accuracy, latency, seconds, error = (getattr(evaluation, field.name) for field in fields(cls))
        if not (
            (accuracy is None or (_is_amount(accuracy) and accuracy <= 1))
            and (not timed if latency is None else _is_amount(latency))
            and isinstance(seconds, dict)
            and all(_is_amount(time) for time in seconds.values())
            and (accuracy is None) == isinstance(error, str)
            and (error is None or accuracy is None)
        ):
            raise ValueError("an evaluation that no search wrote")
        return evaluation


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


class Evaluator:
    """Builds, trains and validates the students of one space. On a CPU the same architecture and seed give the same
    result.

    All rollouts share their batches, the teacher's logits and the validation images, so that students differ by their
    architecture and not by what they saw.
    """

    def __init__(
        self,
        stage: str,
        space: ArchitectureSpace,
        data: ImageData,
        logits: TeacherLogits,
        calibration: Tensor,
        config: SearchConfig,
        training: Training | None = None,
    ) -> None:
        """stage: its name, which seeds students. calibration: images (N, C, H, W) for the norms' statistics.

        training: of students, instead of `distill.train`.
        """
        self.stage, self.space, self.data, self.config = stage, space, data, config
        self._logits, self._calibration, self._training = logits, calibration, training
        self.device = data.train.images.device
        steps_per_epoch = max(1, len(data.train) // config.batch_size)
        self._rollout_epochs = config.rollout_steps / steps_per_epoch if config.epochs is None else config.epochs
        self._rollout_batches = self._batches(self._rollout_epochs, keep=True)
        # narrow students on a GPU wait for launches and casts, not for arithmetic (bench/gpu.md)
        self._how = {"capture": True, "autocast": False} if self.device.type == "cuda" else {}
        self._images = _subset(data.validation, config.validation_images, derived(config.seed, "validation"))

    def evaluate(self, arch: Architecture, seed: int) -> Evaluation:
        """Evaluate a student after the few steps of a rollout; numbers that are not finite become its error."""
        clock, latency = _Clock(self.device), None
        try:
            with seeded(seed, self.device):
                student = self._build(arch)
                clock.note("build")
                latency = _finite(latency_of(student, self.data, self.config))
                clock.note("latency")
                self._train(
                    student, self._rollout_batches, self._rollout_epochs, self.config.learning_rate, **self._how
                )
                clock.note("train")
            with as_products(student, self.device):
                short_accuracy = accuracy(student, self._images, strict=True)
            clock.note("validate")
        except NOT_FINITE as reason:
            clock.note("failed")
            return Evaluation(None, latency, clock.seconds, first_line(reason))
        return Evaluation(short_accuracy, latency, clock.seconds)

    def train(
        self,
        arch: Architecture,
        epochs: float,
        purpose: str,
        progress: Progress | None = None,
        checkpointer: Checkpointer | None = None,
    ) -> fx.GraphModule:
        """A student trained in full, on batches that begin alike for all. purpose: for progress. Raises Diverged."""
        batches = self._batches(epochs, views=self.data.augmentation.views if self.data.augmentation else None)
        if progress is not None:
            progress.phase(f"training {purpose}", len(batches))
        with seeded(derived(self.config.seed, self.stage, "training", arch.key), self.device):
            student = self._build(arch)
            # at the full rate a training of few steps harms students that are nearly the teacher
            learning_rate = self.config.final_learning_rate * math.sqrt(min(1.0, len(batches) / FULL_RATE_STEPS))
            self._train(student, batches, epochs, learning_rate, progress=progress, checkpointer=checkpointer)
        return student

    def _build(self, arch: Architecture) -> fx.GraphModule:
        student = self.space.build(arch, self.config.init)
        if self.config.init != "fitted":  # which has re-estimated norms on the way
            recalibrate(student, torch.split(self._calibration, 128))
        return student

    def _train(
        self,
        student: fx.GraphModule,
        batches: BatchSource,
        epochs: float,
        learning_rate: float,
        **how: Any,
    ) -> None:
        """how: further arguments of `distill.train`."""
        if self._training is not None:
            self._training(student.train(), epochs)
            student.eval()
        else:
            train(student, batches, learning_rate=learning_rate, kd_weight=self.config.kd_weight, **how)

    def _batches(self, epochs: float, views: int | None = None, keep: bool = False) -> Batches:
        config, data = self.config, self.data
        seed = derived(config.seed, "batches")
        return Batches(
            data.train, self._logits, epochs, config.batch_size, data.augmentation, seed, views=views, keep=keep
        )


@dataclass(frozen=True)
class Recipe:
    """All that a stage's evaluator is made of, to be made in another process. earlier: what the stages before ended
    with, as JSON of the architecture and the student's state dict.

    It is pickled with everything on the CPU, since the other process may see another device, or none.
    """

    stage: str
    teacher: nn.Module
    data: ImageData
    calibration: Tensor
    config: SearchConfig
    earlier: tuple[tuple[str, dict[str, Tensor]], ...] = ()
    training: Training | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Its fields, the tensors in them on the CPU."""
        return {
            **self.__dict__,
            "teacher": copy.deepcopy(self.teacher).cpu(),
            "data": self.data.to("cpu"),
            "calibration": self.calibration.cpu(),
            "earlier": on_cpu(self.earlier),
        }

    def __call__(self, device: torch.device | str | None = None) -> Evaluator:
        """Make the evaluator. device: where it shall work; default: where the data are."""
        device = torch.device(device or self.data.train.images.device)
        teacher, data, calibration = self.teacher.to(device), self.data.to(device), self.calibration.to(device)
        space = space_of(teacher, calibration, self.config)
        logits = TeacherLogits(giving_logits(teacher, space, calibration), data.train)
        for architecture, state in self.earlier:
            student = restored(space, Architecture.from_json(architecture), state)
            space = space_of(student, calibration, self.config)
        return Evaluator(self.stage, space, data, logits, calibration, self.config, self.training)


def _finite(latency: float | None) -> float | None:
    if latency is not None and not math.isfinite(latency):
        raise ArithmeticError(f"the latency is {latency} ms")
    return latency


class _Clock:
    """Seconds between notes, by name, of what a device was asked for in between."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._last = device, now(device)

    def note(self, part: str) -> None:
        at = now(self._device)
        self.seconds[part], self._last = round(at - self._last, 4), at


def _subset(split: Split, count: int | None, seed: int) -> Split:
    """`count` images of a split, drawn by the seed; the split itself where it has no more."""
    if count is None or count >= len(split):
        return split
    index = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count]
    return split.subset(index.sort().values.to(split.labels.device))
