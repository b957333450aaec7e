"""Folders of images, as users have them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from n2n_fast.training.data import Augmentation, ImageData
from n2n_fast.training.datasets import load
from n2n_fast.training.splits import keys_of
from small_sets import refused as one_line

RNG = np.random.default_rng(0)


def write(
    folder: Path, names: Sequence[str] = ("cat", "dog"), count: int = 10, size: tuple[int, int] = (20, 16)
) -> None:
    """`count` images (width, height) a class; the first channel tells the class."""
    for shade, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for place in range(count):
            pixels = RNG.integers(0, 6, (size[1], size[0], 3), dtype=np.uint8)
            pixels[:, :, 0] += 100 * shade % 250
            Image.fromarray(pixels).save(folder / name / f"{place}.png")


def read(root: Path, **options: Any) -> ImageData:
    return load(f"imagefolder:{root}", **options)


def lengths(data: ImageData) -> list[int]:
    return [len(split) for split in data.parts.values()]


def refused(root, text, **options):
    """The one line that refuses a folder, in which `text` stands."""
    with one_line(text) as error:
        read(root, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ([""], [14, 2, 4]),
        (["train", "test"], [18, 2, 20]),
        (["train", "val"], [20, 10, 10]),
        (["train", "val", "test"], [20, 20, 20]),
        (["Train", "VALID", "Test"], [20, 20, 20]),
        (["training", "validation", "testing"], [20, 20, 20]),
    ],
)
def test_parts_are_used_as_they_are_named(folders: list[str], expected: list[int], tmp_path: Path) -> None:
    for name in folders:
        write(tmp_path / name)
    data = read(tmp_path)
    assert lengths(data) == expected
    assert data.class_names == ("cat", "dog")
    assert data.train.images.shape[1:] == (3, 16, 16)
    assert data.augmentation == Augmentation(crop=2, flip=True)
    for split in data.parts.values():
        assert torch.equal(split.images[:, 0, 3, 3] // 90, split.labels.byte())
    origins = [
        data.origins[part].removeprefix(str(tmp_path / name)) for part, name in zip(data.parts, folders, strict=False)
    ]
    assert origins[0] == ""
    assert data.notes == ("images of 20x16 (width x height) are brought to 16x16; --image-size sets another",)


def test_further_parts_come_from_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", count=3)
    data = read(tmp_path / "a", validation=str(tmp_path / "b"), test=0.25)
    assert lengths(data) == [15, 6, 5]
    assert data.origins["validation"] == str(tmp_path / "b")
    refused(tmp_path / "a", "nowhere is not a directory", test=str(tmp_path / "nowhere"))


def test_two_names_for_one_part_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val", "valid"):
        write(tmp_path / name)
    refused(tmp_path, "holds val and valid, which are one part; keep one")


def test_what_is_cut_is_cut_by_the_files(tmp_path: Path) -> None:
    write(tmp_path / "a")
    before = read(tmp_path / "a", image_size=8)
    (tmp_path / "b").mkdir()
    for folder in (tmp_path / "a").iterdir():
        (tmp_path / "b" / folder.name).mkdir()
        for path in folder.iterdir():  # named the other way round
            path.rename(tmp_path / "b" / folder.name / f"{9 - int(path.stem)}.png")
    after = read(tmp_path / "b", image_size=8)
    for part, split in before.parts.items():
        assert sorted(keys_of(split.images).tolist()) == sorted(keys_of(after.parts[part].images).tolist())
    assert before.digest != after.digest  # another order
    assert read(tmp_path / "b").digest == after.digest  # of the files, whatever their size in pixels


def spoil(root: Path) -> int:
    """Damage images of a folder in all ways; how many."""
    cat = root / "cat"
    (cat / "0.png").write_bytes(b"")
    (cat / "1.png").write_bytes((cat / "1.png").read_bytes()[:200])
    (cat / "2.png").write_bytes(b"no image")
    (cat / "._3.png").write_bytes(b"\0\5\x16\7")
    (cat / "gone.png").symlink_to(root / "nowhere.png")
    (root / "bird").mkdir()
    return 6


def test_all_bad_files_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path)
    assert spoil(tmp_path) == 6
    text = refused(tmp_path, r"repair or remove them, or add --skip-bad to go on without$")
    for line in (
        "bird holds no images",
        "0.png is empty",
        "1.png cannot be decoded",
        "2.png cannot be decoded (UnidentifiedImageError",
        "._3.png is no image but what macOS keeps beside one",
        "gone.png is a link to nothing",
    ):
        assert line in text
    data = read(tmp_path, skip_bad=True)
    assert data.class_names == ("bird", "cat", "dog")  # so that the others keep their numbers
    assert sum(lengths(data)) == 17
    assert data.notes[-1].startswith("skipped: ")
    for split in data.parts.values():
        assert torch.equal(1 + split.images[:, 0, 3, 3] // 90, split.labels.byte())


def test_parts_of_other_classes_are_told(tmp_path: Path) -> None:
    write(tmp_path / "train", ("cat", "cow", "dog"))
    write(tmp_path / "test", ("cat", "dog", "pig"))
    text = refused(tmp_path, "cow is missing")
    assert "pig is of no class of the training images" in text
    data = read(tmp_path, skip_bad=True)
    assert data.class_names == ("cat", "cow", "dog")
    assert data.parts["test"].labels.bincount(minlength=3).tolist() == [10, 0, 10]


def test_the_size_is_the_commonest(tmp_path: Path) -> None:
    write(tmp_path, size=(20, 16))
    Image.fromarray(np.zeros((300, 40, 3), np.uint8)).save(tmp_path / "cat" / "+.png")  # first in order
    data = read(tmp_path)
    assert data.train.image_size == (16, 16)
    assert data.notes[0].startswith("images of 2 sizes from 20x16 to 40x300 (width x height) are brought to 16x16")
    assert read(tmp_path, image_size=(16, 20)).train.image_size == (16, 20)
    large = tmp_path / "large"
    write(large, size=(500, 400), count=3)
    assert read(large).train.image_size == (224, 224)


@pytest.mark.parametrize(("dtype", "scale"), [("uint8", 1), (">u2", 257), ("<u2", 257)])
def test_images_of_16_bits_are_scaled(dtype: str, scale: int, tmp_path: Path) -> None:
    levels = RNG.integers(0, 256, (40, 6, 6))
    for n, level in enumerate(levels):
        folder = tmp_path / str(n % 2)
        folder.mkdir(exist_ok=True)
        image = Image.fromarray((level * scale).astype(dtype))
        image.save(folder / f"{n:02}.{'tif' if dtype == '>u2' else 'png'}")
    data = read(tmp_path, channels=1)
    seen = torch.cat([split.images for split in data.parts.values()]).flatten(1)
    wanted = torch.from_numpy(levels).byte().flatten(1)
    assert sorted(seen.tolist()) == sorted(wanted.tolist())
    assert ("40 images of 16 bits a pixel, scaled to 8" in data.notes) == (scale > 1)


def test_images_of_no_known_range_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    Image.fromarray(np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "cat" / "float.tif")
    refused(tmp_path, "float.tif has 32 bits a pixel, of a range that it does not tell; save it with 8 or 16")


def test_grey_images_for_one_channel(tmp_path: Path) -> None:
    write(tmp_path)
    refused(tmp_path, "is no grey image but 1 channel is asked for", channels=1)
    for path in tmp_path.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert read(tmp_path, channels=1).train.images.shape[1] == 1
    assert read(tmp_path).train.images.shape[1] == 3


def test_the_order_of_classes(tmp_path: Path) -> None:
    names = [str(n) for n in range(12)]
    write(tmp_path, names, count=3)
    assert read(tmp_path).class_names[:3] == ("0", "1", "10")
    for order in ("natural", names):
        data = read(tmp_path, class_order=order)
        assert data.class_names == tuple(names)
        assert sorted(set(data.train.labels.tolist())) == list(range(12))
    by_text, by_number = read(tmp_path), read(tmp_path, class_order="natural")
    for split, other in zip(by_text.parts.values(), by_number.parts.values(), strict=True):
        assert torch.equal(split.images, other.images)
        assert [by_text.class_names[n] for n in split.labels] == [by_number.class_names[n] for n in other.labels]
    refused(
        tmp_path, r"--class-order and the 12 classes differ \(cat\); name each class once", class_order=[*names, "cat"]
    )
    refused(tmp_path, "differ", class_order=["0"] * 12)


def test_bad_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "nowhere", "nowhere is not a directory")
    refused(tmp_path, "is no folder of class folders of images")
    write(tmp_path / "one", ("cat",))
    refused(tmp_path / "one", "1 class in the training data")
    monkeypatch.setattr("n2n_fast.training.datasets._memory_bytes", lambda: 10_000)
    refused(tmp_path / "one", r"GB are needed for the images but half of memory is 0\.0 GB")
