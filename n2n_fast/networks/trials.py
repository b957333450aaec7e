"""What an operation does to channels, tried on numbers that tell where they went: it need not be known by name."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

TRIALS = 8  # of whether channels depend on each other


def moved(function: Callable[[Tensor], Any], shape: Sequence[int], dim: int) -> np.ndarray | None:
    """For each number of `function`'s result the channel of its input that it comes from, -1 for a constant.

    None where it does more than to move numbers: channels are given numbers in two ways, and must be found by both.
    """
    width = shape[dim]
    places = [width if d == dim else 1 for d in range(len(shape))]
    codes = [torch.arange(1.0, width + 1), 3.0 * torch.randperm(width, generator=torch.Generator().manual_seed(0)) + 5]
    results = [function(code.view(places).expand(*shape)) for code in codes]
    if not isinstance(results[0], Tensor) or not results[0].is_floating_point():
        return None
    found = results[0].double()
    position = found.round().long() - 1
    if bool((found.round() != found).any()) or int(position.min()) < -1 or not 0 <= int(position.max()) < width:
        return None
    expected = torch.where(position < 0, found, codes[1].double()[position.clamp_min(0)])
    return position.numpy() if torch.equal(results[1].double(), expected) else None


def separate(function: Callable[[Tensor], Any], shape: Sequence[int], dim: int) -> int | None:
    """The dimension of `function`'s result along which each channel depends on the same channel of its input alone.

    Tried by changing random halves of the channels; None if there is no such dimension.
    """
    generator = torch.Generator().manual_seed(0)
    width = shape[dim]
    places = [width if d == dim else 1 for d in range(len(shape))]
    before = torch.rand(*shape, generator=generator)
    result = function(before)
    if not isinstance(result, Tensor):
        return None
    candidates = [d for d in range(1, result.ndim) if result.shape[d] == width]
    candidates.sort(key=lambda d: d != dim)
    for _ in range(TRIALS):
        changes = torch.rand(width, generator=generator) < 0.5
        differs = function(torch.where(changes.view(places), before.flip(0) + 1, before)) != result
        candidates = [d for d in candidates if not bool((differs.movedim(d, 0).flatten(1).any(1) & ~changes).any())]
    return candidates[0] if candidates and width > 1 else None


def reduces(function: Callable[[Tensor], Any], shape: Sequence[int], dim: int) -> bool:
    """Whether the result has the same shape for half of the channels: `function` takes their mean, their maximum."""
    half = [-(-size // 2) if d == dim else size for d, size in enumerate(shape)]
    results = [function(torch.ones(sizes)) for sizes in (list(shape), half)]
    return all(isinstance(result, Tensor) for result in results) and results[0].shape == results[1].shape
