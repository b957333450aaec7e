"""Fitted weights: exact where exactness is possible, better than slices where it is not."""

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
from n2n_fast.networks.fitting import Calibration, full_precision
from n2n_fast.networks.graph import TracedTeacher
from n2n_fast.networks.importance import pivoted_order
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.training.distill import recalibrate, seeded
from spaces import apart, even, outputs, spoil
from written import Written

NETS = ("chain", "vgg_size", "cifar_resnet", "bottlenecks", "mobile", "gated", "dense")


def images(count=96, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def chain(width, seed=0, spoilt=None):
    """Two convolutions, one with a norm, a flatten and a linear layer; spoilt: what to do to them before."""
    with seeded(seed, torch.device("cpu")):
        net = nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(width * 16, 5)),
        )
    if spoilt is not None:
        with torch.no_grad():
            spoilt(net)
    return recalibrate(net, [images()])  # which fitting will find again


def space_of(teacher, pixels=None, **options):
    """A space whose students are fitted to these images."""
    pixels = images() if pixels is None else pixels
    return ArchitectureSpace(teacher, pixels[:2], pixels, **options)


# Exact


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
    space = space_of(recalibrate(teacher, [pixels]), pixels)
    arch = space.shrink(space.teacher, left)
    assert arch.params < space.teacher.params or min(left) == 1
    assert apart(space.build(arch), teacher, networks.images(count=16)) < 1e-3


def test_a_linear_layer_over_the_last_dimension_is_fitted():
    teacher, pixels = networks.make("channel_last"), torch.randn(64, 3, 16, 16)
    for tensor in (teacher.widen.weight.data, teacher.widen.bias.data):
        tensor[12:] = tensor[:12]
    space = space_of(teacher, pixels)
    arch = space.shrink(space.teacher, networks.ratios(space, widen=0.5))
    assert arch.params < space.teacher.params
    assert apart(space.build(arch), teacher, pixels) < 1e-3


class LinearBranch(nn.Module):
    """A residual branch without an activation, whose first convolution and norm are a linear map of its input."""

    def __init__(self, width):
        super().__init__()
        self.first, self.norm1 = networks.conv_bn(width, width, 1)
        self.second, self.norm2 = networks.conv_bn(width, width, 1)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.second(self.norm1(self.first(x)))))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("width", [2, 5, 8])
def test_removed_linear_maps_are_folded_into_the_next_layer(width, blocks, seed):
    with seeded(seed, torch.device("cpu")):
        teacher = nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *(LinearBranch(width) for _ in range(blocks))),
            *(nn.Conv2d(width, width, 1), nn.Conv2d(width, 7, 1)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)),
        )
    space = space_of(recalibrate(networks.settle(teacher, seed), [images()]))
    gone = [str(2 + blocks), *(f"{2 + k}.{name}" for k in range(blocks) for name in ("first", "norm1"))]
    arch = space.remove(space.teacher, networks.without(space, *gone))
    assert arch.keep.count(False) == 1 + 2 * blocks
    assert apart(space.build(arch), teacher, images(16, seed=9)) < 1e-4


def test_everything_kept_is_the_teacher_to_the_last_bit():
    teacher = chain(6, 1)
    space = space_of(teacher)
    assert torch.equal(outputs(space.build(space.teacher), images(8)), outputs(teacher, images(8)))


# Near


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_fitted_students_are_nearer_to_the_teacher_than_sliced_ones(ratio):
    teacher, x = chain(24, 3), images(64, seed=5)
    space = space_of(teacher)
    sliced, fitted = (
        apart(recalibrate(space.build(even(space, ratio), init), [images()]), teacher, x)
        for init in ("sliced", "fitted")
    )
    assert fitted < 0.9 * sliced


def test_a_layer_without_a_bias_or_norm_makes_up_for_the_means_that_are_lost():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 10, 1, bias=False))
    net[0].bias.data += 1
    space = space_of(net)
    sliced, fitted = (
        apart(space.build(even(space, 0.5), init), net, images(16, seed=9)) for init in ("sliced", "fitted")
    )
    assert fitted < 0.6 * sliced


@pytest.mark.parametrize("groups", [4, 8])
def test_grouped_convolutions_take_up_removed_maps_of_their_groups(groups):
    net = networks.settle(
        Written(
            lambda net, x: net.last(net.grouped(net.first(x))),
            first=nn.Conv2d(8, 8, 1, groups=groups, bias=False),  # a constant ends at the padding
            grouped=nn.Conv2d(8, 16, 3, padding=1, groups=groups),
            last=nn.Conv2d(16, 8, 1),
        )
    )
    pixels = networks.images(count=128)
    space = space_of(net, pixels)
    arch = space.remove(space.teacher, networks.without(space, "first"))
    assert not arch.keep[1]
    students = [space.build(arch, init) for init in ("sliced", "fitted")]
    wanted = nn.Sequential(net.stem, net.first, net.grouped)
    sliced, fitted = (apart(nn.Sequential(student.stem, student.grouped), wanted, pixels) for student in students)
    assert fitted < min(0.05, 0.1 * sliced)


