"""Whatever people write: channels are followed, or pinned with a warning, and every student is what was foreseen."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import networks
from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.networks.space import ArchitectureSpace
from networks import Branching, NotUnderstood, Tail, check_student, images, kill_channels, ratios, settle, without
from written import WRITTEN, conv, net_of


@functools.cache
def space_of(name: str) -> ArchitectureSpace:
    return ArchitectureSpace(net_of(name), images())


@pytest.mark.parametrize("name", WRITTEN)
def test_what_can_shrink_does_and_what_cannot_says_so(name: str) -> None:
    space = space_of(name)
    shrinks = [layer.name for layer, can in zip(space.layers, space.choices(space.teacher)[0], strict=True) if can]
    assert shrinks == WRITTEN[name].shrinkable.split()
    assert bool(space.warnings) == bool(WRITTEN[name].warning)
    assert not space.warnings or any(WRITTEN[name].warning in warning for warning in space.warnings)


@pytest.mark.parametrize("name", WRITTEN)
def test_everything_kept_gives_the_teachers_outputs(name: str) -> None:
    space = space_of(name)
    with torch.no_grad():
        assert torch.equal(space.build(space.teacher)(images()), net_of(name)(images()))


@pytest.mark.parametrize("name", WRITTEN)
@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=8)
def test_students_are_what_was_foreseen(name: str, seed: int) -> None:
    check_student(space_of(name), images(), seed, least=0.05)


@pytest.mark.parametrize("name", [name for name, case in WRITTEN.items() if case.exact])
def test_dead_channels_are_dropped_without_loss(name: str) -> None:
    traced = ArchitectureSpace(net_of(name), images())._traced
    left = kill_channels(traced, share=2)
    space = ArchitectureSpace(traced.module, images())
    with torch.no_grad():
        expected, got = traced.module(images()), space.build(space.shrink(space.teacher, left))(images())
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["channel_last", "shuffled", *WRITTEN])
def test_a_students_own_space_is_no_narrower(name: str) -> None:
    """Stage 2 searches the space of stage 1's student."""
    space = space_of(name) if name in WRITTEN else networks.space_of(name)
    again = ArchitectureSpace(space.build(space.teacher), images())
    assert again.teacher.params == space.teacher.params
    assert again.choices(again.teacher) == space.choices(space.teacher)
    assert again.layers == space.layers


def test_nothing_is_warned_about_where_all_is_understood() -> None:
    for name in networks.SMALL:
        assert networks.space_of(name).warnings == (), name


def volume(dimensions: int) -> nn.Module:
    kinds = {1: (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.ConvTranspose1d, nn.AdaptiveAvgPool1d),
             3: (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.ConvTranspose3d, nn.AdaptiveAvgPool3d)}  # fmt: skip
    a_conv, a_norm, a_pool, transposed, pool = kinds[dimensions]
    return nn.Sequential(
        *(a_conv(3, 8, 3, padding=1), a_norm(8), nn.ReLU(), a_pool(2), a_conv(8, 12, 3, padding=1, groups=4)),
        *(transposed(12, 10, 2, stride=2), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(10, 10)),
    )


@pytest.mark.parametrize("dimensions", [1, 3])
def test_signals_and_volumes_shrink_too(dimensions: int) -> None:
    net, x = volume(dimensions).eval(), torch.randn(2, 3, *[8] * dimensions)
    space = ArchitectureSpace(net, x, calibration=torch.randn(16, 3, *[8] * dimensions))
    with torch.no_grad():
        assert torch.equal(space.build(space.teacher, "sliced")(x), net(x))
    assert space.warnings == ()
    for ratio in (0.1, 0.5):
        arch = space.shrink(space.teacher, [ratio] * len(space.layers), [0.3] * len(space.layers))
        assert arch.params < space.teacher.params
        for init in ("sliced", "fitted"):
            student = space.build(arch, init)
            assert sum(p.numel() for p in student.parameters()) == arch.params
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                assert student(x[:1]).isfinite().all()
            assert counter.get_total_flops() == 2 * arch.macs


# What is pinned


@pytest.mark.parametrize("operation", ["cumsum", "einsum"])
def test_an_operation_that_is_not_understood_pins_what_it_touches(operation: str) -> None:
    net = settle(NotUnderstood(operation))
    space = ArchitectureSpace(net, images())
    assert any(operation in warning for warning in space.warnings)
    assert torch.equal(space.build(space.teacher)(images()), net(images()))
    count = len(space.layers)
    student = space.build(space.shrink(space.teacher, [0.5] * count, [0.4] * count))
    sizes = {name: getattr(student, name).out_channels for name in ("stem", "conv", "free", "last")}
    assert sizes == {"stem": 4, "conv": 8, "free": 6, "last": 4}
    assert student(images()).shape == (2, 10)
    student = space.build(space.remove(space.teacher, without(space, "free")))  # its 12 channels meet the 8 pinned ones
    assert student.last.in_channels == 8
    assert student(images()).shape == (2, 10)
    with pytest.raises(DegenerateArchitecture):
        space.remove(space.shrink(space.teacher, ratios(space, free=0.5)), without(space, "free"))


def test_an_untraceable_submodule_can_be_a_leaf() -> None:
    net = Branching().eval()
    space = ArchitectureSpace(net, images(), leaf=["branch"])
    assert "branch" in [layer.name for layer in space.layers]
    assert any("branch" in warning for warning in space.warnings)
    for x in (images(), -images()):
        assert torch.equal(space.build(space.teacher)(x), net(x))


@pytest.mark.parametrize("leaf", ["0", "7", "15"])
def test_a_leaf_with_weights_stays_whole_and_is_counted(leaf: str) -> None:
    teacher = networks.make("chain")
    space = ArchitectureSpace(teacher, images(), images(count=32), leaf=[leaf])
    assert space.teacher.params == sum(p.numel() for p in teacher.parameters())
    student = check_student(space, images(), seed=0)
    assert student.get_submodule(leaf).weight.shape == teacher.get_submodule(leaf).weight.shape


class SizeByNumber(Tail):
    """A size whose place is taken by another that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = conv(8, 12), conv(12, 8)

    def body(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.last(x.reshape(x.shape[0], 12, -1).view(x.shape))


def test_a_size_written_as_a_number_pins_channels_where_it_cannot_follow() -> None:
    space = ArchitectureSpace(settle(SizeByNumber()), images())
    (warning,) = space.warnings
    assert "has sizes of its own" in warning
    student = space.build(space.shrink(space.teacher, [0.5] * len(space.layers)))
    assert (student.inner.in_channels, student.inner.out_channels) == (4, 12)
    assert student(images()).shape == (2, 10)
