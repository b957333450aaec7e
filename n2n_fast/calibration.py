"""What a teacher's activations say about its channels: their order, and weights fitted to those that remain.

A student whose weights are merely sliced from the teacher starts at chance. Here every layer that mixes channels is
fitted instead: where the teacher's layer reads h and the student's reads y, its weight W becomes W·A with
A = E[h yᵀ] (E[y yᵀ] + εI)⁻¹, the linear map that rebuilds h from y best (He et al. 2017 select channels by such a
reconstruction; here it only replaces the weights). Channels are kept in the order of a pivoted Cholesky factorisation,
greedy by how much of all others a channel explains.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from n2n_fast import ops
from n2n_fast.channels import BATCH_NORMS, CONVS
from n2n_fast.errors import BadInput, DegenerateArchitecture
from n2n_fast.graph import Architecture, TracedTeacher

RIDGE = 1e-5  # ε in units of the mean variance of y
PRIOR = 1e-2  # the same where the student's own activations are fitted, towards the teacher's bridge
EXACT = 1e-8  # the same where samples show a linear map
EXPLAINED = 1e-5  # of a variance: what is left of it is the moments' rounding
BLOCK = 64  # pivots between two updates of a Schur complement
NARROW = 64  # channels
SAMPLES_PER_CHANNEL = 8
MIN_SAMPLES = 16384
PASS_NUMBERS = 2**23  # the largest activation of a batch through the teacher: what caches hold is fastest
MAX_PASS_NUMBERS = 2**26  # the same through a student, whose layers see all images at once


@dataclass(frozen=True)
class Moments:
    """First and second moments of samples of one layer's input: mean (C,), covariance (C, C), both float64."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class _Split:
    """The channels of a layer's input: those that a student keeps, as the teacher orders them, and those it loses."""

    kept: np.ndarray
    lost: np.ndarray
    order: np.ndarray  # of all channels, the kept first
    place: Tensor  # of each of `kept` in `order`
    nested: bool  # whether `order` is the axis's own, by saliency


