"""Students: equal to the teacher where nothing or only dead channels are cut, and independent of everything else."""

import copy
import io
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.student import independent_copy
from networks import (
    LARGE,
    SMALL,
    ReadAgainTwice,
    images,
    make,
    ratios,
    settle,
    space_of,
    teacher_of,
    without,
)
from spaces import apart, even, half, outputs, spoil


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_a_step(net: nn.Module) -> None:
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(images()).square().sum().backward()
    optimizer.step()
    net.eval()


# Nothing cut


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_with_everything_kept_outputs_equal_the_teachers_to_the_last_bit(name: str) -> None:
    space, teacher = space_of(name), teacher_of(name)
    student = space.build(even(space, 1.0))
    assert not student.training
    assert equal(student.state_dict(), teacher.state_dict()) or name == "channel_last"  # its scale becomes a layer
    assert torch.equal(outputs(student, images(name)), outputs(teacher, images(name)))


@pytest.mark.parametrize(
    ("make_net", "dtype"), [(ReadAgainTwice, torch.float32), (lambda: make("cifar_resnet"), torch.float64)]
)
def test_in_place_activations_and_other_dtypes_make_no_difference(make_net, dtype: torch.dtype) -> None:
    """Both calls of a shared in-place relu change their input for later readers."""
    net, x = settle(make_net()).to(dtype), images().to(dtype)
    space = ArchitectureSpace(net, x)
    student = space.build(space.teacher)
    assert {p.dtype for p in student.parameters()} == {dtype}
    assert torch.equal(outputs(student, x), outputs(net, x))


# Channels cut


@pytest.mark.parametrize("name", [*(name for name in SMALL if name != "channel_last"), "resnet18"])
@given(share=st.floats(0.1, 0.9), seed=st.integers(0, 10**9))
@settings(deadline=None, max_examples=6)
def test_dead_channels_can_be_cut_without_a_trace(name: str, share: float, seed: int) -> None:
    net = copy.deepcopy(teacher_of(name))
    left = spoil(net, "dead", share, seed, name)
    space = ArchitectureSpace(net, images(name))
    arch = space.shrink(space.teacher, left)
    assert arch.params < space.teacher.params or min(left) == 1
    assert apart(space.build(arch), net, images(name, 4)) < 1e-5


def test_a_channel_that_nobody_reads_is_cut_first() -> None:
    net = make("chain")
    net[3].weight.data[:, [2, 5]] = 0
    space = ArchitectureSpace(net, images())
    assert apart(space.build(space.shrink(space.teacher, ratios(space, _0=0.75))), net, images()) < 1e-5


def test_live_channels_cannot_be_cut_without_a_trace() -> None:
    assert apart(half(space_of("cifar_resnet")), teacher_of("cifar_resnet"), images()) > 1e-2


def test_sliced_weights_are_rows_and_columns_of_the_teachers() -> None:
    space, net = space_of("chain"), teacher_of("chain")
    student = space.build(space.shrink(space.teacher, ratios(space, _0=0.5, _3=0.5)))
    rows = [i for i in range(8) if (net[1].weight[i] == student.get_submodule("1").weight).any()]
    assert len(rows) == 4
    assert torch.equal(student.get_submodule("0").weight, net[0].weight[rows])
    inputs = student.get_submodule("3").weight
    assert all(any(torch.equal(row, full) for full in net[3].weight[:, rows]) for row in inputs)
    for part in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(student.get_submodule("1"), part), getattr(net[1], part)[rows])


def test_whole_convolution_groups_are_cut() -> None:
    space = space_of("resnext")  # 8 channels in 4 groups of 2
    student = space.build(space.shrink(space.teacher, ratios(space, _3__conv1=0.5)))
    conv, teacher = student.get_submodule("3.conv2"), teacher_of("resnext").get_submodule("3.conv2")
    assert (conv.in_channels, conv.out_channels, conv.groups) == (4, 4, 2)
    assert conv.weight.shape == (4, 2, 3, 3)
    blocks = list(teacher.weight.view(4, 2, 2, 3, 3))
    assert all(any(torch.equal(block, whole) for whole in blocks) for block in conv.weight.view(2, 2, 2, 3, 3))
    assert outputs(student).shape == (2, 10)


@pytest.mark.parametrize("between", [nn.GroupNorm(1, 8), nn.GroupNorm(4, 8), nn.PReLU(), nn.PReLU(8)], ids=str)
def test_other_norms_and_activations_shrink_too(between: nn.Module) -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.Conv2d(8, 8, 3), nn.Conv2d(8, 10, 1)))
    space = ArchitectureSpace(net, images())
    arch = even(space, 0.5)
    student = space.build(arch)
    assert outputs(student).shape == outputs(net).shape
    assert arch.params == sum(p.numel() for p in student.parameters()) < space.teacher.params


# The teacher is left alone


def condition(net: nn.Module) -> dict[str, object]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        name: (id(m), m.training, getattr(m, "inplace", None), type(m), *(list(getattr(m, h)) for h in hooks))
        for name, m in net.named_modules()
    }


def frozen_norms(net: nn.Module) -> nn.Module:
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


