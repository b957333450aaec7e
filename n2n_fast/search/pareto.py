"""The students that no other beats at once in accuracy and in cost."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A student of a search. accuracy: on validation; where it was not `trained` fully, what is expected of it."""

    stage: str
    architecture: str
    params: int
    macs: int
    accuracy: float
    trained: bool


def front(points: Iterable[Point], by: str) -> list[Point]:
    """The Pareto front of accuracy against `by`, "params" or "macs", the cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (getattr(p, by), -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best
