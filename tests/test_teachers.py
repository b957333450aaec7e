"""Teachers: making, training, reading them from files, and telling their architecture from a state dict."""

import os
import pickle
import re
import sys

import pytest
import torch
import torchvision.models
from torch import nn

from n2n_fast.training.architectures import OnMeta, infer_architecture
from n2n_fast.training.data import ImageData, accuracy, from_tensors
from n2n_fast.training.datasets import load
from n2n_fast.training.distill import Progress
from n2n_fast.training.teacher_files import load_teacher
from n2n_fast.training.teachers import SmallResNet, check_teacher, create, input_channels, train_teacher
from small_sets import refused

OWN = ["digits_resnet", "resnet20", "resnet32", "resnet56"]


def save(content, path):
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def digits():
    return load("digits")


# Making


@pytest.mark.parametrize("arch", OWN)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 9), (3, 32)])
def test_small_resnets_take_small_images(arch, channels, size):
    model = create(arch, 7, channels, size).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_a_seed_settles_the_weights_and_leaves_the_global_state():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, same, other = (create("resnet20", 10, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "densenet121", "squeezenet1_1"])
def test_torchvision_models_take_grey_images(arch):
    model = create(arch, 5, channels=1, image_size=64)
    assert input_channels(model) == 1
    assert model.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 5)


def test_the_cifar_stem_keeps_the_resolution():
    model = create("resnet18", 10, cifar_stem=True)
    assert isinstance(model.maxpool, nn.Identity)
    assert model.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)


UNSUITABLE_SIZE = r"cannot take images of 8x8 pixels \(.*\); set another --image-size"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"arch": "resnet19"}, r"'resnet19' is no known architecture; give .*resnet18.* or package\.module:factory"),
        ({"arch": "???"}, "give a torchvision name such as resnet18"),
        ({"arch": "squeezenet1_1", "cifar_stem": True}, "squeezenet1_1 has no CIFAR stem"),
        ({"arch": "resnet20", "cifar_stem": True}, "resnet20 is made for small images already"),
        ({"arch": "squeezenet1_1", "image_size": 8}, f"squeezenet1_1 {UNSUITABLE_SIZE}"),
    ],
)
def test_what_cannot_be_made_is_refused(options, text):
    with refused(text):
        create(**{"classes": 10, **options})


# Training


def test_the_digits_teacher_learns(digits):
    phases, steps = [], []

    class Listener(Progress):
        def phase(self, *told):
            phases.append(told)

        def step(self, *told):
            steps.append(told)

    model = train_teacher(create("digits_resnet", 10, 1), digits, epochs=5, progress=Listener())
    assert not model.training
    assert accuracy(model, digits.test) > 0.93
    assert phases == [("training the teacher", 50)]
    assert [step for step, _, _ in steps] == [10, 20, 30, 40, 50]
    assert steps[-1][1] < 0.5 * steps[0][1]
    assert steps[-1][2] > 0.9


def test_a_seed_settles_the_training_and_the_test_split_is_untouched(digits):
    untested = ImageData(digits.name, digits.train, digits.validation, None, 10, digits.augmentation)
    states = []
    for seed, some in ((1, digits), (1, untested), (2, digits)):
        torch.manual_seed(len(states))  # the caller's random state does not matter
        model = nn.Sequential(create("digits_resnet", 10, 1), nn.Dropout(0.1))
        states.append(train_teacher(model, some, epochs=0.3, seed=seed).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["0.fc.weight"], states[2]["0.fc.weight"])


def test_a_diverging_training_is_stopped(digits):
    with refused(r"diverged: the loss is .* at step 10 of .*; lower the learning rate"):
        train_teacher(create("digits_resnet", 10, 1), digits, epochs=5, learning_rate=1e12)


def test_train_needs_two_images():
    images, labels = torch.arange(3 * 64, dtype=torch.uint8).view(3, 1, 8, 8), torch.tensor([0, 1, 1])
    tiny = from_tensors("tiny", (images, labels), (images, labels), validation=2)
    with refused("tiny: 1 training image"):
        train_teacher(create("digits_resnet", 2, 1), tiny, epochs=1)


# Fitting the data


def damaged():
    model = create("digits_resnet", 10, 1)
    nn.init.constant_(model.fc.bias, float("nan"))
    return model


