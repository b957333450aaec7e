"""What a teacher's activations say about its channels: their order, and weights fitted to those that remain.

A student whose weights are merely sliced from the teacher starts at chance. Here every layer that mixes channels is
fitted instead: where the teacher's layer reads h and the student's reads y, its weight W becomes W·A with
A = E[h yᵀ] (E[y yᵀ] + εI)⁻¹, the linear map that rebuilds h from y best (He et al. 2017 select channels by such a
reconstruction; here it only replaces the weights). Channels are kept in the order of a pivoted Cholesky factorisation,
greedy by how much of all others a channel explains.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from n2n_fast import native
from n2n_fast.files.errors import BadInput, DegenerateArchitecture
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.graph import TracedTeacher
from n2n_fast.networks.kinds import BATCH_NORMS, CONVS
from n2n_fast.networks.products import as_products

RIDGE = 1e-5  # ε of the teacher's own moments, in units of the mean variance of y
PRIOR = 1e-2  # the same where the student's activations are fitted, towards the teacher's bridge
EXACT = 1e-5  # the same where the samples show a linear map; less would be lost in their rounding
NEARLY = 1e-3  # of a variance: kept channels that leave more of the teacher's tell no lost one exactly
EXPLAINED = 1e-5  # of a variance: what is left of it is the moments' rounding
BLOCK = 64  # pivots between two updates of a Schur complement
ROWS = 2048  # samples that are summed in float32; such sums are added up in float64
SAMPLES_PER_CHANNEL = 8
MIN_SAMPLES = 16384  # of the images that a student is fitted to
PASS_IMAGES = 320  # that a student is fitted to; 256 are 0.5 points worse on a ResNet-18 (bench/README.md)
PASS_NUMBERS = 2**23  # the largest activation of a batch through the teacher: what caches hold is fastest
MAX_PASS_NUMBERS = 2**26  # the same through a student, whose layers see all images at once


@dataclass(frozen=True)
class Moments:
    """First and second moments of samples of one layer's input: mean (C,), covariance (C, C), both float64."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Target:
    """What one layer reads in the teacher, at the images and positions that students are fitted to.

    samples: (P, C), their mean taken off; mean: (C,); variance: (), the sum over channels, float64.
    """

    samples: Tensor
    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Factor:
    """L of L·Lᵀ = E[h hᵀ] + εI, the channels by saliency; the leading blocks are those of any number kept.

    rows: L, its rows in the axis's own order; inverse: L⁻¹; left: the share of the variance that the first 0, 1, ..., C
    channels leave unexplained.
    """

    rows: Tensor
    inverse: Tensor
    epsilon: Tensor
    left: np.ndarray


