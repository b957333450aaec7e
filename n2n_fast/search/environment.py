"""The environment of the policies: the transition T(s, a) with its limits, and what a student shows (section 3).

On a CPU the same architecture and seed give the same evaluation, whoever makes it.
"""

import copy
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from n2n_fast.files.errors import DegenerateArchitecture, first_line, raise_device_fault
from n2n_fast.files.states import on_cpu
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.products import as_products
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.config import SearchConfig
from n2n_fast.search.teacher import giving_logits, latency_of, restored, space_of
from n2n_fast.training.batches import Batches, TeacherLogits
from n2n_fast.training.clock import now
from n2n_fast.training.data import ImageData, Split, accuracy
from n2n_fast.training.distill import Checkpointer, Progress, recalibrate, seeded, train
from n2n_fast.training.seeds import derived

Training = Callable[[nn.Module, float], object]  # trains a student in place, for so many epochs
Job = tuple[Architecture, int]  # a student to evaluate, and its seed

MOST_TILTED = 0.75  # of students at a limit: powers of what narrowing a layer saves
FULL_RATE_STEPS = 400  # a full training that is shorter takes a lower learning rate
MOST_PASSES = 10  # over few images, for one epoch
TRIES = 2  # of a student whose evaluation fails by itself

# What building, training and validating a student raise where numbers overflow; Diverged is an ArithmeticError.
NOT_FINITE = (ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Transition:
    """A stage's transition from the teacher of its space.

    saves: which of the limits, "params" or "macs", students are narrowed for where no policy says how; None where they
    stay as they are drawn. grows: whether a student that is below the limits gets wider.
    """

    space: ArchitectureSpace
    removes: bool
    ratios: tuple[float, ...]
    saves: str | None = None
    params: int | None = None
    macs: int | None = None
    grows: bool = False

    @classmethod
    def of(
        cls, space: ArchitectureSpace, config: SearchConfig, removes: bool, limited: Collection[str], grows: bool = True
    ) -> "Transition":
        """Students are brought to the limits on params and MACs among `limited`, objectives as of `Constraints.enough`.

        One that is smaller than is rewarded gets wider, unless it has to be fast as well. grows: not where the reward
        is the user's own, which may reward more.
        """
        if not (limits := {"params", "macs"} & set(limited)):
            return cls(space, removes, config.ratios)
        saves = next(name for name in (config.objective, "params", "macs") if name in limits)
        grows = removes or (grows and config.objective in limited and "latency" not in limited)
        return cls(space, removes, config.ratios, saves, config.max_params, config.max_macs, grows)

    def __call__(self, actions: Tensor) -> list[Architecture | DegenerateArchitecture]:
        """The students of N rows of actions, or why one is none that is worth anything.

        actions: (N, layers), whether each layer stays, 1 or 0; in stage 2 (N, layers, 2), the places in `ratios` of
        channels and kernel. Layers that are removed are judged by what is left of a student of the wanted size,
        narrowed as a middle anchor.
        """
        if self.removes:
            return [self._of_removal(tuple(row)) for row in actions.bool().tolist()]
        channels, kernels = torch.tensor(self.ratios, dtype=torch.float64)[actions].unbind(2)
        limits: dict[str, Any] = {"params": self.params, "macs": self.macs, "grow": self.grows}
        return [*self.space.shrink_all_within(self.space.teacher, channels.tolist(), kernels.tolist(), **limits)]

    @functools.cached_property
    def _of_removal(self) -> Callable[[tuple[bool, ...]], Architecture | DegenerateArchitecture]:
        return functools.lru_cache(maxsize=10_000)(self._removed)  # a policy draws the same again and again

    def _removed(self, keep: tuple[bool, ...]) -> Architecture | DegenerateArchitecture:
        try:
            arch = self.space.remove(self.space.teacher, keep)
        except DegenerateArchitecture as reason:
            return reason
        return self.space.shrink_within(arch, self._narrowed, params=self.params, macs=self.macs, grow=self.grows)

    def tilted(self, tilt: float) -> Tensor:
        """Actions of stage 2, (layers, 2), next to the space's tilted ratios, with every kernel at its whole size."""
        assert self.saves is not None
        wanted = torch.tensor(self.space.tilted(tilt, self.saves))
        nearest = (torch.tensor(self.ratios).log() - wanted[:, None].log()).abs().argmin(1)
        return torch.stack([nearest, torch.full_like(nearest, len(self.ratios) - 1)], 1)

    @functools.cached_property
    def _narrowed(self) -> list[float]:
        """The widths at which removals are judged."""
        layers = len(self.space.layers)
        return [1.0] * layers if self.saves is None else self.space.tilted(MOST_TILTED / 2, self.saves)


@dataclass(frozen=True)
class Evaluation:
    """What a student shows. short_accuracy: after a rollout's steps, if any, on the images set aside for rollouts; None
    where `error` says why there is none. latency: ms, where the search asks for it. seconds: of each part of the work.
    """

    short_accuracy: float | None
    latency: float | None
    seconds: dict[str, float]
    error: str | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any], timed: bool) -> "Evaluation":
        """The inverse of `asdict`; ValueError or TypeError for anything else. timed: whether a latency is needed."""
        new = cls(**record)
        failed = new.short_accuracy is None
        amounts = [*new.seconds.values(), *(n for n in (new.short_accuracy, new.latency) if n is not None)]
        if (
            not all(type(amount) in (int, float) and 0 <= amount < math.inf for amount in amounts)
            or (new.short_accuracy is not None and new.short_accuracy > 1)
            or (timed and new.latency is None and not failed)
            or (not isinstance(new.error, str) if failed else new.error is not None)
        ):
            raise ValueError("an evaluation that no search wrote")
        return new


