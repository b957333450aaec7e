"""Params and MACs of every architecture of a teacher, without building it."""

from collections.abc import Sequence

import numpy as np
from torch import fx, nn

from n2n_fast.networks.groups import ChannelGroups
from n2n_fast.networks.kinds import WEIGHTED


class Costs:
    """Params of layer i: per_pair·in·out·kernel + per_channel·out + constant; MACs: positions·pairs·kernel.

    dense: layers whose weights join all inputs with all outputs; others' inputs are counted in per_pair. params, macs:
    outside of layers, or where MACs do not depend on the architecture.
    """

    def __init__(self, groups: ChannelGroups, positions: Sequence[int], traced: fx.GraphModule) -> None:
        """positions: per image and layer, at which it is computed."""
        count = len(groups.names)
        self._groups, self._positions = groups, np.array(positions, dtype=np.int64)
        self._per_pair, self._per_channel, self._constant = (np.zeros(count, dtype=np.int64) for _ in range(3))
        self.dense = np.zeros(count, dtype=bool)
        for i, module in enumerate(groups.modules):
            if groups.out_axis[i] < 0 or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
                self._constant[i] = sum(p.numel() for p in module.parameters())
            elif isinstance(module, WEIGHTED):
                parts = getattr(module, "groups", 1)
                self.dense[i] = parts == 1
                self._per_pair[i] = 1 if parts == 1 else int(module.in_channels) // parts  # type: ignore[arg-type]
                self._per_channel[i] = 0 if module.bias is None else 1
            else:
                self._per_channel[i] = sum(p is not None for p in module._parameters.values())
        read = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
        self.params = sum(value.numel() for name, value in traced.named_parameters() if name in read)
        self.macs = 0

    def of(self, keep: Sequence[bool], widths: np.ndarray, kernels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(params, MACs for one image), (N,) each, of N architectures that keep the same layers.

        widths: (N, groups); kernels: elements of each layer's kernel, (N, layers).
        """
        groups = self._groups
        width = np.pad(widths @ groups.occurrences.T, ((0, 0), (0, 1)))  # axis -1: no channels
        out = width[:, groups.out_axis]
        pairs = self._per_pair * out * np.where(self.dense, width[:, groups.in_axis], 1) * kernels
        kept = np.asarray(keep, dtype=bool)
        params = (pairs + self._per_channel * out + self._constant)[:, kept].sum(1) + self.params
        return params, (pairs * self._positions)[:, kept].sum(1) + self.macs
