"""The transitions of the search: what they do, what they refuse, and that what they promise is what is built."""

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from n2n_fast import native
from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.student import StudentFactory
from networks import LARGE, SMALL, images, make, position, ratios, settle, space_of, teacher_of, without

SEEDS = st.integers(0, 10**9)
RATIOS = [i / 10 for i in range(1, 11)]


def drawn(space: ArchitectureSpace, seed: int) -> Architecture:
    """A random architecture: a share of the layers removed, then random ratios; at times one of both alone."""
    rng = random.Random(seed)
    count = len(space.layers)
    share = rng.choice([0.0, 0.1, 0.3, 0.6, 1.0])
    arch = removed(space, [rng.random() >= share for _ in range(count)])
    if rng.random() < 0.2:
        return arch
    channels, kernels = ([rng.choice(RATIOS) for _ in range(count)] for _ in range(2))
    return space.shrink(arch, channels, kernels if rng.random() < 0.7 else None)


def removed(space: ArchitectureSpace, keep: Sequence[bool]) -> Architecture:
    try:
        return space.remove(space.teacher, keep)
    except DegenerateArchitecture:
        return space.teacher


def check_costs(name: str, arch: Architecture) -> nn.Module:
    """The student of `arch`, once its parameters and MACs are found to be as promised."""
    student = space_of(name).build(arch)
    assert arch.params == sum(p.numel() for p in student.parameters())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        student(images(name, 1))
    assert arch.macs == counter.get_total_flops() // 2
    return student


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_the_teacher_is_the_first_state(name: str) -> None:
    space, teacher = space_of(name), teacher_of(name)
    assert all(space.teacher.keep)
    assert space.teacher.params == sum(p.numel() for p in teacher.parameters())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        teacher(images(name, 1))
    assert space.teacher.macs == counter.get_total_flops() // 2
    ones = [1.0] * len(space.layers)
    assert space.remove(space.teacher, [True] * len(ones)) == space.teacher
    assert space.shrink(space.teacher, ones, ones) == space.teacher


@pytest.mark.parametrize("name", SMALL)
@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_costs_are_the_built_students_and_it_trains(name: str, seed: int) -> None:
    arch = drawn(space_of(name), seed)
    student = check_costs(name, arch).train()
    out = student(images(name, 4))
    assert out.shape == (4, 10)
    out.square().sum().backward()
    gradients = [p.grad for p in student.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("seed", [3, 11])
def test_costs_are_the_built_students_for_large_nets(name: str, seed: int) -> None:
    rng = random.Random(seed)
    space = space_of(name)
    keep = [rng.random() < 0.8 for _ in space.layers]
    small, kernels = ([rng.choice(RATIOS[:5]) for _ in space.layers] for _ in range(2))
    arch = space.shrink(removed(space, keep), small, kernels)
    assert arch.params < space.teacher.params
    student = check_costs(name, arch).train()
    student(images(name, 2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("name", SMALL)
@given(SEEDS)
@settings(deadline=None, max_examples=10)
def test_transitions_are_deterministic_never_grow_and_stay_in_the_space(name: str, seed: int) -> None:
    space = space_of(name)
    arch = drawn(space, seed)
    assert arch == drawn(space, seed)
    assert arch.key == drawn(space, seed).key
    assert arch.params <= space.teacher.params
    assert arch.macs <= space.teacher.macs
    assert all(1 <= w <= size for w, size in zip(arch.widths, space.teacher.widths, strict=True))
    assert all(keep or layer.removable for keep, layer in zip(arch.keep, space.layers, strict=True))
    ones = [1.0] * len(space.layers)
    assert space.shrink(arch, ones, ones) == arch
    assert space.remove(arch, [True] * len(ones)) == arch


# Removal


@pytest.mark.parametrize("name", SMALL)
@given(seed=SEEDS)
@settings(deadline=None, max_examples=5)
def test_widths_are_the_built_students(name: str, seed: int) -> None:
    space = space_of(name)
    arch = drawn(space, seed)
    student = space.build(arch)
    for layer, kept, width in zip(space.layers, arch.keep, space.widths(arch), strict=True):
        built = getattr(student.get_submodule(layer.name), "weight", None)
        if kept and layer.kind in ("conv", "depthwise", "linear"):
            assert width == len(built), layer.name


def test_removal_unites_groups_at_the_narrowest_width() -> None:
    space = space_of("chain")
    student = space.build(space.remove(space.teacher, without(space, "3")))  # 8 -> 12, between 8 and 12 wide
    assert student.get_submodule("0").out_channels == 8
    assert student.get_submodule("4").num_features == 8
    assert student.get_submodule("7").in_channels == 8
    assert student.get_submodule("7").out_channels == 12
    student = space.build(space.remove(space.teacher, without(space, "3", "7", "10")))
    assert student.get_submodule("11").num_features == 8
    assert student.get_submodule("15").in_features == 8


def test_removal_unites_groups_at_the_narrowest_width_when_the_later_is_narrower() -> None:
    net = settle(nn.Sequential(*(nn.Conv2d(a, b, 3) for a, b in ((3, 16), (16, 16), (16, 4))), nn.Conv2d(4, 10, 1)))
    padded = settle(nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 4), (4, 10)))))
    assert not any(layer.removable for layer in ArchitectureSpace(net, images()).layers[:3])  # 3x3 without padding
    space = ArchitectureSpace(padded, images())
    student = space.build(space.remove(space.teacher, without(space, "1")))
    assert student.get_submodule("0").out_channels == student.get_submodule("2").in_channels == 4


