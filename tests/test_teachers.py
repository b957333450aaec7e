"""Teachers: making, training, reading them from files, and telling their architecture from a state dict."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn

from n2n_fast.files.errors import BadInput
from n2n_fast.training import teachers
from n2n_fast.training.data import ImageData, accuracy, from_tensors
from n2n_fast.training.datasets import load
from n2n_fast.training.distill import Progress
from n2n_fast.training.teachers import (
    check_fits,
    create,
    infer_architecture,
    input_channels,
    load_state_dict_file,
    load_teacher,
    train_teacher,
)

OWN = ["digits_resnet", "resnet20", "resnet32", "resnet56"]


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def save(held: Any, path: Path) -> Path:
    torch.save(held, path)
    return path


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("digits")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A state dict of the smallest teacher."""
    return save(create("digits_resnet", 10, 1).state_dict(), tmp_path / "small.pt")


# --- making


@pytest.mark.parametrize("arch", OWN)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 9, 32])
def test_small_resnets_take_small_images(arch: str, channels: int, size: int) -> None:
    model = create(arch, 7, channels, size).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_the_digits_teacher_is_small() -> None:
    assert 75_000 < sum(parameter.numel() for parameter in create("digits_resnet", 10, 1).parameters()) < 300_000


def test_a_seed_settles_the_weights_and_leaves_the_global_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, same, other = (create("resnet20", 10, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "densenet121", "squeezenet1_1"])
def test_torchvision_models_take_grey_images(arch: str) -> None:
    model = create(arch, 5, channels=1, image_size=64)
    assert input_channels(model) == 1
    assert model.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 5)


def test_the_cifar_stem_keeps_the_resolution() -> None:
    model = create("resnet18", 10, cifar_stem=True)
    assert isinstance(model.maxpool, nn.Identity)
    assert model.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"arch": "resnet19"}, r"'resnet19' is no known architecture; give .*resnet18.* or package\.module:factory"),
        ({"arch": "???"}, "give a torchvision name such as resnet18"),
        ({"arch": "squeezenet1_1", "cifar_stem": True}, "squeezenet1_1 has no CIFAR stem"),
        ({"arch": "resnet20", "cifar_stem": True}, "resnet20 is made for small images already"),
        (
            {"arch": "squeezenet1_1", "image_size": 8},
            r"squeezenet1_1 cannot take images of 8x8 pixels \(.*\); set another --image-size",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInput, match=text) as error:
        create(**{"classes": 10, **options})
    message(error)


# --- training


def test_the_digits_teacher_learns(digits: ImageData) -> None:
    reports: list[tuple[int, float, float]] = []
    lengths: list[int] = []

    class Listener(Progress):
        def phase(self, name: str, length: int) -> None:
            lengths.append(length)

        def step(self, step: int, loss: float, accuracy: float) -> None:
            reports.append((step, loss, accuracy))

    assert digits.test is not None
    model = train_teacher(create("digits_resnet", 10, 1), digits, epochs=5, progress=Listener())
    assert not model.training
    assert accuracy(model, digits.test) > 0.93
    assert [step for step, _, _ in reports] == [10, 20, 30, 40, 50]
    assert lengths == [50]
    assert reports[-1][1] < 0.5 * reports[0][1]
    assert reports[-1][2] > 0.9


def test_a_seed_settles_the_training_and_the_test_split_is_untouched(digits: ImageData) -> None:
    untested = ImageData(digits.name, digits.train, digits.validation, None, 10, digits.augmentation)
    states = []
    for seed, some in ((1, digits), (1, untested), (2, digits)):
        torch.manual_seed(len(states))  # the caller's random state does not matter
        model = nn.Sequential(create("digits_resnet", 10, 1), nn.Dropout(0.1))
        states.append(train_teacher(model, some, epochs=0.3, seed=seed).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["0.fc.weight"], states[2]["0.fc.weight"])


def test_a_diverging_training_is_stopped(digits: ImageData) -> None:
    with pytest.raises(BadInput, match=r"diverged: the loss is .* at step 10 of .*; lower the learning rate") as error:
        train_teacher(create("digits_resnet", 10, 1), digits, epochs=5, learning_rate=1e12)
    message(error)


