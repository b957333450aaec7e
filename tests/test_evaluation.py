"""What is not finite in a student is told, and never becomes an accuracy."""

import math

import pytest
import torch

import n2n_fast
from n2n_fast import distill, evaluation
from n2n_fast.batches import TeacherLogits
from n2n_fast.config import SearchConfig
from n2n_fast.data import accuracy
from n2n_fast.distill import Diverged, seeded
from n2n_fast.evaluation import Evaluation, Evaluator
from n2n_fast.space import ArchitectureSpace
from n2n_fast.teacher import SmallResNet

NAN = float("nan")


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return n2n_fast.from_tensors("noise", (torch.randn(80, 1, 8, 8, generator=generator), torch.arange(80) % 4), seed=0)


@pytest.fixture
def evaluator(data):
    """Of a small teacher; `steps` of training, from sliced weights."""

    def of(steps=0, **settings):
        with seeded(0, torch.device("cpu")):
            teacher = SmallResNet(1, data.classes, 1).eval()
        images = data.train.batch(torch.arange(32))[0]
        space = ArchitectureSpace(teacher, images[:2], images)
        config = SearchConfig(init="sliced", rollout_steps=steps, batch_size=16, **settings)
        return Evaluator("shrinkage", space, data, TeacherLogits(teacher, data.train), images, config)

    return of


def spoiled(monkeypatch, change):
    """Let every student that is built be changed."""
    build = ArchitectureSpace.build

    def built(self, arch, init=None):
        student = build(self, arch, init)
        with torch.no_grad():
            change(student)
        return student

    monkeypatch.setattr(ArchitectureSpace, "build", built)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("steps", [0, 2])
def test_weights_that_are_not_finite_are_an_error(value, steps, evaluator, monkeypatch):
    judge = evaluator(steps)
    spoiled(monkeypatch, lambda student: [p.fill_(value) for p in student.parameters() if p.ndim > 1])
    found = judge.evaluate(judge.space.teacher, 0)
    assert found.accuracy is None
    assert "not finite" in found.error or "the loss is" in found.error
    assert Evaluation.from_record(vars(found), timed=False) == found


def test_a_single_image_without_finite_logits_is_an_error(evaluator, data):
    judge = evaluator()
    bright = judge._images.images.clone()
    bright[3] = NAN
    object.__setattr__(judge._images, "images", bright)
    found = judge.evaluate(judge.space.teacher, 0)
    assert found.accuracy is None
    assert "the logits of 1 of" in found.error
    with seeded(0, torch.device("cpu")):
        model = SmallResNet(1, data.classes, 1).eval()
    assert 0 <= accuracy(model, judge._images) < 1


@pytest.mark.parametrize("latency", [NAN, math.inf])
def test_a_latency_that_is_not_finite_is_an_error(latency, evaluator, monkeypatch):
    judge = evaluator(max_latency=5.0)
    monkeypatch.setattr(evaluation, "latency_ms", lambda *_: latency)
    found = judge.evaluate(judge.space.teacher, 0)
    assert (found.accuracy, found.latency) == (None, None)
    assert "latency" in found.error


def test_a_reconstruction_that_cannot_be_solved_is_an_error(evaluator, monkeypatch):
    judge = evaluator()

    def singular(*_):
        raise torch.linalg.LinAlgError("linalg.cholesky: the input is not positive-definite")

    monkeypatch.setattr(ArchitectureSpace, "build", singular)
    assert "positive-definite" in judge.evaluate(judge.space.teacher, 0).error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_overflow_of_mixed_precision_diverges(dtype, evaluator, monkeypatch):
    monkeypatch.setattr(distill, "mixed_precision", lambda *_: torch.autocast("cpu", dtype))
    judge = evaluator(2)
    spoiled(monkeypatch, lambda student: student.fc.weight.fill_(1e38))
    found = judge.evaluate(judge.space.teacher, 0)
    assert found.accuracy is None
    assert "the loss is" in found.error
    with pytest.raises(Diverged):
        judge.train(judge.space.teacher, 1, "a student")
