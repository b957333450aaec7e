"""Batches of a training, the same for every student, with the teacher's logits, which are computed once."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from n2n_fast.training.data import Augmentation, Split
from n2n_fast.training.seeds import generator

KEPT_NUMBERS = 2**26  # of prepared batches that are held for the next student
KEPT_LOGITS = 2**28


class TeacherLogits:
    """A teacher's logits: computed for any images, and once for the whole of `split` where those are asked for.

    Keep one for as long as the teacher and the split stay the same, and hand it to every `Batches`.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], split: Split, batch_size: int = 512) -> None:
        """forward: images (n, C, H, W) float32 -> logits (n, classes), of a model in eval mode."""
        self._forward = forward
        self._split = split
        self._batch_size = batch_size
        self._whole: Tensor | None = None
        self._views: dict[tuple[int, int], Tensor] = {}
        self.of_steps: dict[tuple[int, int | None, int], Tensor] = {}  # by seed, views and step of a schedule

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images: (n, C, H, W) normalised -> logits (n, classes) without gradient."""
        return self._forward(images).detach()

    @functools.cached_property
    def classes(self) -> int:
        """How many logits an image has."""
        return self(self._split.batch(torch.zeros(1, dtype=torch.long))[0]).shape[1]

    def whole(self) -> Tensor:
        """Logits of the whole split without augmentation, (N, classes), computed on the first call."""
        if self._whole is None:
            parts = self._split.batches(self._batch_size)
            self._whole = torch.cat([self(images.contiguous(memory_format=torch.channels_last)) for images, _ in parts])
        return self._whole

    def of_view(self, schedule: "Schedule", view: int) -> Tensor:
        """Logits of the schedule's whole split in one of its views, (N, classes), computed on the first call."""
        key = schedule.seed, view
        if key not in self._views:
            parts = torch.split(torch.arange(len(schedule.split)), self._batch_size)
            self._views[key] = torch.cat([self(schedule.images(part, view)) for part in parts])
        return self._views[key]