class Calibration:
    """The teacher's inputs to each layer that mixes channels, at sampled positions of unlabelled images.

    images: (N, C, H, W). Of each layer's input about max(16384, 8 C) positions are kept, so that memory is bounded by
    the widths and not by the image size.
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
        self._generator = torch.Generator().manual_seed(0)
        self._places: dict[int, Tensor] = {}
        self.samples: dict[int, Tensor] = self._run_teacher()
        self.moments = {i: _moments(self.samples[i]) for i in self.fitted.values()}
        for i, moments in self.moments.items():
            if not moments.covariance.isfinite().all():
                raise BadInput(
                    f"the input of the teacher's layer {traced.names[i]} is not finite on calibration images"
                )
        self.saliency = self._explaining_first(saliency) if by_activations else saliency

    @torch.no_grad()
    def _run_teacher(self) -> dict[int, Tensor]:
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
            wanted = max(MIN_SAMPLES, SAMPLES_PER_CHANNEL * rows.shape[2])
            count = min(positions, -(-wanted // len(self.images)))
            draws = torch.rand(len(self.images), positions, generator=self._generator)
            self._places[i] = draws.topk(count).indices.to(x.device)
        places = self._places[i][first : first + len(x)]
        image = torch.arange(len(x), device=x.device)[:, None]
        found = rows.reshape(-1, rows.shape[2])[(image * positions + places).flatten()]
        return found.float() if found.element_size() < 4 else found

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
        """Fit the sliced weights of a student from which no layer was removed, from the teacher's moments alone.

        What the lost channels did is added to the kept: W_kept + W_lost·A, A = E[h_lost yᵀ] (E[y yᵀ] + εI)⁻¹.
        """
        splits = self._splits(self.fitted.values(), kept)
        lost_weights = self._weights(arch, kept, {i: split.lost for i, split in splits.items()})
        for i, split in splits.items():
            module: Any = student.get_submodule(self.traced.names[i])
            (bridge, constant), lost = self._bridge(i, split), lost_weights[i]
            _set_weight(module, lost, bridge, add=True)
            norm = self.traced.norm_after[i]
            if module.bias is not None:
                module.bias.data.add_(_of_constant(lost, constant))
            elif norm is not None:
                mean: Any = student.get_submodule(self.traced.names[norm]).running_mean
                if mean is not None:
                    mean.sub_(_of_constant(lost, constant))

    @torch.no_grad()
    def reconstruct(self, student: fx.GraphModule, arch: Architecture, kept: Sequence[np.ndarray | None]) -> None:
        """Fit each layer to what really reaches it, in one pass over the student; norms are re-estimated on the way.

        The student's input y comes from the layers fitted before, the target h from the teacher (asymmetric
        reconstruction), so that errors do not add up and removed layers are bridged.
        """
        calibration = self
        weights = self._weights(arch, kept, {i: None for i in self.fitted.values() if arch.keep[i]})

        class Fitter(fx.Interpreter):
            def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
                module = self.fetch_attr(target)
                i = calibration.fitted.get(target)
                if i in weights:
                    calibration._fit_to(module, i, args[0], weights[i], arch, kept)
                if target in calibration.grouped and isinstance(module, CONVS):
                    calibration._fit_groups(module, calibration.grouped[target], args[0], kept)
                if isinstance(module, BATCH_NORMS) and module.track_running_stats:
                    _estimate(module, args[0])
                return super().call_module(target, args, kwargs)

        Fitter(student).run(self._batch(0, MAX_PASS_NUMBERS))

    def _fit_to(
        self, module: Any, i: int, x: Tensor, weight: Tensor, arch: Architecture, kept: Sequence[np.ndarray | None]
    ) -> None:
        """Fit layer i to its input x in the student; weight: the teacher's, (C, O', kh', kw')."""
        given = self.sample(i, x, 0)
        wanted = self.samples[i][: len(given)]
        intercept = self._has_intercept(i, arch.keep)
        means = [s.mean(0) if intercept else torch.zeros_like(s[0]) for s in (given, wanted)]
        given, wanted = given - means[0], wanted - means[1]
        bridge = _bridge_between(given, wanted, self._teacher_bridge(i, kept)).to(given.dtype)
        _set_weight(module, weight, bridge)
        if module.bias is not None:
            module.bias.data.add_(_of_constant(weight, means[1] - bridge @ means[0]))

    def _fit_groups(self, module: Any, i: int, x: Tensor, kept: Sequence[np.ndarray | None]) -> None:
        """Fit each convolution group of layer i to what of its input x in the student the same group reads."""
        given = self.sample(i, x, 0)
        channels = kept[self.traced.in_axis[i]]
        wanted = self.samples[i][: len(given)]
        wanted = wanted if channels is None else wanted[:, torch.from_numpy(channels).to(wanted.device)]
        means = given.mean(0), wanted.mean(0)
        weight = module.weight.data
        width = weight.shape[1]
        y, h = ((s - mean).double().view(len(given), -1, width) for s, mean in zip((given, wanted), means, strict=True))
        second, cross = (torch.einsum("pgi,pgj->gij", a, y) / len(y) for a in (y, h))
        ridge = PRIOR * second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
        ridge = ridge * torch.eye(width, dtype=second.dtype, device=second.device)
        bridge = torch.linalg.solve(second + ridge, cross + ridge, left=False).to(weight.dtype)
        of_group = weight.view(len(bridge), -1, width, weight[0, 0].numel())
        if module.bias is not None:
            rest = means[1].view(-1, width, 1) - bridge @ means[0].view(-1, width, 1)
            module.bias.data.add_((of_group.sum(3) @ rest).flatten())
        weight.copy_(torch.einsum("gonk,gnm->gomk", of_group, bridge).reshape(weight.shape))

    def _has_intercept(self, i: int, keep: Sequence[bool] | None = None) -> bool:
        """Whether a constant that the layer adds is taken up, by its bias or by the norm that follows."""
        norm = self.traced.norm_after[i]
        return getattr(self.traced.modules[i], "bias", None) is not None or (
            norm is not None and (keep is None or keep[norm])
        )

    def _split(self, axis: int, repeat: int, kept: np.ndarray) -> _Split:
        """The split of an axis on which each channel has `repeat` positions, of which `kept` remain."""
        order, channels = self._orders[axis], kept[::repeat] // repeat
        is_kept = np.zeros(len(order), dtype=bool)
        is_kept[channels] = True
        nested = bool(is_kept[order[: len(channels)]].all())
        order = order if nested else np.append(channels, np.flatnonzero(~is_kept))
        first, lost = np.split(order, [len(channels)])
        return _Split(channels, lost, order, torch.from_numpy(first.argsort()), nested)

    def _splits(self, layers: Iterable[int], kept: Sequence[np.ndarray | None]) -> dict[int, _Split]:
        """The splits of those of the layers whose input loses channels."""
        reads = {i: (int(self.traced.in_axis[i]), self.traced.repeats[i]) for i in layers}
        of_axis = {
            (axis, repeat): self._split(axis, repeat, channels)
            for axis, repeat in set(reads.values())
            if (channels := kept[axis]) is not None
        }
        return {i: of_axis[read] for i, read in reads.items() if read in of_axis}

    def _bridge(self, i: int, split: _Split) -> tuple[Tensor, Tensor]:
        """What the kept channels say of layer i's lost ones: A, (lost, kept), and the mean that it leaves, (lost,)."""
        factor, inverse, mean = self._factors[i] if split.nested else self._factor(i, split.order)
        k = len(split.kept)
        bridge = factor[k:, :k] @ inverse[:k, :k]
        constant = torch.addmv(mean[k:], bridge, mean[:k], alpha=-1)
        return bridge.index_select(1, split.place.to(factor.device)), constant

    def _teacher_bridge(self, i: int, kept: Sequence[np.ndarray | None]) -> Tensor:
        """A for layer i, (C, C'), where y is the teacher's own input restricted to the channels kept."""
        mean = self.moments[i].mean
        split = self._splits([i], kept).get(i)
        if split is None:
            return torch.eye(len(mean)).to(mean)
        bridge = mean.new_zeros(len(split.order), len(split.kept))
        bridge[split.kept, np.arange(len(split.kept))] = 1
        bridge[split.lost] = self._bridge(i, split)[0].to(bridge)
        return bridge

    def _weights(
        self, arch: Architecture, kept: Sequence[np.ndarray | None], channels: dict[int, np.ndarray | None]
    ) -> dict[int, Tensor]:
        """Teacher weights by input channel, (C, O', kh', kw'), at some input channels of some fitted layers."""
        bank, kernels, places = self._bank
        of_layer = [channels.get(i) for i in self.fitted.values()]
        chosen = np.array([places[i] for i in channels], dtype=np.int64)
        crops = [arch.kernels[i] if len(arch.kernels[i]) == 2 else kernels[i] for i in channels]
        cut = bank.materialize(chosen, [*of_layer, *kept], np.array(crops, dtype=np.int64).reshape(-1, 2))
        return dict(zip(channels, cut, strict=True))

    # What all students share, made when first needed

    @functools.cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        """For each axis that a fitted layer reads, its channels by saliency."""
        repeats = {int(self.traced.in_axis[i]): self.traced.repeats[i] for i in self.fitted.values()}
        of_axis = {axis: self.saliency[self.traced.axes[axis][::repeat]] for axis, repeat in repeats.items()}
        return {axis: np.argsort(-saliency, kind="stable") for axis, saliency in of_axis.items()}

    @functools.cached_property
    def _factors(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """For each fitted layer its moments by saliency, factorised; the leading blocks are those of any width."""
        return {i: self._factor(i, self._orders[int(self.traced.in_axis[i])]) for i in self.fitted.values()}

    def _factor(self, i: int, order: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Of layer i's input, channels in `order`: Cholesky factor of the second moments, its inverse, and mean."""
        second = _second(self.moments[i], self._has_intercept(i))[order][:, order]
        factor, _ = _factorised(second, RIDGE)
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
        dtype = self.samples[i].dtype
        return factor.to(dtype), inverse.to(dtype), self.moments[i].mean[order].to(dtype)

    @functools.cached_property
    def _bank(self) -> tuple[ops.WeightBank, dict[int, tuple[int, int]], dict[int, int]]:
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
        return ops.WeightBank(list(weights.values()), list(range(count)), out_axes), kernels, places


def _set_weight(module: Any, weight: Tensor, bridge: Tensor, add: bool = False) -> None:
    """The module's weight becomes, or grows by, Wᵀ A: weight W (C, O', kh', kw'), bridge A (C, C')."""
    result = bridge.T.to(weight.dtype) @ weight.flatten(1)
    result = result.view(len(result), weight.shape[1], -1).transpose(0, 1)
    target = module.weight.data.view(result.shape)
    target.add_(result) if add else target.copy_(result)


def _of_constant(weight: Tensor, constant: Tensor) -> Tensor:
    """What a layer of weight (C, O, kh, kw) makes of a constant input (C,), borders aside, (O,)."""
    return (constant.to(weight.dtype) @ weight.flatten(1)).view(weight.shape[1], -1).sum(1)


def _moments(samples: Tensor) -> Moments:
    mean = samples.mean(0)
    centred = samples - mean
    covariance = _product(centred, centred)
    return Moments(mean.double(), (covariance + covariance.T) / 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """E[a bᵀ] of samples (P, A) and (P, B), (A, B) float64.

    Multiplied in their precision, which centring has made enough; where they are narrow, in float64, which costs little
    and keeps sums over many samples exact.
    """
    if max(a.shape[1], b.shape[1]) <= NARROW:
        a, b = a.double(), b.double()
    return (a.T @ b).double() / len(a)


def _second(moments: Moments, centred: bool) -> Tensor:
    return moments.covariance if centred else moments.covariance + torch.outer(moments.mean, moments.mean)


def _bridge_between(given: Tensor, wanted: Tensor, prior: Tensor) -> Tensor:
    """A that minimises E|h - A y|² + ε|A - prior|², (C, C'), float64, given samples y (P, C') and h (P, C).

    Samples are few beside the channels and the prior is worth much, unless they show h to be a linear map of y.
    """
    second, cross = _product(given, given), _product(wanted, given)
    bridge = _solve(second, cross, PRIOR, prior)
    total = float(wanted.double().square().sum()) / len(wanted)
    if len(given) > 2 * len(second) and _residual(total, second, cross, bridge) < 1e-2 * total:
        given, wanted = given.double(), wanted.double()
        second, cross = _product(given, given), _product(wanted, given)
        exact = _solve(second, cross, EXACT, prior)
        if _residual(total, second, cross, exact) < EXPLAINED * total:
            return exact
    return bridge


def _solve(second: Tensor, cross: Tensor, ridge: float, prior: Tensor) -> Tensor:
    """A = (E[h yᵀ] + ε·prior) (E[y yᵀ] + εI)⁻¹, given E[y yᵀ] (C', C') and E[h yᵀ] (C, C')."""
    factor, epsilon = _factorised(second, ridge)
    return torch.cholesky_solve((cross + epsilon * prior).T, factor).T


def _residual(total: float, second: Tensor, cross: Tensor, bridge: Tensor) -> float:
    """E|h - A y|², given E|h|²."""
    return total - 2 * float((bridge * cross).sum()) + float((bridge @ second * bridge).sum())


def _factorised(second: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Cholesky factor of second moments plus εI, and ε: `ridge` times their mean, or more where that is too little.

    The ridge keeps dead and doubled channels finite, whose moments are singular but for their rounding.
    """
    epsilon = ridge * max(float(second.diagonal().mean()), 1e-30)
    if not math.isfinite(epsilon):
        raise DegenerateArchitecture("its activations are not finite")
    identity = torch.eye(len(second), dtype=second.dtype, device=second.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(second + epsilon * identity)
        if not failed:
            return factor, epsilon
        epsilon *= 10


def _estimate(norm: Any, x: Tensor) -> None:
    """Set the statistics of a batch norm to those of its input."""
    variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1])
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


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