def test_a_fitting_teacher_passes(digits):
    check_teacher(create("digits_resnet", 10, 1), digits)
    check_teacher(create("resnet18", 10, 3), load("digits", channels=3, image_size=32))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: create("digits_resnet", 10, 3), "takes images of 3 channels but digits gives 1"),
        (lambda: create("digits_resnet", 100, 1), "tells 100 classes apart but the data has 10"),
        (lambda: create("squeezenet1_1", 10, 1), UNSUITABLE_SIZE),
        (nn.Identity, r"gives an output of shape \(2, 1, 8, 8\); expected logits"),
        (damaged, "gives NaN or infinite logits on digits"),
    ],
)
def test_an_unfit_teacher_is_refused(make, text, digits):
    with refused(f"^the teacher {text}"):
        check_teacher(make(), digits)


# Inferring


FAMILIES = [
    *OWN,
    "resnet18", "resnet34", "resnet50", "wide_resnet50_2", "resnext50_32x4d",
    "vgg11", "vgg16_bn", "squeezenet1_1", "googlenet", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5",
    "efficientnet_b0", "efficientnet_b1", "densenet121", "regnet_x_400mf", "convnext_tiny",
]  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        *((arch, {"classes": 37, "channels": 1, "cifar_stem": False}) for arch in FAMILIES),
        *(
            (arch, {"classes": 100, "channels": 3, "cifar_stem": True})
            for arch in ("resnet18", "resnet50", "wide_resnet50_2")
        ),
    ],
)
def test_architectures_are_inferred(arch, options):
    with OnMeta():
        state = create(arch, **options).state_dict()
    assert infer_architecture(state) == (arch, options)
    assert infer_architecture({key: value for key, value in state.items() if "num_batches" not in key})[0] == arch


def test_a_state_dict_of_no_known_architecture_is_refused_with_its_keys():
    state = create("resnet18", 10).state_dict()
    del state["layer4.1.bn2.weight"]
    state["extra.weight"] = torch.zeros(3)
    state["layer1.0.conv1.weight"] = torch.zeros(65, 64, 3, 3)
    missing = "1 keys missing (layer4.1.bn2.weight)"
    unexpected = "1 keys unexpected (extra.weight)"
    misshaped = "1 keys misshaped (layer1.0.conv1.weight (65, 64, 3, 3) instead of (64, 64, 3, 3))"
    text = f"nearest is resnet18: {missing}, {unexpected}, {misshaped}; give --arch package.module:factory for your own"
    with refused(re.escape(text)):
        infer_architecture(state)


def test_few_of_many_keys_are_named():
    with refused(r"1000 keys unexpected \(block0\.weight, block1\.weight, block2\.weight, \.\.\.\)"):
        infer_architecture({f"block{i}.weight": torch.zeros(3) for i in range(1000)})


# Reading


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"model_state_dict": state}, "optimizer": {"lr": 0.1}},
        lambda state: {"net": state, "acc": 93.0},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.backbone.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
    ],
)
def test_wrappers_and_prefixes_come_off(wrap, tmp_path):
    model = create("digits_resnet", 10, 1).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    loaded = load_teacher(save(wrap(model.state_dict()), tmp_path / "wrapped.pt"))
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_torchvision_teacher_with_a_cifar_stem(tmp_path):
    model = create("resnet18", 10, 1, cifar_stem=True).eval()
    path = save(model.state_dict(), tmp_path / "resnet18.pt")
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(load_teacher(path)(images), model(images))
    assert torch.equal(load_teacher(path, arch="resnet18")(images), model(images))
    with refused(r"resnet18\.pt: does not fit resnet34: 80 keys missing \(layer1\.2\.conv1"):
        load_teacher(path, arch="resnet34")
    with refused("'resnet19' is no known architecture"):
        load_teacher(path, arch="resnet19")


def test_a_teacher_of_auxiliary_heads(tmp_path):
    model = torchvision.models.googlenet(weights=None, num_classes=4, aux_logits=True, init_weights=False).eval()
    images = torch.rand(1, 3, 64, 64)
    path = save(model.state_dict(), tmp_path / "googlenet.pt")
    assert torch.equal(load_teacher(path)(images), model(images))