@dataclass(frozen=True)
class Schedule:
    """The training batches of `epochs` (may be fractional) over a split: settled by the seed, the same each time.

    Each epoch is shuffled anew and drops its last incomplete batch, unless the split is smaller than a batch. A longer
    schedule of the same seed begins as a shorter one.
    views: the augmented versions of an image that epochs take turns with, so that a teacher needs to see each only
    once; None: another version each time.
    """

    split: Split
    epochs: float
    batch_size: int
    augmentation: Augmentation | None
    seed: int
    views: int | None = None
    _draws: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # by view

    def __post_init__(self) -> None:
        """Refuse what cannot be iterated."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size}; expected at least 1")
        if not 0 <= self.epochs < math.inf:
            raise ValueError(f"epochs: {self.epochs}; expected a finite number of at least 0")

    def __len__(self) -> int:
        """Number of steps: at least one where epochs > 0."""
        return max(1, round(self.epochs * self.steps_per_epoch)) if self.epochs else 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches that one pass over the split gives."""
        return max(1, len(self.split) // self.batch_size)

    def view_of(self, step: int) -> int | None:
        """The view that a step, counted from 0, takes."""
        return None if self.views is None else step // self.steps_per_epoch % self.views

    def indices(self, start: int = 0) -> Iterator[Tensor]:
        """For each step from `start` on the places in the split, (n,) int64 on its device."""
        shuffled: Tensor | None = None
        for step in range(start, len(self)):
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0 or shuffled is None:
                shuffled = torch.randperm(len(self.split), generator=generator(self.seed, 0, epoch))
                shuffled = shuffled.to(self.split.images.device)
            yield shuffled[place * self.batch_size : (place + 1) * self.batch_size]

    def images(self, index: Tensor, view: int) -> Tensor:
        """Images at index (n,) in a view, normalised, (n, C, H, W) float32."""
        images = self.split.images[index]
        if self.augmentation is not None:
            images = self.augmentation.apply(images, self._drawn(self.augmentation, view)[:, index])
        return self.split.normalise(images).contiguous()

    def _drawn(self, augmentation: Augmentation, view: int) -> Tensor:
        """How a view changes each image of the split, (3, N); two views in turn mirror what the other does not."""
        if view not in self._draws:
            draws = augmentation.draw(len(self.split), generator(self.seed, 2, view // 2))
            if view % 2:
                others = augmentation.draw(len(self.split), generator(self.seed, 3, view // 2))
                draws = torch.cat([others[:2], 1 - draws[2:]])
            self._draws[view] = draws.to(self.split.images.device)
        return self._draws[view]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield index (n,), images (n, C, H, W) float32, augmented and normalised, and labels (n,)."""
        return self.after(0)

    def after(self, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same from step `start` on, counted from 0."""
        for step, index in enumerate(self.indices(start), start):
            view = self.view_of(step)
            if view is None:
                images = self.split.images[index]
                if self.augmentation is not None:
                    images = self.augmentation(images, generator(self.seed, 1, step))
                images = self.split.normalise(images).contiguous()
            else:
                images = self.images(index, view)
            yield index, images, self.split.labels[index]


class Batches:
    """A schedule of training batches with the teacher's logits, the very same for every student that iterates it.

    A `TeacherLogits` runs once for each view of the whole split where a pass over it is asked for; otherwise the
    teacher runs once a step, on the first pass. Other schedules of the same seed reuse either.
    """

    def __init__(
        self,
        split: Split,
        teacher_logits: Callable[[Tensor], Tensor] | None,
        epochs: float,
        batch_size: int,
        augmentation: Augmentation | None,
        seed: int,
        *,
        views: int | None = None,
        keep: bool = False,
    ) -> None:
        """teacher_logits: images (n, C, H, W) -> logits (n, classes), best a `TeacherLogits` of this split; or none.

        views: of the schedule. keep: hold the prepared batches for the next pass, as far as KEPT_NUMBERS allow.
        """
        self.schedule = Schedule(split, epochs, batch_size, augmentation, seed, views)
        self._teacher_logits = teacher_logits
        self._memo: dict[tuple[int, int | None, int], Tensor] = {}
        if isinstance(teacher_logits, TeacherLogits):
            self._memo = teacher_logits.of_steps
        numbers = len(self.schedule) * batch_size * split.channels * math.prod(split.image_size)
        self._keep = keep and numbers <= KEPT_NUMBERS
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.schedule)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield images (n, C, H, W) float32, labels (n,) int64 and teacher logits (n, classes) or None."""
        return self.after(0)

    def after(self, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The same from step `start` on, counted from 0."""
        for step, (index, images, labels) in enumerate(self._prepared(start), start):
            yield images, labels, self._logits(step, index, images)

    def _prepared(self, start: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        if self._keep and not self._kept:
            self._kept = list(self.schedule)
        return self._kept[start:] if self._kept else self.schedule.after(start)

    def _logits(self, step: int, index: Tensor, images: Tensor) -> Tensor | None:
        teacher, schedule = self._teacher_logits, self.schedule
        if teacher is None:
            return None
        if isinstance(teacher, TeacherLogits):
            if schedule.augmentation is None:
                return teacher.whole()[index]
            view = schedule.view_of(step)
            if view is not None and self._covers_views(teacher):
                return teacher.of_view(schedule, view)[index]
        key = schedule.seed, schedule.views, step
        if key in self._memo:
            return self._memo[key]
        with torch.no_grad():
            logits = teacher(images).detach()
        if logits.numel() * len(schedule) <= KEPT_LOGITS:
            self._memo[key] = logits
        return logits

    def _covers_views(self, teacher: "TeacherLogits") -> bool:
        """Whether the schedule is long enough for whole views, and these small enough to be kept."""
        schedule = self.schedule
        numbers = len(schedule.split) * teacher.classes * (schedule.views or 0)
        return len(schedule) >= schedule.steps_per_epoch and numbers <= KEPT_LOGITS
