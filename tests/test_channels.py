"""Whatever people write: channels are followed, or held and said to be, and every student is what was foreseen."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import networks
from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.student import slots_of
from networks import Tail, chain, images, settle
from written import WRITTEN, conv


def net_of(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return settle(WRITTEN[name].make())


SPACES: dict[str, ArchitectureSpace] = {}


def space_of(name: str) -> ArchitectureSpace:
    if name not in SPACES:
        SPACES[name] = ArchitectureSpace(net_of(name), images())
    return SPACES[name]


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
    space, rng = space_of(name), np.random.default_rng(seed)
    keep = (rng.random(len(space.layers)) >= 0.2).tolist()
    channels, kernels = (rng.uniform(0.05, 1, len(space.layers)).tolist() for _ in range(2))
    try:
        arch = space.shrink(space.remove(space.teacher, keep), channels, kernels)
    except DegenerateArchitecture:
        return
    student = space.build(arch)
    assert sum(p.numel() for p in student.parameters()) == arch.params
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        student(images(count=1))
    assert counter.get_total_flops() == 2 * arch.macs
    student.train()(images()).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("name", [name for name, case in WRITTEN.items() if case.exact])
def test_dead_channels_are_dropped_without_loss(name: str) -> None:
    teacher, rng = net_of(name), np.random.default_rng(0)
    traced = ArchitectureSpace(teacher, images())._traced
    left = [1.0] * len(traced.layers)
    for g, units in enumerate(traced.units):
        spare = len(units) // 2
        if traced.pinned[g] or not traced.writers[g] or spare == 0:
            continue
        left[traced.writers[g][0]] = 1 - spare / len(units)
        dead = rng.choice(units, spare, replace=False)
        for slot in slots_of(traced):
            if slot.is_parameter:
                written = slot.columns if slot.transposed and slot.columns is not None else slot.rows
                weight = slot.tensor if written == slot.rows else slot.tensor.transpose(0, 1)
                weight[torch.from_numpy(np.isin(traced.axes[written], dead))] = 0
    space = ArchitectureSpace(traced.module, images())
    with torch.no_grad():
        expected, got = traced.module(images()), space.build(space.shrink(space.teacher, left))(images())
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


# Other ranks, dtypes, outputs


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_example_takes_the_teachers_dtype(dtype: torch.dtype) -> None:
    net = settle(chain()).to(dtype)
    space = ArchitectureSpace(net, images(), calibration=images(count=32))
    student = space.build(space.shrink(space.teacher, [0.5] * len(space.layers)), "fitted")
    assert {p.dtype for p in student.parameters()} == {dtype}
    assert student(images().to(dtype)).isfinite().all()


class ManyOutputs(Tail):
    """Logits and what else was at hand."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv = kind, conv(8, 12)

    def forward(self, x: Tensor) -> object:
        features = self.stem(x)
        other = self.conv(features)
        logits = self.fc(features.mean((2, 3)))
        if self.kind == "dict":
            return {"features": features, "logits": logits}
        return (logits, other) if self.kind == "tuple" else [(logits, features)]


@pytest.mark.parametrize("kind", ["tuple", "dict", "nested"])
def test_of_several_outputs_students_give_the_logits(kind: str) -> None:
    net = ManyOutputs(kind).eval()
    space = ArchitectureSpace(net, images())
    output: object = net(images())
    while not isinstance(output, Tensor):
        output = output["logits"] if isinstance(output, dict) else output[0]  # type: ignore[index]
    assert torch.equal(space.build(space.teacher)(images()), output)
    assert "conv" not in [layer.name for layer in space.layers]
    assert sum("conv" in warning for warning in space.warnings) == 1  # nothing that remains uses it


def test_auxiliary_heads_are_dropped_and_said_once() -> None:
    net = torchvision.models.googlenet(num_classes=10, aux_logits=True, init_weights=False).eval()
    space = ArchitectureSpace(net, torch.randn(1, 3, 64, 64))
    (warning,) = space.warnings
    assert "aux1" in warning
    assert "aux2" in warning
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(space.build(space.teacher)(x), net(x))


def test_lazy_modules_are_initialised_by_the_example() -> None:
    net = nn.Sequential(
        nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10)
    )
    space = ArchitectureSpace(net, images())
    assert [layer.kind for layer in space.layers] == ["conv", "norm", "pool", "reshape", "linear"]
    assert net(images()).shape == (2, 10)


@pytest.mark.parametrize("name", ["weight_norm", "weight_norm_by_hook", "pruned", "spectral_norm"])
def test_computed_weights_are_parameters_of_students_and_left_alone_in_the_teacher(name: str) -> None:
    net = net_of(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    space = ArchitectureSpace(net, images())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert before.keys() == net.state_dict().keys()
    assert set(space.build(space.teacher).operation.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("name", ["channel_last", "shuffled", *WRITTEN])
def test_a_students_own_space_is_no_narrower(name: str) -> None:
    """Stage 2 searches the space of stage 1's student."""
    space = space_of(name) if name in WRITTEN else networks.space_of(name)
    again = ArchitectureSpace(space.build(space.teacher), images())
    assert again.teacher.params == space.teacher.params
    assert again.choices(again.teacher) == space.choices(space.teacher)
    assert again.layers == space.layers


class SizeByNumber(Tail):
    """A size whose place is taken by another that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = conv(8, 12), conv(12, 8)

    def body(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.last(x.reshape(x.shape[0], 12, -1).view(x.shape))


def test_a_size_written_as_a_number_is_held_where_it_cannot_follow() -> None:
    space = ArchitectureSpace(settle(SizeByNumber()), images())
    (warning,) = space.warnings
    assert "has sizes of its own" in warning
    student = space.build(space.shrink(space.teacher, [0.5] * len(space.layers)))
    assert (student.inner.in_channels, student.inner.out_channels) == (4, 12)
    assert student(images()).shape == (2, 10)
