"""A student's evaluation: its accuracy after a few steps of training, and its full training (section 3.3)."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx, nn

from n2n_fast.files.errors import BadInput, first_line
from n2n_fast.files.states import load_finite, on_cpu
from n2n_fast.networks.graph import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.tracing import run
from n2n_fast.search.config import SearchConfig
from n2n_fast.search.reward import Cost
from n2n_fast.training.batches import Batches, TeacherLogits
from n2n_fast.training.clock import now
from n2n_fast.training.data import ImageData, Split, accuracy
from n2n_fast.training.distill import BatchSource, Checkpointer, Progress, latency_ms, recalibrate, seeded, train
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
                self._train(student, self._rollout_batches, self._rollout_epochs, self.config.learning_rate)
                clock.note("train")
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
            self._train(student, batches, epochs, learning_rate, progress, checkpointer)
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
        progress: Progress | None = None,
        checkpointer: Checkpointer | None = None,
    ) -> None:
        if self._training is not None:
            self._training(student.train(), epochs)
            student.eval()
            return
        kd_weight = self.config.kd_weight
        train(
            student,
            batches,
            learning_rate=learning_rate,
            kd_weight=kd_weight,
            progress=progress,
            checkpointer=checkpointer,
        )

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
class Teacher:
    """The teacher, to which every stage's logits and rewards refer.

    module: in float32 and eval mode, gives logits alone. given: the same as it came, which may have more outputs.
    space: of all its students. calibration: unlabelled images (n, C, H, W). accuracy: on the validation split.
    """

    given: nn.Module
    module: nn.Module
    space: ArchitectureSpace
    calibration: Tensor
    cost: Cost
    accuracy: float
    logits: TeacherLogits

    @classmethod
    def of(cls, given: nn.Module, data: ImageData, config: SearchConfig) -> "Teacher":
        """Trace and measure a teacher in float32 and eval mode. Raises BadInput where it cannot be used."""
        calibration = calibration_images(data, config)
        space = space_of(given, calibration, config)
        module = giving_logits(given, space, calibration)
        validation_accuracy = _above_chance(module, data)
        cost = Cost(space.teacher.params, space.teacher.macs, latency_of(module, data, config))
        return cls(given, module, space, calibration, cost, validation_accuracy, TeacherLogits(module, data.train))


def calibration_images(data: ImageData, config: SearchConfig) -> Tensor:
    """Unlabelled training images, (n, C, H, W) normalised, drawn by the seed."""
    split = data.train
    generator = torch.Generator().manual_seed(derived(config.seed, "calibration"))
    index = torch.randperm(len(split), generator=generator)[: config.calibration_images]
    images, _ = split.batch(index.to(split.images.device))
    return images


def _above_chance(teacher: nn.Module, data: ImageData) -> float:
    """The teacher's validation accuracy; BadInput where it has learned nothing about this data."""
    try:
        measured = accuracy(teacher, data.validation, strict=True)
    except ArithmeticError as error:
        raise BadInput(f"the teacher cannot be used on {data.name}: {error}; its weights are damaged") from None
    chance = float(data.validation.labels.bincount().max()) / len(data.validation)
    if measured <= 1.2 * chance:
        raise BadInput(
            f"the teacher's validation accuracy on {data.name} is {measured:.1%}, no better than chance "
            f"({chance:.1%}): set --mean, --std and --image-size to the preprocessing that it was trained with"
        )
    return measured


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
