"""TracedTeacher: a teacher's graph, its layers, their channel groups, and the cost of every architecture made of it."""

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from n2n_fast.files.errors import BadInput
from n2n_fast.networks.channels import ChannelLabels
from n2n_fast.networks.costs import Costs
from n2n_fast.networks.groups import ChannelGroups
from n2n_fast.networks.kinds import BATCH_NORMS, CONVS, kernel_size
from n2n_fast.networks.layers import layers_of
from n2n_fast.networks.rules import follow_channels
from n2n_fast.networks.tracing import trace, unused, values_of


class TracedTeacher(ChannelGroups):
    """A traced teacher and, inherited, the groups of its channels.

    module: the traced graph, sharing the teacher's tensors. example: (2, C, H, W), twice the first image of the
    example. shapes: of the graph's tensors, for the example. layers: one per leaf module, in order of first call.
    warnings: what was not understood. largest_activation: numbers per image. fittable: layers whose weights can be
    fitted to their inputs; groupwise: those of which each convolution group can; repeats: how often each input channel
    stands in a row; norm_after: the batch norm that alone reads the output.
    """

    def __init__(
        self, teacher: nn.Module, example: Tensor, leaf: Iterable[str] = (), pinned_nodes: Collection[str] = ()
    ) -> None:
        """pinned_nodes: names of the graph's nodes whose inputs are to stay at full width."""
        if example.ndim < 3 or len(example) < 1:
            raise BadInput(f"example_input: expected (N, C, H, W) with N >= 1, got {tuple(example.shape)}")
        parameter = next((p for p in teacher.parameters() if p.is_floating_point()), example)
        if parameter.is_meta:
            raise BadInput("the teacher is on the meta device, without weights; load them first")
        self.example = torch.cat([example[:1], example[:1]]).to(parameter.device, parameter.dtype)
        self.module = trace(teacher, self.example, leaf)
        self.shapes, numbers = values_of(self.module, teacher, self.example)
        self.largest_activation = max(math.prod(shape) // 2 for shape in self.shapes.values())
        labels = follow_channels(self.module, self.shapes, numbers, {*leaf, *pinned_nodes})
        self.module.recompile()
        super().__init__(labels)
        self.warnings = tuple(labels.warnings)
        if idle := unused(self.module, teacher):
            self.warnings += (f"{', '.join(idle)}: not used in evaluation, students do without",)
        self.layers = layers_of(self, labels)
        self._costs = Costs(self, [layer.positions for layer in labels.layers.values()], self.module)
        self.dense_input = self._costs.dense
        if labels.warnings or any(layer.opaque for layer in labels.layers.values()):
            self._count_what_is_not_understood()
        self._note_what_fitting_needs(labels)

    def cost(self, keep: Sequence[bool], widths: np.ndarray, kernels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(params, MACs for one image) of architectures, without building them; see `Costs.of`."""
        return self._costs.of(keep, widths, kernels)

    def _count_what_is_not_understood(self) -> None:
        """What happens there costs the same MACs in every architecture."""
        from torch.utils.flop_counter import FlopCounterMode  # here, since it imports triton

        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.module(self.example[:1])
        kernels = np.array([[math.prod(kernel_size(module)) for module in self.modules]])
        _, understood = self.cost([True] * len(self.names), self.sizes[None], kernels)
        self._costs.macs = counter.get_total_flops() // 2 - int(understood[0])

    def _note_what_fitting_needs(self, labels: ChannelLabels) -> None:
        index = {name: i for i, name in enumerate(self.names) if isinstance(self.modules[i], BATCH_NORMS)}
        self.repeats = [layer.repeat for layer in labels.layers.values()]
        self.fittable, self.groupwise, self.norm_after = [], [], []
        for module, layer in zip(self.modules, labels.layers.values(), strict=True):
            weighted = isinstance(module, (*CONVS, nn.Linear)) and layer.output is not None and len(layer.calls) == 1
            grouped = getattr(module, "groups", 1) > 1
            self.fittable.append(weighted and not grouped)
            self.groupwise.append(weighted and grouped)
            users = [str(user.target) if user.op == "call_module" else "" for user in layer.calls[0].users]
            self.norm_after.append(index.get(users[0]) if len(users) == 1 else None)
