"""ArchitectureSpace: the states and transitions of the search, and the students they stand for (sections 3.1, 3.2)."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, fx, nn

from n2n_fast.files.errors import BadInput, DegenerateArchitecture
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.fitting import Calibration
from n2n_fast.networks.graph import TracedTeacher
from n2n_fast.networks.kinds import KINDS, crop, smallest_kernel
from n2n_fast.networks.layers import Layer
from n2n_fast.networks.student import StudentFactory, l1_saliency, randomize

INITS = ("fitted", "sliced", "random")
SALIENCIES = ("activations", "l1")
NARROWEST = 1e-4  # factor of ratios, which leaves one channel everywhere
HALVINGS = 12  # of the logarithms of the factors that are possible


class ArchitectureSpace:
    """All networks that removing and shrinking the layers of one teacher can give.

    teacher: nn.Module with one image input. example_input: (N, C, H, W), N >= 1, the images it will see.
    calibration: unlabelled training images (M, C, H, W) to which students' weights are fitted, a few hundred.
    saliency: which channels a student keeps: "activations", those that tell most of all others on the calibration
    images, the default where there are such; or "l1", those of the largest weights.
    leaf: paths of submodules to be treated as one opaque layer each.
    round_to: shrunk widths are multiples of this many channels, where they are not the teacher's own.
    Raises BadInput if the teacher cannot be traced or does not accept the images.
    """

    layers: tuple[Layer, ...]
    teacher: Architecture
    warnings: tuple[str, ...]

    def __init__(
        self,
        teacher: nn.Module,
        example_input: Tensor,
        calibration: Tensor | None = None,
        *,
        saliency: str | None = None,
        leaf: Iterable[str] = (),
        round_to: int = 1,
    ) -> None:
        if round_to < 1:
            raise ValueError(f"round_to: expected at least 1, got {round_to}")
        self.round_to = round_to
        saliency = saliency or ("l1" if calibration is None else "activations")
        if saliency not in SALIENCIES:
            raise ValueError(f"saliency: expected one of {', '.join(SALIENCIES)}, got {saliency!r}")
        if saliency == "activations" and calibration is None:
            raise ValueError("saliency: 'activations' needs calibration images")
        self._factory: StudentFactory
        held: set[str] = set()
        while misfit := self._trace(teacher, example_input, leaf, held):
            if misfit in held:
                raise BadInput(f"the teacher cannot be narrowed at {misfit!r} of its graph; name the module as `leaf`")
            held.add(misfit)
        self._calibration: Calibration | None = None
        if calibration is not None:
            value = self._factory.saliency
            images = calibration.to(self._traced.example)
            self._calibration = Calibration(self._traced, images, value, saliency == "activations")
            self._factory = StudentFactory(self._traced, self._calibration.saliency)

    def _trace(self, teacher: nn.Module, example: Tensor, leaf: Iterable[str], held: set[str]) -> str | None:
        """Trace the teacher, nodes named in `held` kept at full width; name another one that has to be, if any."""
        self._traced = TracedTeacher(teacher, example, leaf, held)
        self._factory = StudentFactory(self._traced, l1_saliency(self._traced))
        self._smallest = tuple(smallest_kernel(module) for module in self._traced.modules)
        self._classes_of: dict[tuple[bool, ...], list[dict[int, int]]] = {}
        self.layers = self._traced.layers
        self.warnings = self._traced.warnings
        self.teacher = self._architecture(
            (True,) * len(self.layers),
            tuple(int(n) for n in self._traced.sizes),
            tuple(layer.kernel_size for layer in self.layers),
        )
        rng = np.random.default_rng(0)  # equal ratios would hide groups that ought to be one
        for least in (0.05, 0.5):
            narrow = self.shrink(self.teacher, rng.uniform(least, 1, len(self.layers)).tolist())
            if found := self._factory.misfit(narrow, self._kept_units(narrow)):
                return found
        return None

    def remove(self, arch: Architecture, keep: Sequence[bool]) -> Architecture:
        """Stage 1's transition: drop the layers whose `keep` is false.

        keep: one bool per layer; entries of fixed layers are ignored. What entered a removed layer leaves it
        unchanged, so the channels on both its sides become one group, as wide as the narrowest of them.
        Raises DegenerateArchitecture where their widths cannot meet.
        """
        self._check(arch)
        self._check_length("keep", keep)
        kept = tuple(
            before and (bool(now) or not layer.removable)
            for before, now, layer in zip(arch.keep, keep, self.layers, strict=True)
        )
        widths = list(arch.widths)
        for factors in self._classes(kept):
            if len(factors) == 1:
                continue
            unit = min(arch.widths[g] // factor for g, factor in factors.items())
            for g, factor in factors.items():
                widths[g] = unit * factor
                if unit < 1 or (self._traced.pinned[g] and widths[g] != self._traced.sizes[g]):
                    raise DegenerateArchitecture("the channels on both sides of a removed layer cannot meet")
        return self._architecture(kept, tuple(widths), arch.kernels)

    def shrink(
        self, arch: Architecture, channels: Sequence[float], kernels: Sequence[float] | None = None
    ) -> Architecture:
        """Stage 2's transition: scale widths and kernel sizes.

        channels, kernels: ratios in (0, 1] of the given architecture's, one per layer. The first kept layer that
        writes a group decides its width; a kernel is cropped to an odd size; other entries are ignored.
        """
        self._check(arch)
        for name, ratios in (("channels", channels), ("kernels", kernels)):
            if ratios is not None:
                self._check_length(name, ratios)
                wrong = [i for i, ratio in enumerate(ratios) if not 0 < ratio <= 1]
                if wrong:
                    raise ValueError(f"{name}[{wrong[0]}]: expected a ratio in (0, 1], got {ratios[wrong[0]]}")
        widths, sizes = list(arch.widths), list(arch.kernels)
        for factors in self._classes(arch.keep):
            decider = self._decider(factors, arch.keep)
            if decider is not None:
                g, factor = next(iter(factors.items()))
                unit = self._rounded(arch.widths[g] // factor, channels[decider], self._step(factors, decider))
                for g, factor in factors.items():
                    widths[g] = unit * factor
        if kernels is not None:
            sizes = [
                crop(size, smallest, ratio) if kept and size else size
                for size, smallest, ratio, kept in zip(sizes, self._smallest, kernels, arch.keep, strict=True)
            ]
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

        def fits(found: Architecture) -> bool:
            return (params is None or found.params <= params) and (macs is None or found.macs <= macs)

        found, largest = self.shrink(arch, channels, kernels), 1.0  # which looks at the ratios
        if grow:
            largest = 1 / min(channels)
            found = scaled(largest)
        if fits(found):
            return found
        low, high = math.log(NARROWEST), math.log(largest)
        best = scaled(NARROWEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if fits(found := scaled(math.exp(middle))):
                low, best = middle, found
            else:
                high = middle
        return best

    def choices(self, arch: Architecture) -> tuple[list[bool], list[bool]]:
        """Which layers' channel ratios and which layers' kernel ratios change anything in `shrink`."""
        self._check(arch)
        deciders = set()
        for factors in self._classes(arch.keep):
            decider = self._decider(factors, arch.keep)
            if decider is not None:
                step = self._step(factors, decider)
                if all(arch.widths[g] > factor * step for g, factor in factors.items()):  # a single step cannot shrink
                    deciders.add(decider)
        kernels = [
            kept and size != smallest
            for kept, size, smallest in zip(arch.keep, arch.kernels, self._smallest, strict=True)
        ]
        return [i in deciders for i in range(len(self.layers))], kernels

    def tilted(self, tilt: float, objective: str = "params") -> list[float]:
        """Channel ratios that narrow each of the teacher's layers by the power -tilt of what that saves, one a layer.

        What saves least keeps 1, as do layers whose ratio changes nothing. 0 leaves all at 1; at 0.5 the layers come to
        about the same cost. objective: "params" or "macs", which is to be saved.
        """
        savings = self._savings(objective)
        least = min((saved for saved in savings if saved > 0), default=1.0)
        return [(saved / least) ** -tilt if saved > 0 else 1.0 for saved in savings]

    def _savings(self, objective: str) -> list[float]:
        """What halving a layer's channel ratio saves of the teacher's cost, by layer that writes these channels."""
        teacher, found = self.teacher, [0.0] * len(self.layers)
        for factors in self._classes(teacher.keep):
            decider = self._decider(factors, teacher.keep)
            if decider is not None:
                halved = self.shrink(teacher, [0.5 if i == decider else 1.0 for i in range(len(self.layers))])
                writers = {i for g in factors for i in self._traced.writers[g]}
                found[decider] = (getattr(teacher, objective) - getattr(halved, objective)) / len(writers)
        return found

    def widths(self, arch: Architecture) -> list[int | None]:
        """Output channels of every layer in an architecture, None where a layer has no channel axis of its own.

        A removed layer's are those of what passes in its place.
        """
        self._check(arch)
        channels = self._traced.occurrences @ np.array(arch.widths, dtype=np.int64)
        return [int(channels[axis]) if axis >= 0 else None for axis in self._traced.out_axis]

    def build(self, arch: Architecture, init: str | None = None) -> fx.GraphModule:
        """The student of an architecture, in evaluation mode, on the teacher's device and of its dtype.

        init: "fitted" fits the weights, layer by layer, so that each rebuilds what the teacher's layer reads, and
        re-estimates batch norms; the default where calibration images were given. "sliced" cuts the teacher's weights,
        the default otherwise. "random" draws new ones from torch's generator.
        Its parameters are its own; its fx graph is shared with the space: deepcopy the student before editing that.
        """
        self._check(arch)
        init = init or ("sliced" if self._calibration is None else "fitted")
        if init not in INITS:
            raise ValueError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
        kept = self._factory.kept_channels(self._kept_units(arch))
        student = self._factory.build(arch, kept)
        if init == "random":
            randomize(student)
        elif init == "fitted":
            if self._calibration is None:
                raise ValueError(f"init: {init!r} needs the space to be made with calibration images")
            if arch != self.teacher:
                self._calibration.fit(student, arch, kept)
        return student

    def unrounded(self) -> "ArchitectureSpace":
        """The same space with widths of any number of channels; shares everything else."""
        space = copy.copy(self)
        space.round_to = 1
        return space

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

    def _architecture(
        self, keep: tuple[bool, ...], widths: tuple[int, ...], kernels: tuple[tuple[int, ...], ...]
    ) -> Architecture:
        # the kernel of a removed layer means nothing: equal networks are equal architectures
        kernels = tuple(
            size if kept else layer.kernel_size for size, kept, layer in zip(kernels, keep, self.layers, strict=True)
        )
        params, macs = self._traced.cost(keep, widths, kernels)
        return Architecture(keep, widths, kernels, params, macs)

    def _kept_units(self, arch: Architecture) -> np.ndarray:
        return self._factory.kept_units(arch, self._classes(arch.keep))

    def _check(self, arch: Architecture) -> None:
        """Raise ValueError for an architecture of another number of layers or groups."""
        layers, groups = len(self.layers), len(self._traced.sizes)
        if (len(arch.keep), len(arch.kernels), len(arch.widths)) != (layers, layers, groups):
            raise ValueError(
                f"arch: expected {layers} layers and {groups} channel groups, "
                f"got {len(arch.keep)} and {len(arch.widths)}: it is of another space"
            )

    def member(self, arch: Architecture) -> Architecture:
        """`arch` itself, if removing and shrinking can lead to it; ValueError where it is of another space."""
        self._check(arch)
        layers = zip(arch.keep, arch.kernels, self.layers, strict=True)
        widths = zip(arch.widths, self._traced.sizes, self._traced.pinned, strict=True)
        fits = (
            all(_holds_kernel(kept, size, layer) for kept, size, layer in layers)
            and all(width == size if pinned else 1 <= width <= size for width, size, pinned in widths)
            and all(len({Fraction(arch.widths[g], n) for g, n in of.items()}) == 1 for of in self._classes(arch.keep))
        )
        if not fits or asdict(self._architecture(arch.keep, arch.widths, arch.kernels)) != asdict(arch):
            raise ValueError(f"arch: {arch.key} is of another space")
        return arch

    def _check_length(self, name: str, values: Sequence[object]) -> None:
        if len(values) != len(self.layers):
            raise ValueError(f"{name}: expected {len(self.layers)} entries, one per layer, got {len(values)}")

    def _step(self, factors: dict[int, int], decider: int) -> int:
        """Of how many of a class's smallest numbers its widths are multiples, so that channels are of `round_to`."""
        channels = self._traced.occurrences[self._traced.out_axis[decider]]
        of_one = sum(int(channels[g]) * factor for g, factor in factors.items())
        return self.round_to // math.gcd(self.round_to, of_one)

    @staticmethod
    def _rounded(width: int, ratio: float, step: int) -> int:
        """The multiple of `step` next to width · ratio, at least one, not above `width`, which itself may be kept."""
        if ratio == 1 or width < step:
            return width
        return min(max(1, round(width * ratio / step)), width // step) * step

    def _decider(self, factors: dict[int, int], keep: Sequence[bool]) -> int | None:
        """The first kept layer that writes a group of the class; None if the class cannot shrink."""
        if any(self._traced.pinned[g] for g in factors):
            return None
        return min((i for g in factors for i in self._traced.writers[g] if keep[i]), default=None)

    def _classes(self, keep: tuple[bool, ...]) -> list[dict[int, int]]:
        """Groups that removals make one: {group: factor} with width = factor · (the class's common number)."""
        if keep not in self._classes_of:
            self._classes_of[keep] = self._unite(keep)
        return self._classes_of[keep]

    def _unite(self, keep: tuple[bool, ...]) -> list[dict[int, int]]:
        neighbours: list[list[tuple[int, Fraction]]] = [[] for _ in self._traced.sizes]
        for i in np.flatnonzero(~np.array(keep)):
            for g, m, h, n in self._traced.relations(int(i)) or ():
                neighbours[g].append((h, Fraction(m, n)))
                neighbours[h].append((g, Fraction(n, m)))
        seen: dict[int, Fraction] = {}
        classes = []
        for start in range(len(neighbours)):
            if start in seen:
                continue
            seen[start] = Fraction(1)
            members = [start]
            for g in members:
                for h, ratio in neighbours[g]:
                    if h not in seen:
                        members.append(h)
                    if seen.setdefault(h, seen[g] * ratio) != seen[g] * ratio:
                        raise DegenerateArchitecture("removed layers ask contradictory widths of a channel group")
            scale = math.lcm(*(seen[g].denominator for g in members))
            common = math.gcd(*(int(seen[g] * scale) for g in members))
            classes.append({g: int(seen[g] * scale) // common for g in members})
        return classes


def _holds_kernel(kept: bool, size: tuple[int, ...], layer: Layer) -> bool:
    """Whether a layer can be kept or removed so, with a kernel cropped to `size`."""
    if not kept:
        return layer.removable
    whole = layer.kernel_size
    return len(size) == len(whole) and all(n <= k and (k - n) % 2 == 0 for n, k in zip(size, whole, strict=True))
