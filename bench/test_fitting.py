"""Time to calibrate a teacher and to build one fitted student of it: pytest bench/test_fitting.py."""

import resource

import pytest
import torch
import torchvision

from n2n_fast import ArchitectureSpace
from n2n_fast.training import teachers
from n2n_fast.training.distill import recalibrate

IMAGES = 512


def network(name, channels, size):
    """A network whose norms have seen data, and images."""
    images = torch.randn(IMAGES, channels, size, size, generator=torch.Generator().manual_seed(0))
    own = name in teachers.SMALL_RESNETS
    model = teachers.create(name, 10, channels) if own else torchvision.models.get_model(name, num_classes=10)
    return recalibrate(model, images[:32].split(32)), images


@pytest.mark.parametrize(("name", "channels", "size"), [("resnet20", 1, 28), ("resnet18", 3, 32), ("resnet34", 3, 32)])
@pytest.mark.parametrize("init", ["sliced", "fitted"])
def test_student(benchmark, name, channels, size, init):
    model, images = network(name, channels, size)
    space = ArchitectureSpace(model, images[:2], images)
    arch = space.shrink(space.teacher, [0.5] * len(space.layers))
    student = space.build(arch, init)
    assert sum(p.numel() for p in student.parameters()) == arch.params
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())
    benchmark.pedantic(space.build, (arch, init), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize(("name", "size", "rounds"), [("resnet18", 32, 3), ("resnet50", 224, 1)])
def test_calibration(benchmark, name, size, rounds):
    """Peak memory is that of the process: run a case alone to read its own."""
    model, images = network(name, 3, size)
    space = benchmark.pedantic(ArchitectureSpace, (model, images[:2], images), rounds=rounds)
    student = space.build(space.shrink(space.teacher, [0.5] * len(space.layers)), "fitted")
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())
    benchmark.extra_info["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