@dataclass(frozen=True)
class Evaluator:
    """Builds, trains and validates the students of one space.

    All rollouts share their batches, the teacher's logits and the validation images, so that students differ by their
    architecture and not by what they saw. stage: its name, which seeds students. calibration: images (N, C, H, W) for
    the norms' statistics. training: of students, instead of `distill.train`.
    """

    stage: str
    space: ArchitectureSpace
    data: ImageData
    logits: TeacherLogits
    calibration: Tensor
    config: SearchConfig
    training: Training | None = None

    @property
    def device(self) -> torch.device:
        """Where students are."""
        return self.data.train.images.device

    @functools.cached_property
    def _rollout_batches(self) -> Batches:
        steps_per_epoch = max(1, len(self.data.train) // self.config.batch_size)
        epochs = self.config.rollout_steps / steps_per_epoch if self.config.epochs is None else self.config.epochs
        return self._batches(epochs, keep=True)

    @functools.cached_property
    def _images(self) -> Split:
        """The validation images on which rollouts' students are tried, drawn by the seed."""
        split, count = self.data.validation, self.config.validation_images
        if count is None or count >= len(split):
            return split
        generator = torch.Generator().manual_seed(derived(self.config.seed, "validation"))
        index = torch.randperm(len(split), generator=generator)[:count]
        return split.subset(index.sort().values.to(split.labels.device))

    def evaluate(self, arch: Architecture, seed: int) -> Evaluation:
        """Evaluate a student after the steps of a rollout, if any; numbers that are not finite become its error."""
        clock, latency = _Clock(self.device), None
        try:
            with seeded(seed, self.device):
                student = self._build(arch)
                clock.note("build")
                latency = latency_of(student, self.data, self.config)
                clock.note("latency")
                # narrow students on a GPU wait for launches and casts, not for arithmetic (bench/gpu.md)
                how = {"capture": True, "autocast": False} if self.device.type == "cuda" else {}
                if len(self._rollout_batches):
                    self._train(student, self._rollout_batches, self.config.learning_rate, **how)
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
        """A student trained in full, on batches that begin alike for all. purpose: for progress. Raises Diverged.

        epochs: of at least `epoch_steps` steps each, as far as `passes` allows.
        """
        epochs *= passes(self.config, len(self.data.train))
        batches = self._batches(epochs, views=self.data.augmentation.views if self.data.augmentation else None)
        if progress is not None:
            progress.phase(f"training {purpose}", len(batches))
        with seeded(derived(self.config.seed, self.stage, "training", arch.key), self.device):
            student = self._build(arch)
            # at the full rate a training of few steps harms students that are nearly the teacher
            learning_rate = self.config.final_learning_rate * math.sqrt(min(1.0, len(batches) / FULL_RATE_STEPS))
            self._train(student, batches, learning_rate, progress=progress, checkpointer=checkpointer)
        return student

    def _build(self, arch: Architecture) -> fx.GraphModule:
        student = self.space.build(arch, self.config.init)
        if self.config.init != "fitted":  # which has re-estimated norms on the way
            recalibrate(student, torch.split(self.calibration, 128))
        return student

    def _train(self, student: fx.GraphModule, batches: Batches, rate: float, **how: Any) -> None:
        """how: further arguments of `distill.train`."""
        if self.training is not None:
            self.training(student.train(), batches.schedule.epochs)
            student.eval()
        else:
            train(student, batches, learning_rate=rate, kd_weight=self.config.kd_weight, **how)

    def _batches(self, epochs: float, **how: Any) -> Batches:
        config, data = self.config, self.data
        seed = derived(config.seed, "batches")
        return Batches(data.train, self.logits, epochs, config.batch_size, data.augmentation, seed, **how)


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
        moved = {"teacher": copy.deepcopy(self.teacher).cpu(), "data": self.data.to("cpu")}
        return {**on_cpu(vars(self)), **moved}

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


def passes(config: SearchConfig, images: int) -> float:
    """Over so many training images, of which a full training's epoch consists: several where they are few.

    A student learns by steps; that it has seen all images says little where these are few.
    """
    return min(MOST_PASSES, max(1.0, config.epoch_steps / max(1, images // config.batch_size)))


class Executor:
    """Has the students of the current stage evaluated: here in this process, one after the other."""

    evaluator: Evaluator

    def begin(self, evaluator: Evaluator, recipe: Recipe) -> None:
        """A stage begins. recipe: makes the same evaluator in another process."""
        self.evaluator = evaluator

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[Evaluation]:
        """The evaluations of the jobs, in their order, each made when it is asked for."""
        for arch, seed in jobs:
            yield evaluated(self.evaluator, arch, seed)

    def close(self) -> None:
        """Let go of whatever was started."""


def evaluated(evaluator: Evaluator, arch: Architecture, seed: int, tries: int = TRIES) -> Evaluation:
    """An evaluation; where all tries fail by themselves, its `error` says so. Raises DeviceFault."""
    try:
        return evaluator.evaluate(arch, seed)
    except Exception as error:  # noqa: BLE001 - whatever a student fails with, the search goes on without it
        raise_device_fault(error)
        if tries > 1:
            return evaluated(evaluator, arch, seed, tries - 1)
        return Evaluation(None, None, {}, f"{type(error).__name__}: {first_line(error)}")


class _Clock:
    """Seconds between notes, by name, of what a device was asked for in between."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._last = device, now(device)

    def note(self, name: str) -> None:
        at = now(self._device)
        self.seconds[name], self._last = round(at - self._last, 4), at
