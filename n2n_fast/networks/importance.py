"""The importance of a teacher's channels: which of them a student keeps first.

By weights, or by activations: in the order of a pivoted Cholesky factorisation of their second moments, greedy by how
much of all others a channel explains.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from n2n_fast.networks.graph import TracedTeacher
from n2n_fast.networks.student import slots_of

EXPLAINED = 1e-5  # of a variance: what is left of it is the moments' rounding
BLOCK = 64  # pivots between two updates of a Schur complement


def l1_importance(traced: TracedTeacher) -> np.ndarray:
    """Importance of each unit by absolute weights, (units,) float64.

    The sum over all tensors that write a unit times the sum over all that read it, each tensor divided by its mean:
    a channel that nobody writes or nobody reads is worth nothing, whatever the other side weighs.
    """
    written, read = (np.zeros(len(traced.group_of)) for _ in range(2))
    for slot in slots_of(traced):
        if not slot.is_parameter:
            continue
        weight = slot.tensor.float() if slot.tensor.element_size() < 4 else slot.tensor
        weight = weight.reshape(len(weight), 1 if slot.columns is None else weight.shape[1], -1)
        for dim, axis in enumerate((slot.rows, slot.columns)):
            if axis is not None:
                total = written if (dim == 0) != slot.transposed else read
                sums = torch.linalg.vector_norm(weight, 1, (1 - dim, 2)).double().cpu()
                np.add.at(total, traced.axes[axis], (sums / sums.mean().clamp_min(1e-30)).numpy())
    unread = np.isin(np.arange(len(read)), np.concatenate([traced.axes[a] for a in traced.in_axis]), invert=True)
    return written * np.where(unread, 1.0, read)


def activation_importance(traced: TracedTeacher, covariances: Mapping[int, Tensor], ties: np.ndarray) -> np.ndarray:
    """For each unit how early the pivoted factorisation of its group takes it, (units,); higher is earlier.

    covariances: of the inputs of layers, by layer, (C, C) each. ties: another importance, which decides between equals.
    """
    importance = np.zeros(len(ties))
    for group in traced.units:
        units = group[np.argsort(-ties[group], kind="stable")]  # of equals, the first is taken
        matrix = _group_covariance(traced, covariances, units)
        if matrix is not None:
            importance[units[pivoted_order(matrix)]] = np.arange(len(units), 0, -1) / len(units)
    return importance


def _group_covariance(traced: TracedTeacher, covariances: Mapping[int, Tensor], units: np.ndarray) -> Tensor | None:
    """A group's covariance, summed over the layers that read all its units, each divided by its trace."""
    total = None
    for i, covariance in covariances.items():
        axis = traced.axes[traced.in_axis[i]][:: traced.repeats[i]]
        if not np.isin(units, axis).all():
            continue
        member = torch.from_numpy((axis[None] == units[:, None]).astype(np.float64))
        of_group = member @ covariance.cpu() @ member.T
        trace = float(of_group.trace())
        if trace > 0:
            total = of_group / trace + (0 if total is None else total)
    return total


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
