"""Tracing a teacher: its layers, their features, the cost of architectures, and what is refused."""

import contextlib
import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from n2n_fast.files.errors import BadInput, DegenerateArchitecture, DeviceFault
from n2n_fast.networks import moves
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.kinds import KINDS, crop, smallest_kernel
from n2n_fast.networks.layers import Layer
from n2n_fast.networks.space import ArchitectureSpace
from networks import Branching, Gate, NotUnderstood, Tail, images, ratios, settle, space_of, teacher_of, without


def layers_of(name: str) -> dict[str, Layer]:
    return {layer.name: layer for layer in space_of(name).layers}


# Layers


def test_layers_come_in_the_order_of_their_first_call_with_their_sizes() -> None:
    layers = layers_of("chain")
    assert list(layers) == [str(i) for i in range(16)]
    assert [layer.kind for layer in layers.values()] == [
        *("conv", "norm", "activation") * 2,
        *("pool", "conv", "norm", "activation", "conv", "norm", "activation", "pool", "reshape", "linear"),
    ]
    conv = layers["3"]
    assert (conv.kernel_size, conv.stride, conv.padding, conv.out_channels) == ((5, 5), (1, 1), (2, 2), 12)
    assert layers["6"].stride == (2, 2)
    assert layers["15"].out_channels == 10


def test_depthwise_convolutions_are_a_kind_of_their_own() -> None:
    layers = layers_of("mobile")
    assert {name for name, layer in layers.items() if layer.kind == "depthwise"} == {
        f"{i}.depthwise.0" for i in (3, 4, 5)
    }


@pytest.mark.parametrize(
    ("net", "notes"),
    [
        ("chain", {"0": "first layer", "6": "resolution", "13": "resolution", "14": "reshapes", "15": "classifier"}),
        ("vgg_size", {"conv1": "first layer", "drop": "changes nothing", "fc2": "classifier"}),
        (
            "cifar_resnet",
            {
                "conv1": "first layer",
                "layer2.0.conv1": "resolution",
                "layer2.0.shortcut.0": "resolution",
                "linear": "classifier",
            },
        ),
        (
            "resnet18",
            {
                "conv1": "first layer",
                "maxpool": "resolution",
                "avgpool": "resolution",
                "fc": "classifier",
                **{f"layer{i}.0.conv1": "resolution" for i in (2, 3, 4)},
                **{f"layer{i}.0.downsample.0": "resolution" for i in (2, 3, 4)},
            },
        ),
    ],
)
def test_exactly_the_fixed_layers_are_not_removable_and_say_why(net: str, notes: dict[str, str]) -> None:
    layers = layers_of(net)
    fixed = {name: layer.note for name, layer in layers.items() if not layer.removable}
    assert fixed.keys() == notes.keys()
    for name, note in notes.items():
        assert note in fixed[name]
    assert not any(layer.note for layer in layers.values() if layer.removable)


@pytest.mark.parametrize("tail", [nn.LogSoftmax(1), nn.Softmax(1)])
def test_a_softmax_at_the_end_does_not_hide_the_classifier(tail: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10), tail)
    space = ArchitectureSpace(net, images())
    layer = {layer.name: layer for layer in space.layers}["3"]
    assert not layer.removable
    assert layer.note == "classifier"


def test_what_shrinks_is_what_first_writes_a_group_or_has_a_kernel_to_crop() -> None:
    shrinkable = {name for name, layer in layers_of("cifar_resnet").items() if layer.shrinkable}
    convs = {"conv1"} | {f"layer{i}.{j}.conv{k}" for i in (1, 2) for j in (0, 1) for k in (1, 2)}
    assert shrinkable == convs  # the 1x1 shortcut writes a group whose width layer2.0.conv2 decides


def test_skips_of_a_basic_block() -> None:
    layers = layers_of("resnet18")
    block = ("conv1", "bn1", "relu", "conv2", "bn2")
    for i, part in enumerate(block):
        layer = layers[f"layer1.0.{part}"]
        assert (layer.skip_start, layer.skip_end) == (i + 1, len(block) - i), part
    for i, part in enumerate((*block, "downsample.0", "downsample.1")):
        layer = layers[f"layer2.0.{part}"]
        assert (layer.skip_start, layer.skip_end) == (i + 1, 7 - i), part
    for name in ("conv1", "bn1", "relu", "maxpool", "avgpool", "fc"):
        assert (layers[name].skip_start, layers[name].skip_end) == (0, 0), name


def test_a_chain_has_no_skips() -> None:
    assert all((layer.skip_start, layer.skip_end) == (0, 0) for layer in layers_of("chain").values())


