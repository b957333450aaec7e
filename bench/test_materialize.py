"""Cutting a student out of its teacher, beside one copy of its bytes and index_select."""

import numpy as np
import pytest
import torch
import torchvision

from n2n_fast import ArchitectureSpace, native
from n2n_fast.networks.student import slots_of

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
WAYS = ["n2n_fast", "n2n_fast, described anew", "index_select", "memcpy"]


class Cut:
    """The weights of a torchvision network and, for each, the channels that a student keeps.

    smaller: times fewer params, all layers narrowed by one ratio; None: half of all widths.
    """

    def __init__(self, name, device, smaller=None):
        teacher = torchvision.models.get_model(name, num_classes=10).eval().to(device)
        space = ArchitectureSpace(teacher, torch.zeros(1, 3, 32, 32, device=device))
        half, params = [0.5] * len(space.layers), space.teacher.params // (smaller or 1)
        arch = space.shrink(space.teacher, half)
        if smaller is not None:
            arch = space.shrink_within(space.teacher, half, params=params)
        self.kept = space._factory.kept_channels(arch)
        slots = slots_of(space._traced)
        index = [None if k is None else torch.from_numpy(k) for k in self.kept]
        self.rows = [index[slot.rows] for slot in slots]
        self.columns = [None if slot.columns is None else index[slot.columns] for slot in slots]
        self.weights = [slot.tensor for slot in slots]
        self.bank = native.WeightBank(self.weights, [slot.rows for slot in slots], [slot.columns for slot in slots])
        self.on_device = [[None if i is None else i.to(device) for i in side] for side in (self.rows, self.columns)]
        self.out = torch.empty(native.materialize_numel(self.weights, self.rows, self.columns), device=device)
        self.source = torch.randn(len(self.out), device=device)

    def call(self, way):
        """Cut by one of WAYS; the student's tensors, or for memcpy the flat buffer."""
        if way == "n2n_fast":
            return self.bank.materialize(np.arange(len(self.weights)), self.kept, out=self.out)
        if way == "n2n_fast, described anew":
            return native.materialize(self.weights, self.rows, self.columns, None, self.out)
        return self.by_index_select() if way == "index_select" else self.out.copy_(self.source)

    def by_index_select(self):
        results = []
        for weight, row, column in zip(self.weights, *self.on_device, strict=True):
            result = weight if row is None else weight.index_select(0, row)
            results.append(result if column is None else result.index_select(1, column))
        return results

    def check(self, way):
        """Assert that a way gives what index_select does; every byte of the student is poisoned before."""
        if way != "memcpy":
            self.out.fill_(float("nan"))
            wanted = self.by_index_select()
            assert all(torch.equal(a, b) for a, b in zip(self.call(way), wanted, strict=True)), way


@pytest.fixture(scope="module", params=DEVICES)
def cut(request):
    return Cut("resnet34", request.param)


@pytest.mark.parametrize("way", WAYS)
def test_half_a_resnet34(benchmark, cut, way):
    on_gpu = cut.out.is_cuda
    benchmark.group = "materialize: half a ResNet-34" + " on a GPU" * on_gpu
    cut.check(way)
    benchmark.extra_info["megabytes"] = len(cut.out) * 4e-6

    def timed():
        cut.call(way)
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=100, warmup_rounds=10)