def test_removal_in_a_residual_stream_reaches_the_whole_stream() -> None:
    space = space_of("bottlenecks")  # removing the 1x1 that shrinks 24 channels to 8 makes the stream 8 wide
    arch = space.remove(space.teacher, without(space, "4.conv1"))
    student = check_costs("bottlenecks", arch)
    convs = {name: m.out_channels for name, m in student.named_modules() if isinstance(m, nn.Conv2d)}
    assert convs == {
        "0": 8,
        **{f"3.{c}": 8 for c in ("conv1", "conv2", "conv3", "downsample.0")},
        "4.conv2": 8,
        "4.conv3": 8,
    }
    assert student.get_submodule("7").in_features == 8


def test_removed_norms_and_activations_change_no_width() -> None:
    space = space_of("chain")
    arch = space.remove(space.teacher, without(space, "1", "2", "4"))
    assert arch.widths == space.teacher.widths
    assert arch.params == space.teacher.params - 2 * 8 - 2 * 12
    assert arch.macs == space.teacher.macs
    student, teacher = space.build(arch), teacher_of("chain")
    x = images()
    expected = teacher[5:](teacher[3](teacher[0](x)))
    assert torch.equal(student(x), expected)


def test_a_removed_layer_passes_its_input_through() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1)))
    space = ArchitectureSpace(net, images())
    student = space.build(space.remove(space.teacher, without(space, "1")))
    assert torch.equal(student(images()), net[3](net[2](net[0](images()))))


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
    assert space.remove(space.teacher, removable) == space.teacher
    assert space.remove(space.teacher, [r or i % 2 == 0 for i, r in enumerate(removable)]) == space.teacher


def test_what_is_removed_stays_removed() -> None:
    space = space_of("chain")
    once = space.remove(space.teacher, without(space, "3"))
    assert space.remove(once, [True] * len(space.layers)) == once
    both = space.remove(once, without(space, "7"))
    assert both == space.remove(space.teacher, without(space, "3", "7"))


# Degenerate


