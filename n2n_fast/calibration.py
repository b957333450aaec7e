"""What a teacher's activations say about its channels: their order, and weights fitted to those that remain.

A student whose weights are merely sliced from the teacher starts at chance. Here every layer that mixes channels is
fitted instead: where the teacher's layer reads h and the student's reads y, its weight W becomes W·A with
A = E[h yᵀ] (E[y yᵀ] + εI)⁻¹, the linear map that rebuilds h from y best (He et al. 2017 select channels by such a
reconstruction; here it only replaces the weights). Channels are kept in the order of a pivoted Cholesky factorisation,
greedy by how much of all others a channel explains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from n2n_fast.channels import BATCH_NORMS, CONVS
from n2n_fast.graph import Architecture, TracedTeacher

RIDGE = 1e-4  # ε in units of the mean variance of y
PRIOR = 1e-2  # the same, towards the teacher's own bridge, where the student's activations are fitted
EXPLAINED = 1e-5  # of a channel's variance: what is left of it is the moments' rounding
SAMPLES_PER_CHANNEL = 16
MIN_SAMPLES = 4096
MAX_BATCH_NUMBERS = 2**26  # the largest activation that a pass holds at once


@dataclass(frozen=True)
class Moments:
    """First and second moments of samples of one layer's input: mean (C,), covariance (C, C), both float64."""

    mean: Tensor
    covariance: Tensor