def test_fitting_re_estimates_the_norms():
    space = space_of(chain(8, 4))
    student = space.build(space.shrink(space.teacher, networks.ratios(space, _0=0.5)), "fitted")
    before = {name: value.clone() for name, value in student.named_buffers()}
    after = dict(recalibrate(student, [images()]).named_buffers())
    count = images()[:, 0].numel()
    torch.testing.assert_close(before["1.running_mean"], after["1.running_mean"], rtol=1e-4, atol=1e-5)
    divided_by = after["1.running_var"] * (count - 1) / count
    torch.testing.assert_close(before["1.running_var"], divided_by, rtol=1e-4, atol=1e-5)


# Which channels


@settings(deadline=None, max_examples=30, derandomize=True)
@given(n=st.integers(1, 12), rank=st.integers(0, 12), seed=st.integers(0, 999))
def test_pivoted_order_is_the_greedy_one(n, rank, seed):
    factor = torch.randn(n, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = factor @ factor.T
    order = pivoted_order(matrix)
    assert sorted(order) == list(range(n))
    left = matrix.clone()
    for j in order[: max(0, min(n, rank) - 1)]:
        gains = left.square().sum(0) / left.diagonal().clamp_min(1e-9 * float(matrix.diagonal().max()))
        assert float(gains[j]) >= float(gains.max()) * (1 - 1e-6)
        left = left - torch.outer(left[:, j], left[:, j]) / left[j, j]


def test_importance_by_weights_or_by_activations():
    teacher, pixels, x = networks.make("cifar_resnet"), networks.images(count=64), networks.images(count=16)
    without_images = ArchitectureSpace(teacher, pixels[:2])
    by_weights, by_activations = (space_of(teacher, pixels, importance=name) for name in ("l1", "activations"))
    arch = even(without_images, 0.5)
    sliced = without_images.build(arch)
    assert torch.equal(outputs(by_weights.build(arch, "sliced"), x), outputs(sliced, x))
    assert not torch.equal(outputs(by_activations.build(arch, "sliced"), x), outputs(sliced, x))
    assert apart(by_weights.build(arch, "fitted"), teacher, x) < apart(sliced, teacher, x)


# Wrong arguments


def test_what_cannot_be_is_refused():
    teacher = chain(4)
    without_images = ArchitectureSpace(teacher, images(2))
    with pytest.raises(ValueError, match="init: 'fitted' needs the space to be made with calibration images"):
        without_images.build(without_images.teacher, "fitted")
    with pytest.raises(ValueError, match="importance: 'activations' needs calibration images"):
        ArchitectureSpace(teacher, images(2), importance="activations")
    with pytest.raises(ValueError, match="importance: expected one of activations, l1, got 'l2'"):
        space_of(teacher, importance="l2")


def test_activations_that_are_not_finite_are_named():
    teacher = chain(4)
    teacher[1].weight.data[0] = float("inf")
    with pytest.raises(BadInput, match="the input of the teacher's layer 3 is not finite"):
        space_of(teacher)


# Numbers


def test_degenerate_moments_never_give_a_weight_that_is_not_finite():
    def spoilt(net):
        net[0].weight[:5] = 0
        net[1].weight[:3] = 0
        net[1].bias[:2] = 0

    space = space_of(
        chain(12, 0, spoilt), images(1)
    )  # fewer samples than channels, constant, dead and doubled channels
    for ratio in (0.1, 0.5, 0.9):
        student = space.build(even(space, ratio))
        assert all(bool(value.isfinite().all()) for value in student.state_dict().values())


def test_samples_are_bounded_by_the_widths_not_by_the_images(monkeypatch):
    monkeypatch.setattr(fitting, "MIN_SAMPLES", 50)
    monkeypatch.setattr(fitting, "SAMPLES_PER_CHANNEL", 2)
    calibration = Calibration(TracedTeacher(chain(6), images(2)), images(40))
    rows = {name: len(calibration.targets[i].samples) for name, i in calibration.fitted.items()}
    assert rows == {"0": 80, "3": 80, "6": 80}  # two of 64, 64 and 16 positions of each image


def test_a_fitted_build_waits_once_and_sends_nothing_twice():
    pixels = torch.randn(64, 3, 32, 32)
    space = space_of(recalibrate(torchvision.models.resnet18(num_classes=10), [pixels]), pixels)
    first, *archs = (even(space, ratio) for ratio in (0.7, 0.5, 0.3))
    space.build(first)  # makes what all students share
    sent = []
    for arch in archs:
        with counted() as (kernels, traffic):
            space.build(arch)
        assert kernels["aten::convolution"] == 20
        assert kernels["aten::_local_scalar_dense"] + sum(traffic.reads.values()) <= 5
        sent += traffic.sent
    assert len(sent) == len(set(sent)) > 0


class Spy(nn.Module):
    """Notes the precision in which it is called."""

    used = ()

    def forward(self, x):
        Spy.used += (getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),)
        return x


def test_weights_are_fitted_in_full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        space = space_of(nn.Sequential(Spy(), *chain(6)), leaf=["0"])
        Spy.used = ()
        space.build(even(space, 0.5))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(Spy.used) == {"ieee"}


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