def flattening(hidden: int) -> nn.Sequential:
    """4 channels at 8 x 8, so 256 inputs of a linear layer of `hidden` outputs."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, hidden), nn.ReLU(), nn.Linear(hidden, 10)),
    )


def test_widths_that_cannot_meet_are_degenerate_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    space = ArchitectureSpace(flattening(150), images())

    def built(*_: object) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr(StudentFactory, "build", built)
    monkeypatch.setattr(native, "materialize", built)
    arch = space.shrink(space.teacher, ratios(space, _3=0.2))
    with pytest.raises(DegenerateArchitecture) as caught:  # 30 outputs are not even one channel of 64 positions
        space.remove(arch, without(space, "3"))
    assert caught.value.reason == str(caught.value) != ""


def test_widths_that_could_never_meet_are_known_from_the_start() -> None:
    space = ArchitectureSpace(flattening(32), images())
    assert space.layers[position(space, "3")].note == "its input and output channels cannot meet"


def test_a_linear_layer_is_as_wide_as_whole_channels() -> None:
    space = ArchitectureSpace(flattening(150), images())  # two channels of 64 positions
    arch = space.remove(space.teacher, without(space, "3"))
    student = space.build(arch)
    assert student.get_submodule("0").out_channels == 2
    assert student.get_submodule("5").in_features == 128
    assert arch.params == sum(p.numel() for p in student.parameters()) == 3 * 2 * 9 + 2 + 128 * 10 + 10
    assert student(images()).shape == (2, 10)
    arch = space.shrink(arch, ratios(space, _0=0.5))
    assert space.build(arch).get_submodule("5").in_features == 64


def test_a_removal_that_shrinks_below_one_channel_is_degenerate() -> None:
    space = ArchitectureSpace(flattening(150), images())
    narrow = space.shrink(space.teacher, ratios(space, _3=0.4))  # 60 < 64
    with pytest.raises(DegenerateArchitecture):
        space.remove(narrow, without(space, "3"))


# Wrong arguments


@pytest.mark.parametrize("length", [0, 15, 17])
def test_wrong_lengths_are_refused(length: int) -> None:
    space = space_of("chain")
    wrong, right = [1.0] * length, [1.0] * 16
    for name, call in (
        ("keep", lambda: space.remove(space.teacher, [True] * length)),
        ("channels", lambda: space.shrink(space.teacher, wrong)),
        ("kernels", lambda: space.shrink(space.teacher, right, wrong)),
    ):
        with pytest.raises(ValueError, match=rf"{name}: .*16.*got {length}"):
            call()


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan"), float("inf")])
@given(st.integers(0, 15))
@settings(max_examples=5, deadline=None)
def test_ratios_outside_their_range_are_refused(ratio: float, index: int) -> None:
    space = space_of("chain")
    wrong, right = [1.0] * 16, [1.0] * 16
    wrong[index] = ratio
    with pytest.raises(ValueError, match=rf"channels\[{index}\].*got {ratio}"):
        space.shrink(space.teacher, wrong)
    with pytest.raises(ValueError, match=rf"kernels\[{index}\].*got {ratio}"):
        space.shrink(space.teacher, right, wrong)


def test_an_unknown_init_is_refused() -> None:
    space = space_of("chain")
    with pytest.raises(ValueError, match=r"init.*'best'"):
        space.build(space.teacher, init="best")


# Shrinkage


def test_the_first_writer_of_a_group_decides() -> None:
    space = space_of("cifar_resnet")
    student = space.build(space.shrink(space.teacher, ratios(space, conv1=0.5, layer1__0__conv2=0.1, linear=0.1)))
    for name in ("conv1", "layer1.0.conv2", "layer1.1.conv2"):
        assert student.get_submodule(name).out_channels == 4
    assert student.get_submodule("layer2.0.shortcut.0").in_channels == 4
    assert student.get_submodule("layer1.0.conv1").out_channels == 8
    assert student.get_submodule("linear").out_features == 10


def test_shrinkage_is_relative_to_the_given_architecture() -> None:
    space = space_of("chain")
    half = ratios(space, _0=0.5, _3=0.5)
    student = space.build(space.shrink(space.shrink(space.teacher, half), half))
    assert student.get_submodule("0").out_channels == 2
    assert student.get_submodule("3").out_channels == 3
    tiny = space.shrink(space.teacher, [0.01] * 16)
    assert [w for w in tiny.widths if w not in (3, 10)] == [1] * 4


def test_shrink_after_remove_keeps_united_groups_equal() -> None:
    space = space_of("chain")
    arch = space.shrink(space.remove(space.teacher, without(space, "3")), ratios(space, _0=0.5, _3=0.1, _7=0.25))
    student = check_costs("chain", arch)
    widths = [student.get_submodule(name).out_channels for name in ("0", "7", "10")]
    assert widths == [4, 3, 16]
    assert student.get_submodule("7").in_channels == 4


def test_remove_after_shrink_takes_the_narrower_of_the_shrunk() -> None:
    space = space_of("chain")
    for first, expected in ((0.75, 3), (0.25, 2)):
        arch = space.shrink(space.teacher, ratios(space, _0=first, _3=0.25))
        student = check_costs("chain", space.remove(arch, without(space, "3")))
        assert student.get_submodule("0").out_channels == student.get_submodule("7").in_channels == expected


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, share=st.floats(0.02, 1.1), by=st.sampled_from(["params", "macs"]), grow=st.booleans())
def test_shrinking_within_limits_goes_just_as_far_as_needed(name: str, seed: int, share: float, by: str, grow: bool):
    space, rng = space_of(name), random.Random(seed)
    arch = removed(space, [rng.random() >= 0.1 for _ in space.layers])
    channels, kernels = ([rng.choice(RATIOS) for _ in space.layers] for _ in range(2))
    limit = int(share * getattr(arch, by))
    found = space.shrink_within(arch, channels, kernels, **{by: limit}, grow=grow)

    def scaled(factor: float) -> Architecture:
        return space.shrink(arch, [min(1.0, ratio * factor) for ratio in channels], kernels)

    largest = scaled(1 / min(channels) if grow else 1.0)
    narrowest = scaled(1e-9)
    assert found.keep == arch.keep
    assert found.kernels == largest.kernels
    if getattr(largest, by) <= limit:
        assert found == largest
    elif getattr(narrowest, by) > limit:
        assert found == narrowest
    else:
        assert getattr(found, by) <= limit
        grid = [scaled(10 ** (i / 500)) for i in range(-2000, 501) if grow or i <= 0]
        assert getattr(found, by) >= max(getattr(a, by) for a in grid if getattr(a, by) <= limit) * 0.98 - 100


def test_shrinking_within_no_limits_is_shrinking() -> None:
    space = space_of("chain")
    half = [0.5] * len(space.layers)
    assert space.shrink_within(space.teacher, half) == space.shrink(space.teacher, half)
    assert space.shrink_within(space.teacher, half, grow=True) == space.teacher
    both = space.shrink_within(space.teacher, half, params=space.teacher.params // 5, macs=space.teacher.macs // 5)
    assert both.params <= space.teacher.params // 5
    assert both.macs <= space.teacher.macs // 5
    for wrong in ([0.0, *half[1:]], [1.5, *half[1:]], half[1:]):
        for grow in (False, True):
            with pytest.raises(ValueError, match="channels"):
                space.shrink_within(space.teacher, wrong, params=1, grow=grow)


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
    saved = [
        9 * (4 * 8 + 4 * 16) + 4,
        9 * (8 * 8 + 8 * 32) + 8,
        9 * (16 * 16 + 16 * 4) + 16,
    ]
    expected = [(saved[0] / found) ** 0.5 for found in saved]
    assert space.tilted(0.5)[:3] == pytest.approx(expected)
    assert space.tilted(0.5)[3] == 1


@pytest.mark.parametrize("name", ["chain", "cifar_resnet", "bottlenecks", "resnext", "mobile", "dense"])
@given(SEEDS)
@settings(deadline=None, max_examples=10)
def test_remove_and_shrink_in_any_order_give_students_that_run(name: str, seed: int) -> None:
    space, rng = space_of(name), random.Random(seed)
    arch = drawn(space, seed)
    try:
        arch = space.remove(arch, [rng.random() < 0.8 for _ in space.layers])
    except DegenerateArchitecture:
        return
    check_costs(name, space.shrink(arch, [rng.choice(RATIOS) for _ in space.layers]))


def check_choices(space: ArchitectureSpace, arch: Architecture) -> None:
    count = len(space.layers)
    channels, kernels = space.choices(arch)
    assert len(channels) == len(kernels) == count
    ones = [1.0] * count
    for i, layer in enumerate(space.layers):
        flipped = [0.1 if j == i else 1.0 for j in range(count)]
        assert (space.shrink(arch, flipped, ones) != arch) == channels[i], layer.name
        assert (space.shrink(arch, ones, flipped) != arch) == kernels[i], layer.name


@pytest.mark.parametrize("name", [*SMALL, "resnet18", "mobilenet_v2"])
def test_choices_are_exactly_the_entries_that_change_something(name: str) -> None:
    check_choices(space_of(name), space_of(name).teacher)


@pytest.mark.parametrize("name", ["chain", "vgg_size", "cifar_resnet", "bottlenecks", "mobile"])
@given(SEEDS)
@settings(deadline=None, max_examples=10)
def test_choices_after_removal(name: str, seed: int) -> None:
    rng, space = random.Random(seed), space_of(name)
    check_choices(space, removed(space, [rng.random() < 0.6 for _ in space.layers]))


@pytest.mark.parametrize("name", ["chain", "cifar_resnet"])
def test_a_group_of_one_channel_leaves_no_choice(name: str) -> None:
    space = space_of(name)
    check_choices(space, space.shrink(space.teacher, [0.05] * len(space.layers)))


def test_a_map_that_a_removed_linear_layer_left_one_channel_leaves_no_choice() -> None:
    space = space_of("vgg_size")  # 20 hidden units hold one channel of 16 positions
    check_choices(space, space.remove(space.teacher, without(space, "fc1")))


def test_kernels_at_their_smallest_leave_no_choice() -> None:
    space = space_of("chain")
    ones = [1.0] * 16
    arch = space.shrink(space.teacher, ones, [0.1] * 16)
    assert not any(space.choices(arch)[1])
    check_choices(space, arch)


# Kernels


def conv_net(conv: nn.Conv2d) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(3, conv.in_channels, 1)
    return settle(nn.Sequential(first, conv, nn.ReLU(), nn.Conv2d(conv.out_channels, 10, 1)))  # type: ignore[return-value]


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
    ],
    ids=str,
)
def test_a_kernel_is_cropped_at_its_centre_and_padding_follows(
    arguments: dict, ratio: float, kernel: int, padding: int | str, mode: str
) -> None:
    net = conv_net(nn.Conv2d(8, 8, **arguments, padding_mode=mode))
    space = ArchitectureSpace(net, images())
    arch = space.shrink(space.teacher, [1.0] * len(space.layers), [ratio] * len(space.layers))
    student = space.build(arch)
    before, after = net[1], student.get_submodule("1")
    assert after.kernel_size == (kernel, kernel)
    assert after.padding == (padding if isinstance(padding, str) else (padding, padding))
    cut = (before.kernel_size[0] - kernel) // 2
    end = before.kernel_size[0] - cut
    assert torch.equal(after.weight, before.weight[:, :, cut:end, cut:end])
    assert student(images()).shape == net(images()).shape
    assert arch.params == sum(p.numel() for p in student.parameters())
    reference = nn.Conv2d(8, 8, **{**arguments, "kernel_size": kernel, "padding": padding}, padding_mode=mode)
    reference.load_state_dict(after.state_dict())
    x = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(after(x), reference(x))


def test_a_kernel_crops_each_dimension_for_itself() -> None:
    space = ArchitectureSpace(conv_net(nn.Conv2d(8, 8, (1, 7), padding=(0, 3))), images())
    student = space.build(space.shrink(space.teacher, [1.0] * 4, [0.5] * 4))
    assert student.get_submodule("1").kernel_size == (1, 3)
    assert student.get_submodule("1").padding == (0, 1)
    assert student(images()).shape == (2, 10, 16, 16)


def test_kernels_are_left_alone_unless_asked_for() -> None:
    space = space_of("chain")
    assert space.shrink(space.teacher, [0.5] * 16).kernels == space.teacher.kernels
    arch = space.shrink(space.teacher, [1.0] * 16, ratios(space, _3=0.6))
    assert [i for i, (a, b) in enumerate(zip(arch.kernels, space.teacher.kernels, strict=True)) if a != b] == [3]
    assert arch.widths == space.teacher.widths


def test_building_the_space_of_a_student() -> None:
    """Stage 2's space is made from stage 1's student."""
    space = ArchitectureSpace(make("cifar_resnet"), images())
    arch = space.shrink(space.remove(space.teacher, without(space, "layer1.0.conv1")), [0.5] * len(space.layers))
    student = space.build(arch)
    second = ArchitectureSpace(student, images())
    assert second.teacher.params == arch.params
    assert second.teacher.macs == arch.macs
    assert torch.equal(second.build(second.teacher)(images()), student(images()))
    smaller = second.shrink(second.teacher, [0.5] * len(second.layers))
    assert second.build(smaller)(images()).shape == (2, 10)


def test_a_copied_space_builds_the_same_students():
    space = space_of("cifar_resnet")
    arch = space.shrink(space.teacher, [0.5] * len(space.layers))
    x = images()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(space).build(arch)(x), space.build(arch)(x))


class ScaledTwice(nn.Module):
    """A parameter that scales channels at two places is one parameter: it stays where it is, at full width."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.scale, self.fc = nn.Parameter(torch.rand(6, 1, 1)), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc((self.second(self.first(x) * self.scale) * self.scale).mean((2, 3)))


