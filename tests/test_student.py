"""Students: equal to the teacher where nothing or only dead channels are cut, and independent of everything else."""

import copy
import io
import itertools
import pickle
import random
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
    Twice,
    conv_bn,
    images,
    make,
    position,
    ratios,
    settle,
    space_of,
    teacher_of,
    without,
)


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def half(space: ArchitectureSpace) -> nn.Module:
    count = len(space.layers)
    return space.build(space.shrink(space.teacher, [0.5] * count, [0.4] * count))


def train_a_step(net: nn.Module, x: Tensor) -> None:
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().sum().backward()
    optimizer.step()
    net.eval()


# Nothing cut


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_with_everything_kept_outputs_equal_the_teachers_to_the_last_bit(name: str) -> None:
    space = space_of(name)
    ones = [1.0] * len(space.layers)
    arch = space.shrink(space.remove(space.teacher, [True] * len(ones)), ones, ones)
    student = space.build(arch)
    assert not student.training
    assert torch.equal(outputs(student, images(name)), outputs(teacher_of(name), images(name)))


def test_an_in_place_relu_changes_what_is_read_again() -> None:
    """Both calls of a shared in-place relu change their input for later readers."""
    net = settle(ReadAgainTwice())
    space = ArchitectureSpace(net, images())
    assert torch.equal(outputs(space.build(space.teacher), images()), outputs(net, images()))


def test_the_students_layers_carry_the_teachers_names() -> None:
    student = space_of("cifar_resnet").build(space_of("cifar_resnet").teacher)
    assert equal(student.state_dict(), teacher_of("cifar_resnet").state_dict())


def test_other_dtypes_are_kept() -> None:
    net, x = make("cifar_resnet").double(), images().double()
    space = ArchitectureSpace(net, x)
    student = space.build(space.teacher)
    assert {p.dtype for p in student.parameters()} == {torch.float64}
    assert torch.equal(outputs(student, x), outputs(net, x))


# Dead channels cut. Each line: the first writer of a group, all its writers, the norms that follow them.

DEAD: dict[str, list[tuple[str, list[str], list[str]]]] = {
    "chain": [(c, [c], [n]) for c, n in (("0", "1"), ("3", "4"), ("7", "8"), ("10", "11"))],
    "vgg_size": [("conv1", ["conv1"], ["norm1"]), ("conv2", ["conv2"], []), ("fc1", ["fc1"], [])],
    "cifar_resnet": [
        ("conv1", ["conv1", "layer1.0.conv2", "layer1.1.conv2"], ["bn1", "layer1.0.bn2", "layer1.1.bn2"]),
        (
            "layer2.0.conv2",
            ["layer2.0.conv2", "layer2.0.shortcut.0", "layer2.1.conv2"],
            ["layer2.0.bn2", "layer2.0.shortcut.1", "layer2.1.bn2"],
        ),
        *((f"{b}.conv1", [f"{b}.conv1"], [f"{b}.bn1"]) for b in ("layer1.0", "layer1.1", "layer2.0", "layer2.1")),
    ],
    "bottlenecks": [
        ("0", ["0"], ["1"]),
        ("3.conv3", ["3.conv3", "3.downsample.0", "4.conv3"], ["3.bn3", "3.downsample.1", "4.bn3"]),
        *((f"{b}.conv{i}", [f"{b}.conv{i}"], [f"{b}.bn{i}"]) for b in (3, 4) for i in (1, 2)),
    ],
    "mobile": [
        ("0", ["0", "3.project.0"], ["1", "3.project.1"]),
        ("4.project.0", ["4.project.0", "5.project.0"], ["4.project.1", "5.project.1"]),
        *(
            (f"{b}.expand.0", [f"{b}.expand.0", f"{b}.depthwise.0"], [f"{b}.expand.1", f"{b}.depthwise.1"])
            for b in (3, 4, 5)
        ),
    ],
    "dense": [("stem", ["stem"], []), ("grow", ["grow"], []), ("mix", ["mix"], [])],
    "resnet18": [
        (
            "conv1",
            ["conv1", "layer1.0.conv2", "layer1.1.conv2"],
            ["bn1", "layer1.0.bn2", "layer1.1.bn2"],
        ),
        *(
            (
                f"layer{i}.0.conv2",
                [f"layer{i}.0.conv2", f"layer{i}.0.downsample.0", f"layer{i}.1.conv2"],
                [f"layer{i}.0.bn2", f"layer{i}.0.downsample.1", f"layer{i}.1.bn2"],
            )
            for i in (2, 3, 4)
        ),
        *(
            (f"layer{i}.{j}.conv1", [f"layer{i}.{j}.conv1"], [f"layer{i}.{j}.bn1"])
            for i in (1, 2, 3, 4)
            for j in (0, 1)
        ),
    ],
}