class Runs:
    """Unpickling it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused(tmp_path):
    proof = tmp_path / "proof"
    path = tmp_path / "evil.pt"
    for content in ({"state_dict": Runs(proof)}, Runs(proof)):
        with refused(r"evil\.pt is a pickle that wants to run code \(\w+\.system\).*--allow-pickle"):
            load_teacher(save(content, path))
    for protocol in (2, 5):
        path.write_bytes(pickle.dumps(Runs(proof), protocol))
        with refused(r"wants to run code|is no file that torch\.save wrote"):
            load_teacher(path)
    assert not proof.exists()


def test_a_pickled_module_only_where_allowed(tmp_path):
    model = create("digits_resnet", 10, 1)
    path = save(model, tmp_path / "module.pt")
    with refused(r"wants to run code \(n2n_fast\.training\.teachers\.SmallResNet\)"):
        load_teacher(path)
    wrapped = save({"model": model}, tmp_path / "wrapped.pt")
    for file in (path, wrapped):
        loaded = load_teacher(file, allow_pickle=True)
        assert isinstance(loaded, SmallResNet)
        assert not loaded.training
        assert torch.equal(loaded.fc.weight, model.fc.weight)


def test_files_without_a_state_dict_are_refused(tmp_path):
    content = save(create("digits_resnet", 10, 1).state_dict(), tmp_path / "small.pt").read_bytes()
    halves = {"cut": content[: len(content) // 2], "start": content[:50], "empty": b""}
    for name, case in {**halves, "text": b"hello, this is no model\n", "numbers": b"1 2 3\n"}.items():
        (tmp_path / name).write_bytes(case)
        with refused(rf"{name} is no file that torch\.save wrote, or a damaged one"):
            load_teacher(tmp_path / name)
    with refused("nowhere does not exist"):
        load_teacher(tmp_path / "nowhere")
    with refused("is a directory; give a file"):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({}, "holds no state dict but nothing"),
        ({"epoch": 3, "lr": 0.1}, "holds no state dict but epoch, lr; save model"),
        ({"state_dict": {}}, "holds no state dict but nothing"),
        ({"state_dict": {"a": 1}}, "holds no state dict but a"),
        ([torch.zeros(1)], "holds a list; save model.state_dict"),
        (torch.zeros(1), "holds a Tensor; save model.state_dict"),
    ],
)
def test_other_contents_are_refused(content, text, tmp_path):
    with refused(text):
        load_teacher(save(content, tmp_path / "other.pt"))


@pytest.mark.parametrize("arch", [None, "digits_resnet"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused_by_name(value, arch, tmp_path):
    state = create("digits_resnet", 10, 1).state_dict()
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = value
    with refused(r"layer2\.0\.conv1\.weight holds NaN or infinite values"):
        load_teacher(save(state, tmp_path / "nan.pt"), arch)


# Factories


FACTORIES = """
from torch import nn

def plain(classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

def wider():
    return plain(7)

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = plain()

    def forward(self, x):
        return self.model(x)

def fails():
    raise RuntimeError("no weights\\nat all")

def gives_text():
    return "model"

number = 3
"""


@pytest.fixture
def linear(tmp_path, monkeypatch):
    """The state dict that the factories' networks have, beside them in the current directory."""
    (tmp_path / "some_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "some_factories", raising=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict()


def test_a_factory_of_the_current_directory(linear):
    before = sys.path.copy()
    model = load_teacher(save(linear, "linear.pt"), "some_factories:plain")
    assert sys.path == before
    assert torch.equal(model.state_dict()["1.weight"], linear["1.weight"])


def test_a_factory_whose_own_keys_look_like_a_prefix(linear):
    state = {f"model.{key}": value for key, value in linear.items()}
    model = load_teacher(save({"state_dict": state}, "wrapped.pt"), "some_factories:Wrapped")
    assert torch.equal(model.state_dict()["model.1.bias"], linear["1.bias"])


@pytest.mark.parametrize(
    ("arch", "text"),
    [
        ("some_factories:missing", "some_factories:missing cannot be imported .*AttributeError"),
        ("no_such_module:factory", "cannot be imported .*ModuleNotFoundError.*write package.module:factory"),
        (":factory", "cannot be imported"),
        ("some_factories:fails", r"some_factories:fails failed \(RuntimeError: no weights\)"),
        ("some_factories:gives_text", "some_factories:gives_text gives a str; it must give a torch.nn.Module"),
        ("some_factories:number", "some_factories:number is a int; it must be"),
        ("some_factories:wider", r"2 keys misshaped \(1\.weight \(10, 64\) instead of \(7, 64\)"),
        ("torch.nn:ReLU", "does not fit torch.nn:ReLU: 2 keys unexpected"),
    ],
)
def test_bad_factories_are_refused(arch, text, linear):
    with refused(text):
        load_teacher(save(linear, "linear.pt"), arch)
