"""The reward of a student, and the limits a user may set (section 3.2 of the paper)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

DEGENERATE = -1.0
ANNEALING_UPDATES = 15
OBJECTIVES = ("params", "macs", "latency")


@dataclass(frozen=True)
class Cost:
    """What a network costs: parameters, MACs of one image, milliseconds of a forward pass where that was measured."""

    params: int
    macs: int
    latency: float | None = None

    def of(self, objective: str) -> float:
        """The figure that an objective counts: "params", "macs" or "latency"."""
        return float(getattr(self, objective))


RewardFunction = Callable[[float, Cost], float]  # of a validation accuracy and of what the student costs


def reward(accuracy: float, cost: float, teacher_accuracy: float, teacher_cost: float) -> float:
    """R = C (2 - C) · A / A_teacher with C = 1 - cost / teacher_cost; -1 for a student that costs no less.

    accuracy, teacher_accuracy: in (0, 1], both on the validation split. In the paper costs are parameters.
    """
    if cost >= teacher_cost:
        return DEGENERATE
    compression = 1 - cost / teacher_cost
    return compression * (2 - compression) * accuracy / teacher_accuracy


@dataclass(frozen=True)
class Constraints:
    """Hard limits on the student. None: no limit. max_latency: in ms. min_accuracy: on validation, in [0, 1]."""

    max_params: int | None = None
    max_macs: int | None = None
    max_latency: float | None = None
    min_accuracy: float | None = None

    @property
    def costs(self) -> dict[str, float]:
        """The limits on costs that are set, by objective."""
        limits = {name: getattr(self, f"max_{name}") for name in OBJECTIVES}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def enough(self, teacher: Cost, last: bool) -> dict[str, float]:
        """The limits on costs that the teacher does not meet, by objective.

        A stage before the last cannot bring students to a latency: there it is half of the way, as a factor.
        """
        limits = {name: limit for name, limit in self.costs.items() if limit < teacher.of(name)}
        if not last and "latency" in limits:
            limits["latency"] = math.sqrt(limits["latency"] * teacher.of("latency"))
        return limits

    def gaps(self, cost: Cost, accuracy: float) -> dict[str, float]:
        """How far each limit that is not met is away, relative to it; empty where all are met."""
        over = {name: cost.of(name) / limit - 1 for name, limit in self.costs.items()}
        if self.min_accuracy:
            over["accuracy"] = 1 - accuracy / self.min_accuracy
        return {name: gap for name, gap in over.items() if gap > 0}

    def violation(self, cost: Cost, accuracy: float) -> float:
        """0 where all limits are met, else the sum of the relative distances to them."""
        return sum(self.gaps(cost, accuracy).values())

    @staticmethod
    def anneal(reward: float, update: int, severity: float = 1.0) -> float:
        """The reward of a student that violates a constraint: (1 - p) R - p, p = s (1 - ε), ε = (1 - update / 15)^4.

        Lenient at the start, when nothing is feasible yet. severity: s in [0, 1]; at 1, as in the paper, it ends
        at -1.
        """
        softness = max(0.0, 1 - update / ANNEALING_UPDATES) ** 4
        share = severity * (1 - softness)
        return (1 - share) * reward - share


@dataclass(frozen=True)
class StageReward:
    """The reward of one stage's students: R, or the user's `own`, less a penalty for limits that are missed.

    enough: by objective, costs below which no saving is rewarded. penalty: times the violation; None: all of it.
    """

    teacher: Cost
    teacher_accuracy: float
    objective: str
    limits: Constraints
    enough: Mapping[str, float]
    penalty: float | None
    own: RewardFunction | None = None

    def __call__(self, accuracy: float, cost: Cost) -> float:
        """The reward of a student, whatever the limits say."""
        if self.own is not None:
            return float(self.own(accuracy, cost))
        counted = max(cost.of(self.objective), self.enough.get(self.objective, 0.0))
        return reward(accuracy, counted, self.teacher_accuracy, self.teacher.of(self.objective))

    def penalised(self, reward: float, violation: float, update: int) -> float:
        """The reward that the policy learns from. Near a limit the miss counts by its size: no prediction is exact."""
        if violation == 0:
            return reward
        severity = 1.0 if self.penalty is None else min(1.0, self.penalty * violation)
        return self.limits.anneal(reward, update, severity)
