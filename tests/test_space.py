"""The transitions of the search: what they do, what they refuse, and that what they promise is what is built."""

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from networks import LARGE, SMALL, images, position, ratios, settle, space_of, teacher_of, without
from spaces import RATIOS, drawn, even, outputs, removed
from written import Written

SEEDS = st.integers(0, 10**9)


def cost(net: nn.Module, name: str = "") -> tuple[int, int]:
    """Params, and MACs of one image, counted."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net(images(name, 1))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2


def built(space: ArchitectureSpace, arch: Architecture, name: str = "") -> nn.Module:
    """The student of `arch`, once its costs and widths are as promised."""
    student = space.build(arch)
    assert (arch.params, arch.macs) == cost(student, name)
    for layer, kept, width in zip(space.layers, arch.keep, space.widths(arch), strict=True):
        if kept and layer.kind in ("conv", "depthwise", "linear"):
            assert width == len(student.get_submodule(layer.name).weight), layer.name
    return student


def trains(student: nn.Module, name: str) -> bool:
    student.train()(images(name, 4)).square().sum().backward()
    return all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_the_teacher_is_the_first_state(name: str) -> None:
    space = space_of(name)
    assert all(space.teacher.keep)
    assert (space.teacher.params, space.teacher.macs) == cost(teacher_of(name), name)


@pytest.mark.parametrize("name", SMALL)
@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_architectures_stay_in_their_space_and_students_are_as_these_say_and_train(name: str, seed: int) -> None:
    space = space_of(name)
    arch = drawn(space, seed)
    assert (arch, arch.key) == (drawn(space, seed), drawn(space, seed).key)
    assert arch.params <= space.teacher.params
    assert arch.macs <= space.teacher.macs
    assert all(1 <= w <= size for w, size in zip(arch.widths, space.teacher.widths, strict=True))
    assert all(keep or layer.removable for keep, layer in zip(arch.keep, space.layers, strict=True))
    ones = [1.0] * len(space.layers)
    assert space.shrink(arch, ones, ones) == space.remove(arch, [True] * len(ones)) == space.member(arch) == arch
    assert trains(built(space, arch, name), name)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("seed", [3, 11])
def test_students_of_large_nets_are_as_their_architectures_say_and_train(name: str, seed: int) -> None:
    arch = drawn(space_of(name), seed)
    assert arch.params < space_of(name).teacher.params
    assert trains(built(space_of(name), arch, name), name)


# Worked examples


def narrowing() -> nn.Sequential:
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 4), (4, 10))))


@pytest.mark.parametrize(
    ("net", "steps", "widths"),
    [
        # removal unites groups at the narrowest width
        ("chain", ["3"], {"0": 8, "3": 8, "7": 12}),
        ("chain", ["3 7 10"], {"0": 8, "11": 8}),
        (narrowing, ["1"], {"0": 4, "2": 10}),
        ("bottlenecks", ["4.conv1"], {"0": 8, "3.conv3": 8, "3.downsample.0": 8, "4.conv3": 8}),  # the whole stream
        (lambda: flattening(150), ["3"], {"0": 2, "3": 128}),  # as many whole channels of 64 positions as there are
        (lambda: flattening(150), ["3", {"0": 0.5}], {"0": 1, "3": 64}),
        # the first writer of a group decides
        (
            "cifar_resnet",
            [{"conv1": 0.5, "layer1.0.conv2": 0.1, "linear": 0.1}],
            {"conv1": 4, "layer1.0.conv2": 4, "layer1.1.conv2": 4, "layer1.0.conv1": 8, "linear": 10},
        ),
        ("twice", [{"stem": 0.5}], {"stem": 4, "conv": 4}),
        ("chain", ["3", {"0": 0.5, "3": 0.1, "7": 0.25}], {"0": 4, "7": 3, "10": 16}),
        # ratios are of the architecture's own widths
        ("chain", [{"0": 0.5, "3": 0.5}, {"0": 0.5, "3": 0.5}], {"0": 2, "3": 3}),
        ("chain", [{"0": 0.01, "3": 0.01}], {"0": 1, "3": 1}),
        ("chain", [{"0": 0.75, "3": 0.25}, "3"], {"0": 3, "3": 3}),
        ("chain", [{"0": 0.25, "3": 0.25}, "3"], {"0": 2, "3": 2}),
    ],
)
def test_widths_after_removals_and_ratios_by_layer(net, steps: list, widths: dict[str, int]) -> None:
    space = space_of(net) if isinstance(net, str) else ArchitectureSpace(settle(net()), images())
    arch = space.teacher
    for step in steps:
        if isinstance(step, str):
            arch = space.remove(arch, without(space, *step.split()))
        else:
            arch = space.shrink(arch, [step.get(layer.name, 1.0) for layer in space.layers])
    built(space, arch)
    by_name = dict(zip((layer.name for layer in space.layers), space.widths(arch), strict=True))
    assert {name: by_name[name] for name in widths} == widths


# Removal


def test_removed_norms_and_activations_change_no_width_and_pass_their_input_through() -> None:
    space, teacher = space_of("chain"), teacher_of("chain")
    arch = space.remove(space.teacher, without(space, "1", "2", "4"))
    assert arch.widths == space.teacher.widths
    assert arch.params == space.teacher.params - 2 * 8 - 2 * 12
    assert torch.equal(outputs(space.build(arch)), outputs(nn.Sequential(teacher[0], teacher[3], *teacher[5:])))


def test_removed_layers_never_alias_a_residual() -> None:
    space, teacher, x = space_of("cifar_resnet"), teacher_of("cifar_resnet"), images()
    block = [f"layer1.0.{part}" for part in ("conv1", "bn1", "conv2", "bn2")]
    student = space.build(space.remove(space.teacher, without(space, *block)))
    with torch.no_grad():
        stem = teacher.bn1(teacher.conv1(x)).relu()
        expected = teacher.linear(teacher.layer2(teacher.layer1[1](2 * stem)).mean((2, 3)))
        assert torch.allclose(student(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", [*SMALL, "resnet18", "mobilenet_v2"])
def test_entries_of_fixed_layers_are_ignored(name: str) -> None:
    space = space_of(name)
    removable = [layer.removable for layer in space.layers]
    assert not all(removable)
    assert space.remove(space.teacher, [r or i % 2 == 0 for i, r in enumerate(removable)]) == space.teacher


def test_what_is_removed_stays_removed() -> None:
    space = space_of("chain")
    once = space.remove(space.teacher, without(space, "3"))
    assert space.remove(once, without(space, "7")) == space.remove(space.teacher, without(space, "3", "7"))


@pytest.mark.parametrize("name", [*SMALL, *LARGE, "regnet_y_800mf"])
def test_a_removable_layer_can_be_removed_alone(name: str) -> None:
    space = space_of(name)
    for layer in space.layers:
        if layer.removable:
            space.remove(space.teacher, without(space, layer.name))


def flattening(hidden: int) -> nn.Sequential:
    """4 channels at 8 x 8, so 256 inputs of a linear layer of `hidden` outputs."""
    first = (nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, nn.Linear(256, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def test_widths_that_cannot_meet_are_degenerate() -> None:
    space = ArchitectureSpace(flattening(150), images())
    arch = space.shrink(space.teacher, ratios(space, _3=0.4))
    with pytest.raises(DegenerateArchitecture) as caught:  # 60 outputs are not even one channel of 64 positions
        space.remove(arch, without(space, "3"))
    assert caught.value.reason == str(caught.value) != ""
    space = ArchitectureSpace(flattening(32), images())
    assert space.layers[position(space, "3")].note == "its input and output channels cannot meet"


# Wrong arguments


ONES = [1.0] * 16  # a ratio for each layer of "chain"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(([1.0] * n, f": expected 16 entries, one per layer, got {n}") for n in (0, 15, 17)),
        *(([*ONES[:7], x, *ONES[8:]], rf"\[7\]: expected .*, got {x}") for x in (0.0, -0.1, 1.01, math.nan, math.inf)),
    ],
)
def test_wrong_ratios_are_refused(wrong: list[float], message: str) -> None:
    space = space_of("chain")
    for name, call in (
        ("channels", lambda: space.shrink(space.teacher, wrong)),
        ("kernels", lambda: space.shrink(space.teacher, ONES, wrong)),
        ("channels", lambda: space.shrink_within(space.teacher, wrong, params=1, grow=True)),
    ):
        with pytest.raises(ValueError, match=name + message):
            call()


def test_other_wrong_arguments_are_refused() -> None:
    space = space_of("chain")
    with pytest.raises(ValueError, match="keep: expected 16 entries, one per layer, got 15"):
        space.remove(space.teacher, [True] * 15)
    with pytest.raises(ValueError, match=r"init: expected one of .*, got 'best'"):
        space.build(space.teacher, init="best")
    with pytest.raises(ValueError, match="round_to: expected at least 1, got 0"):
        ArchitectureSpace(teacher_of("chain"), images(), round_to=0)


def test_an_architecture_of_another_space_is_refused() -> None:
    space = space_of("chain")
    arch, other = space.teacher, space_of("cifar_resnet").teacher
    for call in (space.member, space.build, space.widths, space.choices):
        with pytest.raises(ValueError, match=r"arch: expected 16 layers and \d+ channel groups, got 21 and 8"):
            call(other)
    for changed in (
        replace(arch, keep=(False, *arch.keep[1:])),
        replace(arch, kernels=((2, 2), *arch.kernels[1:])),
        replace(arch, params=arch.params + 1),
        replace(arch, keep=tuple(without(space, "3"))),  # whose groups' widths differ
    ):
        with pytest.raises(ValueError, match=f"arch: {changed.key} is of another space"):
            space.member(changed)
    with pytest.raises(DegenerateArchitecture):
        space.member(replace(arch, widths=tuple(width + 1 for width in arch.widths)))


# Shrinkage


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, share=st.floats(0.02, 1.1), by=st.sampled_from(["params", "macs"]), grow=st.booleans())
def test_shrinking_within_limits_goes_just_as_far_as_needed(name: str, seed: int, share: float, by: str, grow: bool):
    space, rng = space_of(name), random.Random(seed)
    arch = removed(space, [rng.random() >= 0.1 for _ in space.layers])
    channels, kernels = ([rng.choice(RATIOS) for _ in space.layers] for _ in range(2))
    limit = int(share * getattr(arch, by))
    within = space.shrink_within(arch, channels, kernels, **{by: limit}, grow=grow)

    def scaled(factor: float) -> Architecture:
        return space.shrink(arch, [min(1.0, ratio * factor) for ratio in channels], kernels)

    largest, narrowest = scaled(1 / min(channels) if grow else 1.0), scaled(1e-9)
    assert within.keep == arch.keep
    assert within.kernels == largest.kernels
    if getattr(largest, by) <= limit:
        assert within == largest
    elif getattr(narrowest, by) > limit:
        assert within == narrowest
    else:
        assert getattr(within, by) <= limit
        grid = [scaled(10 ** (i / 500)) for i in range(-2000, 501) if grow or i <= 0]
        assert getattr(within, by) >= max(getattr(a, by) for a in grid if getattr(a, by) <= limit) * 0.98 - 100


def test_shrinking_within_both_limits_or_none() -> None:
    space = space_of("chain")
    halves = [0.5] * len(space.layers)
    assert space.shrink_within(space.teacher, halves) == space.shrink(space.teacher, halves)
    assert space.shrink_within(space.teacher, halves, grow=True) == space.teacher
    both = space.shrink_within(space.teacher, halves, params=space.teacher.params // 5, macs=space.teacher.macs // 5)
    assert both.params <= space.teacher.params // 5
    assert both.macs <= space.teacher.macs // 5


@pytest.mark.parametrize("objective", ["params", "macs"])
@pytest.mark.parametrize("name", ["chain", "cifar_resnet", "mobile", "dense"])
def test_tilted_ratios_fall_as_what_narrowing_a_layer_saves(name: str, objective: str) -> None:
    space = space_of(name)
    assert space.tilted(0, objective) == [1.0] * len(space.layers)
    once, twice = space.tilted(0.4, objective), space.tilted(0.8, objective)
    assert twice == pytest.approx([ratio**2 for ratio in once])
    free, _ = space.choices(space.teacher)
    assert max(ratio for ratio, is_free in zip(once, free, strict=True) if is_free) == 1
    assert {ratio for ratio, is_free in zip(once, free, strict=True) if not is_free} <= {1.0}


def test_tilted_ratios_of_a_chain_let_the_layers_cost_the_same() -> None:
    """Three convolutions of 3x3 between 8, 16 and 32 channels: what halving a width saves is known."""
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 4, 3))
    space = ArchitectureSpace(net, torch.randn(1, 8, 16, 16))
    saved = [9 * (4 * 8 + 4 * 16) + 4, 9 * (8 * 8 + 8 * 32) + 8, 9 * (16 * 16 + 16 * 4) + 16]
    assert space.tilted(0.5) == pytest.approx([*((saved[0] / of_layer) ** 0.5 for of_layer in saved), 1])


def check_choices(space: ArchitectureSpace, arch: Architecture) -> None:
    """What `choices` says is what changing one ratio does."""
    channels, kernels = space.choices(arch)
    ones = [1.0] * len(space.layers)
    for i, (layer, width, kernel) in enumerate(zip(space.layers, channels, kernels, strict=True)):
        changed = [*ones[:i], 0.1, *ones[i + 1 :]]
        assert (space.shrink(arch, changed, ones) != arch) == width, layer.name
        assert (space.shrink(arch, ones, changed) != arch) == kernel, layer.name


@pytest.mark.parametrize("name", [*SMALL, "resnet18", "mobilenet_v2"])
def test_choices_are_exactly_the_entries_that_change_something(name: str) -> None:
    space = space_of(name)
    check_choices(space, space.teacher)
    least = even(space, 0.001, 0.1)
    assert not any(any(choices) for choices in space.choices(least))
    check_choices(space, least)


@pytest.mark.parametrize("name", SMALL)
@given(SEEDS)
@settings(deadline=None, max_examples=10)
def test_choices_of_any_architecture(name: str, seed: int) -> None:
    check_choices(space_of(name), drawn(space_of(name), seed))


def test_a_map_that_a_removed_linear_layer_left_one_channel_leaves_no_choice() -> None:
    space = space_of("vgg_size")  # 20 hidden units make one channel of 16 positions
    check_choices(space, space.remove(space.teacher, without(space, "fc1")))


# Kernels


def conv_net(conv: nn.Conv2d) -> ArchitectureSpace:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, conv.in_channels, 1), nn.Conv2d(conv.out_channels, 10, 1)
    return ArchitectureSpace(settle(nn.Sequential(first, conv, nn.ReLU(), last)), images())


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize(
    ("arguments", "ratio", "kernel", "padding"),
    [
        ({"kernel_size": 5, "padding": 2}, 0.6, 3, 1),
        ({"kernel_size": 5, "padding": 2}, 0.1, 1, 0),
        ({"kernel_size": 5, "padding": 2}, 0.8, 3, 1),
        ({"kernel_size": 5, "padding": 1}, 0.1, 3, 0),
        ({"kernel_size": 3, "padding": 2}, 0.1, 1, 1),
        ({"kernel_size": 5, "padding": "same"}, 0.6, 3, "same"),
        ({"kernel_size": 5, "padding": "same", "dilation": 2}, 0.6, 3, "same"),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, 0.1, 1, 0),
        ({"kernel_size": 5, "padding": 4, "dilation": 2}, 0.6, 3, 2),
        ({"kernel_size": 5, "padding": 2, "stride": 2}, 0.6, 3, 1),
        ({"kernel_size": 5, "padding": 0}, 0.1, 5, 0),
        ({"kernel_size": 5, "padding": "valid"}, 0.1, 5, "valid"),
        ({"kernel_size": 4, "padding": 2}, 0.1, 4, 2),
        ({"kernel_size": 5, "padding": 2, "groups": 4}, 0.6, 3, 1),
        ({"kernel_size": (1, 7), "padding": (0, 3)}, 0.5, (1, 3), (0, 1)),
    ],
    ids=str,
)
def test_a_kernel_is_cropped_at_its_centre_and_padding_follows(arguments, ratio, kernel, padding, mode) -> None:
    before = nn.Conv2d(8, 8, **arguments, padding_mode=mode)
    space = conv_net(before)
    student = built(space, even(space, 1.0, ratio))
    after = student.get_submodule("1")
    reference = nn.Conv2d(8, 8, **{**arguments, "kernel_size": kernel, "padding": padding}, padding_mode=mode)
    assert (after.kernel_size, after.padding) == (reference.kernel_size, reference.padding)
    height, width = after.kernel_size
    top, left = (before.kernel_size[0] - height) // 2, (before.kernel_size[1] - width) // 2
    assert torch.equal(after.weight, before.weight[:, :, top : top + height, left : left + width])
    assert outputs(student).shape == outputs(space.build(space.teacher)).shape
    reference.load_state_dict(after.state_dict())
    x = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(after(x), reference(x))


def test_kernels_are_left_alone_unless_asked_for() -> None:
    space = space_of("chain")
    assert space.shrink(space.teacher, [0.5] * 16).kernels == space.teacher.kernels
    arch = space.shrink(space.teacher, ONES, ratios(space, _3=0.6))
    assert [i for i, (a, b) in enumerate(zip(arch.kernels, space.teacher.kernels, strict=True)) if a != b] == [3]
    assert arch.widths == space.teacher.widths


# Spaces


def test_a_convolution_that_changes_the_resolution_stays() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 10, 3))
    assert not any(layer.removable for layer in ArchitectureSpace(net, images()).layers)


def test_building_the_space_of_a_student() -> None:
    """Stage 2's space is made from stage 1's student."""
    space = space_of("cifar_resnet")
    arch = space.shrink(space.remove(space.teacher, without(space, "layer1.0.conv1")), [0.5] * len(space.layers))
    student = space.build(arch)
    second = ArchitectureSpace(student, images())
    assert (second.teacher.params, second.teacher.macs) == (arch.params, arch.macs)
    assert torch.equal(outputs(second.build(second.teacher)), outputs(student))
    built(second, even(second, 0.5))


def test_a_copied_space_builds_the_same_students() -> None:
    space = space_of("cifar_resnet")
    arch = even(space, 0.5)
    assert torch.equal(outputs(copy.deepcopy(space).build(arch)), outputs(space.build(arch)))


def test_a_scale_read_twice_is_left_alone() -> None:
    """A parameter that scales channels at two places is one parameter: it stays where it is, at full width."""
    scale = nn.Parameter(torch.rand(8, 1, 1))
    net = Written(lambda net, x: net.conv(x * net.scale) * net.scale, conv=nn.Conv2d(8, 8, 1), scale=scale).eval()
    space = ArchitectureSpace(net, images())
    assert torch.equal(outputs(built(space, space.teacher)), outputs(net))
    assert outputs(built(space, even(space, 0.5))).shape == (2, 10)


@pytest.mark.parametrize("name", ["chain", "cifar_resnet", "resnext", "mobile", "dense", "shuffled", "resnet18"])
@pytest.mark.parametrize("step", [2, 4, 8])
def test_rounded_widths_are_multiples_or_the_teachers_own(name: str, step: int) -> None:
    space = ArchitectureSpace(teacher_of(name), images(name), round_to=step)
    chosen = space.choices(space.teacher)[0]
    for ratio in (0.1, 0.3, 0.5, 0.8):
        arch = even(space, ratio)
        built(space, arch, name)
        for layer, chooses, width in zip(space.layers, chosen, space.widths(arch), strict=True):
            if chooses or layer.kind == "depthwise":
                assert width % step == 0 or width == layer.out_channels, layer.name
            assert not chooses or ratio > 0.1 or width < layer.out_channels
        assert even(space.unrounded(), ratio) == even(space_of(name), ratio)
    assert even(space, 1.0) == space.teacher


def test_a_width_below_the_step_is_no_choice() -> None:
    space = ArchitectureSpace(teacher_of("chain"), images(), round_to=8)
    chosen = [layer.name for layer, can in zip(space.layers, space.choices(space.teacher)[0], strict=True) if can]
    assert chosen == [layer.name for layer in space.layers if layer.kind == "conv" and layer.out_channels > 8]
