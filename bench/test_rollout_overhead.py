"""From sampled actions to a student ready to train, beside what it costs otherwise; ratio 0.5, images of 32 px."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from n2n_fast import ArchitectureSpace, SearchConfig, from_tensors
from n2n_fast.networks.student import slots_of
from n2n_fast.search.environment import Evaluator
from n2n_fast.search.policies import ShrinkagePolicy
from n2n_fast.training.batches import TeacherLogits
from n2n_fast.training.distill import recalibrate

NETS = ["resnet18", "resnet34", "resnet50", "vgg16_bn", "mobilenet_v2"]
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ROLLOUTS = 5  # of an update, drawn in one pass of the policy
IMAGES = 512


class Setting:
    """A teacher and all that each way needs to make students of it."""

    def __init__(self, name, device="cpu"):
        self.name = name
        self.images = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
        teacher = torchvision.models.get_model(name, num_classes=10).to(device)
        self.teacher = recalibrate(teacher, self.images[:64].split(64))
        self.spaces = {
            "sliced": ArchitectureSpace(self.teacher, self.images[:1]),
            "fitted": ArchitectureSpace(self.teacher, self.images[:1], self.images),
        }
        space = self.spaces["sliced"]
        self.policy = ShrinkagePolicy(space.features().shape[1], RATIOS)
        self.mask = torch.tensor(space.choices(space.teacher)).T
        self.features = space.features()
        self.arch = space.shrink(space.teacher, [0.5] * len(space.layers))
        self.kept = space._factory.kept_channels(self.arch)

    def ours(self, init):
        """A rollout's share of an update's sampling, its architecture, its student."""
        space, generator = self.spaces[init], torch.Generator().manual_seed(0)
        student = None

        def update():
            nonlocal student
            actions = self.policy.sample(self.features, self.mask, ROLLOUTS, generator).tolist()
            for row in actions:
                # what was drawn is decoded, and ratio 0.5 taken, so that all ways make the same student
                assert len([RATIOS[channels] for channels, _ in row]) == len(space.layers)
                arch = space.shrink(space.teacher, [0.5] * len(space.layers))
                student = space.build(arch, init)
            return student

        return update

    def torch_pruning(self):
        import torch_pruning

        model = copy.deepcopy(self.teacher)
        classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        importance = torch_pruning.importance.MagnitudeImportance(p=1)
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, self.images[:1], importance, pruning_ratio=0.5, ignored_layers=[classifier]
        )
        pruner.step()
        return model

    def anew(self):
        """The torchvision model constructed again, its weights selected from the teacher's."""
        device = self.images.device
        model = torchvision.models.get_model(self.name, num_classes=10).eval().to(device)
        traced = self.spaces["sliced"]._traced
        for slot in slots_of(traced):
            value = slot.tensor
            for dim, axis in ((0, slot.rows), (1, slot.columns)):
                if axis is not None and self.kept[axis] is not None:
                    value = value.index_select(dim, torch.from_numpy(self.kept[axis]).to(device))
            module = model.get_submodule(traced.names[slot.layer])
            if slot.is_parameter:
                setattr(module, slot.name, nn.Parameter(value))
            else:
                module._buffers[slot.name] = value
            if slot.name == "weight" and getattr(module, "groups", 1) > 1:
                module.groups = len(value)
        return model


@pytest.fixture(scope="module", params=NETS)
def setting(request):
    return Setting(request.param)


@pytest.mark.parametrize("way", ["n2n_fast", "n2n_fast, fitted", "Torch-Pruning", "constructed anew"])
def test_rollout(benchmark, setting, way):
    benchmark.group = f"rollout: {setting.name}"
    calls = {
        "n2n_fast": setting.ours("sliced"),
        "n2n_fast, fitted": setting.ours("fitted"),
        "Torch-Pruning": setting.torch_pruning,
        "constructed anew": setting.anew,
    }
    student = calls[way]()
    params = sum(p.numel() for p in student.parameters())
    if way == "Torch-Pruning":  # rounds widths in its own way
        assert params == pytest.approx(setting.arch.params, rel=0.05)
    else:
        assert params == setting.arch.params
    if way == "n2n_fast":
        with torch.no_grad():
            torch.testing.assert_close(student(setting.images[:4]), setting.anew()(setting.images[:4]))
    rollouts = ROLLOUTS if way.startswith("n2n_fast") else 1
    benchmark.extra_info["rollouts"] = rollouts  # of a call: divide by it
    benchmark.pedantic(calls[way], rounds=20 if way == "n2n_fast" else 5, warmup_rounds=1)


def test_evaluations_an_hour(benchmark):
    """Whole evaluations as a search makes them: students of a ResNet-18 at 50 times, each of other widths."""
    setting, generator = Setting("resnet18"), torch.Generator().manual_seed(0)
    space = setting.spaces["fitted"]
    images, labels = torch.randn(2200, 3, 32, 32, generator=generator), torch.arange(2200) % 10
    data = from_tensors("noise", (images[:200], labels[:200]), validation=(images[200:], labels[200:]))
    config, logits = SearchConfig(), TeacherLogits(setting.teacher, data.train)
    evaluator = Evaluator("shrinkage", space, data, logits, setting.images[: config.calibration_images], config)
    ratios = (0.1 + 0.9 * torch.rand(25, len(space.layers), generator=generator)).tolist()
    archs = iter(space.shrink_all_within(space.teacher, ratios, params=space.teacher.params // 50, grow=True))

    def evaluation():
        assert evaluator.evaluate(next(archs), 0).error is None

    benchmark.pedantic(evaluation, rounds=20, warmup_rounds=2)
    benchmark.extra_info["an hour"] = round(3600 / benchmark.stats.stats.median)
