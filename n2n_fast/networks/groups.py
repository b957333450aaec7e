"""Units and groups: the channels of a teacher's layers, as far as they can be chosen.

Channels that are tied are one *unit*, kept or dropped as a whole; units that occur equally often on every weight's axes
form one *group*, of which any number may be kept. So an architecture is a number of units per group, and every shape
follows from it.
"""

import math

import numpy as np

from n2n_fast.networks.channels import ChannelLabels, components
from n2n_fast.networks.kinds import WEIGHTED


class ChannelGroups:
    """The layers of a traced graph and the groups of their channels.

    names, modules: of the layers, in order of first call. axes: the distinct channel axes of all layers, each an array
    of unit numbers; in_axis, out_axis: index of each layer's, -1 without. units_of: for each node's tensor its channel
    dimension and the unit of each channel, -1 for those that no layer has. group_of: group of each unit. units: of each
    group. sizes, pinned, output: units per group, whether all must stay, whether they are the logits. occurrences:
    (axes, groups), channels of an axis for each kept unit of a group. writers: for each group the layers whose weights
    have it as output channels.
    """

    def __init__(self, labels: ChannelLabels) -> None:
        self.names = tuple(labels.layers)
        self.modules = tuple(labels.traced.get_submodule(name) for name in self.names)
        root = components(labels.count, labels.ties)
        sides = [side for layer in labels.layers.values() for side in (layer.input, layer.output)]
        used = np.unique(root[np.concatenate([np.arange(0), *(side for side in sides if side is not None)])])
        number = np.full(labels.count, -1)
        number[used] = np.arange(len(used))
        units = [None if side is None else number[root[side]] for side in sides]
        axes = {axis.tobytes(): axis for axis in units if axis is not None}
        order = {key: i for i, key in enumerate(axes)}
        index = np.array([-1 if axis is None else order[axis.tobytes()] for axis in units], dtype=int)
        self.axes, self.in_axis, self.out_axis = list(axes.values()), index[::2], index[1::2]
        self.units_of = {n: (value.dim, number[root[value.labels]]) for n, value in labels.values.items() if value}
        pinned, output = (
            np.isin(used, root[np.concatenate([np.arange(0), *rows])]) for rows in (labels.pins, labels.outputs)
        )
        self.group_of = self._groups(pinned)
        self.sizes = np.bincount(self.group_of)
        self.pinned, self.output = (np.bincount(self.group_of, weights=unit) > 0 for unit in (pinned, output))
        self.units = [np.flatnonzero(self.group_of == g) for g in range(len(self.sizes))]
        counts = [np.bincount(self.group_of[axis], minlength=len(self.sizes)) for axis in self.axes]
        self.occurrences = np.stack(counts) // self.sizes
        weighted = [i for i, m in enumerate(self.modules) if isinstance(m, WEIGHTED) and self.out_axis[i] >= 0]
        self.writers = [[i for i in weighted if n[self.out_axis[i]]] for n in self.occurrences.T]

    def _groups(self, pinned: np.ndarray) -> np.ndarray:
        """Partition refinement: units that are equally pinned and equally often on every axis are one group."""
        group = pinned.astype(int)
        for axis in self.axes:
            units, counts = np.unique(axis, return_counts=True)
            _, refined = np.unique(group[units] * (counts.max() + 1) + counts, return_inverse=True)
            group[units] = group.max(initial=0) + 1 + refined
        _, first, group = np.unique(group, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[group]  # in the order of their first units

    def along(self, axis: int) -> list[int]:
        """The groups along an axis, without repetition of neighbours; none for -1."""
        groups = self.group_of[self.axes[axis]] if axis >= 0 else self.group_of[:0]
        return [int(g) for g in groups[np.diff(groups, prepend=-1) != 0]]

    def relations(self, i: int) -> list[tuple[int, int, int, int]] | None:
        """What removing layer i asks of the widths: (g, m, h, n) means m·width[g] = n·width[h]. None: impossible."""
        if self.in_axis[i] == self.out_axis[i]:
            return []
        sides = self.along(self.in_axis[i]), self.along(self.out_axis[i])
        if len(sides[0]) != len(sides[1]):
            return None
        relations = []
        for g, h in zip(*sides, strict=True):
            m, n = int(self.occurrences[self.in_axis[i], g]), int(self.occurrences[self.out_axis[i], h])
            # widths are steps times n and m without common factors, for as many steps as both groups have units
            per_step = {g: n // math.gcd(m, n), h: m // math.gcd(m, n)}
            steps = min(self.sizes[group] // width for group, width in per_step.items())
            whole = all(steps * width == self.sizes[group] for group, width in per_step.items() if self.pinned[group])
            if (g == h and m != n) or steps < 1 or not whole:
                return None
            if g != h:
                relations.append((g, m, h, n))
        return relations
