"""The states and transitions of the search: the architectures of one teacher, as numbers alone (section 3.1)."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.graph import TracedTeacher
from n2n_fast.networks.kinds import KINDS, crop, smallest_kernel
from n2n_fast.networks.widths import WidthClass, WidthClasses

NARROWEST = 1e-4  # factor of ratios, which leaves one channel everywhere
HALVINGS = 12  # of the logarithms of the factors that are possible


class Transitions:
    """All that removing and shrinking the layers of a traced teacher can give.

    layers: the teacher's. teacher: its own architecture. warnings: what of it was not understood.
    round_to: shrunk widths are multiples of this many channels, where they are not the teacher's own.
    """

    def __init__(self, traced: TracedTeacher, round_to: int = 1) -> None:
        self._traced, self.round_to = traced, round_to
        self.layers, self.warnings = traced.layers, traced.warnings
        self.classes = WidthClasses(traced)
        self._smallest = tuple(smallest_kernel(module) for module in traced.modules)
        kernels = tuple(layer.kernel_size for layer in self.layers)
        self.teacher = self._architecture((True,) * len(kernels), tuple(traced.sizes.tolist()), kernels)

    def remove(self, arch: Architecture, keep: Sequence[bool]) -> Architecture:
        """Stage 1's transition: drop the layers whose `keep` is false.

        keep: one bool per layer; entries of fixed layers are ignored. A removed layer passes its input through, so the
        channels on both its sides become one group, as wide as the narrowest of them.
        Raises DegenerateArchitecture where their widths cannot meet.
        """
        self._check(arch)
        self._check_length("keep", keep)
        kept = tuple(
            before and (bool(now) or not layer.removable)
            for before, now, layer in zip(arch.keep, keep, self.layers, strict=True)
        )
        widths = list(arch.widths)
        for tied in self.classes.of(kept):
            tied.set(widths, tied.number(widths))
        groups = zip(widths, self._traced.sizes, self._traced.pinned, strict=True)
        if not all((size if pinned else 1) <= width <= size for width, size, pinned in groups):
            raise DegenerateArchitecture("the channels on both sides of a removed layer cannot meet")
        return self._architecture(kept, tuple(widths), arch.kernels)

    def shrink(
        self, arch: Architecture, channels: Sequence[float], kernels: Sequence[float] | None = None
    ) -> Architecture:
        """Stage 2's transition: scale widths and kernel sizes.

        channels, kernels: ratios in (0, 1] of those of `arch`, one per layer. The first kept layer that writes a group
        decides its width; a kernel is cropped to an odd size; other entries are ignored.
        """
        return self.shrink_within(arch, channels, kernels)

    def shrink_within(
        self,
        arch: Architecture,
        channels: Sequence[float],
        kernels: Sequence[float] | None = None,
        *,
        params: int | None = None,
        macs: int | None = None,
        grow: bool = False,
    ) -> Architecture:
        """As `shrink`, all channel ratios times the largest factor that keeps params and MACs within limits.

        The factor is at most 1; with `grow` a student below the limits is made wider too, as far as the ratios' order
        allows. Where even the narrowest student is too large, that one.
        """
        rows = [channels], None if kernels is None else [kernels]
        return self.shrink_all_within(arch, *rows, params=params, macs=macs, grow=grow)[0]

    def shrink_all_within(
        self,
        arch: Architecture,
        channels: Sequence[Sequence[float]],
        kernels: Sequence[Sequence[float]] | None = None,
        *,
        params: int | None = None,
        macs: int | None = None,
        grow: bool = False,
    ) -> list[Architecture]:
        """`shrink_within` for each row of ratios, all at once: a policy imagines thousands of students."""
        self._check(arch)
        self._check_ratios("channels", channels)
        sizes = [arch.kernels] * len(channels)
        if kernels is not None:
            self._check_ratios("kernels", kernels)
            sizes = [
                tuple(crop(*layer) for layer in zip(arch.kernels, self._smallest, row, strict=True)) for row in kernels
            ]
        ratios = np.array(channels, dtype=np.float64)
        students = _Shrunk(self._traced, self.classes.of(arch.keep), arch, ratios, sizes, self.round_to)
        widths, costs = students.within(params, macs, 1 / ratios.min(1) if grow else np.ones(len(ratios)))
        return [
            self._architecture(arch.keep, tuple(row), kernel, tuple(cost))
            for row, kernel, cost in zip(widths.tolist(), sizes, costs.T.tolist(), strict=True)
        ]

    def choices(self, arch: Architecture) -> tuple[list[bool], list[bool]]:
        """Which layers' channel ratios and which layers' kernel ratios change anything in `shrink`."""
        self._check(arch)
        classes = [tied for tied in self.classes.of(arch.keep) if tied.writers]
        deciders = {tied.writers[0] for tied in classes if tied.number(arch.widths) > tied.step(self.round_to)}
        layers = zip(arch.keep, arch.kernels, self._smallest, strict=True)
        return [i in deciders for i in range(len(arch.keep))], [kept and k != least for kept, k, least in layers]

    def tilted(self, tilt: float, objective: str = "params") -> list[float]:
        """Channel ratios that narrow each of the teacher's layers by the power -tilt of what that saves, one a layer.

        A layer saves what halving its ratio saves of the teacher's cost, shared among the layers that write the same
        channels. What saves least keeps 1, as do layers whose ratio changes nothing. 0 leaves all at 1; at 0.5 the
        layers come to about the same cost. objective: "params" or "macs", which is to be saved.
        """
        ones = [1.0] * len(self.layers)
        savings: dict[int, float] = {}
        for tied in self.classes.of(self.teacher.keep):
            for decider in tied.writers[:1]:
                halved = self.shrink(self.teacher, [*ones[:decider], 0.5, *ones[decider + 1 :]])
                saved = getattr(self.teacher, objective) - getattr(halved, objective)
                savings[decider] = saved / len(tied.writers)
        savings = {i: saved for i, saved in savings.items() if saved > 0}
        least = min(savings.values(), default=1.0)
        return [(savings.get(i, least) / least) ** -tilt for i in range(len(self.layers))]

    def widths(self, arch: Architecture) -> list[int | None]:
        """Output channels of every layer in an architecture, None where a layer has no channel axis of its own.

        A removed layer's are those of what passes in its place.
        """
        self._check(arch)
        channels = self._traced.occurrences @ np.array(arch.widths, dtype=np.int64)
        return [int(channels[axis]) if axis >= 0 else None for axis in self._traced.out_axis]

    def coordinates(self, archs: Sequence[Architecture]) -> list[Tensor]:
        """What is known of N architectures without building them, (N, n) each, float64.

        Logarithms of their shares of the teacher's widths, of its kernels' elements and of its params and MACs; and
        which layers are kept, 1 or 0.
        """
        wide = (self._traced.sizes > 1) & ~np.array(self._traced.pinned)
        croppable = [i for i, layer in enumerate(self.layers) if layer.kernel_size != self._smallest[i]]
        removable = [i for i, layer in enumerate(self.layers) if layer.removable]
        widths = np.array([arch.widths for arch in archs])[:, wide] / self._traced.sizes[wide]
        elements = _elements([arch.kernels for arch in archs]) / _elements([self.teacher.kernels])
        costs = np.array([(arch.params, arch.macs) for arch in archs]) / (
            self.teacher.params,
            max(1, self.teacher.macs),
        )
        kept = np.array([arch.keep for arch in archs], dtype=np.float64)[:, removable]
        logs = (np.log(part) for part in (widths, elements[:, croppable], np.maximum(costs, 1e-9)))
        return [torch.from_numpy(part) for part in (*logs, kept)]

    def features(self) -> Tensor:
        """x_t of every layer, (layers, features) float32: kind as one-hot, sizes on a logarithmic scale."""
        rows = []
        for layer in self.layers:
            sizes = (max(size, default=0) for size in (layer.kernel_size, layer.stride, layer.padding))
            numbers = (*sizes, layer.out_channels, layer.skip_start, layer.skip_end)
            scales = (8, 4, 4, 2048, 64, 64)
            scaled = [math.log1p(n) / math.log1p(scale) for n, scale in zip(numbers, scales, strict=True)]
            rows.append([float(layer.kind == kind) for kind in KINDS] + scaled)
        return torch.tensor(rows)

    def member(self, arch: Architecture) -> Architecture:
        """`arch` itself, if removing and shrinking can lead to it; ValueError where it is of another space."""
        self._check(arch)
        layers = zip(self.layers, arch.keep, arch.kernels, strict=True)
        fits = all(_can_crop(layer.kernel_size, kernel) if kept else layer.removable for layer, kept, kernel in layers)
        if not fits or asdict(self.remove(arch, arch.keep)) != asdict(arch):
            raise ValueError(f"arch: {arch.key} is of another space")
        return arch

    def _architecture(
        self,
        keep: tuple[bool, ...],
        widths: tuple[int, ...],
        kernels: tuple[tuple[int, ...], ...],
        cost: tuple[int, int] | None = None,
    ) -> Architecture:
        """cost: params and MACs, where they are known."""
        # the kernel of a removed layer means nothing: equal networks are equal architectures
        layers = zip(kernels, keep, self.layers, strict=True)
        kernels = tuple(size if kept else layer.kernel_size for size, kept, layer in layers)
        if cost is None:
            params, macs = self._traced.cost(keep, np.array([widths]), _elements([kernels]))
            cost = int(params[0]), int(macs[0])
        return Architecture(keep, widths, kernels, *cost)

    def _check(self, arch: Architecture) -> None:
        """Raise ValueError for an architecture of another number of layers or groups."""
        layers, groups = len(self.layers), len(self._traced.sizes)
        if (len(arch.keep), len(arch.kernels), len(arch.widths)) != (layers, layers, groups):
            raise ValueError(
                f"arch: expected {layers} layers and {groups} channel groups, "
                f"got {len(arch.keep)} and {len(arch.widths)}: it is of another space"
            )

    def _check_length(self, name: str, values: Sequence[object]) -> None:
        if len(values) != len(self.layers):
            raise ValueError(f"{name}: expected {len(self.layers)} entries, one per layer, got {len(values)}")

    def _check_ratios(self, name: str, rows: Sequence[Sequence[float]]) -> None:
        for ratios in rows:
            self._check_length(name, ratios)
            for i, ratio in enumerate(ratios):
                if not 0 < ratio <= 1:
                    raise ValueError(f"{name}[{i}]: expected a ratio in (0, 1], got {ratio}")


class _Shrunk:
    """N students of one architecture that keep the same layers, their ratios times a factor each."""

    def __init__(
        self,
        traced: TracedTeacher,
        classes: Sequence[WidthClass],
        arch: Architecture,
        ratios: np.ndarray,
        kernels: Sequence[tuple[tuple[int, ...], ...]],
        round_to: int,
    ) -> None:
        """ratios: (N, layers); kernels: N times one per layer."""
        classes = [tied for tied in classes if tied.writers]
        self._cost, self._keep, self._kernels = traced.cost, arch.keep, _elements(kernels)
        self._whole = np.array(arch.widths, dtype=np.int64)
        self._ratios = ratios[:, [tied.writers[0] for tied in classes]]
        self._numbers = np.array([tied.number(arch.widths) for tied in classes], dtype=np.int64)
        self._steps = np.array([tied.step(round_to) for tied in classes], dtype=np.int64)
        members = [(g, place, factor) for place, tied in enumerate(classes) for g, factor in tied.factors.items()]
        self._groups, self._class, self._factors = np.array(members, dtype=np.int64).reshape(-1, 3).T

    def scaled(self, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Widths (N, groups), and params and MACs (2, N), for factors (N,)."""
        ratios = np.minimum(1.0, self._ratios * factors[:, None])
        most = self._numbers // self._steps
        shrunk = np.clip(np.rint(self._numbers * ratios / self._steps), 1, np.maximum(1, most)).astype(np.int64)
        stay = (ratios == 1) | (most == 0)
        numbers = np.where(stay, self._numbers, shrunk * self._steps)
        widths = np.tile(self._whole, (len(ratios), 1))
        widths[:, self._groups] = numbers[:, self._class] * self._factors
        return widths, np.stack(self._cost(self._keep, widths, self._kernels))

    def within(self, params: int | None, macs: int | None, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of the largest factors, at most `largest`, (N,), that are within the limits; see `scaled`."""
        limits = np.array([[np.iinfo(np.int64).max if limit is None else limit] for limit in (params, macs)])
        widths, costs = self.scaled(largest)
        fit = np.all(costs <= limits, axis=0)
        if fit.all():
            return widths, costs
        narrowest, narrowest_costs = self.scaled(np.full(len(largest), NARROWEST))
        widths, costs = np.where(fit[:, None], widths, narrowest), np.where(fit, costs, narrowest_costs)
        low, high = np.full(len(largest), math.log(NARROWEST)), np.log(largest)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            tried, tried_costs = self.scaled(np.exp(middle))
            fits = np.all(tried_costs <= limits, axis=0)
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
            better = fits & ~fit
            widths, costs = np.where(better[:, None], tried, widths), np.where(better, tried_costs, costs)
        return widths, costs


def _elements(kernels: Sequence[tuple[tuple[int, ...], ...]]) -> np.ndarray:
    """Elements of every layer's kernel, (N, layers)."""
    return np.array([[math.prod(kernel) for kernel in row] for row in kernels], dtype=np.int64)


def _can_crop(whole: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    return len(kernel) == len(whole) and all(n <= k and (k - n) % 2 == 0 for n, k in zip(kernel, whole, strict=True))
