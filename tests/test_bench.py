"""That benchmarks are fair to those they compare with."""

import importlib.util
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compiled_rival_is_compiled_for_every_size_alone(monkeypatch):
    bench, sizes, compile_ = loaded("test_kd_loss"), [], torch.compile

    def backend(graph, examples):
        sizes.append([size for example in examples for size in example.shape])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=backend, **options))
    for size in ((4, 3), (6, 5), (7, 9)):
        logits, teacher, labels = torch.randn(size).requires_grad_(), torch.randn(size), torch.zeros(size[0]).long()
        bench.WAYS["torch.compile"]()(logits, teacher, labels)
    assert all(type(number) is int for found in sizes for number in found)
    assert [set(found) for found in sizes] == [{4, 3}, {6, 5}, {7, 9}]
