"""Members of every convolutional family of torchvision; bench/coverage.py does the same for all 68 nets.

Which members is drawn by N2N_FAST_SEED, 0 unless set, from those that are small enough for a test.
"""

import functools
import os
import random

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from n2n_fast.networks.space import ArchitectureSpace
from networks import check_student, kill_channels, settle

pytestmark = pytest.mark.slow

FAMILIES = {
    "alexnet": ["alexnet"],
    "vgg": ["vgg11", "vgg11_bn", "vgg13_bn"],
    "resnet": ["resnet18", "resnet34", "resnet50"],
    "wide_resnet": ["wide_resnet50_2"],
    "resnext": ["resnext50_32x4d"],
    "regnet_x": ["regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf"],
    "regnet_y": ["regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf"],
    "densenet": ["densenet121", "densenet169"],
    "googlenet": ["googlenet"],
    "inception": ["inception_v3"],
    "squeezenet": ["squeezenet1_0", "squeezenet1_1"],
    "shufflenet": ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"],
    "mobilenet_v2": ["mobilenet_v2"],
    "mobilenet_v3": ["mobilenet_v3_small", "mobilenet_v3_large"],
    "mnasnet": ["mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"],
    "efficientnet": ["efficientnet_b0", "efficientnet_b1", "efficientnet_b2"],
    "efficientnet_v2": ["efficientnet_v2_s"],
    "convnext": ["convnext_tiny", "convnext_small"],
}
SMALLEST = {"alexnet": 63, "inception": 75}  # images; others 32
NOT_INIT = ("googlenet", "inception", "vgg")  # slow to initialise
REACH = {"shufflenet": 18}  # times fewer params that every ratio at 0.1 gives; others 20
DRAWN = random.Random(int(os.environ.get("N2N_FAST_SEED", "0")))
MEMBERS = {family: DRAWN.choice(members) for family, members in FAMILIES.items()}


def images(family: str) -> Tensor:
    size = SMALLEST.get(family, 32)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def network(family: str) -> nn.Module:
    quick = {"init_weights": False} if family in NOT_INIT else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.get_model(MEMBERS[family], num_classes=10, **quick)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.ones_(parameter)  # 1e-6 would hide what the blocks do
    return settle(model)


@functools.lru_cache(maxsize=1)  # one family after the other
def teacher_and_space(family: str) -> tuple[nn.Module, ArchitectureSpace]:
    teacher = network(family)
    return teacher, ArchitectureSpace(teacher, images(family))


@pytest.mark.parametrize("family", FAMILIES)
class TestFamily:
    """The four properties that bench/coverage.py shows of all members."""

    def test_everything_kept_is_the_teacher_and_little_is_small(self, family: str) -> None:
        teacher, space = teacher_and_space(family)
        x = images(family)
        with torch.no_grad():
            assert torch.equal(space.build(space.teacher)(x), teacher(x))
        smallest = space.shrink(space.teacher, [0.1] * len(space.layers))
        assert space.teacher.params > REACH.get(family, 20) * smallest.params
        said = [warning for warning in space.warnings if "not used in evaluation" not in warning]
        assert said == []

    @given(seed=st.integers(0, 2**32 - 1))
    @settings(deadline=None, max_examples=2, derandomize=True)
    def test_students_are_what_was_foreseen(self, family: str, seed: int) -> None:
        check_student(teacher_and_space(family)[1], images(family), seed)

    def test_dead_channels_are_dropped_without_loss(self, family: str) -> None:
        teacher, x = network(family), images(family)
        left = kill_channels(ArchitectureSpace(teacher, x)._traced, share=3)
        assert min(left) < 1
        space = ArchitectureSpace(teacher, x)
        with torch.no_grad():
            expected, got = teacher(x), space.build(space.shrink(space.teacher, left))(x)
        assert (got - expected).norm() <= 1e-5 * expected.norm()