def kill(net: nn.Module, names: list[str], dead: list[int]) -> None:
    for name in names:
        for parameter in net.get_submodule(name).parameters():
            parameter.data[dead] = 0


def check_dead(name: str, seed: int) -> None:
    """A net whose random dead channels are exactly those cut gives the same outputs."""
    net, rng = make(name), random.Random(seed)
    kept, expected = {}, {}
    for first, writers, norms in DEAD[name]:
        width = net.get_submodule(first).weight.shape[0]
        dead = rng.sample(range(width), rng.randrange(width))
        kill(net, writers, dead)
        kill(net, norms, dead)
        if name == "dense" and first in ("stem", "grow"):  # the norm of the concatenation holds both
            kill(net, ["norm"], [d + (8 if first == "grow" else 0) for d in dead])
        kept[first] = 1 - len(dead) / width
        expected.update(dict.fromkeys(writers, width - len(dead)))
    space = ArchitectureSpace(net, images(name))
    channels = [kept.get(layer.name, 1.0) for layer in space.layers]
    student = space.build(space.shrink(space.teacher, channels))
    assert {w: student.get_submodule(w).weight.shape[0] for w in expected} == expected
    x = images(name, 4)
    assert torch.allclose(outputs(student, x), outputs(net, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in DEAD if name in SMALL])
@given(st.integers(0, 10**9))
@settings(deadline=None, max_examples=6)
def test_dead_channels_can_be_cut_without_a_trace(name: str, seed: int) -> None:
    check_dead(name, seed)


def test_dead_channels_of_a_resnet18_can_be_cut_without_a_trace() -> None:
    check_dead("resnet18", 5)


def test_live_channels_cannot() -> None:
    net, space = teacher_of("cifar_resnet"), space_of("cifar_resnet")
    assert (outputs(half(space), images()) - outputs(net, images())).abs().max() > 1e-3


def test_whole_convolution_groups_are_cut() -> None:
    space = space_of("resnext")  # 8 channels in 4 groups of 2
    student = space.build(space.shrink(space.teacher, ratios(space, _3__conv1=0.5)))
    conv, teacher = student.get_submodule("3.conv2"), teacher_of("resnext").get_submodule("3.conv2")
    assert (conv.in_channels, conv.out_channels, conv.groups) == (4, 4, 2)
    assert conv.weight.shape == (4, 2, 3, 3)
    blocks = list(teacher.weight.view(4, 2, 2, 3, 3))
    assert all(any(torch.equal(block, whole) for whole in blocks) for block in conv.weight.view(2, 2, 2, 3, 3))
    assert outputs(student, images()).shape == (2, 10)


def test_dead_convolution_groups_can_be_cut_without_a_trace() -> None:
    net = make("resnext")
    dead = [0, 1, 6, 7]
    kill(net, [f"3.{part}" for part in ("conv1", "bn1", "conv2", "bn2")], dead)
    space = ArchitectureSpace(net, images())
    student = space.build(space.shrink(space.teacher, ratios(space, _3__conv1=0.5)))
    assert student.get_submodule("3.conv2").groups == 2
    assert torch.allclose(outputs(student, images()), outputs(net, images()), rtol=1e-5, atol=1e-5)


def test_a_convolution_called_twice_shrinks_on_both_sides() -> None:
    net = settle(Twice())
    space = ArchitectureSpace(net, images())
    student = space.build(space.shrink(space.teacher, ratios(space, stem=0.5)))
    conv = student.get_submodule("conv")
    assert (conv.in_channels, conv.out_channels) == (4, 4)
    dead = make("twice")
    kill(dead, ["stem", "conv", "norm"], [1, 2, 5, 6])
    space = ArchitectureSpace(dead, images())
    student = space.build(space.shrink(space.teacher, ratios(space, stem=0.5)))
    assert torch.allclose(outputs(student, images()), outputs(dead, images()), rtol=1e-5, atol=1e-5)


