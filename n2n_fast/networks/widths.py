"""Which channel groups have their widths in common once layers are removed, and which layer decides each width."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.networks.graph import TracedTeacher


@dataclass(frozen=True)
class WidthClass:
    """Channel groups whose widths keep their proportions: each is the group's factor times one common number.

    factors: of each group. writers: the kept layers that write these groups, in order; the first decides the width;
    none where the width is fixed. channels: in the first writer's output, for a common number of 1.
    """

    factors: dict[int, int]
    writers: tuple[int, ...]
    channels: int

    def number(self, widths: Sequence[int]) -> int:
        """The common number of these widths; where they are out of proportion, that of the narrowest."""
        return min(widths[g] // factor for g, factor in self.factors.items())

    def set(self, widths: list[int], number: int) -> None:
        """Write the widths of these groups for a common number."""
        for g, factor in self.factors.items():
            widths[g] = number * factor

    def step(self, round_to: int) -> int:
        """The least common number whose channels are a multiple of `round_to`."""
        return round_to // math.gcd(round_to, self.channels)


class WidthClasses:
    """The width classes of a traced teacher, for any removal of its layers."""

    def __init__(self, traced: TracedTeacher) -> None:
        self._traced = traced
        self._known: dict[tuple[bool, ...], list[WidthClass]] = {}

    def of(self, keep: tuple[bool, ...]) -> list[WidthClass]:
        """All classes where the layers `keep` are kept. Raises DegenerateArchitecture where widths cannot meet."""
        if keep not in self._known:
            self._known[keep] = [self._class(factors, keep) for factors in self._united(keep)]
        return self._known[keep]

    def _class(self, factors: dict[int, int], keep: Sequence[bool]) -> WidthClass:
        traced = self._traced
        if any(traced.pinned[g] for g in factors):
            return WidthClass(factors, (), 0)
        writers = sorted({i for g in factors for i in traced.writers[g] if keep[i]})
        channels = traced.occurrences[traced.out_axis[writers[0]]] if writers else np.zeros(len(traced.sizes), int)
        return WidthClass(factors, tuple(writers), sum(int(channels[g]) * n for g, n in factors.items()))

    def _united(self, keep: Sequence[bool]) -> Iterable[dict[int, int]]:
        """The factors of each class: a removed layer fixes the ratio of the widths on both its sides."""
        neighbours: list[list[tuple[int, Fraction]]] = [[] for _ in self._traced.sizes]
        for i in np.flatnonzero(~np.array(keep)):
            for g, m, h, n in self._traced.relations(int(i)) or ():
                neighbours[g].append((h, Fraction(m, n)))
                neighbours[h].append((g, Fraction(n, m)))
        relative: dict[int, Fraction] = {}  # width of each group, in those of its class's first
        for start in range(len(neighbours)):
            if start in relative:
                continue
            relative[start] = Fraction(1)
            members = [start]
            for g in members:
                for h, ratio in neighbours[g]:
                    if h not in relative:
                        members.append(h)
                    if relative.setdefault(h, relative[g] * ratio) != relative[g] * ratio:
                        raise DegenerateArchitecture("removed layers ask contradictory widths of a channel group")
            scale = math.lcm(*(relative[g].denominator for g in members))
            common = math.gcd(*(int(relative[g] * scale) for g in members))
            yield {g: int(relative[g] * scale) // common for g in members}