# --- fitting the data


def test_a_fitting_teacher_passes(digits: ImageData) -> None:
    check_fits(create("digits_resnet", 10, 1), digits)
    check_fits(create("resnet18", 10, 3), load("digits", channels=3, image_size=32))


def test_an_unfit_teacher_is_refused(digits: ImageData) -> None:
    damaged = create("digits_resnet", 10, 1)
    nn.init.constant_(damaged.get_parameter("fc.bias"), float("nan"))
    cases = {
        "takes images of 3 channels but digits gives 1": create("digits_resnet", 10, 3),
        "tells 100 classes apart but the data has 10": create("digits_resnet", 100, 1),
        r"cannot take images of 8x8 pixels \(.*\); set another --image-size": create("squeezenet1_1", 10, 1),
        r"gives an output of shape \(2, 1, 8, 8\); expected logits": nn.Identity(),
        "gives NaN or infinite logits on digits": damaged,
    }
    for text, model in cases.items():
        with pytest.raises(BadInput, match=f"^some {text}") as error:
            check_fits(model, digits, "some")
        message(error)


# --- inferring


FAMILIES = [
    *OWN,
    "resnet18", "resnet34", "resnet50", "wide_resnet50_2", "resnext50_32x4d",
    "vgg11", "vgg16_bn", "squeezenet1_1", "googlenet", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5",
    "efficientnet_b0", "efficientnet_b1", "densenet121", "regnet_x_400mf", "convnext_tiny",
]  # fmt: skip


def on_meta(arch: str, classes: int, channels: int, cifar_stem: bool = False) -> dict[str, Tensor]:
    with teachers._OnMeta():
        return teachers._make(arch, classes, channels, cifar_stem).state_dict()


@pytest.mark.parametrize("arch", FAMILIES)
def test_architectures_are_inferred(arch: str) -> None:
    expected = {"classes": 37, "channels": 1, "cifar_stem": False}
    assert infer_architecture(on_meta(arch, 37, 1)) == (arch, expected)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_cifar_stems_are_inferred(arch: str) -> None:
    expected = {"classes": 100, "channels": 3, "cifar_stem": True}
    assert infer_architecture(on_meta(arch, 100, 3, cifar_stem=True)) == (arch, expected)


def test_what_is_inferred_is_what_create_takes() -> None:
    state = on_meta("resnet34", 12, 1, cifar_stem=True)
    arch, options = infer_architecture(state)
    made = create(arch, **options).state_dict()
    assert {key: value.shape for key, value in made.items()} == {key: value.shape for key, value in state.items()}


def test_counters_and_auxiliary_heads_do_not_matter() -> None:
    state = on_meta("resnet18", 10, 3)
    assert infer_architecture({k: v for k, v in state.items() if "num_batches" not in k})[0] == "resnet18"
    with teachers._OnMeta():
        auxiliary = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False).state_dict()
    assert any(key.startswith("aux1.") for key in auxiliary)
    assert infer_architecture(auxiliary)[0] == "googlenet"


def changed(arch: str = "resnet18") -> dict[str, Tensor]:
    return {key: value.clone() for key, value in create(arch, 10).state_dict().items()}


def test_a_state_dict_of_no_known_architecture_is_refused_with_its_keys() -> None:
    state = changed()
    del state["layer4.1.bn2.weight"]
    state["extra.weight"] = torch.zeros(3)
    state["layer1.0.conv1.weight"] = torch.zeros(65, 64, 3, 3)
    with pytest.raises(BadInput, match="nearest is resnet18: 1 keys missing") as error:
        infer_architecture(state)
    text = message(error)
    assert "missing (layer4.1.bn2.weight)" in text
    assert "1 keys unexpected (extra.weight)" in text
    assert "misshaped (layer1.0.conv1.weight (65, 64, 3, 3) instead of (64, 64, 3, 3))" in text
    assert text.endswith("give --arch package.module:factory for your own")


