"""A model's answers: plain and balanced accuracy, and classes numbered otherwise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from n2n_fast.training.answers import Answers, answers
from n2n_fast.training.data import Split


class Says(nn.Module):
    """Answers what the first pixel of an image says, with `outputs` logits."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        logits = nn.functional.one_hot(images[:, 0, 0, 0].long().clamp_min(0), self.outputs).float()
        return logits.where(images[:, :1, 0, 0] >= 0, torch.nan)


def answered(labels: Tensor, said: Tensor, classes: int, outputs: int | None = None) -> Answers:
    images = said.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    split = Split(images, labels, torch.zeros(1), torch.ones(1))
    model = Says(outputs or classes).train()
    result = answers(model, split, classes, batch_size=7)
    assert model.training
    return result


def test_nine_to_one() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    always = answered(labels, torch.zeros(100).long(), 2)
    assert (always.accuracy, always.balanced_accuracy, always.chance, always.majority) == (0.9, 0.5, 0.5, 0.9)
    assert not always.is_above_chance
    good = answered(labels, torch.cat([labels[:99], torch.zeros(1).long()]), 2)
    assert (good.accuracy, good.balanced_accuracy) == pytest.approx((0.99, 0.95))
    assert good.is_above_chance


def test_what_is_not_finite_is_wrong() -> None:
    labels = torch.arange(20) % 2
    some = answered(labels, labels.where(torch.arange(20) < 16, -1), 2)
    assert (some.accuracy, some.unusable) == (0.8, 4)


@settings(max_examples=100, deadline=None)
@given(
    order=st.integers(3, 12).flatmap(lambda n: st.permutations(range(n))),
    noise=st.floats(0, 0.5),
    seed=st.integers(0, 99),
)
def test_an_order_is_recognised(order: list[int], noise: float, seed: int) -> None:
    classes, generator = len(order), torch.Generator().manual_seed(seed)
    labels = torch.arange(60 * classes) % classes
    output_of = torch.tensor([order.index(label) for label in range(classes)])
    random = torch.randint(classes, labels.shape, generator=generator)
    said = torch.where(torch.rand(labels.shape, generator=generator) < noise, random, output_of[labels])
    moved = sum(a != b for a, b in enumerate(order)) / classes
    found = answered(labels, said, classes).order()
    if moved == 0:
        assert found is None
    elif moved * (1 - noise) > 0.4:
        assert found == order


def test_what_is_no_order_is_none() -> None:
    labels = torch.arange(1000) % 4
    random = torch.randint(4, (1000,), generator=torch.Generator().manual_seed(0))
    assert answered(labels, random, 4).order() is None  # has learned nothing
    assert answered(labels, labels // 2, 4).order() is None  # takes two classes for one
    assert answered(labels, (labels + 1) % 5, 4, 5).order() is None  # has another number of outputs
    missing = answered(labels[labels < 3], (labels[labels < 3] + 1) % 4, 4)
    assert missing.order() == [3, 0, 1, 2]  # no image of class 3


def test_the_error_is_told() -> None:
    labels = torch.arange(900) % 2
    some = answered(labels, labels.where(torch.arange(900) >= 90, 1 - labels), 2)
    assert some.standard_error == pytest.approx(0.01)
    assert str(some) == "90.00% ± 1.00%"
    uneven = answered(torch.tensor([0] * 90 + [1] * 10), torch.zeros(100).long(), 2)
    assert str(uneven) == "90.00% ± 3.00% (balanced: 50.00%)"
