"""Channel labels: which channels of which tensors must stay together.

Every channel of every tensor carries a *label*. A convolution makes new ones, a norm passes its input's through,
``add`` ties two of them together, ``cat`` puts them side by side. What an operation that is not understood touches is
pinned: it stays at full width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from n2n_fast.networks.kinds import TRANSPOSED


class NotUnderstood(Exception):
    """It is not known what a node does to channels; the message says more, if there is more to say."""


@dataclass(frozen=True)
class Channels:
    """The channel axis of a tensor: its dimension and the label of each of its channels.

    repeat: after a flatten, the number of positions at which each channel stands in a row.
    """

    dim: int
    labels: np.ndarray
    repeat: int = 1


@dataclass
class LayerChannels:
    """Labels on both sides of a layer, and the positions per image at which it is computed (summed over its calls).

    input and output are None for layers without channels of their own: those that reshape, and opaque ones.
    repeat: of the input. opaque: whether it is not understood. calls: the nodes that call it.
    """

    input: np.ndarray | None
    output: np.ndarray | None
    repeat: int = 1
    positions: int = 0
    opaque: bool = False
    calls: list[fx.Node] = field(default_factory=list)


class ChannelLabels:
    """The channel labels of a traced graph, and what is known of them.

    shapes, numbers: of the nodes that give one tensor, and of those that give none, for one example. values: of each
    node, None where there are no channels; a node that gives several tensors has those of the tensor that it reads.
    ties: arrays of labels; those at the same place in both belong together. pins, outputs: labels of full width, and
    those of the logits among them. layers: by the module's path, in order of first call.
    """

    def __init__(
        self, traced: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]], numbers: dict[fx.Node, Any]
    ) -> None:
        self.traced, self.shapes, self.numbers = traced, shapes, numbers
        self.values: dict[fx.Node, Channels | None] = {}
        self.count = 0
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.pins: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []
        self.layers: dict[str, LayerChannels] = {}
        self._pinned_at: dict[str, list[str]] = {}  # by reason

    @property
    def warnings(self) -> list[str]:
        """What keeps channels at full width, a line for each kind."""
        return [
            f"{reason} ({places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}): "
            "the channels it touches stay at full width"
            for reason, places in self._pinned_at.items()
        ]

    def module(self, node: fx.Node) -> Any:
        """The module that a node calls."""
        return self.traced.get_submodule(str(node.target))

    def name(self, node: fx.Node) -> str:
        """What a node does: the class of its module, or the name of its function."""
        if node.op == "call_module":
            return type(self.module(node)).__name__
        return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))

    def read_by(self, node: fx.Node) -> list[Channels]:
        """The channels of the tensors that a node reads."""
        return [value for n in node.all_input_nodes if (value := self.values[n]) is not None]

    def fresh(self, size: int) -> np.ndarray:
        """New labels."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def pinned(self, size: int) -> np.ndarray:
        """New labels of channels that stay at full width."""
        self.pins.append(self.fresh(size))
        return self.pins[-1]

    def tie(self, first: np.ndarray, *others: np.ndarray) -> None:
        """Keep or drop together what is at the same place in all these arrays of labels."""
        self.ties += [(first, other) for other in others]

    def pin(self, node: fx.Node, reason: str) -> None:
        """Keep the channels that a node reads at full width."""
        if labels := [value.labels for value in self.read_by(node)]:
            self.pins += labels
            place = str(node.target) if node.op == "call_module" else node.name
            self._pinned_at.setdefault(reason, []).append(place)

    def pin_unknown(self, node: fx.Node, reason: str) -> Channels | None:
        """Pin what a node reads that is not understood, and what it gives, wherever the channels of that may lie."""
        if node.op == "call_module":
            self.record(node, None, None, opaque=True)
        self.pin(node, reason or f"{self.name(node)} is not understood")
        if node not in self.shapes:
            return None
        rank = len(self.shapes[node])
        dims = [v.dim for n in node.all_input_nodes if (v := self.values[n]) and len(self.shapes.get(n, ())) == rank]
        dims += [1] if rank in (2, 4) else []
        return Channels(dims[0], self.pinned(self.shapes[node][dims[0]])) if dims else None

    def record(
        self, node: fx.Node, read: np.ndarray | None, written: np.ndarray | None, *, opaque: bool = False
    ) -> None:
        """Note the channels on both sides of a layer; weights that are used again tie those of both calls."""
        module, sources = self.module(node), node.all_input_nodes
        value = self.values[sources[0]] if sources else None
        layer = self.layers.setdefault(
            str(node.target), LayerChannels(read, written, repeat=value.repeat if value else 1)
        )
        layer.calls.append(node)
        layer.opaque |= opaque
        if read is not None and written is not None and len(written):
            side, width = (sources[0], len(read)) if isinstance(module, TRANSPOSED) else (node, len(written))
            layer.positions += math.prod(self.shapes[side][1:]) // width
        if list(module.parameters()):
            for before, now in ((layer.input, read), (layer.output, written)):
                if before is not None and now is not None and before is not now:
                    self.tie(before, now)


def components(count: int, ties: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """For each label the smallest label it is tied to, directly or not. (count,) int64."""
    root = np.arange(count)
    if not ties:
        return root
    a, b = (np.concatenate(side) for side in zip(*ties, strict=True))
    while True:
        low = np.minimum(root[a], root[b])
        if np.array_equal(low, root[a]) and np.array_equal(low, root[b]):
            return root
        for ends in (a, b):
            np.minimum.at(root, root[ends], low)
        while not np.array_equal(root, root[root]):
            root = root[root]