def test_few_of_many_keys_are_named() -> None:
    with pytest.raises(BadInput, match=r"fits no known architecture; nearest is ") as error:
        infer_architecture({f"block{i}.weight": torch.zeros(3) for i in range(1000)})
    assert "1000 keys unexpected (block0.weight, block1.weight, block2.weight, ...)" in message(error)
    assert len(message(error)) < 600


# --- reading


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
def test_wrappers_and_prefixes_come_off(wrap: Any, tmp_path: Path) -> None:
    model = create("digits_resnet", 10, 1).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    path = save(wrap(model.state_dict()), tmp_path / "wrapped.pt")
    assert load_state_dict_file(path).keys() == model.state_dict().keys()
    loaded = load_teacher(path, classes=10, channels=1)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_torchvision_teacher_with_a_cifar_stem(tmp_path: Path) -> None:
    model = create("resnet18", 10, 1, cifar_stem=True).eval()
    path = save(model.state_dict(), tmp_path / "resnet18.pt")
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(load_teacher(path)(images), model(images))
    assert torch.equal(load_teacher(path, arch="resnet18")(images), model(images))
    with pytest.raises(BadInput, match=r"resnet18\.pt: does not fit resnet34: 80 keys missing \(layer1\.2\.conv1"):
        load_teacher(path, arch="resnet34")
    with pytest.raises(BadInput, match="'resnet19' is no known architecture"):
        load_teacher(path, arch="resnet19")


def test_a_teacher_of_auxiliary_heads(tmp_path: Path) -> None:
    model = torchvision.models.googlenet(weights=None, num_classes=4, aux_logits=True, init_weights=False).eval()
    images = torch.rand(1, 3, 64, 64)
    path = save(model.state_dict(), tmp_path / "googlenet.pt")
    assert torch.equal(load_teacher(path, classes=4)(images), model(images))


def test_the_wrong_number_of_classes_or_channels_is_refused(small: Path) -> None:
    with pytest.raises(BadInput, match=r"small\.pt tells 10 classes apart but the data has 7") as error:
        load_teacher(small, classes=7)
    message(error)
    with pytest.raises(BadInput, match=r"small\.pt takes images of 1 channels but the data has 3"):
        load_teacher(small, channels=3)


def test_grey_data_fits_three_channels(tmp_path: Path) -> None:
    path = save(create("digits_resnet", 10, 3).state_dict(), tmp_path / "colour.pt")
    assert input_channels(load_teacher(path, channels=1)) == 3


