"""Architectures drawn at random, teachers with channels that can be spared, and what tests ask of students."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.graph import TracedTeacher
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.student import slots_of
from networks import images

RATIOS = [i / 10 for i in range(1, 11)]


def removed(space: ArchitectureSpace, keep: Sequence[bool], arch: Architecture | None = None) -> Architecture:
    """`space.remove`, or `arch` (the teacher) itself where that is degenerate."""
    arch = arch or space.teacher
    try:
        return space.remove(arch, keep)
    except DegenerateArchitecture:
        return arch


def drawn(space: ArchitectureSpace, seed: int) -> Architecture:
    """A random architecture: one or two rounds of layers removed, then random ratios; at times one of both alone."""
    rng = random.Random(seed)
    count = len(space.layers)
    arch = space.teacher
    for _ in range(rng.choice([1, 1, 2])):
        share = rng.choice([0.0, 0.1, 0.3, 0.6, 1.0])
        arch = removed(space, [rng.random() >= share for _ in range(count)], arch)
        if rng.random() < 0.8:
            channels, kernels = ([rng.choice(RATIOS) for _ in range(count)] for _ in range(2))
            arch = space.shrink(arch, channels, kernels if rng.random() < 0.7 else None)
    return arch


def even(space: ArchitectureSpace, channels: float, kernels: float = 1.0) -> Architecture:
    """The teacher with all its ratios the same."""
    return space.shrink(space.teacher, [channels] * len(space.layers), [kernels] * len(space.layers))


def half(space: ArchitectureSpace) -> nn.Module:
    """A student of half the widths and small kernels."""
    return space.build(even(space, 0.5, 0.4))


def outputs(net: nn.Module, x: Tensor | None = None) -> Tensor:
    """What a net gives for x, by default `networks.images()`."""
    with torch.no_grad():
        return net(images() if x is None else x)


def apart(net: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    """|net(x) - teacher(x)| in units of |teacher(x)|."""
    expected = outputs(teacher, x)
    return float((outputs(net, x) - expected).norm() / expected.norm())


def spoil(teacher: nn.Module, kind: str, share: float, seed: int, name: str = "") -> list[float]:
    """Make `share` of the units of every group that can shrink "copies" of others, or "dead"; returns the ratios left.

    name: of the teacher, for `networks.images`.
    """
    traced = TracedTeacher(teacher, images(name))
    generator = np.random.default_rng(seed)
    left = [1.0] * len(traced.layers)
    for g, units in enumerate(traced.units):
        spare = int(share * len(units))
        if traced.pinned[g] or not traced.writers[g] or spare == 0:
            continue
        left[traced.writers[g][0]] = 1 - spare / len(units)
        spoilt, others = np.split(generator.permutation(units), [spare])
        sources = generator.choice(others, spare)
        for slot in slots_of(traced):
            axis = traced.axes[slot.rows]
            if kind == "copies" and np.isin(spoilt, axis).any():
                for unit, source in zip(spoilt, sources, strict=True):
                    slot.tensor[axis == unit] = slot.tensor[axis == source]
            elif kind == "dead" and slot.is_parameter:
                slot.tensor[np.isin(axis, spoilt)] = 0
    return left
