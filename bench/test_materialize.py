"""Cutting half a ResNet-34 out of its teacher, beside one copy of the student's bytes and index_select."""

import numpy as np
import pytest
import torch
import torchvision

from n2n_fast import ArchitectureSpace, ops
from n2n_fast.student import slots_of

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


@pytest.fixture(scope="module", params=DEVICES)
def cut(request):
    """The weights of a ResNet-34 and, for each, the channels that a student of half its widths keeps."""
    teacher = torchvision.models.resnet34(num_classes=10).eval().to(request.param)
    space = ArchitectureSpace(teacher, torch.zeros(1, 3, 32, 32, device=request.param))
    arch = space.shrink(space.teacher, [0.5] * len(space.layers))
    kept = space._factory.kept_channels(space._kept_units(arch))
    slots = slots_of(space._traced)
    index = [None if k is None else torch.from_numpy(k) for k in kept]
    rows = [index[slot.rows] for slot in slots]
    columns = [None if slot.columns is None else index[slot.columns] for slot in slots]
    weights = [slot.tensor for slot in slots]
    bank = ops.WeightBank(weights, [slot.rows for slot in slots], [slot.columns for slot in slots])
    return weights, rows, columns, kept, bank


def by_index_select(weights, rows, columns):
    results = []
    for weight, row, column in zip(weights, rows, columns, strict=True):
        result = weight if row is None else weight.index_select(0, row)
        results.append(result if column is None else result.index_select(1, column))
    return results


@pytest.mark.parametrize("way", ["n2n_fast", "n2n_fast, described anew", "index_select", "memcpy"])
def test_half_a_resnet34(benchmark, cut, way):
    weights, rows, columns, kept, bank = cut
    device = weights[0].device
    benchmark.group = "materialize: half a ResNet-34" + " on a GPU" * (device.type == "cuda")
    there = [[None if index is None else index.to(device) for index in side] for side in (rows, columns)]
    wanted = by_index_select(weights, *there)
    out = torch.empty(ops.materialize_numel(weights, rows, columns), device=device)
    source = torch.randn(len(out), device=device)
    everything = np.arange(len(weights))
    calls = {
        "n2n_fast": lambda: bank.materialize(everything, kept, out=out),
        "n2n_fast, described anew": lambda: ops.materialize(weights, rows, columns, None, out),
        "index_select": lambda: by_index_select(weights, *there),
        "memcpy": lambda: out.copy_(source),
    }
    if way != "memcpy":
        assert all(torch.equal(a, b) for a, b in zip(calls[way](), wanted, strict=True))
    benchmark.extra_info["megabytes"] = len(out) * 4e-6

    def timed():
        calls[way]()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=100, warmup_rounds=10)
