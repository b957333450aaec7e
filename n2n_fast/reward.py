"""The reward of a student, and the constraints a user may set (section 3.2 of the paper)."""

from dataclasses import dataclass

DEGENERATE = -1.0
ANNEALING_UPDATES = 15


def reward(accuracy: float, params: int, teacher_accuracy: float, teacher_params: int) -> float:
    """R = C (2 - C) · A / A_teacher with C = 1 - params / teacher_params; -1 for a student that is no smaller.

    accuracy, teacher_accuracy: in (0, 1], both on the validation split.
    """
    if params >= teacher_params:
        return DEGENERATE
    compression = 1 - params / teacher_params
    return compression * (2 - compression) * accuracy / teacher_accuracy


@dataclass(frozen=True)
class Constraints:
    """Hard limits on the student. None: no limit. min_accuracy: on the validation split, in [0, 1]."""

    max_params: int | None = None
    min_accuracy: float | None = None

    def violation(self, params: int, accuracy: float) -> float:
        """0 where all are met, else the sum of the relative distances to the limits."""
        over = 0.0 if self.max_params is None else max(0.0, params / self.max_params - 1)
        under = 0.0 if not self.min_accuracy else max(0.0, 1 - accuracy / self.min_accuracy)
        return over + under

    @staticmethod
    def anneal(reward: float, update: int) -> float:
        """The reward of a student that violates a constraint: (ε - 1) + ε R, ε = (1 - update / 15)^4, 0 after that.

        Lenient at the start, when nothing is feasible yet, and -1 in the end.
        """
        softness = max(0.0, 1 - update / ANNEALING_UPDATES) ** 4
        return (softness - 1) + softness * reward
