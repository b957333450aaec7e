"""Data sets: splits, augmentation, batches, and the reading of each format."""

import gzip
import hashlib
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision import datasets

from n2n_fast import data
from n2n_fast.data import Augmentation, Batches, ImageData, Schedule, Split, TeacherLogits, accuracy, from_tensors, load
from n2n_fast.errors import BadInput, DegenerateArchitecture

RNG = np.random.default_rng(0)


def images(count: int, channels: int = 3, size: int = 8) -> Tensor:
    """Images all different from one another: the first two pixels count them."""
    random = torch.Generator().manual_seed(0)
    stack = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=random)
    stack[:, 0, 0, 0] = torch.arange(count) % 256
    stack[:, 0, 0, 1] = torch.arange(count) // 256
    return stack


def identity(split: Split) -> set[int]:
    """Which of the `images` are in the split."""
    first = split.images[:, 0, 0].long()
    return set((first[:, 0] + 256 * first[:, 1]).tolist())


def make(count: int = 100, classes: int = 4, **options: Any) -> ImageData:
    return from_tensors("some", (images(count), torch.arange(count) % classes), **options)


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


# --- errors


def test_errors_are_value_errors_and_keep_the_reason() -> None:
    error = DegenerateArchitecture("too large")
    assert isinstance(error, ValueError)
    assert issubclass(BadInput, ValueError)
    assert error.reason == str(error) == "too large"


# --- splits


@settings(max_examples=40, deadline=None)
@given(count=st.integers(20, 600), classes=st.integers(2, 7), seed=st.integers(-3, 2**40), share=st.floats(0.05, 0.5))
def test_splits_are_disjoint_complete_and_in_proportion(count: int, classes: int, seed: int, share: float) -> None:
    some = make(count, classes, seed=seed, validation=share)
    assert some.test is not None
    parts = [identity(part) for part in (some.train, some.validation, some.test)]
    assert set.union(*parts) == set(range(count))
    assert sum(map(len, parts)) == count
    assert len(some.test) == round(0.2 * count)
    assert len(some.validation) == round(share * (count - len(some.test)))
    histogram = some.validation.labels.bincount(minlength=classes)
    assert int(histogram.max() - histogram.min()) <= 2


