"""Splits, their normalisation and augmentation, accuracy on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from n2n_fast.training.data import Augmentation, Split, accuracy, from_tensors
from small_sets import images, make, refused


def test_validation_is_a_tenth_but_at_most_5000():
    labels = torch.arange(60000) % 10
    blank = torch.arange(60000, dtype=torch.int32).view(torch.uint8).view(-1, 4, 1, 1)
    test = (blank[:100], labels[:100])
    large = from_tensors("large", (blank, labels), test)
    assert (len(large.train), len(large.validation)) == (55000, 5000)
    assert large.validation.labels.bincount().tolist() == [500] * 10
    assert len(from_tensors("small", (blank[:1000], labels[:1000]), test).validation) == 100
    assert len(from_tensors("counted", (blank, labels), test, validation=7000).validation) == 7000


def test_too_few_to_split_are_refused():
    with refused("too few images to split, 1 is left"):
        make(2, classes=2)
    assert len(make(3, classes=3).train) == 1


def test_a_batch_is_normalised():
    some = make(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    index = torch.tensor([3, 1, 3])
    batch, labels = some.train.batch(index)
    pixels = some.train.images[index].float() / 255
    expected = (pixels - torch.tensor([0.5, 0.25, 0.0]).view(3, 1, 1)) / torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    torch.testing.assert_close(batch, expected)
    assert torch.equal(labels, some.train.labels[index])


def test_measured_moments_normalise():
    some = make(400)
    everything = torch.cat([split.batch(torch.arange(len(split)))[0] for split in (some.train, some.validation)])
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(everything.std((0, 2, 3)), torch.ones(3), atol=0.02, rtol=0)


def test_floats_are_taken_as_they_are():
    pixels = torch.randn(50, 2, 4, 4, dtype=torch.float64)
    some = from_tensors("floats", (pixels, torch.arange(50) % 2))
    assert some.train.images.dtype == torch.float32
    torch.testing.assert_close(some.train.batch(torch.arange(5))[0], some.train.images[:5])


def test_grey_images_serve_three_channels():
    labels = torch.arange(50) % 2
    some = from_tensors("grey", (images(50, 1), labels), channels=3, mean=(0.3,), std=(0.5,))
    batch, _ = some.train.batch(torch.arange(4))
    assert batch.shape == (4, 3, 8, 8)
    assert torch.equal(batch[:, 0], batch[:, 2])
    assert some.train.images.shape[1] == 1
    assert some.train.channels == 3
    by_mean = from_tensors("grey", (images(50, 1), labels), mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert by_mean.train.batch(torch.arange(4))[0].shape == (4, 3, 8, 8)


def test_colour_is_refused_for_one_channel():
    with refused(r"images have 3 channels but 1 are asked for.*teacher with 3 input channels"):
        make(channels=1)


def test_a_split_moves():
    moved = make().to("meta")
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
def test_bad_tensors_are_refused(pixels, labels, text):
    with refused(f"^some(, train)?: .*{text}"):
        from_tensors("some", (pixels, labels))


def test_labels_beyond_the_given_classes_are_refused():
    with refused("label 3 is out of range for 3 classes"):
        make(classes=4) and from_tensors("some", (images(8), torch.arange(8) % 4), classes=3)
    assert from_tensors("some", (images(8), torch.arange(8) % 4), classes=9).classes == 9


def test_unlike_train_and_test_are_refused():
    with refused(r"train images are \(3, 8, 8\) but \(3, 9, 9\) in test"):
        from_tensors("some", (images(8), torch.arange(8)), (images(8, size=9), torch.arange(8)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mean": (0.1, 0.2)}, "mean has 2 values for 3 channels; give 1 or 3"),
        ({"std": (1.0, 0.0, 1.0)}, "std is 1.0, 0.0, 1.0; give positive"),
        ({"mean": (float("nan"),)}, "mean is nan; give finite"),
    ],
)
def test_bad_moments_are_refused(options, text):
    with refused(text):
        make(**options)


class _First(nn.Module):
    """Calls every image the class that its first pixel says; notes the mode it was run in."""

    def forward(self, x):
        assert not self.training
        return nn.functional.one_hot(x[:, 0, 0, 0].round().long(), 4).float()


def test_accuracy_counts_the_right_ones():
    pixels = torch.zeros(50, 1, 2, 2, dtype=torch.uint8)
    labels = torch.arange(50) % 4
    pixels[:, 0, 0, 0] = labels.byte()
    pixels[:5, 0, 0, 0] = (labels[:5] + 1).byte() % 4
    split = Split(pixels, labels, torch.tensor([0.0]), torch.tensor([1 / 255]))
    model = _First().train()
    assert accuracy(model, split, batch_size=7) == 0.9
    assert model.training


# --- augmentation


def reference(batch, augmentation, generator):
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
def test_augmentation_is_that_of_single_images(count, channels, height, width, crop, flip, dtype: torch.dtype):
    batch = torch.randint(1, 256, (count, channels, height, width)).to(dtype)
    augmentation = Augmentation(crop, flip)
    before = batch.clone()
    result = augmentation(batch, torch.Generator().manual_seed(count))
    assert torch.equal(result, reference(batch, augmentation, torch.Generator().manual_seed(count)))
    assert torch.equal(batch, before)
