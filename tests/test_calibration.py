"""Fitted weights: exact where exactness is possible, better than slices where it is not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from n2n_fast import calibration
from n2n_fast.calibration import pivoted_order
from n2n_fast.distill import recalibrate, seeded
from n2n_fast.space import ArchitectureSpace

INITS = ("calibrated", "reconstructed")


def chain(width, seed, classes=5):
    """Two convolutions, one with a norm, a flatten and a linear layer."""
    with seeded(seed, torch.device("cpu")):
        net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 16, classes),
        )
    return recalibrate(net, [images()])  # which the reconstruction will find again


def images(count=96, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def ratios(space, **wanted):
    return [wanted.get(f"layer{i}", 1.0) for i in range(len(space.layers))]


def assert_close(student, teacher):
    x = images(16, seed=9)
    with torch.no_grad():
        expected = teacher(x)
        error = float((student(x) - expected).norm() / expected.norm())
    assert error < 1e-3


@pytest.mark.parametrize("init", INITS)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(width=st.integers(2, 9), copies=st.integers(1, 4), seed=st.integers(0, 99))
def test_duplicated_channels_can_go_without_a_trace(init, width, copies, seed):
    teacher = chain(width + copies, seed)
    with torch.no_grad():
        for conv, norm in ((teacher[0], teacher[1]), (teacher[3], None)):
            for copy in range(copies):
                source = copy % width
                for tensor in (
                    conv.weight,
                    conv.bias,
                    *([] if norm is None else [*norm.parameters(), *norm.buffers()]),
                ):
                    if tensor.ndim:
                        tensor[width + copy] = tensor[source]
    space = ArchitectureSpace(teacher, images(2), images())
    ratio = width / (width + copies)
    arch = space.shrink(space.teacher, ratios(space, layer0=ratio, layer3=ratio))
    assert arch.params < space.teacher.params
    assert_close(space.build(arch, init), teacher)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(width=st.integers(2, 8), seed=st.integers(0, 99))
def test_a_removed_linear_map_is_folded_into_the_next_layer(width, seed):
    with seeded(seed, torch.device("cpu")):
        teacher = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.Conv2d(width, 7, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(7, 4),
        ).eval()
    space = ArchitectureSpace(teacher, images(2), images())
    arch = space.remove(space.teacher, [i != 2 for i in range(len(space.layers))])
    for init in INITS:
        assert_close(space.build(arch, init), teacher)


@pytest.mark.parametrize("init", INITS)
def test_degenerate_moments_never_give_a_weight_that_is_not_finite(init):
    teacher = chain(12, 0)
    with torch.no_grad():
        teacher[0].weight[:5] = 0
        teacher[1].weight[:3] = 0
        teacher[1].bias[:2] = 0
    few = images(1)  # fewer samples than channels, constant, dead and doubled channels
    space = ArchitectureSpace(teacher, few, few)
    for ratio in (0.1, 0.5, 0.9):
        student = space.build(space.shrink(space.teacher, [ratio] * len(space.layers)), init)
        assert all(bool(value.isfinite().all()) for value in student.state_dict().values())


def test_everything_kept_is_the_teacher_to_the_last_bit():
    teacher = chain(6, 1)
    space = ArchitectureSpace(teacher, images(2), images())
    with torch.no_grad():
        assert torch.equal(space.build(space.teacher)(images(8)), teacher(images(8)))


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_fitted_students_are_nearer_to_the_teacher_than_sliced_ones(ratio):
    teacher, x = chain(24, 3), images(64, seed=5)
    space = ArchitectureSpace(teacher, images(2), images())
    arch = space.shrink(space.teacher, [ratio] * len(space.layers))
    with torch.no_grad():
        apart = {
            init: float((recalibrate(space.build(arch, init), [images()])(x) - teacher(x)).square().mean())
            for init in ("inherit", *INITS)
        }
    assert apart["calibrated"] < 0.8 * apart["inherit"]
    assert apart["reconstructed"] < 0.8 * apart["inherit"]


def test_reconstruction_re_estimates_the_norms():
    teacher = chain(8, 4)
    space = ArchitectureSpace(teacher, images(2), images())
    student = space.build(space.shrink(space.teacher, ratios(space, layer0=0.5)), "reconstructed")
    before = {name: value.clone() for name, value in student.named_buffers()}
    after = dict(recalibrate(student, [images()]).named_buffers())
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=1e-5)


def test_samples_are_bounded_by_the_widths_not_by_the_images(monkeypatch):
    monkeypatch.setattr(calibration, "MIN_SAMPLES", 50)
    monkeypatch.setattr(calibration, "SAMPLES_PER_CHANNEL", 2)
    space = ArchitectureSpace(chain(6, 0), images(2), images(40))
    rows = {name: len(space._calibration.samples[i]) for name, i in space._calibration.fitted.items()}
    assert rows == {"0": 80, "3": 80, "6": 80}  # two of 64, 64 and 16 positions of each image


@settings(deadline=None, max_examples=30, derandomize=True)
@given(n=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 999))
def test_pivoted_order_is_the_greedy_one(n, rank, seed):
    factor = torch.randn(n, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = factor @ factor.T
    order = pivoted_order(matrix)
    assert sorted(order) == list(range(n))
    left = matrix.clone()
    for j in order[: min(n, rank) - 1]:
        gains = left.square().sum(0) / left.diagonal().clamp_min(1e-9 * float(matrix.diagonal().max()))
        assert float(gains[j]) >= float(gains.max()) * (1 - 1e-6)
        left = left - torch.outer(left[:, j], left[:, j]) / left[j, j]


def test_pivoted_order_of_nothing_is_complete():
    assert np.array_equal(np.sort(pivoted_order(torch.zeros(4, 4, dtype=torch.float64))), np.arange(4))


def test_fitting_needs_images():
    space = ArchitectureSpace(chain(4, 0), images(2))
    with pytest.raises(ValueError, match="calibration images"):
        space.build(space.teacher, "calibrated")
