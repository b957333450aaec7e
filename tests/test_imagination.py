"""What policies learn from students that are only imagined, where the truth about every architecture is known."""

from dataclasses import replace

import pytest
import torch

from n2n_fast.search import reinforce
from n2n_fast.search.checkpoint import RunDirectory
from n2n_fast.search.environment import Evaluation, Executor
from n2n_fast.search.imagination import KNOWN, Imagination, believed, learn_from_imagined, proposed
from n2n_fast.search.predictor import logistic, logit
from n2n_fast.search.reward import Cost
from n2n_fast.search.stage import Search, SearchProgress, Stage
from n2n_fast.search.teacher import Reference
from quarters import TINY, quarters, taught

DATA = quarters()
TEACHER = taught(DATA)
both = pytest.mark.parametrize("name", ["removal", "shrinkage"])


@pytest.fixture
def stage_of(tmp_path):
    """A stage of a search at half the teacher's params, before its first rollout."""

    def of(name, **settings):
        most = sum(p.numel() for p in TEACHER.parameters()) // 2
        config = replace(TINY, anchors=0, imagined_steps=30, max_params=most, **settings)
        with RunDirectory(tmp_path / f"run of {name}", {}, False, lambda: False) as run:
            reference = Reference.of(TEACHER, DATA, config)
            run.begin()
            shared = config, DATA, reference, reference.limits(config), run, SearchProgress(), Executor()
            return Stage(name, reference.space, Search(*shared, {}, None, None))

    return of


def truth(stage, arch):
    """The short accuracy that an architecture would have: it loses by its first layers being gone or narrow."""
    parts = stage.space.coordinates([arch])
    lost = (1 - parts[3][0, :2]).sum() if stage.name == "removal" else -2 * parts[0][0, :2].mean()
    return logistic(2.0 - lost.item())


def evaluate(stage, count):
    """Draw students and note what they would show; the mean of it, in logits."""
    actions = stage.policy.sample(stage.x, stage.mask, count, stage.generator)
    found = []
    for row, arch in zip(actions.tolist(), stage.architectures(actions), strict=True):
        accuracy = truth(stage, arch)
        found.append(logit(accuracy))
        stage.evaluated[arch.key], stage.actions[arch.key] = (arch, Evaluation(accuracy, None, {})), row
    return sum(found) / count


@both
def test_policies_draw_better_students_once_they_have_imagined_some(name, stage_of):
    stage = stage_of(name)
    before = evaluate(stage, 40)
    for _ in range(4):
        learn_from_imagined(stage)
        after = evaluate(stage, 40)
    draws = [logit(truth(stage, arch)) for arch, _ in stage.evaluated.values()]
    assert after > before + 0.5 * torch.tensor(draws).std().item()


@both
def test_proposals_are_new_and_expected_to_be_better(name, stage_of):
    stage = stage_of(name)
    evaluate(stage, 30)
    imagination = Imagination(stage)
    archs = stage.architectures(proposed(stage, imagination))
    assert len({arch.key for arch in archs}) == len(archs)
    wanted = imagination.rewards(archs)
    evaluated = imagination.rewards([arch for arch, _ in stage.evaluated.values()])
    assert max(wanted) >= max(evaluated)
    assert min(wanted) > sum(evaluated) / len(evaluated)


def test_what_is_expected_is_near_what_is_found_and_knows_its_error(stage_of):
    stage = stage_of("shrinkage")
    evaluate(stage, 60)
    imagination = Imagination(stage)
    actions = stage.policy.sample(stage.x, stage.mask, 40, stage.generator)
    archs = stage.architectures(actions)
    found = torch.tensor([truth(stage, arch) for arch in archs])
    expected, error = torch.tensor(imagination.short_accuracies(archs)).T
    assert torch.corrcoef(torch.stack([expected, found]))[0, 1] > 0.8
    assert ((expected - found).abs() < 4 * error + 0.02).float().mean() > 0.9


def test_too_few_evaluations_teach_nothing(stage_of):
    stage = stage_of("shrinkage")
    evaluate(stage, KNOWN - 2)
    assert Imagination.of(stage) is None
    weights = [p.clone() for p in stage.policy.parameters()]
    learn_from_imagined(stage)
    assert all(map(torch.equal, weights, stage.policy.parameters()))


def test_a_lucky_evaluation_is_believed_only_in_part(stage_of):
    stage = stage_of("shrinkage")
    evaluate(stage, 40)
    ranked = sorted(stage.evaluated, key=lambda key: stage.evaluated[key][1].short_accuracy)
    lucky = ranked[len(ranked) // 2]
    arch, evaluation = stage.evaluated[lucky]
    stage.evaluated[lucky] = arch, replace(evaluation, short_accuracy=0.99)
    of = {one.architecture.key: one for one in believed(stage)}
    assert len(of) == len(stage.evaluated)
    assert evaluation.short_accuracy < of[lucky].accuracy < 0.99


def test_failed_evaluations_are_taken_for_chance(stage_of):
    stage = stage_of("shrinkage")
    evaluate(stage, 20)
    key = next(iter(stage.evaluated))
    arch, _ = stage.evaluated[key]
    stage.evaluated[key] = arch, Evaluation(None, None, {}, "the loss is nan")
    ((accuracy, _),) = Imagination(stage).short_accuracies([arch])
    others = [one.short_accuracy for _, one in stage.evaluated.values() if one.short_accuracy is not None]
    assert accuracy < min(others) + 0.5 * (max(others) - min(others))
    assert key not in {one.architecture.key for one in believed(stage)}


def test_known_students_are_drawn_only_where_there_are_no_others(stage_of):
    stage = stage_of("removal", rollouts=6)
    evaluate(stage, 10)
    drawn = reinforce.drawn(stage)
    keys = [arch.key for arch in stage.architectures(drawn)]
    assert len(keys) == 6
    is_new = [key not in stage.evaluated and key not in keys[:i] for i, key in enumerate(keys)]
    assert is_new == sorted(is_new, reverse=True)
    assert len(reinforce.drawn(stage_of("shrinkage", rollouts=6, reuse=False))) == 6


def test_latency_is_learned_where_it_counts(stage_of):
    stage = stage_of("shrinkage", objective="latency")
    evaluate(stage, 30)
    assert Imagination.of(stage) is None  # nobody was timed
    teacher = stage.search.teacher.cost

    def latency(arch):
        return teacher.latency * arch.macs / teacher.macs

    for key, (arch, evaluation) in list(stage.evaluated.items())[:-1]:
        stage.evaluated[key] = arch, replace(evaluation, latency=latency(arch))
    imagination = Imagination.of(stage)
    archs = [arch for arch, _ in stage.evaluated.values()]
    same = [(arch, stage.corrected(arch, stage.evaluated[arch.key][1].short_accuracy)[0]) for arch in archs]
    wanted = [stage.reward(accuracy, Cost(arch.params, arch.macs, latency(arch))) for arch, accuracy in same]
    assert torch.corrcoef(torch.tensor([wanted, imagination.rewards(archs)]))[0, 1] > 0.8
