"""Data sets as users might have them, drawn at random: what is reported is what lies in the files."""

import json
import string
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import n2n_fast
from n2n_fast.files.errors import BadInput
from n2n_fast.training.data import ImageData
from quarters import TINY

PARTS = {
    "train": ("train", "Train", "training"),
    "validation": ("val", "VALID", "validation"),
    "test": ("test", "Test"),
}
DAMAGE = ("empty", "truncated", "text", "apple", "link", "no images", "unknown class")
QUICK = replace(TINY, updates=1, rollouts=1, rollout_steps=1, anchors=0, stages="shrinkage", final_epochs=0.2)


@dataclass(frozen=True)
class Set:
    """A data set to be written. counts: images of each class, by part. kinds: of damage done to the training images."""

    kind: str
    names: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    folders: dict[str, str]
    mode: str
    size: tuple[int, int]
    kinds: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of what is read: folders become squares of the short side."""
        return self.size if self.kind == "npz" else (min(self.size),) * 2

    def pixels(self, label: int, place: int) -> np.ndarray:
        """(H, W) or (H, W, 3) in the mode's range; the class is its level, the first pixels tell images apart."""
        level = 30 + 200 * label // (len(self.names) - 1)
        array = np.full(self.size, level, np.uint8)
        array[0, :2] = place % 256, place // 256
        if self.mode == "RGB":
            return np.stack([array] * 3, 2)
        return array.astype(np.uint16) * 257 if self.mode == "I;16" else array


@st.composite
def sets(draw: st.DrawFn) -> Set:
    names = draw(st.lists(st.text(string.ascii_letters + string.digits, min_size=1, max_size=5), min_size=2, max_size=4,
                          unique_by=str.lower))  # fmt: skip
    names = [name for name in names if name.lower() not in {n.lower() for part in PARTS.values() for n in part}]
    names += [name for name in ("aa", "bb") if len(names) < 2]
    kind = draw(st.sampled_from(["folder", "npz"]))
    parts = ["train", *draw(st.sets(st.sampled_from(["validation", "test"])))]
    counts = {part: tuple(draw(st.integers(4, 14)) for _ in names) for part in parts}
    folders = {part: draw(st.sampled_from(PARTS[part])) for part in parts}
    kinds = draw(st.lists(st.sampled_from(DAMAGE), max_size=3, unique=True)) if kind == "folder" else []
    return Set(kind, tuple(names), counts, folders, draw(st.sampled_from(["L", "RGB", "I;16"])),
               (draw(st.integers(4, 9)), draw(st.integers(4, 9))), tuple(kinds))  # fmt: skip


def write(some: Set, root: Path) -> str:
    """Write it; its spec."""
    place = iter(range(10_000))
    arrays = {
        part: [[some.pixels(label, next(place)) for _ in range(count)] for label, count in enumerate(counts)]
        for part, counts in some.counts.items()
    }
    if some.kind == "npz":
        content = {}
        for part, of_class in arrays.items():
            ending = {"train": "train", "validation": "val", "test": "test"}[part]
            content[f"x_{ending}"] = np.concatenate([np.stack(images) for images in of_class])
            content[f"y_{ending}"] = np.repeat(np.arange(len(of_class)), some.counts[part])
        np.savez(root / "set.npz", **content)
        return f"npz:{root / 'set.npz'}"
    for part, of_class in arrays.items():
        for name, images in zip(some.names, of_class, strict=True):
            folder = root / some.folders[part] / name
            folder.mkdir(parents=True)
            for n, array in enumerate(images):
                Image.fromarray(array).save(folder / f"{n}.png")
    damage(some, root / some.folders["train"] / some.names[0])
    return f"imagefolder:{root}"


def damage(some: Set, folder: Path) -> None:
    for kind in some.kinds:
        path = folder / f"{kind}.png"
        if kind == "empty":
            path.touch()
        elif kind == "truncated":
            whole = (folder / "0.png").read_bytes()
            path.write_bytes(whole[: len(whole) * 2 // 3])
        elif kind == "text":
            path.write_text("no image")
        elif kind == "apple":
            (folder / "._0.png").write_bytes(b"\0\5\x16\7")
        elif kind == "link":
            path.symlink_to(folder / "nowhere.png")
        elif kind == "no images":
            (folder.parent / "zz-nothing").mkdir()
        elif len(some.folders) > 1:
            (folder.parent.parent / some.folders[next(p for p in some.folders if p != "train")] / "zz-unknown").mkdir()


def teacher_of(data: ImageData) -> nn.Module:
    """Tells the classes by their levels, without any training."""
    levels = torch.stack([data.train.batch((data.train.labels == n).nonzero()[:1, 0])[0].mean() if
                          bool((data.train.labels == n).any()) else torch.tensor(99.0)
                          for n in range(data.classes)])  # fmt: skip
    net = nn.Sequential(
        nn.Conv2d(data.train.channels, 6, 1), nn.Conv2d(6, data.classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with torch.no_grad():
        net[0].weight.mul_(0.01)
        net[0].bias.zero_()
        net[0].weight[0] = 1 / data.train.channels
        net[1].weight.zero_()
        net[1].weight[:, 0, 0, 0] = 2 * levels
        net[1].bias.copy_(-levels.square())
    return net.eval()


def usable(some: Set) -> dict[str, int]:
    """Images of each part that can be read."""
    return {part: sum(counts) for part, counts in some.counts.items()}


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(some=sets())
def test_every_figure_is_what_lies_in_the_files(some: Set, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("set")
    spec = write(some, root)
    harmful = [kind for kind in some.kinds if kind != "unknown class" or len(some.folders) > 1]
    if harmful:
        with pytest.raises(BadInput, match="add --skip-bad") as error:
            n2n_fast.load(spec)
        assert str(error.value).count("; ") >= len(harmful)  # each by itself, and what mends them
    data = n2n_fast.load(spec, skip_bad=bool(harmful))
    named = usable(some)
    lengths = {part: len(split) for part, split in data.parts.items()}
    assert sum(lengths.values()) == sum(named.values())
    assert all(
        lengths[part] == count
        for part, count in named.items()
        if part == "test" or (part == "validation" and "test" in named)
    )
    classes = sorted(some.names) if some.kind == "folder" else list(map(str, range(len(some.names))))
    assert [name for name in data.class_names if name != "zz-nothing"] == classes
    assert data.train.image_size == some.shape
    result = n2n_fast.compress(teacher_of(data), data, QUICK, root / "run")
    check(json.loads((root / "run" / "result.json").read_text()), data, result, lengths)


def check(table: dict, data: ImageData, result: n2n_fast.Result, lengths: dict[str, int]) -> None:
    """Hold result.json against counts of our own."""
    assert {part: of["images"] for part, of in table["data"]["parts"].items()} == lengths
    student = n2n_fast.load_student(result.out)
    assert table["student"]["params"] == sum(p.numel() for p in student.parameters())
    for part in ("validation", "test"):
        split = data.parts[part]
        with torch.no_grad():
            said = student(split.batch(torch.arange(len(split)))[0]).argmax(1)
        right = (said == split.labels).double()
        assert table["student"][f"{part}_accuracy"] == pytest.approx(float(right.mean()))
        recalls = [float(right[split.labels == label].mean()) for label in split.labels.unique()]
        assert table["student"][f"{part}_balanced_accuracy"] == pytest.approx(sum(recalls) / len(recalls))
        error = (float(right.mean()) * (1 - float(right.mean())) / len(split)) ** 0.5
        assert table["student"][f"{part}_standard_error"] == pytest.approx(error)
        assert table["teacher"][f"{part}_accuracy"] > 0.9
