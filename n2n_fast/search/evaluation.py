"""What a student is worth: the accuracy that a few steps give it, and its training in full (section 3.3)."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from n2n_fast.files.errors import first_line
from n2n_fast.files.states import load_finite, on_cpu
from n2n_fast.networks.graph import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.tracing import run
from n2n_fast.search.config import SearchConfig
from n2n_fast.search.journal import is_evaluation
from n2n_fast.training.batches import Batches, TeacherLogits
from n2n_fast.training.clock import now
from n2n_fast.training.data import ImageData, Split, accuracy
from n2n_fast.training.distill import BatchSource, Keeper, Progress, fit, latency_ms, recalibrate, seeded
from n2n_fast.training.seeds import derived

Training = Callable[[nn.Module, float], object]  # trains a student in place, for so many epochs

FULL_RATE_STEPS = 400  # of a full training, from which on it takes the full learning rate

# What building, training and trying a student raise where its numbers go astray; Diverged is among the first.
NOT_FINITE = (ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Evaluation:
    """What was found of a student. accuracy: after the few steps, on the images set aside for rollouts; None where
    `error` says why there is none. latency: ms, where the search asks for it. seconds: of each part of the work.
    """

    accuracy: float | None
    latency: float | None
    seconds: dict[str, float]
    error: str | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any], timed: bool) -> "Evaluation":
        """The inverse of `asdict`; ValueError or TypeError for anything else. timed: whether a latency is needed."""
        found = cls(**record)
        if not is_evaluation(**record) or (timed and found.latency is None):
            raise ValueError("an evaluation that is none")
        return found


class Evaluator:
    """Builds, trains and tries the students of one space. On a CPU the same architecture and seed give the same
    result.

    All rollouts share their batches, the teacher's logits for them, and the images that they are tried on, so that
    students differ by what they are and not by what they saw.
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

        training: of students, instead of `distill.fit`.
        """
        self.stage, self.space, self.data, self.config = stage, space, data, config
        self._logits, self._calibration, self._training = logits, calibration, training
        self.device = data.train.images.device
        steps_per_epoch = max(1, len(data.train) // config.batch_size)
        self._rollout_epochs = config.rollout_steps / steps_per_epoch if config.epochs is None else config.epochs
        self._rollout_batches = self._batches(self._rollout_epochs, keep=True)
        self._images = _subset(data.validation, config.validation_images, derived(config.seed, "validation"))

    def evaluate(self, arch: Architecture, seed: int) -> Evaluation:
        """A student after the few steps of a rollout; what is not finite in it becomes the evaluation's error."""
        clock, latency = _Clock(self.device), None
        try:
            with seeded(seed, self.device):
                student = self._build(arch)
                clock.note("build")
                latency = _finite(latency_of(student, self.data, self.config))
                clock.note("latency")
                self._fit(student, self._rollout_batches, self._rollout_epochs, self.config.learning_rate)
                clock.note("train")
            found = accuracy(student, self._images, strict=True)
            clock.note("validate")
        except NOT_FINITE as reason:
            clock.note("failed")
            return Evaluation(None, latency, clock.seconds, first_line(reason))
        return Evaluation(found, latency, clock.seconds)

    def train(
        self,
        arch: Architecture,
        epochs: float,
        purpose: str,
        progress: Progress | None = None,
        keeper: Keeper | None = None,
    ) -> fx.GraphModule:
        """A student trained in full, on batches that begin alike for all. purpose: for progress. Raises Diverged."""
        batches = self._batches(epochs, views=self.data.augmentation.views if self.data.augmentation else None)
        if progress is not None:
            progress.stage(f"training {purpose}", len(batches))
        with seeded(derived(self.config.seed, self.stage, "training", arch.key), self.device):
            student = self._build(arch)
            # at the full rate a training of few steps harms students that are nearly the teacher
            learning_rate = self.config.final_learning_rate * math.sqrt(min(1.0, len(batches) / FULL_RATE_STEPS))
            self._fit(student, batches, epochs, learning_rate, progress, keeper)
        return student

    def _build(self, arch: Architecture) -> fx.GraphModule:
        student = self.space.build(arch, self.config.init)
        if self.config.init != "fitted":  # which has re-estimated norms on the way
            recalibrate(student, torch.split(self._calibration, 128))
        return student

    def _fit(
        self,
        student: fx.GraphModule,
        batches: BatchSource,
        epochs: float,
        learning_rate: float,
        progress: Progress | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        if self._training is not None:
            self._training(student.train(), epochs)
            student.eval()
            return
        kd_weight = self.config.kd_weight
        fit(student, batches, learning_rate=learning_rate, kd_weight=kd_weight, progress=progress, keeper=keeper)

    def _batches(self, epochs: float, views: int | None = None, keep: bool = False) -> Batches:
        config, data = self.config, self.data
        seed = derived(config.seed, "batches")
        return Batches(
            data.train, self._logits, epochs, config.batch_size, data.augmentation, seed, views=views, keep=keep
        )


def latency_of(model: nn.Module, data: ImageData, config: SearchConfig) -> float | None:
    """Median ms of a forward pass over `latency_batch` images, where the search asks for it."""
    if not config.times:
        return None
    images = data.validation
    index = torch.arange(config.latency_batch, device=images.labels.device) % len(images)
    return latency_ms(model, images.batch(index)[0])


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
        teacher, data = copy.deepcopy(self.teacher).cpu(), self.data.to("cpu")
        moved = {
            "teacher": teacher,
            "data": data,
            "calibration": self.calibration.cpu(),
            "earlier": on_cpu(self.earlier),
        }
        return {**self.__dict__, **moved}

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


def space_of(teacher: nn.Module, calibration: Tensor, config: SearchConfig) -> ArchitectureSpace:
    """The space of a teacher, or of an earlier stage's student; calibration: images (N, C, H, W)."""
    looks = config.init == "fitted" or config.saliency == "activations"
    images = calibration if looks else None
    return ArchitectureSpace(
        teacher, calibration[:2], images, saliency=config.saliency, leaf=config.leaf, round_to=config.round_to
    )


def giving_logits(teacher: nn.Module, space: ArchitectureSpace, images: Tensor) -> nn.Module:
    """The teacher, or where it has several outputs one that gives the logits alone."""
    return teacher if isinstance(run(teacher, images[:2]), Tensor) else space.build(space.teacher, "sliced")


def restored(space: ArchitectureSpace, arch: Architecture, state: dict[str, Tensor]) -> fx.GraphModule:
    """A student that was trained before."""
    student = space.build(arch, "sliced")
    load_finite(student, state)
    return student


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