@pytest.mark.parametrize("net", ["chain", "cifar_resnet", "mobile", "resnet18", "resnet50", "vgg11_bn"])
def test_features_are_finite_and_near_the_unit_interval(net: str) -> None:
    space = space_of(net)
    x = space.features()
    assert x.shape == (len(space.layers), len(KINDS) + 6)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert x.min() >= 0
    assert x.max() <= 1.2
    assert torch.equal(x[:, : len(KINDS)].sum(1), torch.ones(len(x)))


def test_wide_layers_do_not_saturate_the_features() -> None:
    net = nn.Sequential(*(nn.Conv2d(a, b, 1) for a, b in ((3, 256), (256, 512), (512, 1024), (1024, 10))))
    channels = ArchitectureSpace(net, images()).features()[:3, len(KINDS) + 3]
    assert (channels.diff() > 0.05).all()
    assert channels[1] < 0.9


def test_features_tell_layers_apart() -> None:
    space = space_of("resnet18")
    rows = dict(zip((layer.name for layer in space.layers), space.features(), strict=True))
    assert not torch.equal(rows["layer1.0.conv1"], rows["layer1.0.conv2"])  # by the skip
    assert not torch.equal(rows["layer2.0.conv1"], rows["layer3.0.conv1"])  # by the width
    assert torch.equal(rows["layer1.0.conv1"], rows["layer1.1.conv1"])


# Kernels


@given(st.integers(1, 11), st.integers(0, 6), st.integers(1, 3), st.floats(0.01, 1))
@settings(deadline=None)
def test_a_cropped_kernel_is_centred_and_keeps_the_output_size(k: int, padding: int, dilation: int, r: float) -> None:
    (small,) = {*smallest_kernel(nn.Conv2d(1, 1, k, padding=padding, dilation=dilation))}
    (new,) = {*crop((k, k), (small, small), r)}
    assert small <= new <= k
    assert (k - new) % 2 == 0
    assert padding - dilation * (k - new) // 2 >= 0
    assert k % 2 or new == k
    assert new >= k * r - 1.5
    assert new <= max(small, k * r + 0.5)


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(1, 1, 3, padding=1), (1, 1)),
        (nn.Conv2d(1, 1, 3), (3, 3)),
        (nn.Conv2d(1, 1, 5, padding=1), (3, 3)),
        (nn.Conv2d(1, 1, 3, padding=2, dilation=2), (1, 1)),
        (nn.Conv2d(1, 1, 3, padding=1, dilation=2), (3, 3)),
        (nn.Conv2d(1, 1, (1, 7), padding=(0, 3)), (1, 1)),
        (nn.Conv2d(1, 1, 5, padding="same"), (1, 1)),
        (nn.Conv2d(1, 1, 5, padding="valid"), (5, 5)),
        (nn.Conv2d(1, 1, 4, padding=2), (4, 4)),
        (nn.MaxPool2d(3, 1, 1), (3, 3)),
    ],
)
def test_smallest_kernel(conv: nn.Module, expected: tuple[int, ...]) -> None:
    assert smallest_kernel(conv) == expected


# Architecture


def an_architecture(**changes: Any) -> Architecture:
    fields = {"keep": (True, False), "widths": (3, 8), "kernels": ((3, 3), ()), "params": 7, "macs": 9}
    return Architecture(**{**fields, **changes})


def test_an_architecture_is_frozen_and_hashable() -> None:
    arch = an_architecture()
    with pytest.raises(dataclasses.FrozenInstanceError):
        arch.params = 1  # type: ignore[misc]
    assert {arch: 1}[an_architecture()] == 1
    others = [an_architecture(**c) for c in ({"keep": (True, True)}, {"widths": (3, 7)}, {"kernels": ((1, 1), ())})]
    assert len({arch, *others}) == 4
    assert len({a.key for a in (arch, *others)}) == 4


def test_the_key_is_stable() -> None:
    assert an_architecture().key == an_architecture(params=0).key == "2ddf81d4d725"


@given(
    st.lists(st.booleans()),
    st.lists(st.integers(1, 10**6)),
    st.lists(st.lists(st.integers(1, 11), max_size=3)),
    st.integers(0, 10**12),
)
def test_json_round_trip(keep: list[bool], widths: list[int], kernels: list[list[int]], params: int) -> None:
    arch = Architecture(tuple(keep), tuple(widths), tuple(map(tuple, kernels)), params, params + 1)
    text = arch.to_json()
    assert "\n" not in text
    read = Architecture.from_json(text)
    assert read == arch
    assert (read.params, read.macs, read.key, hash(read)) == (arch.params, arch.macs, arch.key, hash(arch))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.text() | JSON.map(json.dumps))
def test_garbage_is_no_architecture(text: str) -> None:
    with pytest.raises(BadInput):
        Architecture.from_json(text)


