"""The states and transitions of the search: the architectures of one teacher, as numbers alone (section 3.1)."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.networks.graph import KINDS, Architecture, TracedTeacher, crop, smallest_kernel
from n2n_fast.networks.widths import WidthClasses

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
        self._check(arch)
        self._check_ratios("channels", channels)
        widths, sizes = list(arch.widths), list(arch.kernels)
        for tied in self.classes.of(arch.keep):
            if tied.writers:
                tied.set(widths, tied.shrunk(tied.number(widths), channels[tied.writers[0]], self.round_to))
        if kernels is not None:
            self._check_ratios("kernels", kernels)
            sizes = [crop(*layer) for layer in zip(sizes, self._smallest, kernels, strict=True)]
        return self._architecture(arch.keep, tuple(widths), tuple(sizes))

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

        def scaled(factor: float) -> Architecture:
            return self.shrink(arch, [min(1.0, ratio * factor) for ratio in channels], kernels)

        def fits(student: Architecture) -> bool:
            return (params is None or student.params <= params) and (macs is None or student.macs <= macs)

        best, largest = self.shrink(arch, channels, kernels), 1.0  # which checks the ratios
        if grow:
            largest = 1 / min(channels)
            best = scaled(largest)
        if fits(best):
            return best
        low, high = math.log(NARROWEST), math.log(largest)
        best = scaled(NARROWEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            student = scaled(math.exp(middle))
            low, high, best = (middle, high, student) if fits(student) else (low, middle, best)
        return best

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
        self, keep: tuple[bool, ...], widths: tuple[int, ...], kernels: tuple[tuple[int, ...], ...]
    ) -> Architecture:
        # the kernel of a removed layer means nothing: equal networks are equal architectures
        layers = zip(kernels, keep, self.layers, strict=True)
        kernels = tuple(size if kept else layer.kernel_size for size, kept, layer in layers)
        return Architecture(keep, widths, kernels, *self._traced.cost(keep, widths, kernels))

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

    def _check_ratios(self, name: str, ratios: Sequence[float]) -> None:
        self._check_length(name, ratios)
        for i, ratio in enumerate(ratios):
            if not 0 < ratio <= 1:
                raise ValueError(f"{name}[{i}]: expected a ratio in (0, 1], got {ratio}")


def _can_crop(whole: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    return len(kernel) == len(whole) and all(n <= k and (k - n) % 2 == 0 for n, k in zip(kernel, whole, strict=True))
