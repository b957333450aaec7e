"""Fitted weights: exact where exactness is possible, better than slices where it is not."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import networks
from counting import counted
from n2n_fast.files.errors import BadInput
from n2n_fast.networks import fitting
from n2n_fast.networks.fitting import full_precision
from n2n_fast.networks.graph import TracedTeacher
from n2n_fast.networks.importance import pivoted_order
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.student import slots_of
from n2n_fast.training.distill import recalibrate, seeded
from written import Written


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


NETS = ("chain", "vgg_size", "cifar_resnet", "bottlenecks", "mobile", "gated", "dense")


def spoil(teacher, kind, share, seed):
    """Make `share` of the units of every group that can shrink copies of others, or dead; returns the ratios left."""
    traced = TracedTeacher(teacher, networks.images())
    generator = np.random.default_rng(seed)
    left = [1.0] * len(traced.layers)
    for g, units in enumerate(traced.units):
        spare = int(share * len(units))
        if traced.pinned[g] or not traced.writers[g] or spare == 0:
            continue
        left[traced.writers[g][0]] = 1 - spare / len(units)
        spoilt, others = np.split(generator.permutation(units), [spare])
        sources = generator.choice(others, spare)
        for slot in slots_of(traced):
            axis = traced.axes[slot.rows]
            for unit, source in zip(spoilt, sources, strict=True):
                if kind == "copies":
                    slot.tensor[axis == unit] = slot.tensor[axis == source]
                elif slot.is_parameter:
                    slot.tensor[axis == unit] = 0
    return left


@pytest.mark.parametrize("kind", ["copies", "dead"])
@pytest.mark.parametrize("name", NETS)
@settings(deadline=None, max_examples=6, derandomize=True)
@example(share=0.67, seed=16)  # for "mobile", channels that are constant, but not 0, are lost as well
@example(share=0.5, seed=129)  # there, copies that rounding makes differ
@given(share=st.floats(0.1, 0.7), seed=st.integers(0, 999))
def test_channels_that_say_nothing_of_their_own_go_without_a_trace(name, kind, share, seed):
    teacher = networks.make(name, seed)
    pixels = torch.randn(256, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    left = spoil(teacher, kind, share, seed)
    recalibrate(teacher, [pixels])  # statistics that the reconstruction will find again
    space = ArchitectureSpace(teacher, pixels[:2], pixels)
    arch = space.shrink(space.teacher, left)
    assert arch.params < space.teacher.params or all(ratio == 1 for ratio in left)
    others = networks.images(count=16)
    with torch.no_grad():
        expected, got = teacher(others), space.build(arch)(others)
    assert float((got - expected).norm() / expected.norm()) < 1e-3


def test_a_linear_layer_over_the_last_dimension_is_fitted():
    teacher, pixels = networks.make("channel_last"), torch.randn(64, 3, 16, 16)
    for tensor in (teacher.widen.weight.data, teacher.widen.bias.data):
        tensor[12:] = tensor[:12]
    space = ArchitectureSpace(teacher, pixels[:2], pixels)
    arch = space.shrink(space.teacher, [0.5 if layer.name == "widen" else 1.0 for layer in space.layers])
    assert arch.params < space.teacher.params
    with torch.no_grad():
        torch.testing.assert_close(space.build(arch)(pixels), teacher(pixels), rtol=1e-3, atol=1e-3)


class LinearBranch(nn.Module):
    """A residual branch without an activation, whose first convolution and norm are a linear map of its input."""

    def __init__(self, width, wide):
        super().__init__()
        self.first, self.norm1 = networks.conv_bn(width, wide, 1)
        self.second, self.norm2 = networks.conv_bn(wide, width, 1)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.second(self.norm1(self.first(x)))))


@settings(deadline=None, max_examples=20, derandomize=True)
@given(width=st.integers(2, 8), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_removed_linear_maps_are_folded_into_the_next_layer(width, blocks, seed):
    with seeded(seed, torch.device("cpu")):
        teacher = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            *(LinearBranch(width, width) for _ in range(blocks)),
            nn.Conv2d(width, width, 1),
            nn.Conv2d(width, 7, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(7, 4),
        )
    recalibrate(networks.settle(teacher, seed), [images()])
    space = ArchitectureSpace(teacher, images(2), images())
    gone = {str(2 + blocks), *(f"{2 + k}.{name}" for k in range(blocks) for name in ("first", "norm1"))}
    arch = space.remove(space.teacher, [layer.name not in gone for layer in space.layers])
    assert arch.keep.count(False) == 1 + 2 * blocks
    assert_close(space.build(arch), teacher)


def test_degenerate_moments_never_give_a_weight_that_is_not_finite():
    teacher = chain(12, 0)
    with torch.no_grad():
        teacher[0].weight[:5] = 0
        teacher[1].weight[:3] = 0
        teacher[1].bias[:2] = 0
    few = images(1)  # fewer samples than channels, constant, dead and doubled channels
    space = ArchitectureSpace(teacher, few, few)
    for ratio in (0.1, 0.5, 0.9):
        student = space.build(space.shrink(space.teacher, [ratio] * len(space.layers)))
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
            for init in ("sliced", "fitted")
        }
    assert apart["fitted"] < 0.8 * apart["sliced"]


def test_fitting_re_estimates_the_norms():
    teacher = chain(8, 4)
    space = ArchitectureSpace(teacher, images(2), images())
    student = space.build(space.shrink(space.teacher, ratios(space, layer0=0.5)), "fitted")
    before = {name: value.clone() for name, value in student.named_buffers()}
    after = dict(recalibrate(student, [images()]).named_buffers())
    count = images()[:, 0].numel()
    torch.testing.assert_close(before["1.running_mean"], after["1.running_mean"], rtol=1e-4, atol=1e-5)
    divided_by = after["1.running_var"] * (count - 1) / count
    torch.testing.assert_close(before["1.running_var"], divided_by, rtol=1e-4, atol=1e-5)


def test_samples_are_bounded_by_the_widths_not_by_the_images(monkeypatch):
    monkeypatch.setattr(fitting, "MIN_SAMPLES", 50)
    monkeypatch.setattr(fitting, "SAMPLES_PER_CHANNEL", 2)
    space = ArchitectureSpace(chain(6, 0), images(2), images(40))
    rows = {
        name: len(space._fitter.calibration.targets[i].samples) for name, i in space._fitter.calibration.fitted.items()
    }
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
        space.build(space.teacher, "fitted")


def test_importance_by_weights_or_by_activations():
    teacher = networks.make("cifar_resnet")
    pixels = networks.images(count=64)
    sliced = ArchitectureSpace(teacher, pixels[:2])
    spaces = {name: ArchitectureSpace(teacher, pixels[:2], pixels, importance=name) for name in ("l1", "activations")}
    arch = sliced.shrink(sliced.teacher, [0.5] * len(sliced.layers))
    students = {name: space.build(arch, "sliced").state_dict() for name, space in spaces.items()}
    expected = sliced.build(arch).state_dict()
    assert all(torch.equal(expected[key], value) for key, value in students["l1"].items())
    assert any(not torch.equal(expected[key], value) for key, value in students["activations"].items())
    fitted = spaces["l1"].build(arch, "fitted")
    others = networks.images(count=16)
    with torch.no_grad():
        wanted, one, other = teacher(others), fitted(others), sliced.build(arch)(others)
    assert float((one - wanted).norm()) < float((other - wanted).norm())


def test_importance_that_cannot_be():
    pixels = images()
    with pytest.raises(ValueError, match="'activations' needs calibration images"):
        ArchitectureSpace(chain(4, 0), pixels[:2], importance="activations")
    with pytest.raises(ValueError, match=r"importance: expected one of activations, l1, got 'l2'"):
        ArchitectureSpace(chain(4, 0), pixels[:2], pixels, importance="l2")


def test_activations_that_are_not_finite_are_named():
    teacher = chain(4, 0)
    with torch.no_grad():
        teacher[1].weight[0] = float("inf")
    with pytest.raises(BadInput, match="the input of the teacher's layer 3 is not finite"):
        ArchitectureSpace(teacher, images(2), images())


def test_a_fitted_build_waits_once_and_sends_nothing_twice():
    pixels = torch.randn(64, 3, 32, 32)
    teacher = recalibrate(torchvision.models.resnet18(num_classes=10), [pixels])
    space = ArchitectureSpace(teacher, pixels[:2], pixels)
    archs = [space.shrink(space.teacher, [ratio] * len(space.layers)) for ratio in (0.7, 0.5, 0.3)]
    space.build(archs[0])  # makes what all students share
    sent = []
    for arch in archs[1:]:
        with counted() as (kernels, traffic):
            space.build(arch)
        assert kernels["aten::convolution"] == 20
        assert kernels["aten::_local_scalar_dense"] + sum(traffic.reads.values()) <= 5
        sent += traffic.sent
    assert len(sent) == len(set(sent)) > 0


def test_weights_are_fitted_in_full_precision(monkeypatch):
    used = []
    product = fitting._product

    def spy(a, b):
        used.append(getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"))
        return product(a, b)

    monkeypatch.setattr(fitting, "_product", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        space = ArchitectureSpace(chain(6, 0), images(2), images())
        space.build(space.shrink(space.teacher, [0.5] * len(space.layers)))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(used) == {"ieee"}


@pytest.mark.parametrize("groups", [4, 8])
def test_grouped_convolutions_take_up_removed_maps_of_their_groups(groups):
    def between(net, x):
        return net.last(net.grouped(net.first(x)))

    net = networks.settle(
        Written(
            between,
            first=torch.nn.Conv2d(8, 8, 1, groups=groups, bias=False),  # a constant ends at the padding
            grouped=torch.nn.Conv2d(8, 16, 3, padding=1, groups=groups),
            last=torch.nn.Conv2d(16, 8, 1),
        )
    )
    images = networks.images(count=128)
    space = ArchitectureSpace(net, images, images)
    arch = space.remove(space.teacher, [layer.name != "first" for layer in space.layers])
    assert not arch.keep[1]
    with torch.no_grad():
        layers = ("stem", "grouped")
        wanted = torch.nn.Sequential(net.stem, net.first, net.grouped)(images)
        sliced, fitted = (
            torch.nn.Sequential(*(space.build(arch, init).get_submodule(name) for name in layers))(images)
            for init in ("sliced", "fitted")
        )
    assert relative(fitted, wanted) < min(0.05, 0.1 * relative(sliced, wanted))


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("name", "allowed"), [("allow_tf32", True), ("fp32_precision", "tf32")])
def test_tf32_is_put_off_and_back_in_whichever_way_it_was_allowed(name, allowed):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, name):
        pytest.skip("torch knows one way only")
    before = getattr(matmul, name)
    setattr(matmul, name, allowed)
    try:
        with full_precision():
            assert getattr(matmul, "fp32_precision", "ieee") == "ieee"
        assert getattr(matmul, name) == allowed
    finally:
        setattr(matmul, name, before)
