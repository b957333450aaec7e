"""Which images are for training, for validation and for the test."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from n2n_fast.files.errors import BadInput
from n2n_fast.training.data import ImageData, Split, from_tensors
from n2n_fast.training.splits import keys_of
from small_sets import identity, images, make


def content(split: Split | None) -> list[tuple[int, int]]:
    """The images and labels of a split, in no order."""
    assert split is not None
    return sorted(zip(keys_of(split.images).tolist(), split.labels.tolist(), strict=True))


def contents(data: ImageData) -> list[list[tuple[int, int]]]:
    return [content(split) for split in (data.train, data.validation, data.test)]


@settings(max_examples=50, deadline=None)
@given(count=st.integers(20, 300), classes=st.integers(2, 6), seed=st.integers(0, 99), share=st.floats(0.05, 0.5))
def test_what_is_cut_depends_on_the_images_alone(count: int, classes: int, seed: int, share: float) -> None:
    pixels, labels = images(count), torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    labels[:classes] = torch.arange(classes)
    first = from_tensors("some", (pixels, labels), validation=share)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert contents(from_tensors("other", (pixels[order], labels[order]), validation=share)) == contents(first)
    parts = [identity(split) for split in (first.train, first.validation, first.test) if split]
    assert sum(map(len, parts)) == count == len(set.union(*parts))
    for split, wanted in ((first.test, 0.2), (first.validation, 0.8 * share)):
        assert split is not None
        of_class = split.labels.bincount(minlength=classes) - wanted * labels.bincount(minlength=classes)
        assert float(of_class.abs().max()) <= 2


def test_copies_of_an_image_stay_together() -> None:
    some = from_tensors("some", (images(60).repeat(3, 1, 1, 1), torch.arange(60).repeat(3) % 4))
    parts = [identity(split) for split in (some.train, some.validation, some.test) if split]
    assert sum(map(len, parts)) == 60
    assert not any("too" in note for note in some.notes)
    with pytest.raises(BadInput, match="all images are the same; none can be set apart"):
        from_tensors("some", (images(1).repeat(9, 1, 1, 1), torch.arange(9) % 2))


def test_the_parts_of_a_data_set_are_used_as_they_are() -> None:
    pixels, labels = images(100), torch.arange(100) % 4
    train, validation, test = ((pixels[part], labels[part]) for part in (slice(60), slice(60, 90), slice(90, 100)))
    some = from_tensors("some", train, test, validation=validation)
    assert [len(split) for split in some.parts.values()] == [60, 30, 10]
    assert some.origins == {"train": "train", "validation": "validation", "test": "test"}
    halved = from_tensors("some", train, validation=validation)  # training images are none to test with
    assert [len(split) for split in halved.parts.values()] == [60, 15, 15]
    assert identity(halved.validation) | identity(halved.parts["test"]) == set(range(60, 90))
    assert halved.origins["test"] == "half of validation, by content"
    cut = from_tensors("some", train, test)
    assert [len(split) for split in cut.parts.values()] == [54, 6, 10]
    assert cut.origins["validation"] == "10% of train, by content"
    asked = from_tensors("some", train, test, validation=12)
    assert [len(split) for split in asked.parts.values()] == [48, 12, 10]
    both = from_tensors("some", train, 0.5, validation=0.1)
    assert [len(split) for split in both.parts.values()] == [27, 3, 30]


def test_the_same_images_in_two_parts_are_named() -> None:
    pixels, labels = images(40), torch.arange(40) % 4
    some = from_tensors(
        "some", (pixels[:30], labels[:30]), (pixels[25:], labels[25:]), validation=(pixels[:1], labels[:1])
    )
    assert some.notes == (
        "1 image of validation is in train too: image 0",
        "5 images of test are in train too: image 0, image 1, image 2 and 2 more",
    )


def test_the_digest_is_of_the_content() -> None:
    pixels, labels = images(40), torch.arange(40) % 4
    digests = {
        from_tensors(name, (p, y)).digest
        for name, p, y in (
            ("some", pixels, labels),
            ("renamed", pixels.clone(), labels),
            ("relabelled", pixels, (labels + 1) % 4),
            ("shorter", pixels[:39], labels[:39]),
        )
    }
    assert len(digests) == 3


def test_floats_and_bytes_of_other_shapes_have_keys() -> None:
    for array in (torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, 1, 2, 2)):
        assert keys_of(array).dtype == np.uint64
        assert len(set(keys_of(array).tolist())) == min(1, len(array))


@pytest.mark.parametrize("value", [0, -1, 80, 200, 1.5, float("nan")])
@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_part_that_cannot_be_cut_is_refused(part: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"some: {part} is {value}; give a share between 0 and 1 or a number of the"):
        make(80, **{part: value})