class Calibration:
    """The teacher's inputs to each layer that mixes channels, at sampled positions of unlabelled images.

    images: (N, C, H, W). Of each layer's input about max(4096, 16 C) positions are kept, so that memory is bounded by
    the widths and not by the image size. fitted: indices of the layers whose weights can be fitted: convolutions
    of one group and linear layers that are called once; others are sliced.
    """

    def __init__(self, traced: TracedTeacher, images: Tensor) -> None:
        self.traced, self.images = traced, images
        self.fitted = {name: i for i, name in enumerate(traced.names) if traced.fittable[i]}
        self._generator = torch.Generator().manual_seed(0)
        self._places: dict[int, Tensor] = {}
        self.samples: dict[int, Tensor] = self._run_teacher()
        self.moments = {i: _moments(x) for i, x in self.samples.items()}

    @torch.no_grad()
    def _run_teacher(self) -> dict[int, Tensor]:
        parts: dict[int, list[Tensor]] = {i: [] for i in self.fitted.values()}
        calibration = self

        class Recorder(fx.Interpreter):
            def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
                if target in calibration.fitted:
                    i = calibration.fitted[target]
                    parts[i].append(calibration.sample(i, args[0], sum(map(len, parts[i]))))
                return super().call_module(target, args, kwargs)

        for start in range(0, len(self.images), self._batch_size()):
            Recorder(self.traced.module).run(self.images[start : start + self._batch_size()])
        return {i: torch.cat([part.flatten(0, 1) for part in rows]) for i, rows in parts.items()}

    def _batch_size(self) -> int:
        return max(1, MAX_BATCH_NUMBERS // self.traced.largest_activation)

    def sample(self, i: int, x: Tensor, first: int) -> Tensor:
        """Layer i's input x, for images first, first + 1, ..., at that layer's positions: (n, positions, channels)."""
        repeat = self.traced.repeats[i]
        flat = x.reshape(len(x), -1, repeat) if repeat > 1 else x.flatten(2) if x.ndim > 2 else x[:, :, None]
        if i not in self._places:
            wanted = max(MIN_SAMPLES, SAMPLES_PER_CHANNEL * flat.shape[1])
            count = min(flat.shape[2], -(-wanted // len(self.images)))
            draws = torch.rand(len(self.images), flat.shape[2], generator=self._generator)
            self._places[i] = draws.topk(count).indices.to(x.device)
        places = self._places[i][first : first + len(x)]
        return flat.gather(2, places[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)

    # Which channels

    def saliency(self) -> np.ndarray:
        """For each unit how early the pivoted factorisation of its group takes it, (units,); higher is earlier."""
        traced = self.traced
        value = np.zeros(len(traced.group_of))
        for units in traced.units:
            matrix = self._group_moments(units)
            if matrix is not None:
                order = pivoted_order(matrix)
                value[units[order]] = np.arange(len(units), 0, -1) / len(units)
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
        """Fit the weights of a student from which no layer was removed, from the teacher's moments alone."""
        for name, i in self.fitted.items():
            columns = kept[self.traced.in_axis[i]]
            if columns is None:
                continue
            intercept = self._has_intercept(i, arch)
            channels = self._channels(i, columns)
            bridge = self._teacher_bridge(i, channels, intercept)
            offset = self.moments[i].mean - bridge @ self.moments[i].mean[channels]
            self._set(student.get_submodule(name), i, kept, bridge, offset if intercept else None)

    def _channels(self, i: int, columns: np.ndarray) -> Tensor:
        """The channels that remain of layer i's input, given the positions kept on its axis."""
        repeat = self.traced.repeats[i]
        return torch.from_numpy(columns[::repeat] // repeat).to(self.images.device)

    def _teacher_bridge(self, i: int, channels: Tensor, intercept: bool) -> Tensor:
        """A for layer i, (C, C'), where y is the teacher's own input restricted to `channels`, (C',)."""
        second = _second(self.moments[i], intercept)
        return _solve(second[channels][:, channels], second[:, channels], RIDGE)

    @torch.no_grad()
    def reconstruct(self, student: fx.GraphModule, arch: Architecture, kept: Sequence[np.ndarray | None]) -> None:
        """Fit each layer to what really reaches it, in one pass over the student; norms are re-estimated on the way.

        The student's input y comes from the layers fitted before, the target h from the teacher (asymmetric
        reconstruction), so that errors do not add up and removed layers are bridged.
        """
        calibration = self
        images = self.images[: self._batch_size()]

        class Fitter(fx.Interpreter):
            def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
                module = self.fetch_attr(target)
                i = calibration.fitted.get(target)
                if i is not None and arch.keep[i]:
                    calibration._fit_to(module, i, args[0], arch, kept)
                if isinstance(module, BATCH_NORMS) and module.track_running_stats:
                    _estimate(module, args[0])
                return super().call_module(target, args, kwargs)

        Fitter(student).run(images)

    def _fit_to(
        self, module: nn.Module, i: int, x: Tensor, arch: Architecture, kept: Sequence[np.ndarray | None]
    ) -> None:
        given = self.sample(i, x, 0).flatten(0, 1)
        wanted = self.samples[i][: len(given)]
        intercept = self._has_intercept(i, arch)
        means = [s.mean(0) if intercept else torch.zeros_like(s[0]) for s in (given, wanted)]
        given, wanted = given - means[0], wanted - means[1]
        second, cross = _product(given, given), _product(wanted, given)
        columns = kept[self.traced.in_axis[i]]
        if columns is not None and all(arch.keep):
            bridge = _solve(second, cross, PRIOR, self._teacher_bridge(i, self._channels(i, columns), intercept))
        else:
            bridge = _solve(second, cross, RIDGE)
        offset = means[1].double() - bridge @ means[0].double()
        self._set(module, i, kept, bridge, offset if intercept else None)

    def _has_intercept(self, i: int, arch: Architecture) -> bool:
        """Whether a constant that the layer adds is taken up, by its bias or by the norm that follows."""
        norm = self.traced.norm_after[i]
        return getattr(self.traced.modules[i], "bias", None) is not None or (norm is not None and arch.keep[norm])

    def _set(
        self, module: Any, i: int, kept: Sequence[np.ndarray | None], bridge: Tensor, offset: Tensor | None
    ) -> None:
        """The student's weight becomes that of the teacher's layer i times `bridge`, (C, C')."""
        teacher: Any = self.traced.modules[i]
        rows = kept[self.traced.out_axis[i]]
        weight = teacher.weight.detach() if rows is None else teacher.weight.detach()[torch.from_numpy(rows)]
        if isinstance(teacher, CONVS):
            weight = _cropped(weight, module.weight.shape[2:])
        weight = weight.reshape(len(weight), len(bridge), -1)
        fitted = torch.einsum("oik,ij->ojk", weight, bridge.to(weight.dtype))
        module.weight.data.copy_(fitted.reshape(module.weight.shape))
        if offset is not None and module.bias is not None:
            bias = teacher.bias.detach() if rows is None else teacher.bias.detach()[torch.from_numpy(rows)]
            module.bias.data.copy_(bias + weight.sum(2) @ offset.to(weight.dtype))


def _cropped(weight: Tensor, kernel: Sequence[int]) -> Tensor:
    for dim, size in enumerate(kernel, 2):
        weight = weight.narrow(dim, (weight.shape[dim] - size) // 2, size)
    return weight


def _moments(samples: Tensor) -> Moments:
    mean = samples.mean(0)
    centred = samples - mean
    return Moments(mean.double(), _product(centred, centred))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """E[a bᵀ] of samples (P, A) and (P, B): multiplied in their precision, which centring has made enough, (A, B)."""
    return (a.T @ b).double() / len(a)


def _second(moments: Moments, centred: bool) -> Tensor:
    return moments.covariance if centred else moments.covariance + torch.outer(moments.mean, moments.mean)


def _solve(given: Tensor, cross: Tensor, ridge: float, prior: Tensor | None = None) -> Tensor:
    """Minimise E|h - A y|² + ε|A - prior|² over A, (C, C'): given E[y yᵀ] (C', C') and E[h yᵀ] (C, C').

    The ridge keeps dead and doubled channels finite; a prior of None is 0.
    """
    weight = ridge * given.diagonal().mean().clamp_min(1e-30)
    factor = torch.linalg.cholesky(given + weight * torch.eye(len(given), dtype=given.dtype, device=given.device))
    return torch.cholesky_solve((cross if prior is None else cross + weight * prior).T, factor).T


def _estimate(norm: Any, x: Tensor) -> None:
    """Set the statistics of a batch norm to those of its input."""
    dims = [d for d in range(x.ndim) if d != 1]
    norm.running_mean.copy_(x.mean(dims))
    norm.running_var.copy_(x.var(dims))


def pivoted_order(matrix: Tensor) -> np.ndarray:
    """Greedy order of the variables of a covariance (n, n): each next explains most of what is left of all, (n,) int64.

    A pivoted Cholesky factorisation whose pivot maximises |R e_j|² / R_jj, R being the Schur complement so far; what
    is explained entirely comes last, by variance.
    """
    n = len(matrix)
    factor = torch.zeros_like(matrix)
    left = matrix.diagonal().clone()  # R's diagonal
    columns = matrix.square().sum(0)  # |R e_j|²
    floor = EXPLAINED * left + 1e-300
    order: list[int] = []
    free = torch.ones(n, dtype=torch.bool)
    for t in range(n):
        gain = torch.where(free & (left > floor), columns / left.maximum(floor), -1.0)
        j = int(gain.argmax())
        if gain[j] < 0:
            break
        order.append(j)
        free[j] = False
        c = (matrix[:, j] - factor[:, :t] @ factor[j, :t]) / left[j].sqrt()
        rc = matrix @ c - factor[:, :t] @ (factor[:, :t].T @ c)
        columns = (columns - 2 * c * rc + c.square() * c.square().sum()).clamp_min(0)
        left = left - c.square()
        factor[:, t] = c
    rest = sorted((int(j) for j in free.nonzero()), key=lambda j: -float(matrix[j, j]))
    return np.array(order + rest, dtype=np.int64)