# The teacher is left alone


def condition(net: nn.Module) -> dict[str, object]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        name: (id(m), m.training, getattr(m, "inplace", None), type(m), *(list(getattr(m, h)) for h in hooks))
        for name, m in net.named_modules()
    }


def evaluation(net: nn.Module) -> nn.Module:
    return net.eval()


def training(net: nn.Module) -> nn.Module:
    return net.train()


def frozen_norms(net: nn.Module) -> nn.Module:
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


@pytest.mark.parametrize("mode", [evaluation, training, frozen_norms])
@pytest.mark.parametrize("name", ["chain", "cifar_resnet", "bottlenecks", "read_again"])
def test_the_teacher_is_left_untouched(name: str, mode: Callable[[nn.Module], nn.Module]) -> None:
    net = mode(make(name))
    calls: list[int] = []
    next(net.children()).register_forward_hook(lambda *_: calls.append(1))
    tensors, before = snapshot(net), condition(net)
    space = ArchitectureSpace(net, images())
    train_a_step(half(space), images())
    train_a_step(space.build(space.remove(space.teacher, [False] * len(space.layers))), images())
    space.build(space.teacher, init="random")
    assert equal(net.state_dict(), tensors)
    assert condition(net) == before
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("mode", [training, frozen_norms])
def test_students_of_a_teacher_in_training_are_in_evaluation_mode(mode: Callable[[nn.Module], nn.Module]) -> None:
    net = mode(make("cifar_resnet"))
    space = ArchitectureSpace(net, images())
    student = space.build(space.teacher)
    assert not any(module.training for module in student.modules())
    assert torch.equal(outputs(student, images()), outputs(teacher_of("cifar_resnet"), images()))


def test_students_are_in_evaluation_mode_whatever_the_teacher_does_later() -> None:
    net = make("chain")
    space = ArchitectureSpace(net, images())
    net.train()
    assert not any(module.training for module in space.build(space.teacher).modules())


# Students are independent


def spans(net: nn.Module) -> list[tuple[int, int]]:
    """Memory of every tensor of `net`, from and to."""
    return [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in net.state_dict().values()]


@pytest.mark.parametrize("name", ["chain", "vgg_size", "cifar_resnet", "mobile", "resnext"])
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
    before = snapshot(net)
    train_a_step(student, images())
    assert not any(torch.equal(before[n], p) for n, p in student.named_parameters() if "weight" in n)
    assert not any(torch.equal(before[n], b) for n, b in student.named_buffers() if "running_mean" in n)
    for other in (net, sibling, space.build(space.teacher)):
        assert equal(other.state_dict(), before)
    assert student.training == sibling.training == net.training


def test_parameters_are_leaves_that_want_gradients() -> None:
    student = half(space_of("cifar_resnet"))
    assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("copier", [copy.deepcopy, independent_copy])
@pytest.mark.parametrize("name", ["chain", "cifar_resnet", "mobile"])
def test_a_copy_is_equal_and_independent(name: str, copier: Callable[[nn.Module], nn.Module]) -> None:
    student = half(space_of(name))
    before = snapshot(student)
    copied = copier(student)
    assert torch.equal(outputs(copied, images()), outputs(student, images()))
    assert [m.training for m in copied.modules()] == [m.training for m in student.modules()]
    train_a_step(copied, images())
    assert equal(student.state_dict(), before)
    assert not equal(copied.state_dict(), before)


def test_an_independent_copy_has_a_storage_for_each_tensor() -> None:
    copied = independent_copy(half(space_of("cifar_resnet")))
    tensors = list(copied.state_dict().values())
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)


def test_a_state_dict_can_be_pickled_and_loaded() -> None:
    space = space_of("cifar_resnet")
    student, other = half(space), half(space)
    train_a_step(student, images())
    buffer = io.BytesIO()
    torch.save(student.state_dict(), buffer)
    buffer.seek(0)
    for state in (torch.load(buffer, weights_only=True), pickle.loads(pickle.dumps(student.state_dict()))):
        other.load_state_dict(state)
        assert torch.equal(outputs(other, images()), outputs(student, images()))
    assert buffer.getbuffer().nbytes < 2 * sum(t.nbytes for t in student.state_dict().values()) + 40_000