@pytest.mark.parametrize("mode", [nn.Module.eval, nn.Module.train, frozen_norms])
@pytest.mark.parametrize("name", ["chain", "cifar_resnet", "bottlenecks", "read_again"])
def test_the_teacher_is_left_untouched_whatever_its_mode(name: str, mode: Callable[[nn.Module], nn.Module]) -> None:
    net = mode(make(name))
    calls: list[int] = []
    next(net.children()).register_forward_hook(lambda *_: calls.append(1))
    tensors, before = snapshot(net), condition(net)
    space = ArchitectureSpace(net, images())
    calls.clear()
    student = space.build(space.teacher)
    assert not any(module.training for module in student.modules())
    assert torch.equal(outputs(student), outputs(teacher_of(name)))
    train_a_step(half(space))
    train_a_step(space.build(space.remove(space.teacher, [False] * len(space.layers))))
    space.build(space.teacher, init="random")
    assert not calls  # a student does not call the teacher's hooks
    assert equal(net.state_dict(), tensors)
    assert condition(net) == before
    assert all(p.grad is None for p in net.parameters())
    net.train()
    assert not any(module.training for module in space.build(space.teacher).modules())


# Students are independent


def spans(net: nn.Module) -> list[tuple[int, int]]:
    """Memory of every tensor of `net`, from and to."""
    return [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in net.state_dict().values()]


@pytest.mark.parametrize("name", ["chain", "vgg_size", "cifar_resnet", "mobile", "resnext", "channel_last"])
def test_no_memory_is_shared(name: str) -> None:
    space = space_of(name)
    nets = [teacher_of(name), space.build(space.teacher), space.build(space.teacher), half(space)]
    taken = sorted(span for net in nets for span in spans(net))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))


@pytest.mark.parametrize("name", ["chain", "cifar_resnet"])
def test_training_a_student_changes_no_other(name: str) -> None:
    net = make(name)
    space = ArchitectureSpace(net, images())
    student, sibling = space.build(space.teacher), space.build(space.teacher)
    assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.requires_grad for p in student.parameters())
    before = snapshot(net)
    train_a_step(student)
    assert not any(torch.equal(before[n], p) for n, p in student.named_parameters() if "weight" in n)
    assert not any(torch.equal(before[n], b) for n, b in student.named_buffers() if "running_mean" in n)
    for other in (net, sibling, space.build(space.teacher)):
        assert equal(other.state_dict(), before)


@pytest.mark.parametrize("copier", [copy.deepcopy, independent_copy])
@pytest.mark.parametrize("name", ["chain", "cifar_resnet", "mobile"])
def test_a_copy_is_equal_and_independent(name: str, copier: Callable[[nn.Module], nn.Module]) -> None:
    student = half(space_of(name))
    before = snapshot(student)
    copied = copier(student)
    assert torch.equal(outputs(copied), outputs(student))
    assert [m.training for m in copied.modules()] == [m.training for m in student.modules()]
    train_a_step(copied)
    assert equal(student.state_dict(), before)
    assert not equal(copied.state_dict(), before)


def test_an_independent_copy_has_a_storage_for_each_tensor() -> None:
    copied = independent_copy(half(space_of("cifar_resnet")))
    tensors = list(copied.state_dict().values())
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)


def test_a_state_dict_can_be_saved_and_loaded() -> None:
    space = space_of("cifar_resnet")
    student, other = half(space), half(space)
    train_a_step(student)
    buffer = io.BytesIO()
    torch.save(student.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(outputs(other), outputs(student))
    assert buffer.getbuffer().nbytes < 2 * sum(t.nbytes for t in student.state_dict().values()) + 40_000


def test_recompiling_one_student_affects_no_other() -> None:
    space = space_of("cifar_resnet")
    student, sibling = half(space), half(space)
    expected = outputs(sibling)
    student.recompile()
    edited = copy.deepcopy(student)
    (last,) = (node for node in edited.graph.nodes if node.op == "output")
    with edited.graph.inserting_before(last):
        negated = edited.graph.call_function(torch.neg, (last.args[0],))
    last.args = (negated,)
    edited.recompile()
    assert torch.equal(outputs(edited), -expected)
    for net in (student, sibling, half(space)):
        assert torch.equal(outputs(net), expected)
        net.recompile()
        assert torch.equal(outputs(net), expected)


def test_a_removed_layer_of_one_student_is_there_in_the_next() -> None:
    space = space_of("chain")
    without_it = space.build(space.remove(space.teacher, without(space, "3")))
    assert isinstance(without_it.get_submodule("3"), nn.Identity)
    assert isinstance(space.build(space.teacher).get_submodule("3"), nn.Conv2d)


# Random initialisation


def test_random_initialisation_depends_on_the_seed_alone() -> None:
    space = space_of("cifar_resnet")
    sliced = half(space)

    def new(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return space.build(even(space, 0.5, 0.4), init="random").state_dict()

    first, same, other = new(0), new(0), new(1)
    assert equal(first, same)
    for name, tensor in sliced.state_dict().items():
        assert first[name].shape == tensor.shape
        if "conv" in name or "linear" in name:
            assert not torch.equal(first[name], tensor), name
            assert not torch.equal(first[name], other[name]), name
    norm = {name.rpartition(".")[2]: tensor for name, tensor in first.items() if name.startswith("bn1.")}
    assert (norm["weight"] == 1).all()
    assert (norm["running_var"] == 1).all()
    assert not norm["running_mean"].any()


def test_random_weights_are_scaled_to_the_students_own_width() -> None:
    net = settle(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 10, 1)))
    space = ArchitectureSpace(net, images())
    torch.manual_seed(0)
    student = space.build(even(space, 1 / 16), init="random")
    bound = student.get_submodule("1").weight.abs().max()  # uniform within 1/sqrt(fan in) = 1/2
    assert 0.3 < bound <= 0.5


def test_slicing_draws_nothing() -> None:
    space = space_of("chain")
    before = torch.random.get_rng_state()
    default, sliced = space.build(space.teacher), space.build(space.teacher, init="sliced")
    assert equal(default.state_dict(), sliced.state_dict())
    assert torch.equal(before, torch.random.get_rng_state())
