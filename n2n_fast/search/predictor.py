"""Two predictors of accuracy: of a student that was not built, and of what a student comes to when it is trained fully.

`ArchitecturePredictor` learns from all students that were evaluated what an architecture gives, so that policies learn
from thousands of students that they imagine. `AccuracyPredictor` corrects what an evaluation shows: it underrates the
students that need training most. A few students, the *anchors*, are therefore trained fully, and teach it.

The anchors' training is itself shorter than the final one. Where a limit on accuracy makes the difference count, one
anchor gets the final training too. It is assumed to leave all students the same share of their distance to the teacher,
in logits, but to add to none more than it added to that one: a student far below the teacher does not become its equal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MIN_ANCHORS = 3
MIN_REMAINING = 0.25  # no one student proves that training closes more of the distance for all
MIN_DEVIATION = 0.05  # of logits: no few anchors prove a line more exact than an accuracy can be measured
EDGE = 1e-3  # accuracies are kept this far from 0 and 1
SLOPES = np.array([0.4, 0.1])  # of logit(short accuracy) and log(MACs), before any anchor
SLOPE_DEVIATIONS = np.array([0.4, 0.1])
OUTLYING = 1.5  # deviations beyond which an anchor counts less
ROUNDS = 20  # of weighing anchors anew
NOISE = 0.2  # of a short accuracy among students, before any is known; deviations of hyperparameters are 1 nat
JITTER = 1e-4
FARTHEST = 3.0  # of the logarithms of hyperparameters from their priors, so that matrices stay positive definite
FITTING_STEPS = 30


def logit(accuracy: float) -> float:
    """log(a / (1 - a)), of an accuracy kept away from 0 and 1."""
    inside = min(max(accuracy, EDGE), 1 - EDGE)
    return math.log(inside / (1 - inside))


def logistic(x: float) -> float:
    """The inverse of `logit`."""
    return 0.5 + 0.5 * math.tanh(0.5 * x)


class ArchitecturePredictor:
    """A Gaussian process over what is known of architectures without building them (Rasmussen & Williams 2006, 2.2).

    Its covariance is a squared exponential plus a line, with one length for each block of features, and noise. These
    hyperparameters are the most probable a posteriori, under broad priors.
    """

    def __init__(self, blocks: Sequence[Tensor], values: Tensor) -> None:
        """Learn from N architectures. blocks: features (N, n) each, alike in kind; values: what was found, (N,)."""
        blocks = [block.double() for block in blocks if block.shape[1]]
        self._centres = [block.mean(0) for block in blocks]
        points = self._centred(blocks)
        self._mean, self._scale = values.double().mean(), values.double().std(correction=0).clamp_min(1e-3)
        wanted = (values.double() - self._mean) / self._scale
        lengths = [math.log(0.5 * math.sqrt(block.shape[1])) for block in blocks]
        # logarithms of: amplitude of the squared exponential, of the line, of the noise, lengths
        prior = torch.tensor([0.0, -1.0, math.log(NOISE), *lengths], dtype=torch.float64)
        moved = torch.zeros_like(prior).requires_grad_()
        optimizer = torch.optim.LBFGS([moved], max_iter=FITTING_STEPS, line_search_fn="strong_wolfe")

        def surprise() -> Tensor:
            optimizer.zero_grad()
            self._logs = prior + FARTHEST * torch.tanh(moved / FARTHEST)
            factor = self._factor(points)
            misfit = 0.5 * wanted @ torch.cholesky_solve(wanted[:, None], factor)[:, 0]
            loss = misfit + factor.diagonal().log().sum() + 0.5 * (self._logs - prior).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(surprise)  # type: ignore[no-untyped-call]
        self._logs = prior + FARTHEST * torch.tanh(moved.detach() / FARTHEST)
        self._points, self._cholesky = points, self._factor(points)
        self._weights = torch.cholesky_solve(wanted[:, None], self._cholesky)[:, 0]

    def __call__(self, blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (M,) each, of what M architectures would show; without noise."""
        points = self._centred([block.double() for block in blocks if block.shape[1]])
        cross = self._covariance(points, self._points)
        amplitudes = (2 * self._logs[:2]).exp()
        own = amplitudes[0] + amplitudes[1] * self._scaled(points).square().sum(1)
        known = torch.linalg.solve_triangular(self._cholesky, cross.T, upper=False).square().sum(0)
        deviation = (own - known).clamp_min(1e-9).sqrt()
        return self._mean + self._scale * (cross @ self._weights), self._scale * deviation

    def _centred(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        return [block - centre for block, centre in zip(blocks, self._centres, strict=True)]

    def _scaled(self, points: Sequence[Tensor]) -> Tensor:
        return torch.cat([block / length for block, length in zip(points, self._logs[3:].exp(), strict=True)], 1)

    def _covariance(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        a, b = self._scaled(one), self._scaled(other)
        amplitudes, product = (2 * self._logs[:2]).exp(), a @ b.T
        apart = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * product
        return amplitudes[0] * (-0.5 * apart.clamp_min(0)).exp() + amplitudes[1] * product

    def _factor(self, points: Sequence[Tensor]) -> Tensor:
        covariance = self._covariance(points, points)
        noise = (2 * self._logs[2]).exp() + JITTER
        factor: Tensor = torch.linalg.cholesky(covariance + noise * torch.eye(len(covariance), dtype=torch.float64))
        return factor


class Trained(NamedTuple):
    """An anchor: its accuracy after a rollout's evaluation, log(MACs) of one image, accuracy after its training."""

    short_accuracy: float
    log_macs: float
    full_accuracy: float


@dataclass(frozen=True)
class AccuracyPredictor:
    """logit(full) = intercept + slope · logit(short) + macs_slope · log(MACs): a Bayesian regression over anchors.

    Among students that show the same, those of more MACs gain more by training. Anchors that lie far off count less
    (Huber 1964). Without enough anchors it is the identity.
    count: of anchors. deviation: of the anchors from it, in logits. centre: means of the anchors' two inputs.
    covariance: of the two slopes, by rows. error: mean absolute error, in accuracy, when the others predict an anchor;
    None where there are too few to leave one out. remaining: share of the distance to the teacher's logit that the
    final training leaves to students below it; 1: unknown. gain: logits that it adds at most. teacher: its logit.
    """

    slope: float = 1.0
    macs_slope: float = 0.0
    intercept: float = 0.0
    deviation: float = 0.0
    count: int = 0
    centre: tuple[float, float] = (0.0, 0.0)
    covariance: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    error: float | None = None
    remaining: float = 1.0
    gain: float = 0.0
    teacher: float = 0.0

    def __call__(self, short_accuracy: float, log_macs: float) -> tuple[float, float]:
        """The predicted accuracy after a full training and its standard error, both in accuracy."""
        if self.count == 0:
            return short_accuracy, 0.0
        anchored = self.intercept + self.slope * logit(short_accuracy) + self.macs_slope * log_macs
        added = self._added(anchored)
        accuracy = logistic(anchored + added)
        apart = np.array([logit(short_accuracy), log_macs]) - self.centre
        of_slopes = float(apart @ np.reshape(self.covariance, (2, 2)) @ apart)
        width = math.sqrt(self.deviation**2 * (1 + 1 / self.count) + of_slopes)
        is_near = 0 < added < self.gain  # so near the teacher that the share counts
        return accuracy, accuracy * (1 - accuracy) * width * (self.remaining if is_near else 1.0)

    def after_final_training(self, full_accuracy: float) -> float:
        """The predicted accuracy after the final training of a student with this accuracy after an anchor's."""
        added = self._added(logit(full_accuracy))
        return logistic(logit(full_accuracy) + added) if added else full_accuracy

    def _added(self, anchored: float) -> float:
        """The logits that the final training adds to those of an anchor's accuracy."""
        return min(self.gain, (1 - self.remaining) * max(0.0, self.teacher - anchored))

    def learned_final(self, trained: Sequence[tuple[float, float]], teacher_accuracy: float) -> "AccuracyPredictor":
        """This predictor with what the final training adds; trained: pairs of an anchor's accuracy and the final."""
        teacher = logit(teacher_accuracy)
        pairs = [(logit(accuracy), logit(final)) for accuracy, final in trained]
        pairs = [(before, after) for before, after in pairs if before < teacher - MIN_DEVIATION]
        if not pairs or self.count == 0:
            return self
        share = float(np.median([(teacher - after) / (teacher - before) for before, after in pairs]))
        gain = float(np.median([after - before for before, after in pairs]))
        remaining = min(1.0, max(MIN_REMAINING, share))
        return replace(self, remaining=remaining, gain=max(0.0, gain), teacher=teacher)

    @classmethod
    def learned(cls, anchors: Sequence[Trained]) -> "AccuracyPredictor":
        """Learned from anchors; the identity for fewer than MIN_ANCHORS."""
        if len(anchors) < MIN_ANCHORS:
            return cls()
        found = cls._regression(anchors)
        if len(anchors) == MIN_ANCHORS:
            return found
        errors = []
        for i, (short, log_macs, full) in enumerate(anchors):
            by_others = cls._regression([*anchors[:i], *anchors[i + 1 :]])
            errors.append(abs(by_others(short, log_macs)[0] - full))
        return replace(found, error=sum(errors) / len(errors))

    @classmethod
    def _regression(cls, anchors: Sequence[Trained]) -> "AccuracyPredictor":
        inputs = np.array([(logit(one.short_accuracy), one.log_macs) for one in anchors])
        wanted = np.array([logit(one.full_accuracy) for one in anchors])
        prior, weight, deviation = np.diag(SLOPE_DEVIATIONS**-2.0), np.ones(len(anchors)), 1.0
        for _ in range(ROUNDS):
            centre, mean = np.average(inputs, 0, weight), np.average(wanted, weights=weight)
            weighted = weight[:, None] * (inputs - centre) / deviation**2
            precision = weighted.T @ (inputs - centre) + prior
            slopes = np.linalg.solve(precision, weighted.T @ (wanted - mean) + prior @ SLOPES)
            slopes[0] = max(0.0, slopes[0])
            rest = np.abs(wanted - mean - (inputs - centre) @ slopes)
            deviation = max(MIN_DEVIATION, 1.4826 * float(np.median(rest)))  # of a normal distribution
            weight = np.minimum(1.0, OUTLYING * deviation / np.maximum(rest, 1e-9))
        covariance = np.linalg.inv(precision).ravel()
        slope, macs_slope = map(float, slopes)
        return cls(
            slope,
            macs_slope,
            float(mean - centre @ slopes),
            deviation,
            len(anchors),
            (float(centre[0]), float(centre[1])),
            tuple(map(float, covariance)),  # type: ignore[arg-type]
        )