class Runs:
    """Unpickling it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = tmp_path / "evil.pt"
    for held in ({"state_dict": Runs(proof)}, Runs(proof)):
        with pytest.raises(BadInput, match=r"evil\.pt is a pickle that wants to run code \(\w+\.system\)") as error:
            load_teacher(save(held, path))
        assert "--allow-pickle" in message(error)
    for protocol in (2, 5):
        path.write_bytes(pickle.dumps(Runs(proof), protocol))
        with pytest.raises(BadInput, match=r"wants to run code|is no file that torch\.save wrote"):
            load_teacher(path)
    assert not proof.exists()


def test_a_pickled_module_only_where_allowed(tmp_path: Path) -> None:
    model = create("digits_resnet", 10, 1)
    path = save(model, tmp_path / "module.pt")
    with pytest.raises(BadInput, match=r"wants to run code \(n2n_fast\.training\.teachers\.SmallResNet\)"):
        load_teacher(path)
    loaded = load_teacher(path, classes=10, channels=1, allow_pickle=True)
    assert isinstance(loaded, teachers.SmallResNet)
    assert not loaded.training
    assert load_state_dict_file(path, allow_pickle=True).keys() == model.state_dict().keys()
    held = save({"model": model}, tmp_path / "held.pt")
    assert load_state_dict_file(held, allow_pickle=True).keys() == model.state_dict().keys()


def test_files_without_a_state_dict_are_refused(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    for name, case in {"cut": content[: len(content) // 2], "start": content[:50], "empty": b""}.items():
        (tmp_path / name).write_bytes(case)
    (tmp_path / "text").write_text("hello, this is no model\n")
    (tmp_path / "numbers").write_text("1 2 3\n")
    for name in ("cut", "start", "empty", "text", "numbers"):
        with pytest.raises(BadInput, match=rf"{name} is no file that torch\.save wrote, or a damaged one") as error:
            load_teacher(tmp_path / name)
        message(error)
    with pytest.raises(BadInput, match="nowhere does not exist"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="is a directory; give a file"):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ({}, "holds no state dict but nothing"),
        ({"epoch": 3, "lr": 0.1}, "holds no state dict but epoch, lr; save model"),
        ({"state_dict": {}}, "holds no state dict but nothing"),
        ({"state_dict": {"a": 1}}, "holds no state dict but a"),
        ([torch.zeros(1)], "holds a list; save model.state_dict"),
        (torch.zeros(1), "holds a Tensor; save model.state_dict"),
    ],
)
def test_other_contents_are_refused(held: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=text) as error:
        load_teacher(save(held, tmp_path / "other.pt"))
    message(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused_by_name(value: float, tmp_path: Path) -> None:
    state = create("digits_resnet", 10, 1).state_dict()
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = value
    path = save(state, tmp_path / "nan.pt")
    for arch in (None, "digits_resnet"):
        with pytest.raises(BadInput, match=r"layer2\.0\.conv1\.weight holds NaN or infinite values") as error:
            load_teacher(path, arch)
        message(error)


# --- factories


FACTORIES = """
from torch import nn

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def counted(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

class Wrapped(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.model = counted(**options)

    def forward(self, x):
        return self.model(x)

def fails(num_classes=1):
    raise RuntimeError("no weights\\nat all")

def gives_text():
    return "model"

number = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "some_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "some_factories", raising=False)
    return save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict(), tmp_path / "linear.pt")


@pytest.mark.parametrize("name", ["plain", "counted"])
def test_a_factory_of_the_current_directory(name: str, factories: Path) -> None:
    before = sys.path.copy()
    model = load_teacher(factories, f"some_factories:{name}", classes=10)
    assert sys.path == before
    assert torch.equal(model.state_dict()["1.weight"], load_state_dict_file(factories)["1.weight"])


def test_a_factory_whose_own_keys_look_like_a_prefix(factories: Path) -> None:
    state = {f"model.{key}": value for key, value in load_state_dict_file(factories).items()}
    path = save({"state_dict": state}, factories.with_name("wrapped.pt"))
    model = load_teacher(path, "some_factories:Wrapped", classes=10)
    assert torch.equal(model.state_dict()["model.1.bias"], state["model.1.bias"])


@pytest.mark.parametrize(
    ("arch", "text"),
    [
        ("some_factories:missing", "some_factories:missing cannot be imported .*AttributeError"),
        ("no_such_module:factory", "cannot be imported .*ModuleNotFoundError.*write package.module:factory"),
        (":factory", "cannot be imported"),
        ("some_factories:fails", r"some_factories:fails failed \(RuntimeError: no weights\)"),
        ("some_factories:gives_text", "some_factories:gives_text gives a str; it must give a torch.nn.Module"),
        ("some_factories:number", "some_factories:number is a int; it must be"),
        ("torch.nn:ReLU", "does not fit torch.nn:ReLU: 2 keys unexpected"),
    ],
)
def test_bad_factories_are_refused(arch: str, text: str, factories: Path) -> None:
    with pytest.raises(BadInput, match=text) as error:
        load_teacher(factories, arch, classes=10)
    message(error)


def test_a_factory_of_other_shapes_is_refused(factories: Path) -> None:
    with pytest.raises(BadInput, match=r"2 keys misshaped \(1\.weight \(10, 64\) instead of \(7, 64\)"):
        load_teacher(factories, "some_factories:counted", classes=7)


def test_train_needs_two_images() -> None:
    images, labels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1])
    tiny = from_tensors("tiny", (images, labels), (images, labels), validation=2)
    with pytest.raises(BadInput, match="tiny: 1 training image"):
        train_teacher(create("digits_resnet", 2, 1), tiny, epochs=1)
