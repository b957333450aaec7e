"""What a model answers on labelled images: accuracies, their errors, and whether it numbers the classes otherwise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from n2n_fast.training.data import Split, logits_of_batches

CLEARLY = 0.2  # by how much another order of classes must be more accurate to be called the right one
ABOVE_CHANCE = 1.2  # times
ERRORS = 3.0  # standard errors above it
UNEVEN = 1.5  # times as common as the mean of all classes


@dataclass(frozen=True)
class Answers:
    """counts: (classes, outputs) int64, images of each class by the output that is largest; on the CPU.

    unusable: images whose logits are not all finite; they count as answered wrongly.
    """

    counts: Tensor
    images: int
    unusable: int = 0

    @property
    def accuracy(self) -> float:
        """Share of images answered rightly, in 0..1."""
        return int(self.counts.diagonal().sum()) / self.images

    @property
    def recalls(self) -> Tensor:
        """Share of each class's images answered rightly, (classes,) float64; NaN for a class without images."""
        size = min(self.counts.shape)
        right = torch.zeros(len(self.counts), dtype=torch.float64)
        right[:size] = self.counts.diagonal().double()
        return right / self._of_class.double()

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the classes' recalls, in 0..1: what one class answered always gives 1 / classes."""
        return float(self.recalls.nanmean())

    @property
    def chance(self) -> float:
        """The balanced accuracy of whoever always answers one class; 0 where there is but one."""
        present = int((self._of_class > 0).sum())
        return 1 / present if present > 1 else 0.0

    @property
    def majority(self) -> float:
        """The accuracy of whoever always answers the commonest class."""
        return float(self._of_class.max()) / self.images

    @property
    def is_above_chance(self) -> bool:
        """Whether the classes are told apart, beyond what so few images show by chance."""
        error = math.sqrt(self.chance * (1 - self.chance) / self.images)
        least = min(self.chance + ERRORS * error, (1 + self.chance) / 2)
        return self.balanced_accuracy > max(least, ABOVE_CHANCE * self.chance)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, from so many images."""
        return math.sqrt(max(self.accuracy * (1 - self.accuracy), 0.0) / self.images)

    def __str__(self) -> str:
        """The accuracy with its error; the balanced one where classes are uneven."""
        text = f"{self.accuracy:.2%} ± {self.standard_error:.2%}"
        return text if self.is_even else f"{text} (balanced: {self.balanced_accuracy:.2%})"

    @property
    def is_even(self) -> bool:
        """Whether no class is much commoner than the others."""
        return not self.chance or self.majority <= UNEVEN * self.chance

    @property
    def _of_class(self) -> Tensor:
        return self.counts.sum(1)

    def order(self) -> list[int] | None:
        """For each output the class that it stands for, where that is one to one, not as labelled, and clearly better.

        Classes without images take the outputs that are left, in order.
        """
        classes, outputs = self.counts.shape
        present = self._of_class.nonzero().flatten().tolist()
        answered = self.counts.argmax(1)
        chosen = [int(answered[label]) for label in present]
        if classes != outputs or len(set(chosen)) < len(chosen):
            return None
        others = iter(sorted(set(range(outputs)) - set(chosen)))
        output_of = dict(zip(present, chosen, strict=True))
        complete = [output_of[label] if label in output_of else next(others) for label in range(classes)]
        order = [complete.index(output) for output in range(outputs)]
        better = self.reordered(order)
        gained = better.balanced_accuracy - self.balanced_accuracy
        return order if gained >= CLEARLY and better.is_above_chance else None

    def reordered(self, order: Sequence[int]) -> "Answers":
        """The same answers if the classes were in the order that `order` gives."""
        return Answers(self.counts[list(order)], self.images, self.unusable)


@torch.no_grad()
def answers(model: nn.Module, split: Split, classes: int, batch_size: int = 512) -> Answers:
    """The answers of a model, in eval mode, on a split; the model's mode is put back."""
    counts: Tensor | None = None
    unusable = 0
    for logits, labels in logits_of_batches(model, split, batch_size):
        finite = logits.isfinite().all(1)
        unusable += int((~finite).sum())
        outputs = max(classes, logits.shape[1])
        places = labels[finite] * outputs + logits[finite].argmax(1)
        found = torch.bincount(places, minlength=classes * outputs).view(classes, outputs).cpu()
        counts = found if counts is None else counts + found
    assert counts is not None
    return Answers(counts, len(split), unusable)
