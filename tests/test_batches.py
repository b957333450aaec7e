"""Schedules, batches and the teacher's logits that go with them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from n2n_fast.training.batches import Batches, Schedule, TeacherLogits
from n2n_fast.training.data import Augmentation, Split
from small_sets import make


def counting_teacher(calls):
    def forward(x):
        calls.append(len(x))
        return x.mean((2, 3))

    return forward


@pytest.mark.parametrize("augmentation", [None, Augmentation(2, True)])
def test_every_pass_sees_the_same_batches(augmentation):
    split = make().train
    calls = []
    batches = Batches(split, counting_teacher(calls), 2, 16, augmentation, seed=5)
    passes = [list(batches) for _ in range(2)]
    assert len(calls) == len(batches) == 2 * (len(split) // 16)
    for one, two in zip(*passes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        torch.testing.assert_close(one[2], one[0].mean((2, 3)))
    other = list(Batches(split, counting_teacher(calls), 2, 16, augmentation, seed=6))
    assert not torch.equal(other[0][0], passes[0][0][0])


def test_a_broken_off_pass_is_taken_up():
    calls = []
    batches = Batches(make().train, counting_teacher(calls), 1, 16, Augmentation(1), seed=0)
    next(iter(batches))
    whole = list(batches)
    assert len(calls) == len(whole) == len(batches)


def test_logits_of_the_whole_split_are_computed_once():
    split = make().train
    calls = []
    teacher = TeacherLogits(counting_teacher(calls), split, batch_size=30)
    for seed in (1, 2):
        for pixels, _, logits in Batches(split, teacher, 1, 16, None, seed=seed):
            torch.testing.assert_close(logits, pixels.mean((2, 3)))
    assert sum(calls) == len(split)
    assert not teacher.whole().requires_grad


@pytest.mark.parametrize(("augmentation", "views"), [(Augmentation(2, True), 4), (Augmentation(0, True), 2)])
def test_views_take_turns_and_the_teacher_sees_each_once(augmentation, views):
    split = make().train
    assert augmentation.views == views
    calls = []
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


def test_both_sides_of_an_image_are_among_two_views():
    split = make().train
    schedule = Schedule(split, 2, 16, Augmentation(0, True), seed=0, views=2)
    index = torch.arange(len(split))
    one, two = (schedule.images(index, view) for view in (0, 1))
    assert torch.equal(one.flip(-1), two)
    assert not torch.equal(one, split.batch(index)[0])


def test_a_short_schedule_does_not_make_the_teacher_see_whole_views():
    split = make().train
    calls = []
    teacher = TeacherLogits(counting_teacher(calls), split)
    batches = Batches(split, teacher, 16 / len(split), 16, Augmentation(1), seed=0, views=4)
    list(batches)
    list(batches)
    assert sum(calls) == 16 * len(batches) + 1


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("views", [None, 2])
def test_a_training_can_begin_in_the_middle(keep, views):
    batches = Batches(make().train, counting_teacher([]), 2, 16, Augmentation(1, True), seed=0, views=views, keep=keep)
    whole = list(batches)
    for start in (1, len(whole) // 2, len(whole) - 1, len(whole)):
        rest = list(batches.after(start))
        assert len(rest) == len(whole) - start
        for one, two in zip(rest, whole[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_kept_batches_are_prepared_once(monkeypatch):
    prepared = []
    normalise = Split.normalise
    monkeypatch.setattr(Split, "normalise", lambda s, images: (prepared.append(1), normalise(s, images))[1])
    split = make().train
    for keep, times in ((True, 1), (False, 3)):
        batches = Batches(split, None, 1, 16, Augmentation(1), seed=0, keep=keep)
        prepared.clear()
        for _ in range(3):
            list(batches)
        assert len(prepared) == times * len(batches)


def test_teacher_logits_carry_no_gradient():
    weight = torch.ones(3, requires_grad=True)
    split = make().train
    for augmentation in (None, Augmentation(1)):
        for teacher in (lambda x: x.mean((2, 3)) * weight, TeacherLogits(lambda x: x.mean((2, 3)) * weight, split)):
            _, _, logits = next(iter(Batches(split, teacher, 1, 16, augmentation, seed=0)))
            assert not logits.requires_grad
            assert not logits.is_inference()  # a loss may have to save it


@settings(max_examples=40, deadline=None)
@given(epochs=st.floats(0, 3), batch_size=st.integers(1, 100))
def test_the_length_of_a_schedule(epochs, batch_size):
    split = make(50).train
    schedule = Schedule(split, epochs, batch_size, None, seed=0)
    sizes = [len(index) for index in schedule.indices()]
    assert len(sizes) == len(schedule)
    assert (len(sizes) > 0) == (epochs > 0)
    assert set(sizes) <= {min(batch_size, len(split))}


def test_an_epoch_holds_each_image_once_and_epochs_differ():
    split = make(100).train
    steps = list(Schedule(split, 2, 8, None, seed=0).indices())
    epochs = [torch.cat(steps[:9]), torch.cat(steps[9:])]
    assert all(len(epoch.unique()) == len(split) == 72 for epoch in epochs)
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("augmentation", [None, Augmentation(1, True)])
def test_batches_are_contiguous(augmentation):
    split = make().train
    channels_last = replace(split, images=split.images.contiguous(memory_format=torch.channels_last))
    _, pixels, _ = next(iter(Schedule(channels_last, 1, 8, augmentation, 0)))
    assert pixels.shape[1] > 1
    assert pixels.is_contiguous()
    assert pixels.dtype == torch.float32


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 0), (-1, 8), (float("inf"), 8), (float("nan"), 8)])
def test_an_impossible_schedule_is_refused(epochs, batch_size):
    with pytest.raises(ValueError, match=r"batch_size: 0|epochs: (-1|inf|nan); expected"):
        Schedule(make().train, epochs, batch_size, None, seed=0)