def test_recompiling_one_student_affects_no_other() -> None:
    space = space_of("cifar_resnet")
    student, sibling = half(space), half(space)
    expected = outputs(sibling, images())
    student.recompile()
    assert torch.equal(outputs(student, images()), expected)
    edited = copy.deepcopy(student)
    (last,) = (node for node in edited.graph.nodes if node.op == "output")
    with edited.graph.inserting_before(last):
        negated = edited.graph.call_function(torch.neg, (last.args[0],))
    last.args = (negated,)
    edited.recompile()
    assert torch.equal(outputs(edited, images()), -expected)
    for net in (student, sibling, half(space)):
        assert torch.equal(outputs(net, images()), expected)
        net.recompile()
        assert torch.equal(outputs(net, images()), expected)


def test_a_removed_layer_of_one_student_is_there_in_the_next() -> None:
    space = space_of("chain")
    removed = space.build(space.remove(space.teacher, without(space, "3")))
    assert isinstance(removed.get_submodule("3"), nn.Identity)
    assert isinstance(space.build(space.teacher).get_submodule("3"), nn.Conv2d)


def test_students_do_not_call_the_teachers_hooks() -> None:
    net, calls = make("chain"), []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    space = ArchitectureSpace(net, images())
    calls.clear()
    outputs(space.build(space.teacher), images())
    assert not calls


# Initialisation


def test_random_initialisation_depends_on_the_seed_alone() -> None:
    space = space_of("cifar_resnet")
    inherited = half(space)
    arch = space.shrink(space.teacher, [0.5] * len(space.layers), [0.4] * len(space.layers))

    def new(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return space.build(arch, init="random").state_dict()

    first, same, other = new(0), new(0), new(1)
    assert equal(first, same)
    for name, tensor in inherited.state_dict().items():
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
    student = space.build(space.shrink(space.teacher, [1 / 16] * 3), init="random")
    bound = student.get_submodule("1").weight.abs().max()  # uniform within 1/sqrt(fan in) = 1/2
    assert 0.3 < bound <= 0.5


def test_inheriting_draws_nothing() -> None:
    space = space_of("chain")
    before = torch.random.get_rng_state()
    default, inherited = space.build(space.teacher), space.build(space.teacher, init="sliced")
    assert equal(default.state_dict(), inherited.state_dict())
    assert torch.equal(before, torch.random.get_rng_state())


def test_inherited_weights_are_rows_and_columns_of_the_teachers() -> None:
    space, net = space_of("chain"), teacher_of("chain")
    student = space.build(space.shrink(space.teacher, ratios(space, _0=0.5, _3=0.5)))
    rows = [i for i in range(8) if (net[1].weight[i] == student.get_submodule("1").weight).any()]
    assert len(rows) == 4
    assert torch.equal(student.get_submodule("0").weight, net[0].weight[rows])
    inputs = student.get_submodule("3").weight
    assert all(any(torch.equal(row, full) for full in net[3].weight[:, rows]) for row in inputs)
    for part in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(student.get_submodule("1"), part), getattr(net[1], part)[rows])


def test_a_channel_that_nobody_reads_is_cut_first() -> None:
    net = make("chain")
    net[3].weight.data[:, [2, 5]] = 0
    space = ArchitectureSpace(net, images())
    student = space.build(space.shrink(space.teacher, ratios(space, _0=0.75)))
    assert torch.allclose(outputs(student, images()), outputs(net, images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.GroupNorm(4, 8),
        lambda: nn.GroupNorm(1, 8),
        lambda: nn.InstanceNorm2d(8, affine=True),
        lambda: nn.PReLU(8),
        nn.PReLU,
    ],
    ids=["groups", "all", "instance", "prelu", "prelu1"],
)
def test_other_norms_and_activations_shrink_too(norm: Callable[[], nn.Module]) -> None:
    net = settle(nn.Sequential(*conv_bn(3, 8), norm(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 10, 1)))
    space = ArchitectureSpace(net, images())
    assert torch.equal(outputs(space.build(space.teacher), images()), outputs(net, images()))
    arch = space.shrink(space.teacher, [0.5] * len(space.layers))
    student = space.build(arch)
    assert outputs(student, images()).shape == (2, 10, 16, 16)
    assert arch.params == sum(p.numel() for p in student.parameters()) < space.teacher.params
    assert position(space, "2") == 2