def test_a_seed_settles_the_split() -> None:
    one, same, other = (make(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.train.images, same.train.images)
    assert identity(one.validation) != identity(other.validation)


def test_validation_is_a_tenth_but_at_most_5000() -> None:
    labels = torch.arange(60000) % 10
    blank = torch.zeros(60000, 1, 1, 1, dtype=torch.uint8)
    test = (blank[:100], labels[:100])
    large = from_tensors("large", (blank, labels), test)
    assert (len(large.train), len(large.validation)) == (55000, 5000)
    assert large.validation.labels.bincount().tolist() == [500] * 10
    assert len(from_tensors("small", (blank[:1000], labels[:1000]), test).validation) == 100
    assert len(from_tensors("counted", (blank, labels), test, validation=7000).validation) == 7000


@pytest.mark.parametrize("share", [0, 1.5, -0.1, 80, float("nan")])
def test_bad_validation_is_refused(share: float) -> None:
    with pytest.raises(BadInput, match="give a share between 0 and 1 or a number of the 80 images") as error:
        make(100, validation=share)
    message(error)


def test_too_few_to_split_are_refused() -> None:
    with pytest.raises(BadInput, match="too few images to split, 1 is left"):
        make(2, classes=2)
    assert len(make(3, classes=3).train) == 1


def test_a_batch_is_normalised() -> None:
    some = make(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    index = torch.tensor([3, 1, 3])
    batch, labels = some.train.batch(index)
    pixels = some.train.images[index].float() / 255
    expected = (pixels - torch.tensor([0.5, 0.25, 0.0]).view(3, 1, 1)) / torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    torch.testing.assert_close(batch, expected)
    assert torch.equal(labels, some.train.labels[index])


def test_measured_moments_normalise() -> None:
    some = make(400)
    everything = torch.cat([split.batch(torch.arange(len(split)))[0] for split in (some.train, some.validation)])
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(everything.std((0, 2, 3)), torch.ones(3), atol=0.02, rtol=0)


def test_floats_are_taken_as_they_are() -> None:
    pixels = torch.randn(50, 2, 4, 4, dtype=torch.float64)
    some = from_tensors("floats", (pixels, torch.arange(50) % 2))
    assert some.train.images.dtype == torch.float32
    torch.testing.assert_close(some.train.batch(torch.arange(5))[0], some.train.images[:5])


def test_grey_images_serve_three_channels() -> None:
    labels = torch.arange(50) % 2
    some = from_tensors("grey", (images(50, 1), labels), channels=3, mean=(0.3,), std=(0.5,))
    batch, _ = some.train.batch(torch.arange(4))
    assert batch.shape == (4, 3, 8, 8)
    assert torch.equal(batch[:, 0], batch[:, 2])
    assert some.train.images.shape[1] == 1
    assert some.train.channels == 3
    by_mean = from_tensors("grey", (images(50, 1), labels), mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert by_mean.train.batch(torch.arange(4))[0].shape == (4, 3, 8, 8)


def test_colour_is_refused_for_one_channel() -> None:
    with pytest.raises(BadInput, match=r"images have 3 channels but 1 are asked for.*teacher with 3 input channels"):
        make(channels=1)


def test_a_split_moves() -> None:
    moved = make().to("meta")
    assert moved.test is not None
    assert {moved.train.images.device.type, moved.validation.mean.device.type, moved.test.std.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("pixels", "labels", "text"),
    [
        (images(4)[0], torch.arange(4), r"shape \(3, 8, 8\); expected \(N, C, H, W\)"),
        (images(4), torch.zeros(4, 2).long(), r"labels have shape \(4, 2\); expected one integer"),
        (images(4), torch.tensor([0.0, 1.0, 0.5, 1.0]), "labels are float32; store them as integers"),
        (images(4), torch.tensor([True, False, True, True]), "labels are bool; store them as integers"),
        (images(4), torch.arange(3), "4 images but 3 labels"),
        (images(4)[:0], torch.arange(0), "no images"),
        (images(4)[..., :0], torch.arange(4), "no images"),
        (images(4).int(), torch.arange(4), "images are int32; store them as uint8"),
        (images(4), torch.tensor([0, 1, -1, 2]), "label -1 is negative"),
        (images(4), torch.tensor([0, 1, 9, 2]), "label 9 is out of range"),
        (images(4), torch.tensor([3, 3, 3, 3]), "1 class in the training data; at least 2"),
        (torch.full((4, 1, 2, 2), torch.nan), torch.arange(4), "image 0 holds NaN or infinite"),
        (torch.ones(4, 1, 2, 2).index_fill(0, torch.tensor(2), torch.inf), torch.arange(4), "image 2 holds NaN"),
    ],
)
def test_bad_tensors_are_refused(pixels: Tensor, labels: Tensor, text: str) -> None:
    with pytest.raises(BadInput, match=f"^some, train: .*{text}|^some: .*{text}") as error:
        from_tensors("some", (pixels, labels))
    message(error)


def test_labels_beyond_the_given_classes_are_refused() -> None:
    with pytest.raises(BadInput, match="label 3 is out of range for 3 classes"):
        make(classes=4) and from_tensors("some", (images(8), torch.arange(8) % 4), classes=3)
    assert from_tensors("some", (images(8), torch.arange(8) % 4), classes=9).classes == 9


def test_unlike_train_and_test_are_refused() -> None:
    with pytest.raises(BadInput, match=r"train images are \(3, 8, 8\) but \(3, 9, 9\) in test"):
        from_tensors("some", (images(8), torch.arange(8)), (images(8, size=9), torch.arange(8)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mean": (0.1, 0.2)}, "mean has 2 values for 3 channels; give 1 or 3"),
        ({"std": (1.0, 0.0, 1.0)}, "std is 1.0, 0.0, 1.0; give positive"),
        ({"mean": (float("nan"),)}, "mean is nan; give finite"),
    ],
)
def test_bad_moments_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInput, match=text):
        make(**options)


class _First(nn.Module):
    """Calls every image the class that its first pixel says; notes the mode it was run in."""

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return nn.functional.one_hot(x[:, 0, 0, 0].round().long(), 4).float()


def test_accuracy_counts_the_right_ones() -> None:
    pixels = torch.zeros(50, 1, 2, 2, dtype=torch.uint8)
    labels = torch.arange(50) % 4
    pixels[:, 0, 0, 0] = labels.byte()
    pixels[:5, 0, 0, 0] = (labels[:5] + 1).byte() % 4
    split = Split(pixels, labels, torch.tensor([0.0]), torch.tensor([1 / 255]))
    model = _First().train()
    assert accuracy(model, split, batch_size=7) == 0.9
    assert model.training


# --- augmentation


def reference(batch: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """What `Augmentation` does, one image at a time."""
    crop, count = augmentation.crop, len(batch)
    top, left = torch.randint(2 * crop + 1, (2, count), generator=generator)
    mirrored = torch.randint(2, (1, count), generator=generator)[0]
    out = []
    for image, y, x, mirror in zip(batch, top.tolist(), left.tolist(), mirrored.tolist(), strict=True):
        height, width = image.shape[1:]
        canvas = image.new_zeros(image.shape[0], height + 2 * crop, width + 2 * crop)
        canvas[:, crop : crop + height, crop : crop + width] = image
        window = canvas[:, y : y + height, x : x + width]
        out.append(window.flip(-1) if mirror and augmentation.flip else window)
    return torch.stack(out)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 9),
    channels=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    crop=st.integers(0, 4),
    flip=st.booleans(),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
)
def test_augmentation_is_that_of_single_images(
    count: int, channels: int, height: int, width: int, crop: int, flip: bool, dtype: torch.dtype
) -> None:
    batch = torch.randint(1, 256, (count, channels, height, width)).to(dtype)
    augmentation = Augmentation(crop, flip)
    before = batch.clone()
    result = augmentation(batch, torch.Generator().manual_seed(count))
    assert torch.equal(result, reference(batch, augmentation, torch.Generator().manual_seed(count)))
    assert torch.equal(batch, before)


# --- batches


def counting_teacher(calls: list[int]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.mean((2, 3))

    return forward


@pytest.mark.parametrize("augmentation", [None, Augmentation(2, True)])
def test_every_pass_sees_the_same_batches(augmentation: Augmentation | None) -> None:
    split = make().train
    calls: list[int] = []
    batches = Batches(split, counting_teacher(calls), 2, 16, augmentation, seed=5)
    passes = [list(batches) for _ in range(2)]
    assert len(calls) == len(batches) == 2 * (len(split) // 16)
    for one, two in zip(*passes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        torch.testing.assert_close(one[2], one[0].mean((2, 3)))
    other = list(Batches(split, counting_teacher(calls), 2, 16, augmentation, seed=6))
    assert not torch.equal(other[0][0], passes[0][0][0])


def test_a_broken_off_pass_is_taken_up() -> None:
    calls: list[int] = []
    batches = Batches(make().train, counting_teacher(calls), 1, 16, Augmentation(1), seed=0)
    next(iter(batches))
    whole = list(batches)
    assert len(calls) == len(whole) == len(batches)


def test_logits_of_the_whole_split_are_computed_once() -> None:
    split = make().train
    calls: list[int] = []
    teacher = TeacherLogits(counting_teacher(calls), split, batch_size=30)
    for seed in (1, 2):
        for pixels, _, logits in Batches(split, teacher, 1, 16, None, seed=seed):
            torch.testing.assert_close(logits, pixels.mean((2, 3)))
    assert sum(calls) == len(split)
    assert not teacher.whole().requires_grad


@pytest.mark.parametrize(("augmentation", "views"), [(Augmentation(2, True), 4), (Augmentation(0, True), 2)])
def test_views_take_turns_and_the_teacher_sees_each_once(augmentation: Augmentation, views: int) -> None:
    split = make().train
    assert augmentation.views == views
    calls: list[int] = []
    teacher = TeacherLogits(counting_teacher(calls), split, batch_size=30)
    epochs = 2 * views + 1
    seen: dict[tuple[int, int], Tensor] = {}
    batches = Batches(split, teacher, epochs, 16, augmentation, seed=3, views=views)
    for step, ((index, _, _), (images, labels, logits)) in enumerate(zip(batches.schedule, batches, strict=True)):
        assert torch.equal(labels, split.labels[index])
        torch.testing.assert_close(logits, images.mean((2, 3)))
        view = batches.schedule.view_of(step)
        assert view == step // batches.schedule.steps_per_epoch % views
        for place, image in zip(index.tolist(), images, strict=True):
            assert torch.equal(seen.setdefault((place, view), image), image)
    assert sum(calls) == views * len(split) + 1  # one to learn the number of classes
    again = Batches(split, teacher, 1, 16, augmentation, seed=3, views=views)
    assert torch.equal(next(iter(again))[0], next(iter(batches))[0])
    list(again)
    assert sum(calls) == views * len(split) + 1


def test_both_sides_of_an_image_are_among_two_views() -> None:
    split = make().train
    schedule = Schedule(split, 2, 16, Augmentation(0, True), seed=0, views=2)
    index = torch.arange(len(split))
    one, two = (schedule.images(index, view) for view in (0, 1))
    assert torch.equal(one.flip(-1), two)
    assert not torch.equal(one, split.batch(index)[0])


def test_a_short_schedule_does_not_make_the_teacher_see_whole_views() -> None:
    split = make().train
    calls: list[int] = []
    teacher = TeacherLogits(counting_teacher(calls), split)
    batches = Batches(split, teacher, 16 / len(split), 16, Augmentation(1), seed=0, views=4)
    list(batches)
    list(batches)
    assert sum(calls) == 16 * len(batches) + 1


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("views", [None, 2])
def test_a_training_can_begin_in_the_middle(keep: bool, views: int | None) -> None:
    batches = Batches(make().train, counting_teacher([]), 2, 16, Augmentation(1, True), seed=0, views=views, keep=keep)
    whole = list(batches)
    for start in (1, len(whole) // 2, len(whole) - 1, len(whole)):
        rest = list(batches.after(start))
        assert len(rest) == len(whole) - start
        for one, two in zip(rest, whole[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_kept_batches_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []
    normalise = Split.normalise
    monkeypatch.setattr(Split, "normalise", lambda s, images: (prepared.append(1), normalise(s, images))[1])
    split = make().train
    for keep, times in ((True, 1), (False, 3)):
        batches = Batches(split, None, 1, 16, Augmentation(1), seed=0, keep=keep)
        prepared.clear()
        for _ in range(3):
            list(batches)
        assert len(prepared) == times * len(batches)


def test_teacher_logits_carry_no_gradient() -> None:
    weight = torch.ones(3, requires_grad=True)
    split = make().train
    for augmentation in (None, Augmentation(1)):
        for teacher in (lambda x: x.mean((2, 3)) * weight, TeacherLogits(lambda x: x.mean((2, 3)) * weight, split)):
            _, _, logits = next(iter(Batches(split, teacher, 1, 16, augmentation, seed=0)))
            assert not logits.requires_grad
            assert not logits.is_inference()  # a loss may have to save it


@settings(max_examples=40, deadline=None)
@given(epochs=st.floats(0, 3), batch_size=st.integers(1, 100))
def test_the_length_of_a_schedule(epochs: float, batch_size: int) -> None:
    split = make(50).train
    schedule = Schedule(split, epochs, batch_size, None, seed=0)
    sizes = [len(index) for index in schedule.indices()]
    assert len(sizes) == len(schedule)
    assert (len(sizes) > 0) == (epochs > 0)
    assert set(sizes) <= {min(batch_size, len(split))}


def test_an_epoch_holds_each_image_once_and_epochs_differ() -> None:
    split = make(100).train
    steps = list(Schedule(split, 2, 8, None, seed=0).indices())
    epochs = [torch.cat(steps[:9]), torch.cat(steps[9:])]
    assert all(len(epoch.unique()) == len(split) == 72 for epoch in epochs)
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("augmentation", [None, Augmentation(1, True)])
def test_batches_are_contiguous(augmentation: Augmentation | None) -> None:
    split = make().train
    channels_last = replace(split, images=split.images.contiguous(memory_format=torch.channels_last))
    _, pixels, _ = next(iter(Schedule(channels_last, 1, 8, augmentation, 0)))
    assert pixels.shape[1] > 1
    assert pixels.is_contiguous()
    assert pixels.dtype == torch.float32


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 0), (-1, 8), (float("inf"), 8), (float("nan"), 8)])
def test_an_impossible_schedule_is_refused(epochs: float, batch_size: int) -> None:
    with pytest.raises(ValueError, match=r"batch_size: 0|epochs: (-1|inf|nan); expected"):
        Schedule(make().train, epochs, batch_size, None, seed=0)


# --- the spec


@pytest.mark.parametrize(
    ("spec", "options", "text"),
    [
        ("mnist:x", {}, "'mnist:x' is no known data set; give one of digits, cifar10:DIR, .*npz:FILE"),
        ("", {}, "no known data set"),
        ("digits:x", {}, "write it as digits"),
        ("cifar10", {}, "write it as cifar10:DIR"),
        ("npz:", {}, "write it as npz:FILE"),
        ("digits", {"download": True}, "digits cannot be downloaded; leave out --download, which is for cifar10"),
        ("npz:x.npz", {"download": True}, "npz cannot be downloaded"),
        ("digits", {"image_size": 0}, "image size 0 is out of range"),
        ("digits", {"image_size": 100_000}, "image size 100000 is out of range"),
    ],
)
def test_a_bad_spec_is_refused(spec: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInput, match=text) as error:
        load(spec, **options)
    message(error)


# --- digits


def test_digits() -> None:
    digits = load("digits")
    assert digits.test is not None
    assert [len(split) for split in (digits.train, digits.validation, digits.test)] == [1294, 144, 359]
    assert digits.classes == 10
    assert digits.augmentation == Augmentation(crop=1, flip=False)
    assert digits.train.images.shape[1:] == (1, 8, 8)
    batch, _ = digits.train.batch(torch.arange(1294))
    assert abs(float(batch.mean())) < 0.05
    assert abs(float(batch.std()) - 1) < 0.05
    assert int(digits.train.labels.bincount().min()) > 100


def test_the_test_digits_do_not_depend_on_the_seed() -> None:
    one, two = load("digits", seed=1), load("digits", seed=2, image_size=10)
    assert one.test is not None
    assert two.test is not None
    assert torch.equal(one.test.labels, two.test.labels)
    assert two.test.image_size == (10, 10)
    assert not torch.equal(one.train.labels, two.train.labels)


def test_the_digits_file_is_small_and_scikit_learns() -> None:
    file = resources.files("n2n_fast").joinpath("digits.npz")
    content = file.read_bytes()
    assert len(content) < 100_000
    assert "CC BY 4.0" in resources.files("n2n_fast").joinpath("digits.txt").read_text()
    sklearn = pytest.importorskip("sklearn.datasets")
    with resources.as_file(file) as path, np.load(path) as arrays:
        assert np.array_equal(arrays["images"], sklearn.load_digits().images)
        assert np.array_equal(arrays["labels"], sklearn.load_digits().target)


# --- cifar, svhn: small files in the real formats


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(folder: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray[Any, Any]]:
    """Twenty images in each of the files that torchvision lists, which then have the right sums."""
    folder.mkdir(parents=True)
    key, classes = ("labels", 10) if kind is datasets.CIFAR10 else ("fine_labels", 100)
    written = {}
    lists = {}
    for part in ("train_list", "test_list"):
        lists[part] = []
        for name, _ in getattr(kind, part):
            pixels = RNG.integers(0, 256, (20, 3072), dtype=np.uint8)
            labels = RNG.integers(0, classes, 20).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": pixels, key: labels}))
            lists[part].append([name, md5(folder / name)])
            written[name] = pixels
    meta = dict(kind.meta)
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: [str(i) for i in range(classes)]}))
    meta["md5"] = md5(folder / meta["filename"])
    for name, value in {**lists, "meta": meta}.items():
        monkeypatch.setattr(kind, name, value)
    return written


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("name", "kind"), [("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)])
def test_cifar(name: str, kind: Any, flat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / kind.base_folder
    written = write_cifar(folder, kind, monkeypatch)
    cifar = load(f"{name}:{folder if flat else tmp_path / 'data'}")
    assert cifar.test is not None
    assert cifar.classes == (10 if name == "cifar10" else 100)
    assert cifar.augmentation == Augmentation(crop=4, flip=True)
    assert len(cifar.train) + len(cifar.validation) == 20 * len(kind.train_list)
    expected = torch.from_numpy(written[kind.test_list[0][0]].reshape(20, 3, 32, 32))
    assert torch.equal(cifar.test.images, expected)
    assert cifar.train.mean.numel() == 3


def test_a_cifar_file_of_other_content_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "cifar-10-batches-py", datasets.CIFAR10, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(print))
    with pytest.raises(BadInput, match=r"no cifar10, or a damaged one, in .*--download"):
        load(f"cifar10:{tmp_path}")


def write_svhn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, Any]]:
    scipy_io = pytest.importorskip("scipy.io")
    folder.mkdir(parents=True, exist_ok=True)
    written, listed = {}, dict(datasets.SVHN.split_list)
    for part in ("train", "test"):
        pixels = RNG.integers(0, 256, (32, 32, 3, 30), dtype=np.uint8)
        labels = (np.arange(30) % 10 + 1).reshape(-1, 1).astype(np.uint8)
        path = folder / f"{part}_32x32.mat"
        scipy_io.savemat(path, {"X": pixels, "y": labels})
        listed[part] = [listed[part][0], path.name, md5(path)]
        written[part] = (pixels, labels)
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)
    return written


