"""Time to calibrate a teacher and to build one fitted student of it: python -m pytest bench/test_calibration.py."""

import pytest
import torch
import torchvision

from n2n_fast import ArchitectureSpace, teacher
from n2n_fast.distill import recalibrate

IMAGES = 512


def network(name, channels, size):
    """A network whose norms have seen data, and images."""
    images = torch.randn(IMAGES, channels, size, size, generator=torch.Generator().manual_seed(0))
    own = name in teacher.SMALL_RESNETS
    model = teacher.create(name, 10, channels) if own else torchvision.models.get_model(name, num_classes=10)
    return recalibrate(model, images[:128].split(64)), images


@pytest.mark.parametrize(("name", "channels", "size"), [("resnet20", 1, 28), ("resnet18", 3, 32), ("resnet34", 3, 32)])
@pytest.mark.parametrize("init", ["inherit", "calibrated", "reconstructed"])
def test_student(benchmark, name, channels, size, init):
    model, images = network(name, channels, size)
    space = ArchitectureSpace(model, images[:2], images)
    arch = space.shrink(space.teacher, [0.5] * len(space.layers))
    student = space.build(arch, init)
    assert sum(p.numel() for p in student.parameters()) == arch.params
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())
    benchmark.pedantic(space.build, (arch, init), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32)])
def test_calibration(benchmark, name, size):
    model, images = network(name, 3, size)
    benchmark.pedantic(ArchitectureSpace, (model, images[:2], images), rounds=3, warmup_rounds=1)
