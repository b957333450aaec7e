"""Weights fitted to what a teacher's layers read.

A student whose weights are merely sliced from the teacher starts at chance. Here every layer that mixes channels is
fitted instead: where the teacher's layer reads h and the student's reads y, its weight W becomes W·A with
A = E[h yᵀ] (E[y yᵀ] + εI)⁻¹, the linear map that rebuilds h from y best (He et al. 2017 select channels by such a
reconstruction; here it only replaces the weights).
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
from n2n_fast.networks.importance import EXPLAINED
from n2n_fast.networks.kinds import BATCH_NORMS, CONVS
from n2n_fast.networks.products import as_products
from n2n_fast.networks.student import cropped_kernels, with_2d_kernels

RIDGE = 1e-5  # ε of the teacher's own moments, in units of the mean variance of y
PRIOR = 1e-2  # the same where the student's activations are fitted, towards the teacher's bridge
EXACT = 1e-5  # the same where the samples show a linear map; less would be lost in their rounding
NEARLY = 1e-3  # of a variance: kept channels that leave more of the teacher's tell no lost one exactly
ROWS = 2048  # samples that are summed in float32; such sums are added up in float64
SAMPLES_PER_CHANNEL = 8
MIN_SAMPLES = 16384  # of the images that a student is fitted to
PASS_IMAGES = 320  # that a student is fitted to; 256 are 0.5 points worse on a ResNet-18 (bench/README.md)
PASS_NUMBERS = 2**23  # the largest activation of a batch through the teacher: what caches hold is fastest
MAX_PASS_NUMBERS = 2**26  # the same through a student, whose layers see all images at once


@dataclass(frozen=True)
class Target:
    """What one layer reads in the teacher, at the images and positions that students are fitted to.

    samples: (P, C), their mean taken off; mean: (C,); variance: (), the sum over channels, float64.
    """

    samples: Tensor
    mean: Tensor
    variance: Tensor


class Calibration:
    """The teacher's inputs to each layer that mixes channels, at sampled positions of unlabelled images.

    images: (N, C, H, W). Students are fitted to the first PASS_IMAGES of them, at about max(16384, 8 C) positions of
    each layer's input, so that memory is bounded by the widths and not by the image size. Moments are of all images.
    fitted: the layers whose weights can be fitted: convolutions of one group and linear layers that are called once.
    grouped: convolutions of several groups, of which the student's own activations fit each by itself. Others are
    sliced. targets: of all these. covariances, seconds: of the inputs of fitted layers, (C, C) float64; second moments
    are about the mean where the layer's bias or norm takes up a constant.
    """

    def __init__(self, traced: TracedTeacher, images: Tensor) -> None:
        self.traced, self.images = traced, images
        if images.ndim == 4:
            self.images = images.contiguous(memory_format=torch.channels_last)  # faster to sample by position
        self.fitted = {name: i for i, name in enumerate(traced.names) if traced.fittable[i]}
        self.grouped = {name: i for i, name in enumerate(traced.names) if traced.groupwise[i]}
        self.student_images = self.images[: min(PASS_IMAGES, max(1, MAX_PASS_NUMBERS // traced.largest_activation))]
        self._generator = torch.Generator().manual_seed(0)
        self._places: dict[int, Tensor] = {}
        with full_precision():
            samples = self._run_teacher()
            self.covariances = {i: _covariance(samples[i]) for i in self.fitted.values()}
        self.seconds = dict(self.covariances)
        for i, covariance in self.covariances.items():
            if not covariance.isfinite().all():
                name = traced.names[i]
                raise BadInput(f"the input of the teacher's layer {name} is not finite on calibration images")
            if not has_intercept(traced, i, [True] * len(traced.names)):
                mean = samples[i].mean(0).double()
                self.seconds[i] = covariance + torch.outer(mean, mean)
        counts = {i: len(self.student_images) * places.shape[1] for i, places in self._places.items()}
        self.targets = {i: _target(of_layer[: counts[i]]) for i, of_layer in samples.items()}

    @torch.no_grad()
    def _run_teacher(self) -> dict[int, Tensor]:
        """Samples of each layer's input, (positions of all images, channels)."""
        samples: dict[int, Tensor] = {}  # made whole: joining batches would need twice the memory
        calibration = self
        first = 0

        class Recorder(fx.Interpreter):
            def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
                i = calibration.fitted.get(target, calibration.grouped.get(target))
                if i is not None:
                    rows = calibration.sample(i, args[0], first)
                    per_image = len(rows) // len(args[0])
                    if i not in samples:
                        samples[i] = rows.new_empty(len(calibration.images) * per_image, rows.shape[1])
                    samples[i][first * per_image :][: len(rows)] = rows
                return super().call_module(target, args, kwargs)

        for batch in torch.split(self.images, max(1, PASS_NUMBERS // self.traced.largest_activation)):
            Recorder(self.traced.module).run(batch)
            first += len(batch)
        return samples

    def sample(self, i: int, x: Tensor, first: int = 0) -> Tensor:
        """Layer i's input x, for images first, first + 1, ..., at that layer's positions: (samples, channels)."""
        if x.ndim == 2:
            rows = x.view(len(x), -1, self.traced.repeats[i]).mT
        elif isinstance(self.traced.modules[i], nn.Linear):
            rows = x.flatten(1, -2)
        else:
            rows = x.movedim(1, -1).flatten(1, -2)
        positions, channels = rows.shape[1:]
        if i not in self._places:
            self._places[i] = self._drawn(positions, channels).to(x.device)
        samples, places = rows.reshape(-1, channels), self._places[i]
        if places.shape[1] < positions:
            samples = samples[places[first : first + len(x)].flatten() - first * positions]
        return samples.float() if samples.element_size() < 4 else samples

    def _drawn(self, positions: int, channels: int) -> Tensor:
        """Which of all images' positions are sampled, (N, positions of each), counted through."""
        wanted = max(MIN_SAMPLES, SAMPLES_PER_CHANNEL * channels)
        count = min(positions, -(-wanted // len(self.student_images)))
        draws = torch.rand(len(self.images), positions, generator=self._generator)
        return draws.topk(count).indices + positions * torch.arange(len(self.images))[:, None]


@dataclass(frozen=True)
class Factor:
    """L of L·Lᵀ = E[h hᵀ] + εI, the most important channels first; its leading blocks serve any number kept.

    order, order_on_device: the channels, (C,). rows: L, its rows in the axis's own order. inverse: L⁻¹. left: the
    share of the variance that the first 0, 1, ..., C channels leave unexplained.
    """

    order: np.ndarray
    order_on_device: Tensor
    rows: Tensor
    inverse: Tensor
    epsilon: Tensor
    left: np.ndarray


class WeightFitter:
    """Fits students of one teacher: what all of them share, made when first needed.

    importance: of each unit, (units,); students keep the highest.
    """

    def __init__(self, calibration: Calibration, importance: np.ndarray) -> None:
        self.calibration, self.traced, self.importance = calibration, calibration.traced, importance

    @torch.no_grad()
    def fit(self, student: fx.GraphModule, arch: Architecture, kept: Sequence[np.ndarray | None]) -> None:
        """Fit each layer to what really reaches it, in one pass over the student; norms are re-estimated on the way.

        The student's input y comes from the layers fitted before, the target h from the teacher (asymmetric
        reconstruction), so that errors do not add up and removed layers are bridged. On a GPU the host waits for it
        once, at the end. Raises DegenerateArchitecture where activations are not finite.
        """
        images = self.calibration.student_images
        with full_precision(), as_products(student, images.device):
            fitting = _Pass(self, student, arch, kept)
            fitting.run(images)
        if not bool(fitting.finite):
            raise DegenerateArchitecture("its activations are not finite")

    def bridge(self, i: int, kept: tuple[np.ndarray, Tensor] | None) -> tuple[Tensor, bool]:
        """A for layer i, (C, C') float64, where y is the teacher's own input restricted to the channels kept.

        kept: these on the layer's axis, on the host and on the device; None: all. Second, whether A may be exact.
        """
        factor, repeat = self._factors[i], self.traced.repeats[i]
        if kept is None:
            return torch.eye(len(factor.rows), dtype=torch.float64, device=factor.rows.device), True
        channels, on_device = (index[::repeat] // repeat for index in kept)
        count = len(channels)
        if np.array_equal(np.sort(factor.order[:count]), channels):
            bridge = factor.rows[:, :count] @ factor.inverse[:count, :count]
            return bridge[:, factor.order_on_device[:count].argsort()].double(), bool(factor.left[count] < NEARLY)
        cross = self.calibration.seconds[i][:, on_device]  # a removal united groups, which are ordered by both
        return _solve(cross[on_device], cross, factor.epsilon), True

    def weights(self, arch: Architecture, kept: Sequence[np.ndarray | None]) -> dict[int, Tensor]:
        """Teacher weights of the fitted layers that are kept, by input channel, (C, O', kh', kw')."""
        layers = {k: i for k, i in enumerate(self.calibration.fitted.values()) if arch.keep[i]}
        kernels = cropped_kernels(self._bank, arch, layers.items())
        axes = [*[None] * len(self._bank.weights), *kept]
        return dict(zip(layers.values(), self._bank.materialize(np.array(list(layers)), axes, kernels), strict=True))

    @functools.cached_property
    def _bank(self) -> native.WeightBank:
        """The fitted layers' weights by input channel, (C, O, kh, kw); each has an axis of its own for C."""
        weights = []
        for i in self.calibration.fitted.values():
            weight: Any = self.traced.modules[i].weight
            of_channels = weight.view(len(weight), -1, *(weight.shape[2:] or (self.traced.repeats[i],)))
            weights.append(with_2d_kernels(of_channels).transpose(0, 1))
        outputs = [len(weights) + int(self.traced.out_axis[i]) for i in self.calibration.fitted.values()]
        return native.WeightBank(weights, list(range(len(weights))), outputs)

    @functools.cached_property
    def _factors(self) -> dict[int, Factor]:
        """Each fitted layer's moments, factorised."""
        return {i: self._factor(i) for i in self.calibration.fitted.values()}

    def _factor(self, i: int) -> Factor:
        axis = self.traced.axes[self.traced.in_axis[i]][:: self.traced.repeats[i]]
        order = np.argsort(-self.importance[axis], kind="stable")
        on_device = torch.from_numpy(order).to(self.calibration.images.device)
        second = self.calibration.seconds[i][on_device][:, on_device]
        epsilon = _share(second, RIDGE)
        while True:
            lower, failed = torch.linalg.cholesky_ex(second + epsilon.expand(len(second)).diag())
            if not failed:
                break
            epsilon = 10 * epsilon  # the moments' rounding makes them less than singular
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
        of_column = lower.square().sum(0).cpu().numpy()
        left = np.append(of_column[::-1].cumsum()[::-1], 0) / of_column.sum().clip(1e-30)
        dtype = self.calibration.targets[i].samples.dtype
        return Factor(order, on_device, lower[on_device.argsort()].to(dtype), inverse.to(dtype), epsilon, left)


def has_intercept(traced: TracedTeacher, i: int, keep: Sequence[bool]) -> bool:
    """Whether a constant in the input of layer i is taken up, by its bias or by the norm that follows."""
    norm = traced.norm_after[i]
    return getattr(traced.modules[i], "bias", None) is not None or (norm is not None and keep[norm])


class _Pass(fx.Interpreter):
    """Runs a student once; each of its layers is fitted to what reaches it, just before that layer is called.

    kept: for each axis the channels that the student keeps, None for all.
    """

    def __init__(
        self, fitter: WeightFitter, student: fx.GraphModule, arch: Architecture, kept: Sequence[np.ndarray | None]
    ) -> None:
        super().__init__(student)
        self.fitter, self.calibration, self.traced = fitter, fitter.calibration, fitter.traced
        self.keep, self.weights = arch.keep, fitter.weights(arch, kept)
        device = self.calibration.images.device
        self.kept = [None if axis is None else (axis, torch.from_numpy(axis).to(device)) for axis in kept]
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
        y = self.calibration.sample(i, x)
        mean = y.mean(0)
        y = y - mean
        second, cross, total = _product(y, y), _product(target.samples, y), target.variance
        if not has_intercept(self.traced, i, self.keep):
            second = second + torch.outer(mean, mean)
            cross, total = cross + torch.outer(target.mean, mean), total + target.mean.double().square().sum()
        prior, may_be_exact = self.fitter.bridge(i, self.kept[self.traced.in_axis[i]])
        bridge = _solve(second, cross, _share(second, PRIOR), prior)
        if may_be_exact and len(y) > 2 * len(second):  # enough samples to tell a linear map from a lucky fit
            exact = _solve(second, cross, _share(second, EXACT), prior)
            rest = total - 2 * (exact * cross).sum() + (exact @ second * exact).sum()  # E|h - A y|²
            bridge = torch.where(rest.abs() < EXPLAINED * total, exact, bridge)
        self.finite.logical_and_(bridge.isfinite().all())
        bridge = bridge.to(y.dtype)
        fitted = (bridge.T.to(weight.dtype) @ weight.flatten(1)).view(bridge.shape[1], weight.shape[1], -1)
        module.weight.data.view(len(fitted[0]), len(fitted), -1).copy_(fitted.transpose(0, 1))
        if module.bias is not None:
            constant = (target.mean - bridge @ mean).to(weight.dtype)  # in the layer's input, borders aside
            module.bias.data.add_((constant @ weight.flatten(1)).view(weight.shape[1], -1).sum(1))

    def _fit_groups(self, module: Any, i: int, x: Tensor) -> None:
        """Fit each convolution group of layer i to what of its input x in the student the same group reads."""
        target, kept = self.calibration.targets[i], self.kept[self.traced.in_axis[i]]
        h, h_mean = target.samples, target.mean
        if kept is not None:
            h, h_mean = h[:, kept[1]], h_mean[kept[1]]
        y = self.calibration.sample(i, x)
        y_mean = y.mean(0)
        weight = module.weight.data
        width = weight.shape[1]
        y, h = (samples.double().view(len(y), -1, width) for samples in (y - y_mean, h))
        second, cross = (torch.einsum("pgi,pgj->gij", a, y) / len(y) for a in (y, h))
        ridge = PRIOR * second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
        ridge = ridge * torch.eye(width, dtype=second.dtype, device=second.device)
        factor, _ = torch.linalg.cholesky_ex(second + ridge)
        bridge = torch.cholesky_solve((cross + ridge).mT, factor).mT.to(weight.dtype)
        self.finite.logical_and_(bridge.isfinite().all())
        of_group = weight.view(len(bridge), -1, width, weight[0, 0].numel())
        if module.bias is not None:
            rest = h_mean.view(-1, width, 1) - bridge @ y_mean.view(-1, width, 1)
            module.bias.data.add_((of_group.sum(3) @ rest.to(weight.dtype)).flatten())
        weight.copy_(torch.einsum("gonk,gnm->gomk", of_group, bridge).reshape(weight.shape))


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32, whatever was chosen for speed: fitted weights need more digits than TF32 has.

    torch has two ways of setting this and refuses their mixture, so the way that was used must be the only one read.
    """
    of: Any = torch.backends
    places: list[tuple[Any, str, Any]] = [(of.cuda.matmul, "allow_tf32", False), (of.cudnn, "allow_tf32", False)]
    if hasattr(of.cuda.matmul, "fp32_precision"):  # from torch 2.9 on
        libraries = (of.cuda.matmul, of.cudnn.conv, of.mkldnn.matmul, of.mkldnn.conv)
        places = [(library, "fp32_precision", "ieee") for library in libraries]
    with contextlib.ExitStack() as before:
        for place, name, value in places:
            before.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        yield


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


def _target(samples: Tensor) -> Target:
    mean = samples.mean(0)
    centred = samples - mean
    return Target(centred, mean, centred.square().sum(0).double().sum() / len(centred))


def _covariance(samples: Tensor) -> Tensor:
    centred = samples - samples.mean(0)
    covariance = _product(centred, centred)
    return (covariance + covariance.T) / 2


def _product(a: Tensor, b: Tensor) -> Tensor:
    """E[a bᵀ] of centred samples (P, A) and (P, B), (A, B) float64."""
    whole = len(a) // ROWS * ROWS
    blocks = (s[:whole].view(-1, ROWS, s.shape[1]) for s in (a, b))
    total = torch.bmm(next(blocks).mT, next(blocks)).sum(0, dtype=torch.float64)
    return (total + a[whole:].T @ b[whole:]) / len(a)


def _solve(second: Tensor, cross: Tensor, epsilon: Tensor, prior: Tensor | None = None) -> Tensor:
    """A = (E[h yᵀ] + ε·prior) (E[y yᵀ] + εI)⁻¹, given E[y yᵀ] (C', C') and E[h yᵀ] (C, C'); NaN where it has none."""
    factor, failed = torch.linalg.cholesky_ex(second + epsilon.expand(len(second)).diag())
    wanted = cross if prior is None else cross + epsilon * prior
    return torch.cholesky_solve(wanted.T, factor).T.where(failed == 0, torch.nan)


def _share(second: Tensor, ridge: float) -> Tensor:
    """ε, `ridge` times the mean of second moments (C, C): dead and doubled channels leave them singular."""
    return ridge * second.diagonal().mean().clamp_min(1e-30)
