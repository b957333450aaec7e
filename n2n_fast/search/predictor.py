"""Predicts a student's accuracy after a full training from its accuracy after a few steps.

A short training underrates the students that need training most, the small ones, so that a policy would learn this
bias. A few students, the *anchors*, are therefore trained fully, and a monotone line through them predicts all others.

The anchors' training is itself shorter than the final one. Where a limit on accuracy makes the difference count, one
anchor gets the final training too. It is assumed to leave all students the same share of their distance to the teacher,
in logits, but to add to none more than it added to that one: a student far below the teacher does not become its equal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

MIN_ANCHORS = 3
MIN_REMAINING = 0.25  # no one student proves that training closes more of the distance for all
MIN_DEVIATION = 0.05  # of logits: no few anchors prove a line more exact than an accuracy can be measured
EDGE = 1e-3  # accuracies are kept this far from 0 and 1


@dataclass(frozen=True)
class AccuracyPredictor:
    """logit(full accuracy) = intercept + slope · logit(short accuracy), slope >= 0: the line of Theil and Sen.

    Its slope is the median over pairs of anchors, its intercept the median over anchors: one anchor that stays at
    chance turns it little. Without enough anchors it is the identity.
    count: of anchors. deviation: of the anchors from the line, in logits. mean, spread: of the anchors' logits, spread
    being the sum of squares around their mean. error: mean absolute error, in accuracy, when the others predict an
    anchor; None where there are too few to leave one out. remaining: share of the distance to the teacher's logit that
    the final training leaves to students below it; 1: unknown. gain: logits that it adds at most. teacher: its logit.
    """

    slope: float = 1.0
    intercept: float = 0.0
    deviation: float = 0.0
    count: int = 0
    mean: float = 0.0
    spread: float = 1.0
    error: float | None = None
    remaining: float = 1.0
    gain: float = 0.0
    teacher: float = 0.0

    def __call__(self, short_accuracy: float) -> tuple[float, float]:
        """The predicted accuracy after a full training and its standard error, both in accuracy."""
        if self.count == 0:
            return short_accuracy, 0.0
        x = _logit(short_accuracy)
        anchored = self.intercept + self.slope * x
        added = self._added(anchored)
        accuracy = _logistic(anchored + added)
        width = self.deviation * math.sqrt(1 + 1 / self.count + (x - self.mean) ** 2 / self.spread)
        is_near = 0 < added < self.gain  # so near the teacher that the share counts
        return accuracy, accuracy * (1 - accuracy) * width * (self.remaining if is_near else 1.0)

    def after_final_training(self, full_accuracy: float) -> float:
        """The predicted accuracy after the final training of a student with this accuracy after an anchor's."""
        added = self._added(_logit(full_accuracy))
        return _logistic(_logit(full_accuracy) + added) if added else full_accuracy

    def _added(self, anchored: float) -> float:
        """The logits that the final training adds to those of an anchor's accuracy."""
        return min(self.gain, (1 - self.remaining) * max(0.0, self.teacher - anchored))

    def learned_final(self, trained: Sequence[tuple[float, float]], teacher_accuracy: float) -> "AccuracyPredictor":
        """This predictor with what the final training adds; trained: pairs of an anchor's accuracy and the final."""
        teacher = _logit(teacher_accuracy)
        pairs = [(_logit(accuracy), _logit(final)) for accuracy, final in trained]
        pairs = [(before, after) for before, after in pairs if before < teacher - MIN_DEVIATION]
        if not pairs or self.count == 0:
            return self
        share = float(np.median([(teacher - after) / (teacher - before) for before, after in pairs]))
        gain = float(np.median([after - before for before, after in pairs]))
        remaining = min(1.0, max(MIN_REMAINING, share))
        return replace(self, remaining=remaining, gain=max(0.0, gain), teacher=teacher)

    @classmethod
    def learned(cls, anchors: Sequence[tuple[float, float]]) -> "AccuracyPredictor":
        """Learned from anchors' pairs (short accuracy, full accuracy); the identity for fewer than MIN_ANCHORS."""
        if len(anchors) < MIN_ANCHORS:
            return cls()
        line = cls._line(anchors)
        if len(anchors) == MIN_ANCHORS:
            return line
        errors = []
        for i, (short, full) in enumerate(anchors):
            by_others = cls._line([*anchors[:i], *anchors[i + 1 :]])
            errors.append(abs(by_others(short)[0] - full))
        return replace(line, error=sum(errors) / len(errors))

    @classmethod
    def _line(cls, anchors: Sequence[tuple[float, float]]) -> "AccuracyPredictor":
        x, y = (np.array([_logit(accuracy) for accuracy in column]) for column in zip(*anchors, strict=True))
        slope = max(0.0, _median_slope(x, y))
        intercept = float(np.median(y - slope * x))
        mean, spread = float(x.mean()), max(float(((x - x.mean()) ** 2).sum()), 1e-6)
        rest = float(((y - intercept - slope * x) ** 2).sum())
        deviation = max(MIN_DEVIATION, math.sqrt(rest / max(1, len(anchors) - 2)))
        return cls(slope, intercept, deviation, len(anchors), mean, spread)


def _median_slope(x: np.ndarray, y: np.ndarray) -> float:
    """The median slope of all pairs that differ in x; 0 where none do."""
    i, j = np.triu_indices(len(x), 1)
    apart = x[i] != x[j]
    return float(np.median((y[j] - y[i])[apart] / (x[j] - x[i])[apart])) if apart.any() else 0.0


def _logit(accuracy: float) -> float:
    inside = min(max(accuracy, EDGE), 1 - EDGE)
    return math.log(inside / (1 - inside))


def _logistic(x: float) -> float:
    return 0.5 + 0.5 * math.tanh(0.5 * x)
