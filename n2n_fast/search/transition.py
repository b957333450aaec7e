"""From what a policy draws to an architecture: T(s, a) of section 3.1, brought to the limits on params and MACs."""

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.config import SearchConfig

MOST_TILTED = 0.75  # of students at a limit: powers of what narrowing a layer saves


@dataclass(frozen=True)
class Transition:
    """A stage's transition from the teacher of its space; raises DegenerateArchitecture where it cannot be made.

    saves: which of the limits, "params" or "macs", students are narrowed for where no policy says how;
    None where they stay as they are drawn. grows: whether a student that is below the limits gets wider.
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
        cls,
        space: ArchitectureSpace,
        config: SearchConfig,
        removes: bool,
        last: bool,
        limited: Collection[str],
        own_reward: bool = False,
    ) -> "Transition":
        """Students are brought to the limits on params and MACs, unless there is nothing but removals to do that.

        One that is smaller than is rewarded gets wider, unless it has to be fast as well. last: no stage follows.
        limited: the objectives with a limit, `Constraints.enough`. own_reward: the user's, which may reward more.
        """
        if not (limits := {"params", "macs"} & set(limited)) or (removes and last):
            return cls(space, removes, config.ratios)
        saves = next(name for name in (config.objective, "params", "macs") if name in limits)
        grows = removes or (not own_reward and config.objective in limited and "latency" not in limited)
        return cls(space, removes, config.ratios, saves, config.max_params, config.max_macs, grows)

    def __call__(self, actions: list[Any]) -> Architecture:
        """actions: for every layer whether it stays, 1 or 0; in stage 2 the places in `ratios` of channels and kernel.

        Layers that are removed are judged by what is left of a student of the wanted size, narrowed as a middle anchor.
        """
        space = self.space
        if self.removes:
            return self._within(space.remove(space.teacher, [action == 1 for action in actions]), self._narrowed)
        channels, kernels = ([self.ratios[place] for place in places] for places in zip(*actions, strict=True))
        return self._within(space.teacher, channels, kernels)

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

    def _within(self, arch: Architecture, channels: list[float], kernels: list[float] | None = None) -> Architecture:
        limits = {"params": self.params, "macs": self.macs}
        return self.space.shrink_within(arch, channels, kernels, **limits, grow=self.grows)
