"""From actions to architectures, with and without limits; what is not finite in a student never becomes an accuracy."""

import math
import pickle

import pytest
import torch

import n2n_fast
from elsewhere import ELSEWHERE, Fetching, tensors_of
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search import environment
from n2n_fast.search.config import SearchConfig
from n2n_fast.search.environment import MOST_TILTED, Evaluation, Evaluator, Recipe, Transition
from n2n_fast.training import distill
from n2n_fast.training.batches import TeacherLogits
from n2n_fast.training.distill import Diverged, seeded
from n2n_fast.training.teachers import SmallResNet

NAN = float("nan")
RATIOS = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def space():
    return ArchitectureSpace(SmallResNet(2, 10, 1), torch.zeros(2, 1, 8, 8))


def student(transition, actions):
    """What one row of actions gives."""
    (found,) = transition(torch.tensor([actions]))
    return found


def gone(space, names):
    return [int(layer.name not in names) for layer in space.layers]


def test_without_limits_students_are_as_they_are_drawn(space):
    actions = gone(space, {next(layer.name for layer in space.layers if layer.removable)})
    assert student(Transition(space, True, RATIOS), actions) == space.remove(space.teacher, [bool(a) for a in actions])
    drawn = [[i % 3, (i + 1) % 3] for i in range(len(space.layers))]
    channels, kernels = ([RATIOS[place] for place in places] for places in zip(*drawn, strict=True))
    assert student(Transition(space, False, RATIOS), drawn) == space.shrink(space.teacher, channels, kernels)


@pytest.mark.parametrize("removes", [True, False])
def test_students_of_many_rows_are_those_of_each(space, removes):
    transition = Transition(space, removes, RATIOS, "params", space.teacher.params // 3, grows=True)
    generator = torch.Generator().manual_seed(0)
    shape, last = ((12, len(space.layers)), 2) if removes else ((12, len(space.layers), 2), 3)
    actions = torch.randint(last, shape, generator=generator)
    together = transition(actions)
    assert together == [student(transition, row) for row in actions.tolist()]
    assert all(arch == space.member(arch) and arch.params <= space.teacher.params // 3 for arch in together)


@pytest.mark.parametrize("limited", ["params", "macs"])
def test_removals_are_judged_at_the_limit(space, limited):
    most = getattr(space.teacher, limited) // 5
    transition = Transition(space, True, RATIOS, limited, **{limited: most}, grows=True)
    narrowed = space.tilted(MOST_TILTED / 2, limited)
    whole = space.shrink_within(space.teacher, narrowed, **{limited: most}, grow=True)
    assert student(transition, gone(space, ())) == whole
    removable = [layer.name for layer in space.layers if layer.removable]
    for names in (removable[:1], removable[-2:]):
        arch = student(transition, gone(space, names))
        assert 0.8 * most < getattr(arch, limited) <= most
        assert [layer.name for layer, kept in zip(space.layers, arch.keep, strict=True) if not kept] == names


def test_only_what_grows_reaches_the_limit_from_below(space):
    most = space.teacher.params // 3
    smallest = [[0, 2]] * len(space.layers)
    both = (Transition(space, False, RATIOS, "params", most, grows=grows) for grows in (False, True))
    stays, grows = (student(transition, smallest) for transition in both)
    assert stays == space.shrink(space.teacher, [0.25] * len(space.layers))
    assert stays.params < 0.8 * most < grows.params <= most


def test_tilted_actions_save_ever_more_params_and_leave_kernels(space):
    transition = Transition(space, False, (0.1, 0.2, 0.4, 0.6, 0.8, 1.0), "params", space.teacher.params // 5)
    mild, most = (transition.tilted(tilt) for tilt in (0.0, MOST_TILTED))
    assert (mild == 5).all()
    assert (most[:, 0] < 5).any()
    assert (most[:, 1] == 5).all()


def test_a_limit_out_of_reach_leads_to_the_smallest(space):
    arch = student(Transition(space, False, RATIOS, "params", 10), [[2, 2]] * len(space.layers))
    assert all(width == 1 for width, whole in zip(arch.widths, space.teacher.widths, strict=True) if width < whole)
    assert 10 < arch.params < space.teacher.params // 20


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
    assert Evaluation.from_record(vars(found), timed=True) == found


def test_a_reconstruction_that_cannot_be_solved_is_an_error(evaluator, monkeypatch):
    def singular(*_):
        raise torch.linalg.LinAlgError("linalg.cholesky: the input is not positive-definite")

    judge = evaluator()
    monkeypatch.setattr(ArchitectureSpace, "build", singular)
    assert "positive-definite" in judge.evaluate(judge.space.teacher, 0).error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_overflow_of_mixed_precision_diverges(dtype, evaluator, monkeypatch):
    monkeypatch.setattr(distill, "mixed_precision", lambda *_: torch.autocast("cpu", dtype))
    judge = evaluator(2)
    spoiled(monkeypatch, lambda student: student.fc.weight.fill_(1e38))
    assert "the loss is" in judge.evaluate(judge.space.teacher, 0).error
    with pytest.raises(Diverged):
        judge.train(judge.space.teacher, 1, "a student")


def test_a_recipe_travels_by_the_cpu_and_is_made_where_it_is_told(data, monkeypatch):
    """A worker may see no such device as the run is on, or another."""
    teacher, images = SmallResNet(1, data.classes, 1).to(ELSEWHERE), torch.zeros(2, 1, 8, 8, device=ELSEWHERE)
    earlier = (("an architecture", teacher.state_dict()),)
    recipe = Recipe("shrinkage", teacher, data.to(ELSEWHERE), images, SearchConfig(), earlier)
    with Fetching():
        arrived = pickle.loads(pickle.dumps(recipe))
    assert {tensor.device.type for tensor in tensors_of(arrived)} == {"cpu"}
    assert {tensor.device for tensor in tensors_of(recipe)} == {ELSEWHERE}
    assert len(tensors_of(arrived)) == len(tensors_of(recipe))
    monkeypatch.setattr(environment, "space_of", lambda teacher, calibration, config: (teacher, calibration))
    monkeypatch.setattr(environment, "giving_logits", lambda teacher, space, images: teacher)
    monkeypatch.setattr(environment, "Evaluator", lambda *parts: parts)
    monkeypatch.setattr(environment, "restored", lambda *_: teacher)
    monkeypatch.setattr(environment.Architecture, "from_json", lambda _: None)
    assert {tensor.device for tensor in tensors_of(arrived(ELSEWHERE))} == {ELSEWHERE}


def test_clocks_wait_for_the_device_before_they_begin_and_at_every_note(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    timer = environment._Clock(device := torch.device("cuda", 1))
    assert waits == [device]
    timer.note("build")
    assert waits == [device] * 2
