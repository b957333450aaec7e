"""What a search tells while it works."""

from dataclasses import dataclass, field
from typing import Any

from n2n_fast.search.reward import DEGENERATE
from n2n_fast.training.distill import Progress


@dataclass(frozen=True)
class Rollout:
    """One student of an update; a line of history.jsonl. `actions` as the policy drew them, one entry a layer.

    short_accuracy: after the few steps of a rollout; predicted_accuracy: after a full training, which the reward
    counts, and accuracy_error its standard error; all None where `error` says why. latency: ms. cached: evaluated
    before.
    """

    stage: str
    update: int
    index: int
    actions: list[Any]
    architecture: str | None = None
    params: int | None = None
    macs: int | None = None
    latency: float | None = None
    short_accuracy: float | None = None
    predicted_accuracy: float | None = None
    accuracy_error: float | None = None
    reward: float = DEGENERATE
    feasible: bool = False
    cached: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class SearchProgress(Progress):
    """What `compress` tells while it works; override what you want to show."""

    def rollout(self, rollout: Rollout, best: Rollout | None, compression: float | None) -> None:
        """A rollout was evaluated; compression: how many times fewer params than the teacher the best has."""

    def stopping(self) -> bool:
        """Whether to stop as soon as the update or training at hand is kept; the search then raises Interrupted."""
        return False
