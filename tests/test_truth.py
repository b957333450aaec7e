"""Every figure is what it says: data and habits as users have them, from files to the final table."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import invoke, output, refusal, told
from n2n_fast.training.datasets import load
from n2n_fast.training.teachers import SmallResNet

RNG = np.random.default_rng(0)
QUICK = [part for name in ("updates=1", "rollouts=2", "anchors=0", "stage_epochs=1", "final_epochs=1", "keep_top=1",
                           "epoch_steps=0", "stages=shrinkage") for part in ("--set", name)]  # fmt: skip


pytestmark = pytest.mark.usefixtures("place")


def pixels(label, size=(8, 8)):
    """An image of a class: its level, and noise."""
    return (15 + 20 * label + RNG.integers(0, 10, size)).astype(np.uint8)


def arrays(labels, **others):
    """Write set.npz, with further arrays."""
    np.savez("set.npz", x=np.stack([pixels(label) for label in labels]), y=labels, **others)


def folders(labels, names, root, size=(8, 8)):
    for n, label in enumerate(labels):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(label, size)).save(root / names[label] / f"{n:03}.png")


def taught(data, *options, out="t.pt", epochs=12):
    """A teacher of the data, made by the command line."""
    output("teach", "--arch", "digits_resnet", "--data", data, "--channels", 1, "--epochs", epochs, "--batch-size", 32,
           "--out", out, "--quiet", *options)  # fmt: skip
    return out


def run(*options):
    """The result of a quick run, and what it said meanwhile."""
    code, _, err = invoke("run", *options, *QUICK, "--out", "run")
    assert code == 0, err
    return json.loads(Path("run/result.json").read_text()), err


@pytest.mark.slow
def test_what_the_data_were_taken_to_be_is_said_everywhere(place):
    arrays(np.arange(200) % 4)
    result, err = run("--teacher", taught("npz:set.npz"), "--data", "npz:set.npz")
    for line in (
        "data: npz:set.npz, 4 classes (0, 1, 2, 3)",
        "  8x8 pixels (height x width), 1 channel, uint8 in 15..84, normalised by mean",
        "  train: 144 images, x",
        "  validation: 16 images, 10% of x, by content",
        "  test: 40 images, 20% of x, by content",
    ):
        assert line in err
    assert result["data"]["parts"]["test"] == {"images": 40, "from": "20% of x, by content"}
    config, student = (json.loads((place / "run" / name).read_text()) for name in ("config.json", "student.json"))
    assert config["data"]["digest"] == result["data"]["digest"]
    assert student["classes"] == ["0", "1", "2", "3"]
    assert student["image_size"] == [8, 8]
    err = invoke("inspect", "--teacher", "t.pt", "--data", "npz:set.npz", "--json")[2]
    assert "train: 144 images" in err
    assert result["teacher"]["may_have_seen"] == []  # teach and run cut alike


@pytest.mark.slow
def test_the_parts_do_not_depend_on_the_seed(place):
    arrays(np.arange(200) % 4)
    taught("npz:set.npz", "--seed", 5)
    first, err = run("--teacher", "t.pt", "--data", "npz:set.npz", "--seed", 9)
    assert "may have been trained on" not in err
    made = json.loads((place / "t.pt.json").read_text())
    assert made["data"]["digest"] == first["data"]["digest"]
    evaluated = json.loads(output("evaluate", "run", "--json"))
    assert evaluated["accuracy"] == first["student"]["test_accuracy"]
    assert evaluated["warnings"] == []


@pytest.mark.slow
def test_a_teacher_from_elsewhere_may_have_seen_everything(place):
    labels = np.arange(240) % 4
    folders(labels, "abcd", place / "set" / "train")
    foreign = taught(f"imagefolder:{place / 'set' / 'train'}")
    (place / "t.pt.json").unlink()
    result, err = run("--teacher", foreign, "--data", "imagefolder:set")
    assert "may have been trained on the validation and test images" in err
    assert "may have been trained" in output("run", "--teacher", foreign, "--data", "imagefolder:set", "--dry-run")
    assert result["teacher"]["may_have_seen"] == ["validation", "test"]
    assert "* the teacher may have been trained on the validation and test" in Path("run/report.html").read_text()
    shutil.rmtree("run")
    folders(labels[:40], "abcd", place / "set" / "Valid")
    result, err = run("--teacher", foreign, "--data", "imagefolder:set")
    assert "may have been trained on" not in err
    assert result["teacher"]["may_have_seen"] == []
    assert [part["images"] for part in result["data"]["parts"].values()] == [240, 20, 20]


@pytest.mark.slow
def test_classes_in_another_order_are_recognised(place):
    names = [str(n) for n in range(12)]
    folders(np.arange(480) % 12, names, place / "set")
    taught("imagefolder:set", "--class-order", "natural", epochs=30)
    err = refusal("run", "--teacher", "t.pt", "--data", "imagefolder:set")
    assert "numbers the classes of imagefolder:set in another order" in err
    assert err.endswith("add --class-order natural\n")
    result, _ = run("--teacher", "t.pt", "--data", "imagefolder:set", "--class-order", "natural")
    assert result["teacher"]["validation_accuracy"] > 0.7
    assert result["data"]["classes"] == names
    assert json.loads(output("evaluate", "run", "--json"))["accuracy"] == result["student"]["test_accuracy"]


@pytest.mark.slow
def test_nine_to_one(place):
    labels = np.arange(400) % 10 // 9
    arrays(labels)
    result, _ = run("--teacher", taught("npz:set.npz"), "--data", "npz:set.npz")
    assert result["teacher"]["validation_balanced_accuracy"] > 0.9
    shutil.rmtree("run")
    always = SmallResNet(2, 2, 1)
    torch.nn.init.zeros_(always.fc.weight)
    torch.nn.init.constant_(always.fc.bias, 0.0)
    always.fc.bias.data[0] = 1.0
    torch.save(always.state_dict(), "always.pt")
    err = refusal("run", "--teacher", "always.pt", "--data", "npz:set.npz")
    assert "balanced accuracy on validation images, the mean over classes, is 50.00%, no better than chance" in err


@pytest.mark.slow
def test_images_that_are_no_squares(place):
    np.savez("set.npz", x=np.stack([pixels(n % 4, (16, 32)) for n in range(160)]), y=np.arange(160) % 4)
    result, _ = run("--teacher", taught("npz:set.npz"), "--data", "npz:set.npz")
    assert result["data"]["image_size"] == [16, 32]
    evaluated = json.loads(output("evaluate", "run", "--json"))
    assert evaluated["accuracy"] == result["student"]["test_accuracy"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x.astype(np.float32), "scaled from 0..255 to 0..1"),
        (lambda x: x.astype(np.uint16) * 257, "16-bit images in"),
        (lambda x: (x / 127.5 - 1).astype(np.float32), "taken as already normalised"),
        (lambda x: (x / 255).astype(np.float32), "taken as pixels in 0..1"),
    ],
)
def test_the_range_of_pixels_is_said(change, text):
    arrays(np.arange(80) % 4)
    with np.load("set.npz") as whole:
        np.savez("other.npz", x=change(whole["x"]), y=whole["y"])
    data = load("npz:other.npz")
    assert any(text in note for note in data.notes)
    assert float(data.train.batch(torch.arange(9))[0].abs().max()) < 5


@pytest.mark.parametrize(
    "change", [lambda x: x.astype(np.float32) * 40, lambda x: x.astype(np.float32) - 40, lambda x: x.astype(int) * 300]
)
def test_a_range_that_means_nothing_is_refused(change):
    np.savez("set.npz", x=change(np.stack([pixels(n % 4) for n in range(80)])), y=np.arange(80) % 4)
    assert "0..255" in refusal("teach", "--data", "npz:set.npz")


@pytest.mark.slow
def test_a_run_goes_on_wherever_its_files_lie_but_not_with_others(place, monkeypatch):
    (place / "a").mkdir()
    monkeypatch.chdir(place / "a")
    arrays(np.arange(200) % 4)
    result, _ = run("--teacher", taught("npz:set.npz"), "--data", "npz:set.npz")
    (place / "b").mkdir()
    monkeypatch.chdir(place / "b")
    again = json.loads(output("run", "--resume", "../a/run", "--json"))  # by whole paths
    assert again["student"]["params"] == result["student"]["params"]
    shutil.move(place / "a" / "set.npz", "moved.npz")
    shutil.move(place / "a" / "t.pt", "moved.pt")
    shutil.move(place / "a" / "t.pt.json", "moved.pt.json")
    here = ("--data", "npz:moved.npz", "--teacher", "moved.pt")
    assert output("run", "--resume", "../a/run", *here, "--json")
    with np.load("moved.npz") as whole:
        np.savez("moved.npz", x=whole["x"][::-1], y=whole["y"][::-1])
    assert "another configuration: data" in refusal("run", "--resume", "../a/run", *here)
    err = invoke("evaluate", "../a/run", "--data", "npz:moved.npz")[2]
    assert told(err) == []
    assert "warning" not in err  # the same images, in another order


@pytest.mark.slow
def test_other_images_than_the_runs_are_told(place):
    arrays(np.arange(200) % 4)
    run("--teacher", taught("npz:set.npz"), "--data", "npz:set.npz")
    with np.load("set.npz") as whole:
        np.savez("same.npz", x=(whole["x"] / 255).astype(np.float32), y=whole["y"])
        np.savez("other.npz", x=(whole["x"] / 127.5 - 1).astype(np.float32), y=whole["y"])
    assert "warning" not in invoke("evaluate", "run", "--data", "npz:same.npz")[2]
    for command in (("evaluate", "run"), ("run", "--teacher", "t.pt", "--dry-run")):
        err = invoke(*command, "--data", "npz:other.npz")[2]
        assert "warning: pixels are float32 in -0.88" in err
        assert "; expected uint8 in 15..84, normalised by mean 0." in err
    arrays(np.arange(160) % 4)
    err = invoke("evaluate", "run")[2]
    assert "  test: 32 images, 20% of x, by content" in err
    assert "warning: the images are not those of the run" in err