@pytest.mark.parametrize("field", ["keep", "widths", "kernels", "params", "macs"])
@pytest.mark.parametrize("value", ["missing", None, "yes", [["x"]]])
def test_an_architecture_with_a_broken_field_is_refused(field: str, value: Any) -> None:
    raw = json.loads(an_architecture().to_json())
    raw[field] = value
    if value == "missing":
        del raw[field]
    with pytest.raises(BadInput):
        Architecture.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    "change",
    [
        {"widths": [3, -8]},
        {"widths": [3, 1.5]},
        {"widths": [3, float("inf")]},
        {"widths": {}},
        {"kernels": [[0, 3], []]},
        {"params": float("inf")},
        {"params": 1.5},
        {"macs": float("nan")},
    ],
    ids=str,
)
def test_an_architecture_with_impossible_sizes_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Architecture.from_json(json.dumps({**json.loads(an_architecture().to_json()), **change}))


# What is refused, and what is only pinned


def test_an_untraceable_forward_is_refused_by_file_and_line() -> None:
    with pytest.raises(BadInput, match=r"networks\.py:\d+.*name 'branch' as `leaf`") as caught:
        ArchitectureSpace(Branching(), images())
    assert "\n" not in str(caught.value)


def test_a_teacher_without_weights_is_refused() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    with pytest.raises(BadInput, match="meta device"):
        ArchitectureSpace(net, images())


def test_a_leaf_that_is_not_there_is_refused() -> None:
    with pytest.raises(BadInput, match="no submodule 'brunch'"):
        ArchitectureSpace(Branching(), images(), leaf=["brunch"])


def test_an_untraceable_submodule_can_be_a_leaf() -> None:
    net = Branching().eval()
    space = ArchitectureSpace(net, images(), leaf=["branch"])
    assert "branch" in [layer.name for layer in space.layers]
    assert any("branch" in warning for warning in space.warnings)
    for x in (images(), -images()):
        assert torch.equal(space.build(space.teacher)(x), net(x))


@pytest.mark.parametrize("size", [1, 8, 31])
def test_images_too_small_are_refused_in_one_line(size: int) -> None:
    with pytest.raises(BadInput, match=f"3x{size}x{size}") as caught:
        ArchitectureSpace(teacher_of("vgg11_bn"), torch.randn(1, 3, size, size))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 16), (16,), (0, 3, 16, 16)])
def test_an_example_that_is_no_batch_of_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="example_input") as caught:
        ArchitectureSpace(teacher_of("chain"), torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_images_with_other_channels_are_refused() -> None:
    with pytest.raises(BadInput, match="1x16x16"):
        ArchitectureSpace(teacher_of("chain"), torch.zeros(1, 1, 16, 16))


class Counter(Tail):
    """A forward that computes something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0.0

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_a_forward_with_hidden_state_is_refused() -> None:
    with pytest.raises(BadInput, match="hidden state"):
        ArchitectureSpace(Counter(), images())


@pytest.mark.parametrize(("each_time", "taken"), [(1e-5, True), (1e-2, False)])
def test_rounding_is_not_hidden_state(each_time: float, taken: bool) -> None:
    """On a GPU the same operations do not always give the same last digits."""

    class Drifting(Counter):
        def body(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * (1 + each_time * self.calls)

    with contextlib.nullcontext() if taken else pytest.raises(BadInput, match="hidden state"):
        ArchitectureSpace(Drifting(), images())


@pytest.mark.parametrize(("owner", "name"), [(fx.Tracer, "trace"), (NotUnderstood, "__call__"), (moves, "moved")])
def test_a_lack_of_memory_is_not_taken_for_a_teacher_that_is_not_understood(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    net = settle(NotUnderstood("einsum"))
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(DeviceFault, match="--batch-size"):
        ArchitectureSpace(net, images())


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
    arch = space.remove(space.teacher, without(space, "free"))  # its 12 channels meet the 8 pinned ones
    student = space.build(arch)
    assert student.last.in_channels == 8
    assert student(images()).shape == (2, 10)


@pytest.mark.parametrize("operation", ["cumsum", "einsum"])
def test_what_is_pinned_cannot_meet_what_is_narrower(operation: str) -> None:
    space = ArchitectureSpace(settle(NotUnderstood(operation)), images())
    with pytest.raises(DegenerateArchitecture):
        space.remove(space.shrink(space.teacher, ratios(space, free=0.5)), without(space, "free"))


def test_nothing_is_warned_about_where_all_is_understood() -> None:
    for name in ("chain", "vgg_size", "cifar_resnet", "bottlenecks", "mobile", "dense", "gated"):
        assert space_of(name).warnings == (), name


def test_a_gate_shrinks_with_what_it_gates() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 3), Gate(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))
    space = ArchitectureSpace(net, images())
    student = space.build(space.shrink(space.teacher, [0.5] * len(space.layers)))
    convs = {name: (m.in_channels, m.out_channels) for name, m in student.named_modules() if isinstance(m, nn.Conv2d)}
    assert convs == {"0": (3, 4), "1.down": (4, 2), "1.up": (2, 4)}
