"""The layers of a teacher: kinds, sizes, skips, features, and which of them are fixed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from n2n_fast.networks.kinds import KINDS, crop, smallest_kernel
from n2n_fast.networks.layers import Layer
from n2n_fast.networks.space import ArchitectureSpace
from networks import images, space_of


def layers_of(name: str) -> dict[str, Layer]:
    return {layer.name: layer for layer in space_of(name).layers}


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
    depthwise = [name for name, layer in layers_of("mobile").items() if layer.kind == "depthwise"]
    assert depthwise == [f"{i}.depthwise.0" for i in (3, 4, 5)]


STRIDED = [f"layer{i}.0.{name}" for i in (2, 3, 4) for name in ("conv1", "downsample.0")]


@pytest.mark.parametrize(
    ("net", "first", "last", "others"),
    [
        ("chain", "0", "15", {"6": "resolution", "13": "resolution", "14": "reshapes"}),
        ("vgg_size", "conv1", "fc2", {"drop": "changes nothing"}),
        ("cifar_resnet", "conv1", "linear", dict.fromkeys(["layer2.0.conv1", "layer2.0.shortcut.0"], "resolution")),
        ("resnet18", "conv1", "fc", dict.fromkeys(["maxpool", "avgpool", *STRIDED], "resolution")),
    ],
)
def test_exactly_the_fixed_layers_are_not_removable_and_say_why(
    net: str, first: str, last: str, others: dict[str, str]
) -> None:
    layers, notes = layers_of(net), {first: "first layer", last: "classifier", **others}
    fixed = {name: layer.note for name, layer in layers.items() if not layer.removable}
    assert fixed.keys() == notes.keys()
    assert all(note in fixed[name] for name, note in notes.items())
    assert not any(layer.note for layer in layers.values() if layer.removable)


def test_a_softmax_at_the_end_does_not_hide_the_classifier() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10), nn.Softmax(1))
    assert ArchitectureSpace(net, images()).layers[3].note == "classifier"


def test_what_shrinks_is_what_first_writes_a_group_or_has_a_kernel_to_crop() -> None:
    shrinkable = {name for name, layer in layers_of("cifar_resnet").items() if layer.shrinkable}
    convs = {"conv1"} | {f"layer{i}.{j}.conv{k}" for i in (1, 2) for j in (0, 1) for k in (1, 2)}
    assert shrinkable == convs  # the 1x1 shortcut writes a group whose width layer2.0.conv2 decides


def test_skips_of_a_basic_block() -> None:
    skips = {name: (layer.skip_start, layer.skip_end) for name, layer in layers_of("resnet18").items()}
    block = ("conv1", "bn1", "relu", "conv2", "bn2")
    assert [skips[f"layer1.0.{name}"] for name in block] == [(i, 6 - i) for i in range(1, 6)]
    block += ("downsample.0", "downsample.1")
    assert [skips[f"layer2.0.{name}"] for name in block] == [(i, 8 - i) for i in range(1, 8)]
    assert {skips[name] for name in ("conv1", "bn1", "relu", "maxpool", "avgpool", "fc")} == {(0, 0)}


@pytest.mark.parametrize("net", ["chain", "mobile", "resnet50"])
def test_features_are_one_kind_and_sizes_near_the_unit_interval(net: str) -> None:
    space = space_of(net)
    x = space.features()
    assert x.shape == (len(space.layers), len(KINDS) + 6)
    assert x.dtype == torch.float32
    assert x.min() >= 0
    assert x.max() <= 1.2
    assert torch.equal(x[:, : len(KINDS)].sum(1), torch.ones(len(x)))


def test_features_tell_layers_apart_by_skip_and_width() -> None:
    rows = dict(zip(layers_of("resnet18"), space_of("resnet18").features(), strict=True))
    assert not torch.equal(rows["layer1.0.conv1"], rows["layer1.0.conv2"])
    assert not torch.equal(rows["layer2.0.conv1"], rows["layer3.0.conv1"])
    assert torch.equal(rows["layer1.0.conv1"], rows["layer1.1.conv1"])
    wide = nn.Sequential(*(nn.Conv2d(a, b, 1) for a, b in ((3, 256), (256, 512), (512, 1024), (1024, 10))))
    channels = ArchitectureSpace(wide, images()).features()[:3, len(KINDS) + 3]
    assert (channels.diff() > 0.05).all()


@given(st.integers(1, 11), st.integers(0, 6), st.integers(1, 3), st.floats(0.01, 1))
@settings(deadline=None)
def test_a_cropped_kernel_is_centred_and_keeps_the_output_size(k: int, padding: int, dilation: int, r: float) -> None:
    (small,) = {*smallest_kernel(nn.Conv2d(1, 1, k, padding=padding, dilation=dilation))}
    (new,) = {*crop((k, k), (small, small), r)}
    assert small <= new <= k
    assert (k - new) % 2 == 0
    assert padding - dilation * (k - new) // 2 >= 0
    assert k % 2 or new == k
    assert k * r - 1.5 <= new <= max(small, k * r + 0.5)


@pytest.mark.parametrize(
    ("module", "expected"),
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
    ids=str,
)
def test_smallest_kernel(module: nn.Module, expected: tuple[int, ...]) -> None:
    assert smallest_kernel(module) == expected
