"""Tracing a teacher: what is refused, what is taken, and of several outputs which."""

import contextlib
import re
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

from n2n_fast.files.errors import BadInput, DeviceFault
from n2n_fast.networks import moves
from n2n_fast.networks.space import ArchitectureSpace
from networks import Branching, NotUnderstood, Tail, images, make, settle, teacher_of
from written import conv, net_of


def meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())


class Counter(Tail):
    """A forward that computes something else each time."""

    def __init__(self, each_time: float = 1.0) -> None:
        super().__init__()
        self.calls, self.each_time = 0, each_time

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + self.each_time * self.calls)


REFUSED: list[tuple[Any, Any, dict[str, Any], str]] = [
    (Branching, images(), {}, r"networks\.py:\d+.*name 'branch' as `leaf`"),
    (Branching, images(), {"leaf": ["brunch"]}, "no submodule 'brunch'"),
    (meta, images(), {}, "meta device"),
    (Counter, images(), {}, "hidden state"),
    (lambda: teacher_of("chain"), torch.zeros(1, 1, 16, 16), {}, "1x16x16"),
    *((lambda: teacher_of("vgg11_bn"), torch.zeros(1, 3, n, n), {}, f"3x{n}x{n}") for n in (1, 8, 31)),
    *((lambda: teacher_of("chain"), torch.zeros(shape), {}, rf"example_input.* got {re.escape(str(shape))}")
      for shape in ((3, 16), (16,), (0, 3, 16, 16))),
]  # fmt: skip


@pytest.mark.parametrize(("teacher", "example", "options", "text"), REFUSED)
def test_a_teacher_that_cannot_be_traced_is_refused_in_one_line(
    teacher: Any, example: Tensor, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(BadInput, match=text) as caught:
        ArchitectureSpace(teacher(), example, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("each_time", "taken"), [(1e-5, True), (1e-2, False)])
def test_rounding_is_not_hidden_state(each_time: float, taken: bool) -> None:
    """On a GPU the same operations do not always give the same last digits."""
    with contextlib.nullcontext() if taken else pytest.raises(BadInput, match="hidden state"):
        ArchitectureSpace(Counter(each_time), images())


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_example_takes_the_teachers_dtype(dtype: torch.dtype) -> None:
    net = make("chain").to(dtype)
    space = ArchitectureSpace(net, images(), calibration=images(count=32))
    student = space.build(space.shrink(space.teacher, [0.5] * len(space.layers)), "fitted")
    assert {p.dtype for p in student.parameters()} == {dtype}
    assert student(images().to(dtype)).isfinite().all()


class ManyOutputs(Tail):
    """Logits and what else was at hand."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv = kind, conv(8, 12)

    def forward(self, x: Tensor) -> Any:
        features = self.stem(x)
        other, logits = self.conv(features), self.fc(features.mean((2, 3)))
        return {
            "dict": {"features": features, "logits": logits},
            "tuple": (logits, other),
            "nested": [(logits, features)],
        }[self.kind]


@pytest.mark.parametrize(("kind", "place"), [("tuple", [0]), ("dict", ["logits"]), ("nested", [0, 0])])
def test_of_several_outputs_students_give_the_logits(kind: str, place: list[Any]) -> None:
    net = ManyOutputs(kind).eval()
    space = ArchitectureSpace(net, images())
    logits = net(images())
    for key in place:
        logits = logits[key]
    assert torch.equal(space.build(space.teacher)(images()), logits)
    assert "conv" not in [layer.name for layer in space.layers]
    assert sum("conv" in warning for warning in space.warnings) == 1  # nothing that remains uses it


def test_auxiliary_heads_are_dropped_and_said_once() -> None:
    net = torchvision.models.googlenet(num_classes=10, aux_logits=True, init_weights=False).eval()
    space, x = ArchitectureSpace(net, torch.randn(1, 3, 64, 64)), torch.randn(2, 3, 64, 64)
    assert ["aux1" in warning and "aux2" in warning for warning in space.warnings] == [True]
    with torch.no_grad():
        assert torch.equal(space.build(space.teacher)(x), net(x))


def test_lazy_modules_are_initialised_by_the_example() -> None:
    net = nn.Sequential(
        nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10)
    )
    assert [layer.kind for layer in ArchitectureSpace(net, images()).layers] == [
        *("conv", "norm", "pool", "reshape", "linear")
    ]
    assert net(images()).shape == (2, 10)


@pytest.mark.parametrize("name", ["weight_norm", "weight_norm_by_hook", "pruned", "spectral_norm"])
def test_computed_weights_are_parameters_of_students_and_left_alone_in_the_teacher(name: str) -> None:
    net = net_of(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    space = ArchitectureSpace(net, images())
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert set(space.build(space.teacher).operation.state_dict()) == {"weight", "bias"}