@pytest.mark.parametrize("folder", ["", "SVHN", "svhn"])
def test_svhn(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = write_svhn(tmp_path / folder, monkeypatch)["test"]
    svhn = load(f"svhn:{tmp_path}")
    assert svhn.test is not None
    assert torch.equal(svhn.test.images, torch.from_numpy(pixels.transpose(3, 2, 0, 1).copy()))
    assert svhn.test.labels.tolist() == (labels.ravel() % 10).tolist()  # 10 stands for the digit 0
    assert svhn.augmentation == Augmentation(crop=4, flip=False)


def test_svhn_without_scipy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_importable", lambda module: False)
    with pytest.raises(BadInput, match="pip install scipy"):
        load(f"svhn:{tmp_path}")


# --- fashion-mnist


def idx(array: np.ndarray[Any, Any]) -> bytes:
    """The idx format: two zero bytes, 8 for uint8, the number of dimensions, each dimension, the values."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder: Path, packed: bool, count: int = 40) -> np.ndarray[Any, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        pixels = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            path = folder / f"{part}-{name}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))
    return pixels


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
def test_fashion_mnist(folder: str, packed: bool, tmp_path: Path) -> None:
    pixels = write_fashion(tmp_path / folder, packed)
    before = sorted(tmp_path.rglob("*"))
    fashion = load(f"fashion-mnist:{tmp_path}", channels=3)
    assert fashion.test is not None
    assert torch.equal(fashion.test.images[:, 0], torch.from_numpy(pixels))
    assert fashion.test.labels.tolist() == [i % 10 for i in range(40)]
    assert fashion.augmentation == Augmentation(crop=0, flip=True)
    assert fashion.test.batch(torch.arange(2))[0].shape == (2, 3, 28, 28)
    assert sorted(tmp_path.rglob("*")) == before


def test_images_are_resized(tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=False)
    fashion = load(f"fashion-mnist:{tmp_path}", image_size=32)
    assert fashion.train.images.shape[1:] == (1, 32, 32)
    assert fashion.train.images.dtype == torch.uint8


@pytest.mark.parametrize("packed", [True, False])
def test_truncated_fashion_mnist_is_refused(packed: bool, tmp_path: Path) -> None:
    write_fashion(tmp_path, packed)
    path = next(tmp_path.glob("train-images*"))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BadInput, match=r"fashion-mnist cannot be read from .*--download to fetch it anew") as error:
        load(f"fashion-mnist:{tmp_path}")
    message(error)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion-mnist"])
def test_a_missing_set_names_the_directory_and_the_flag(name: str, tmp_path: Path) -> None:
    if name == "svhn":
        pytest.importorskip("scipy.io")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match=f"no {name}, .* in {folder};.*--download") as error:
            load(f"{name}:{folder}")
        message(error)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BadInput, match=f"{file} is not a directory"):
        load(f"{name}:{file}")


def test_an_unreadable_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(datasets, "CIFAR10", type("Refusing", (datasets.CIFAR10,), {"__init__": refuse}))
    with pytest.raises(BadInput, match=r"cannot be read \(Permission denied\)"):
        load(f"cifar10:{tmp_path}")


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise OSError("no route to host\nat all")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    with pytest.raises(BadInput, match=r"cannot be downloaded into .*\(OSError: no route to host\)") as error:
        load(f"cifar10:{tmp_path}", download=True)
    message(error)


# --- imagefolder


def write_folder(folder: Path, names: tuple[str, ...] = ("cat", "dog"), size: tuple[int, int] = (20, 16)) -> None:
    for shade, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for place in range(10):
            pixels = np.full((size[1], size[0], 3), 100 * shade + place, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{place}.png")


@pytest.mark.parametrize("held", ["test", "val", None])
def test_imagefolder(held: str | None, tmp_path: Path) -> None:
    write_folder(tmp_path / "train" if held else tmp_path)
    if held:
        write_folder(tmp_path / held)
    folder = load(f"imagefolder:{tmp_path}")
    assert folder.test is not None
    assert folder.train.images.shape[1:] == (3, 16, 16)  # the short side of the first image
    assert len(folder.test) == (20 if held else 4)
    assert folder.classes == 2
    assert folder.augmentation == Augmentation(crop=2, flip=True)
    assert torch.equal(folder.train.images[:, 0, 3, 3] // 100, folder.train.labels.byte())
    assert load(f"imagefolder:{tmp_path}", image_size=24).train.image_size == (24, 24)


def test_grey_imagefolder_for_one_channel(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(BadInput, match="is no grey image but 1 channel is asked for"):
        load(f"imagefolder:{tmp_path}", channels=1)
    for path in tmp_path.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert load(f"imagefolder:{tmp_path}", channels=1).train.images.shape[1] == 1
    assert load(f"imagefolder:{tmp_path}").train.images.shape[1] == 3


def test_bad_imagefolders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="nowhere is not a directory"):
        load(f"imagefolder:{tmp_path / 'nowhere'}")
    with pytest.raises(BadInput, match="is no folder of class folders of images"):
        load(f"imagefolder:{tmp_path}")
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", ("cat", "cow"))
    with pytest.raises(BadInput, match=r"differ in their class folders \(cow, dog\)"):
        load(f"imagefolder:{tmp_path}")
    write_folder(tmp_path / "one", ("cat",))
    with pytest.raises(BadInput, match="1 class in the training data"):
        load(f"imagefolder:{tmp_path / 'one'}")
    broken = tmp_path / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(BadInput, match=r"3\.png cannot be decoded .*; remove or repair it") as error:
        load(f"imagefolder:{tmp_path / 'train'}")
    message(error)
    monkeypatch.setattr(data, "_memory_bytes", lambda: 10_000)
    with pytest.raises(BadInput, match=r"GB are needed for the images but half of memory is 0\.0 GB"):
        load(f"imagefolder:{tmp_path / 'test'}")


# --- npz


@pytest.mark.parametrize(
    "shape",
    [(30, 6, 5), (30, 6, 5, 3), (30, 3, 6, 5), (30, 6, 5, 1), (30, 1, 6, 5), (30, 9, 9, 4), (30, 4, 9, 9)],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", ">f8", "float16"])
def test_npz_layouts(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, shape).astype(dtype)
    np.savez(tmp_path / "some.npz", x=pixels, y=np.arange(30) % 3)
    some = load(f"npz:{tmp_path / 'some.npz'}")
    assert some.test is not None
    channels = {3: 1}.get(len(shape)) or min(shape[1], shape[3])
    height, width = max(shape[1:]), sorted(shape[1:])[-2]
    assert some.train.images.shape[1:] == (channels, height, width)
    assert some.train.images.dtype == (torch.uint8 if dtype in ("uint8", "int64") else torch.float32)
    assert some.augmentation is None
    assert len(some.test) == 6


def test_npz_of_train_and_test(tmp_path: Path) -> None:
    arrays = {f"{name}_{part}": array for part in ("train", "test") for name, array in _arrays(20).items()}
    np.savez_compressed(tmp_path / "some.npz", **arrays)
    some = load(f"npz:{tmp_path / 'some.npz'}", classes=7)
    assert some.test is not None
    assert torch.equal(some.test.images[:, 0], torch.from_numpy(arrays["x_test"]))
    assert some.classes == 7


def _arrays(count: int) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": RNG.integers(0, 256, (count, 4, 4), dtype=np.uint8), "y": np.arange(count) % 2}


X, Y = _arrays(20)["x"], _arrays(20)["y"]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"x": X}, "holds x; name the arrays x and y"),
        ({}, "holds nothing; name the arrays"),
        ({"x": X.reshape(20, 16), "y": Y}, r"array x has shape \(20, 16\); expected \(N, H, W\)"),
        ({"x": X[None, None], "y": Y}, r"array x has shape \(1, 1, 20, 4, 4\); expected"),
        ({"x": X, "y": Y[:7]}, "20 images but 7 labels"),
        ({"x": X, "y": Y - 1}, "label -1 is negative"),
        ({"x": X, "y": Y * 100}, "label 100 is out of range"),
        ({"x": X, "y": Y.astype("uint64") + 2**63}, "label 9223372036854775809 is out of range"),
        ({"x": X, "y": Y * 0.5}, "labels are float64; store them as integers"),
        ({"x": X, "y": Y * 0}, "1 class in the training data"),
        ({"x": X, "y": np.eye(2)[Y].astype(int)}, r"labels have shape \(20, 2\)"),
        ({"x": X[:0], "y": Y[:0]}, "no images"),
        ({"x": np.where(X > 9, X, np.nan), "y": Y}, "holds NaN or infinite values"),
        ({"x": X.astype(int) * 2, "y": Y}, r"array x is int64 beyond 0\.\.255"),
        ({"x": X.astype(complex), "y": Y}, "array x is complex128; store numbers"),
        ({"x": X.astype("U3"), "y": Y}, "array x is <U3; store numbers"),
        ({"x": X.astype(object), "y": Y}, "array x holds Python objects, not numbers"),
        ({"x": X, "y": Y.astype(object)}, "array y holds Python objects"),
    ],
)
def test_bad_arrays_are_refused(arrays: dict[str, Any], text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    np.savez(path, **arrays)
    with pytest.raises(BadInput, match=text) as error:
        load(f"npz:{path}")
    assert str(path) in message(error)


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    np.savez(good, x=X, y=Y)
    content = good.read_bytes()
    cases = {"truncated": content[:300], "empty": b"", "text": b"hello", "cut": content[:-30]}
    for name, case in cases.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(case)
        with pytest.raises(BadInput, match=r"\.npz is no \.npz file, or a damaged one") as error:
            load(f"npz:{path}")
        message(error)
    np.save(tmp_path / "single.npy", X)
    with pytest.raises(BadInput, match=r"is no \.npz file"):
        load(f"npz:{tmp_path / 'single.npy'}")
    with pytest.raises(BadInput, match="does not exist"):
        load(f"npz:{tmp_path / 'nowhere.npz'}")
    with pytest.raises(BadInput, match="is a directory"):
        load(f"npz:{tmp_path}")


def npy_header(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros((20, 1000, 1000), np.uint8), y=Y)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(data, "_memory_bytes", lambda: 30_000_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(BadInput, match=r"0\.0 GB are needed for the images but half of memory is 0\.0 GB"):
        load(f"npz:{path}")


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lie.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy_header((20, 1000, 1000)) + b"\0" * 100)
        archive.writestr("y.npy", npy_header((20,)) + b"\0" * 20)
    with pytest.raises(BadInput, match=r"array x declares shape \(20, 1000, 1000\) but holds 100 bytes; save it anew"):
        load(f"npz:{path}")


def test_resizing_beyond_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_memory_bytes", lambda: 10**9)
    with pytest.raises(
        BadInput, match=r"digits: 1\.8 GB are needed .*half of memory is 0\.5 GB; use a smaller --image"
    ):
        load("digits", image_size=1000)