class Calibration:
    """The teacher's inputs to each layer that mixes channels, at sampled positions of unlabelled images.

    images: (N, C, H, W). Students are fitted to the first PASS_IMAGES of them, at about max(16384, 8 C) positions of
    each layer's input, so that memory is bounded by the widths and not by the image size. Moments are of all images.
    saliency: of each unit, (units,); the highest are kept. by_activations: keep those instead that the pivoted
    factorisation takes first, and let `saliency` decide between equals.
    fitted: the layers whose weights can be fitted: convolutions of one group and linear layers that are called once.
    grouped: convolutions of several groups, of which the student's own activations fit each by itself. Others are
    sliced.
    """

    def __init__(self, traced: TracedTeacher, images: Tensor, saliency: np.ndarray, by_activations: bool) -> None:
        self.traced, self.images = traced, images
        self.fitted = {name: i for i, name in enumerate(traced.names) if traced.fittable[i]}
        self.grouped = {name: i for i, name in enumerate(traced.names) if traced.groupwise[i]}
        self.passed = min(PASS_IMAGES, len(self._batch(0, MAX_PASS_NUMBERS)))  # images that a student sees
        self._generator = torch.Generator().manual_seed(0)
        self._places: dict[int, Tensor] = {}
        with full_precision():
            samples = self._run_teacher()
            self.moments = {i: _moments(samples[i]) for i in self.fitted.values()}
        for i, moments in self.moments.items():
            if not moments.covariance.isfinite().all():
                raise BadInput(
                    f"the input of the teacher's layer {traced.names[i]} is not finite on calibration images"
                )
        self.targets = {i: self._target(i, found) for i, found in samples.items()}
        self.saliency = self._explaining_first(saliency) if by_activations else saliency

    @torch.no_grad()
    def _run_teacher(self) -> dict[int, Tensor]:
        """Samples of each layer's input, (positions of all images, channels)."""
        samples: dict[int, Tensor] = {}  # made whole: joining parts would need twice the memory
        calibration = self
        first = 0

        class Recorder(fx.Interpreter):
            def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
                i = calibration.fitted.get(target, calibration.grouped.get(target))
                if i is not None:
                    found = calibration.sample(i, args[0], first)
                    per_image = calibration._places[i].shape[1]
                    if i not in samples:
                        samples[i] = found.new_empty(len(calibration.images) * per_image, found.shape[1])
                    samples[i][first * per_image :][: len(found)] = found
                return super().call_module(target, args, kwargs)

        while first < len(self.images):
            batch = self._batch(first, PASS_NUMBERS)
            Recorder(self.traced.module).run(batch)
            first += len(batch)
        return samples

    def _target(self, i: int, samples: Tensor) -> Target:
        """Layer i's samples at the images that students are fitted to."""
        samples = samples[: self.passed * self._places[i].shape[1]]
        mean = samples.mean(0)
        centred = samples - mean
        return Target(centred, mean, centred.square().sum(0).double().sum() / len(centred))

    def _batch(self, first: int, numbers: int) -> Tensor:
        """Images from the `first` on, as many as `numbers` allow; by position, which is faster to sample."""
        count = max(1, numbers // self.traced.largest_activation)
        images = self.images[first : first + count]
        return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images

    def sample(self, i: int, x: Tensor, first: int) -> Tensor:
        """Layer i's input x, for images first, first + 1, ..., at that layer's positions: (samples, channels)."""
        repeat = self.traced.repeats[i]
        if x.ndim == 2:
            rows = x.view(len(x), -1, repeat).mT
        elif isinstance(self.traced.modules[i], nn.Linear):
            rows = x.flatten(1, -2)
        else:
            rows = x.movedim(1, -1).flatten(1, -2)
        positions = rows.shape[1]
        if i not in self._places:
            self._places[i] = self._drawn(positions, rows.shape[2]).to(x.device)
        found, places = rows.reshape(-1, rows.shape[2]), self._places[i]
        if places.shape[1] < positions:
            found = found[places[first : first + len(x)].flatten() - first * positions]
        return found.float() if found.element_size() < 4 else found

    def _drawn(self, positions: int, channels: int) -> Tensor:
        """Which of all images' positions are sampled, (N, positions of each), counted through."""
        wanted = max(MIN_SAMPLES, SAMPLES_PER_CHANNEL * channels)
        count = min(positions, -(-wanted // self.passed))
        draws = torch.rand(len(self.images), positions, generator=self._generator)
        return draws.topk(count).indices + positions * torch.arange(len(self.images))[:, None]

    # Which channels

    def _explaining_first(self, saliency: np.ndarray) -> np.ndarray:
        """For each unit how early the pivoted factorisation of its group takes it, (units,); higher is earlier."""
        value = np.zeros(len(saliency))
        for group in self.traced.units:
            units = group[np.argsort(-saliency[group], kind="stable")]  # of equals, the first is taken
            matrix = self._group_moments(units)
            if matrix is not None:
                value[units[pivoted_order(matrix)]] = np.arange(len(units), 0, -1) / len(units)
        return value

    def _group_moments(self, units: np.ndarray) -> Tensor | None:
        """The second moments of a group's units, summed over the layers that read them, each divided by its trace."""
        total = None
        for i, moments in self.moments.items():
            axis = self.traced.axes[self.traced.in_axis[i]][:: self.traced.repeats[i]]
            if not np.isin(units, axis).all():
                continue
            member = torch.from_numpy((axis[None] == units[:, None]).astype(np.float64))
            part = member @ moments.covariance.cpu() @ member.T
            trace = float(part.trace())
            if trace > 0:
                total = part / trace + (0 if total is None else total)
        return total

    # Which weights

    @torch.no_grad()
    def fit(self, student: fx.GraphModule, arch: Architecture, kept: Sequence[np.ndarray | None]) -> None:
        """Fit each layer to what really reaches it, in one pass over the student; norms are re-estimated on the way.

        The student's input y comes from the layers fitted before, the target h from the teacher (asymmetric
        reconstruction), so that errors do not add up and removed layers are bridged. On a GPU the host waits for it
        once, at the end. Raises DegenerateArchitecture where activations are not finite.
        """
        with full_precision(), as_products(student, self.images.device):
            fitter = _Fitter(self, student, arch, kept)
            fitter.run(self._batch(0, MAX_PASS_NUMBERS)[: self.passed])
        if not bool(fitter.finite):
            raise DegenerateArchitecture("its activations are not finite")

    def has_intercept(self, i: int, keep: Sequence[bool]) -> bool:
        """Whether a constant that layer i adds is taken up, by its bias or by the norm that follows."""
        norm = self.traced.norm_after[i]
        return getattr(self.traced.modules[i], "bias", None) is not None or (norm is not None and keep[norm])

    def bridge(self, i: int, kept: np.ndarray, channels: Tensor) -> tuple[Tensor, bool]:
        """A for layer i, (C, C') float64, where y is the teacher's own input restricted to the channels kept.

        kept, channels: the same channels, (C',), on the host and on the device. Second, whether A may be exact.
        """
        count, (order, order_on_device) = len(kept), self._orders[int(self.traced.in_axis[i])]
        factor = self._factors[i]
        if np.array_equal(np.sort(order[:count]), kept):
            bridge = factor.rows[:, :count] @ factor.inverse[:count, :count]
            return bridge[:, order_on_device[:count].argsort()].double(), bool(factor.left[count] < NEARLY)
        cross = self._second(i)[:, channels]  # a removal united groups, which are ordered by both
        return _solve(cross[channels], cross, factor.epsilon), True

    def weights(self, arch: Architecture, kept: Sequence[np.ndarray | None]) -> dict[int, Tensor]:
        """Teacher weights of the fitted layers that are kept, by input channel, (C, O', kh', kw')."""
        bank, kernels, places = self._bank
        layers = [i for i in self.fitted.values() if arch.keep[i]]
        chosen = np.array([places[i] for i in layers], dtype=np.int64)
        crops = [arch.kernels[i] if len(arch.kernels[i]) == 2 else kernels[i] for i in layers]
        whole = [None] * len(self.fitted)
        cut = bank.materialize(chosen, [*whole, *kept], np.array(crops, dtype=np.int64).reshape(-1, 2))
        return dict(zip(layers, cut, strict=True))

    # What all students share, made when first needed

    @functools.cached_property
    def _orders(self) -> dict[int, tuple[np.ndarray, Tensor]]:
        """For each axis that a fitted layer reads, its channels by saliency, on the host and on the device."""
        orders = {}
        for i in self.fitted.values():
            axis = int(self.traced.in_axis[i])
            order = np.argsort(-self.saliency[self.traced.axes[axis][:: self.traced.repeats[i]]], kind="stable")
            orders[axis] = order, torch.from_numpy(order).to(self.images.device)
        return orders

    @functools.cached_property
    def _factors(self) -> dict[int, Factor]:
        """Each fitted layer's moments, its channels ordered by saliency, factorised."""
        return {i: self._factor(i, self._orders[int(self.traced.in_axis[i])][1]) for i in self.fitted.values()}

    def _factor(self, i: int, order: Tensor) -> Factor:
        second = self._second(i)[order][:, order]
        epsilon = _share(second, RIDGE)
        while True:
            lower, failed = torch.linalg.cholesky_ex(_plus(second, epsilon))
            if not failed:
                break
            epsilon = 10 * epsilon  # the moments' rounding makes them less than singular
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
        of_column = lower.square().sum(0).cpu().numpy()
        left = np.append(of_column[::-1].cumsum()[::-1], 0) / of_column.sum().clip(1e-30)
        dtype = self.targets[i].samples.dtype
        return Factor(lower[order.argsort()].to(dtype), inverse.to(dtype), epsilon, left)

    def _second(self, i: int) -> Tensor:
        """Second moments of layer i's input in the teacher, (C, C), about the mean where that is taken up."""
        moments = self.moments[i]
        if self.has_intercept(i, [True] * len(self.traced.names)):
            return moments.covariance
        return moments.covariance + torch.outer(moments.mean, moments.mean)

    @functools.cached_property
    def _bank(self) -> tuple[native.WeightBank, dict[int, tuple[int, int]], dict[int, int]]:
        """The fitted layers' weights by input channel, (C, O, kh, kw), their kernels, and each layer's place."""
        weights: dict[int, Tensor] = {}
        for i in self.fitted.values():
            weight: Any = self.traced.modules[i].weight
            by_channel = weight.detach().view(len(weight), -1, *(weight.shape[2:] or (self.traced.repeats[i],)))
            flat = by_channel.flatten(3) if by_channel.ndim == 5 else by_channel
            weights[i] = flat.reshape(*flat.shape[:3], -1).transpose(0, 1)
        count = len(weights)
        out_axes = [count + int(self.traced.out_axis[i]) for i in weights]
        kernels = {i: (weight.shape[2], weight.shape[3]) for i, weight in weights.items()}
        places = {i: k for k, i in enumerate(weights)}
        return native.WeightBank(list(weights.values()), list(range(count)), out_axes), kernels, places


class _Fitter(fx.Interpreter):
    """Runs a student once; each of its layers is fitted to what reaches it, just before that layer is called."""

    def __init__(
        self, calibration: Calibration, student: fx.GraphModule, arch: Architecture, kept: Sequence[np.ndarray | None]
    ) -> None:
        """kept: for each axis the channels that the student keeps, None for all."""
        super().__init__(student)
        device = calibration.images.device
        self.calibration, self.keep = calibration, arch.keep
        self.kept = [
            None if channels is None else (channels, torch.from_numpy(channels).to(device)) for channels in kept
        ]
        self.weights = calibration.weights(arch, kept)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module: Any = self.fetch_attr(target)
        fitted, grouped = (layers.get(target) for layers in (self.calibration.fitted, self.calibration.grouped))
        if fitted in self.weights:
            self._fit(module, fitted, args[0])
        elif grouped is not None and isinstance(module, CONVS):
            self._fit_groups(module, grouped, args[0])
        elif isinstance(module, BATCH_NORMS) and module.track_running_stats:
            with _estimating(module, args[0]):
                return super().call_module(target, args, kwargs)
        return super().call_module(target, args, kwargs)

    def _fit(self, module: Any, i: int, x: Tensor) -> None:
        """Fit layer i to its input x in the student."""
        target, weight = self.calibration.targets[i], self.weights[i]
        given = self.calibration.sample(i, x, 0)
        mean = given.mean(0)
        given = given - mean
        second, cross, total = _product(given, given), _product(target.samples, given), target.variance
        intercept = self.calibration.has_intercept(i, self.keep)
        if not intercept:
            second = second + torch.outer(mean, mean)
            cross, total = cross + torch.outer(target.mean, mean), total + target.mean.double().square().sum()
        prior, may_be_exact = self._prior(i)
        bridge = _solve(second, cross, _share(second, PRIOR), prior)
        if may_be_exact and len(given) > 2 * len(second):  # enough samples to tell a linear map from a lucky fit
            exact = _solve(second, cross, _share(second, EXACT), prior)
            rest = total - 2 * (exact * cross).sum() + (exact @ second * exact).sum()  # E|h - A y|²
            bridge = torch.where(rest.abs() < EXPLAINED * total, exact, bridge)
        self.finite.logical_and_(bridge.isfinite().all())
        bridge = bridge.to(given.dtype)
        _set_weight(module, weight, bridge)
        if module.bias is not None:
            module.bias.data.add_(_of_constant(weight, target.mean - bridge @ mean))

    def _prior(self, i: int) -> tuple[Tensor, bool]:
        """What layer i's bridge is drawn to, the teacher's, (C, C'); and whether a bridge may be exact."""
        traced, kept = self.calibration.traced, self.kept[self.calibration.traced.in_axis[i]]
        if kept is None:
            return torch.eye(len(self.weights[i]), dtype=torch.float64, device=self.finite.device), True
        repeat = traced.repeats[i]
        return self.calibration.bridge(i, *(channels[::repeat] // repeat for channels in kept))

    def _fit_groups(self, module: Any, i: int, x: Tensor) -> None:
        """Fit each convolution group of layer i to what of its input x in the student the same group reads."""
        target, kept = self.calibration.targets[i], self.kept[self.calibration.traced.in_axis[i]]
        wanted, mean = target.samples, target.mean
        if kept is not None:
            wanted, mean = wanted[:, kept[1]], mean[kept[1]]
        given = self.calibration.sample(i, x, 0)
        offset = given.mean(0)
        weight = module.weight.data
        width = weight.shape[1]
        y, h = (samples.double().view(len(given), -1, width) for samples in (given - offset, wanted))
        second, cross = (torch.einsum("pgi,pgj->gij", a, y) / len(y) for a in (y, h))
        ridge = PRIOR * second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
        ridge = ridge * torch.eye(width, dtype=second.dtype, device=second.device)
        factor, _ = torch.linalg.cholesky_ex(second + ridge)
        bridge = torch.cholesky_solve((cross + ridge).mT, factor).mT.to(weight.dtype)
        self.finite.logical_and_(bridge.isfinite().all())
        of_group = weight.view(len(bridge), -1, width, weight[0, 0].numel())
        if module.bias is not None:
            rest = mean.view(-1, width, 1) - bridge @ offset.view(-1, width, 1)
            module.bias.data.add_((of_group.sum(3) @ rest.to(weight.dtype)).flatten())
        weight.copy_(torch.einsum("gonk,gnm->gomk", of_group, bridge).reshape(weight.shape))


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32, whatever was chosen for speed: fitted weights need more digits than TF32 has.

    Whoever chose by one of torch's two ways of setting this must not have it read or put back by the other: torch
    refuses the mixture.
    """
    of: Any = torch.backends
    places: list[tuple[Any, str, Any]] = [(of.cuda.matmul, "allow_tf32", False), (of.cudnn, "allow_tf32", False)]
    if hasattr(of.cuda.matmul, "fp32_precision"):  # from torch 2.9 on
        parts = (of.cuda.matmul, of.cudnn.conv, of.mkldnn.matmul, of.mkldnn.conv)
        places = [(part, "fp32_precision", "ieee") for part in parts]
    before = [getattr(place, name) for place, name, _ in places]
    try:
        for place, name, value in places:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextlib.contextmanager
def _estimating(norm: Any, x: Tensor) -> Iterator[None]:
    """Let a batch norm take its statistics from its input x, and use the same ever after.

    Training mode does both in one pass over x, but keeps n / (n - 1) of the variance that it divides by.
    """
    count, momentum = x.numel() // x.shape[1], norm.momentum
    if count < 2:
        yield
        return
    norm.train()
    norm.momentum = 1.0
    yield
    norm.eval()
    norm.momentum = momentum
    norm.running_var.mul_((count - 1) / count)


def _set_weight(module: Any, weight: Tensor, bridge: Tensor) -> None:
    """The module's weight becomes Wᵀ A: weight W (C, O', kh', kw'), bridge A (C, C')."""
    result = bridge.T.to(weight.dtype) @ weight.flatten(1)
    result = result.view(len(result), weight.shape[1], -1).transpose(0, 1)
    module.weight.data.view(result.shape).copy_(result)


def _of_constant(weight: Tensor, constant: Tensor) -> Tensor:
    """What a layer of weight (C, O, kh, kw) makes of a constant input (C,), borders aside, (O,)."""
    return (constant.to(weight.dtype) @ weight.flatten(1)).view(weight.shape[1], -1).sum(1)


def _moments(samples: Tensor) -> Moments:
    mean = samples.mean(0)
    centred = samples - mean
    covariance = _product(centred, centred)
    return Moments(mean.double(), (covariance + covariance.T) / 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """E[a bᵀ] of centred samples (P, A) and (P, B), (A, B) float64."""
    whole = len(a) // ROWS * ROWS
    blocks = (s[:whole].view(-1, ROWS, s.shape[1]) for s in (a, b))
    total = torch.bmm(next(blocks).mT, next(blocks)).sum(0, dtype=torch.float64)
    return (total + a[whole:].T @ b[whole:]) / len(a)


def _solve(second: Tensor, cross: Tensor, epsilon: Tensor, prior: Tensor | None = None) -> Tensor:
    """A = (E[h yᵀ] + ε·prior) (E[y yᵀ] + εI)⁻¹, given E[y yᵀ] (C', C') and E[h yᵀ] (C, C'); NaN where it has none."""
    factor, failed = torch.linalg.cholesky_ex(_plus(second, epsilon))
    wanted = cross if prior is None else cross + epsilon * prior
    return torch.cholesky_solve(wanted.T, factor).T.where(failed == 0, torch.nan)


def _share(second: Tensor, ridge: float) -> Tensor:
    """ε, `ridge` times the mean of second moments (C, C): dead and doubled channels leave them singular."""
    return ridge * second.diagonal().mean().clamp_min(1e-30)


def _plus(second: Tensor, epsilon: Tensor) -> Tensor:
    """Second moments plus εI."""
    regular = second.clone()
    regular.diagonal().add_(epsilon)
    return regular


def pivoted_order(matrix: Tensor) -> np.ndarray:
    """Greedy order of the variables of a covariance (n, n): each next explains most of what is left of all, (n,) int64.

    A pivoted Cholesky factorisation whose pivot maximises |R e_j|² / R_jj, R being the Schur complement so far; what
    is explained entirely comes last, by variance. R is brought up to date for BLOCK pivots at once.
    """
    order: list[int] = []
    variance = matrix.diagonal()
    free = torch.arange(len(matrix), device=matrix.device)  # the variables of R, which has only those left
    schur, explained = matrix, False
    while len(free) and not explained:
        floor = EXPLAINED * variance[free] + 1e-300
        left, columns = schur.diagonal().clone(), schur.square().sum(0)  # R_jj, |R e_j|²
        factor = schur.new_zeros(len(schur), min(BLOCK, len(schur)))
        is_free = torch.ones_like(free, dtype=torch.bool)
        for t in range(factor.shape[1]):
            gain = torch.where(is_free & (left > floor), columns / left.maximum(floor), -1.0)
            j = int(gain.argmax())
            explained = bool(gain[j] < 0)
            if explained:
                break
            order.append(int(free[j]))
            is_free[j] = False
            known = factor[:, :t]
            c = (schur[:, j] - known @ known[j]) / left[j].sqrt()
            rc = schur @ c - known @ (known.T @ c)
            columns = (columns - 2 * c * rc + c.square() * c.square().sum()).clamp_min(0)
            left = left - c.square()
            factor[:, t] = c
        free = free[is_free]
        remaining = factor[is_free]
        schur = schur[is_free][:, is_free] - remaining @ remaining.T
    order += free[variance[free].argsort(descending=True, stable=True)].tolist()
    return np.array(order, dtype=np.int64)
