"""What is not finite in a student is told, and never becomes an accuracy."""

import math
import pickle

import pytest
import torch

import n2n_fast
from elsewhere import ELSEWHERE, Fetching, tensors_of
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search import evaluation
from n2n_fast.search import teacher as teacher_module
from n2n_fast.search.config import SearchConfig
from n2n_fast.search.evaluation import Evaluation, Evaluator, Recipe
from n2n_fast.training import distill
from n2n_fast.training.batches import TeacherLogits
from n2n_fast.training.data import accuracy
from n2n_fast.training.distill import Diverged, seeded
from n2n_fast.training.teachers import SmallResNet

NAN = float("nan")


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return n2n_fast.from_tensors("noise", (torch.randn(80, 1, 8, 8, generator=generator), torch.arange(80) % 4))


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
    assert found.short_accuracy is None
    assert "not finite" in found.error or "the loss is" in found.error
    assert Evaluation.from_record(vars(found), timed=False) == found


def test_a_single_image_without_finite_logits_is_an_error(evaluator, data):
    judge = evaluator()
    bright = judge._images.images.clone()
    bright[3] = NAN
    object.__setattr__(judge._images, "images", bright)
    found = judge.evaluate(judge.space.teacher, 0)
    assert found.short_accuracy is None
    assert "the logits of 1 of" in found.error
    with seeded(0, torch.device("cpu")):
        model = SmallResNet(1, data.classes, 1).eval()
    assert 0 <= accuracy(model, judge._images) < 1


@pytest.mark.parametrize("latency", [NAN, math.inf])
def test_a_latency_that_is_not_finite_is_an_error(latency, evaluator, monkeypatch):
    judge = evaluator(max_latency=5.0)
    monkeypatch.setattr(teacher_module, "latency_ms", lambda *_: latency)
    found = judge.evaluate(judge.space.teacher, 0)
    assert (found.short_accuracy, found.latency) == (None, None)
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
    assert found.short_accuracy is None
    assert "the loss is" in found.error
    with pytest.raises(Diverged):
        judge.train(judge.space.teacher, 1, "a student")


def test_a_recipe_travels_by_the_cpu(data):
    """A worker may see no such device as the run is on, or another."""
    teacher, images = SmallResNet(1, data.classes, 1).to(ELSEWHERE), torch.zeros(2, 1, 8, 8, device=ELSEWHERE)
    earlier = (("an architecture", teacher.state_dict()),)
    recipe = Recipe("shrinkage", teacher, data.to(ELSEWHERE), images, SearchConfig(), earlier)
    with Fetching():
        arrived = pickle.loads(pickle.dumps(recipe))
    assert {tensor.device.type for tensor in tensors_of(arrived)} == {"cpu"}
    assert {tensor.device for tensor in tensors_of(recipe)} == {ELSEWHERE}
    assert len(tensors_of(arrived)) == len(tensors_of(recipe))


def test_a_recipe_is_made_where_it_is_told(data, monkeypatch):
    monkeypatch.setattr(evaluation, "space_of", lambda teacher, calibration, config: (teacher, calibration))
    monkeypatch.setattr(evaluation, "giving_logits", lambda teacher, space, images: teacher)
    monkeypatch.setattr(evaluation, "Evaluator", lambda *parts: parts)
    recipe = Recipe("shrinkage", SmallResNet(1, 4, 1), data, torch.zeros(2, 1, 8, 8), SearchConfig())
    assert {tensor.device for tensor in tensors_of(recipe(ELSEWHERE))} == {ELSEWHERE}


def test_clocks_wait_for_the_device_before_they_begin_and_at_every_note(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    timer = evaluation._Clock(device := torch.device("cuda", 1))
    assert waits == [device]
    timer.note("build")
    assert waits == [device] * 2
    evaluation._Clock(torch.device("cpu")).note("build")
    assert len(waits) == 2