def test_a_scale_read_twice_is_left_alone():
    teacher, x = ScaledTwice().eval(), torch.randn(2, 3, 8, 8)
    space = ArchitectureSpace(teacher, x)
    assert sum(p.numel() for p in teacher.parameters()) == space.teacher.params
    with torch.no_grad():
        assert torch.equal(space.build(space.teacher)(x), teacher(x))
        assert space.build(space.shrink(space.teacher, [0.5] * len(space.layers)))(x).shape == (2, 4)


@pytest.mark.parametrize("name", [*SMALL, *LARGE, "regnet_y_800mf"])
def test_a_removable_layer_can_be_removed_alone(name):
    space = space_of(name)
    for i, layer in enumerate(space.layers):
        if layer.removable:
            space.remove(space.teacher, [k != i for k in range(len(space.layers))])


# Hardware rounding


@pytest.mark.parametrize("name", ["chain", "cifar_resnet", "resnext", "mobile", "dense", "shuffled", "resnet18"])
@pytest.mark.parametrize("step", [2, 4, 8])
def test_rounded_widths_are_multiples_or_the_teachers_own(name: str, step: int) -> None:
    space = ArchitectureSpace(teacher_of(name), images(name), round_to=step)
    count = len(space.layers)
    whole = {layer.name: layer.out_channels for layer in space.layers}
    for ratio in (0.1, 0.3, 0.5, 0.8):
        arch = space.shrink(space.teacher, [ratio] * count)
        student = space.build(arch)
        chosen = space.choices(space.teacher)[0]
        for layer, chooses in zip(space.layers, chosen, strict=True):
            if layer.kind in ("conv", "linear") and not chooses:
                continue
            module = student.get_submodule(layer.name)
            width = getattr(module, "out_channels", getattr(module, "out_features", None))
            assert width is None or width % step == 0 or width == whole[layer.name], layer.name
            assert not chooses or ratio > 0.1 or width < whole[layer.name]
        student(images(name))
        fine = space.unrounded().shrink(space.teacher, [ratio] * count)
        assert fine == space_of(name).shrink(space_of(name).teacher, [ratio] * count)
    assert space.shrink(space.teacher, [1.0] * count) == space.teacher


def test_a_width_below_the_step_is_no_choice() -> None:
    space = ArchitectureSpace(teacher_of("chain"), images(), round_to=8)
    chosen = [layer.name for layer, can in zip(space.layers, space.choices(space.teacher)[0], strict=True) if can]
    assert chosen == [layer.name for layer in space.layers if layer.kind == "conv" and layer.out_channels > 8]


def test_a_step_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="round_to: expected at least 1, got 0"):
        ArchitectureSpace(teacher_of("chain"), images(), round_to=0)
