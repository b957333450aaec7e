"""What is told of a search before it begins."""

import math
from dataclasses import replace

import pytest

from n2n_fast.files.errors import BadInput
from n2n_fast.search import plan as planned
from n2n_fast.search.teacher import Reference
from quarters import TINY, quarters, taught


@pytest.fixture(scope="module")
def problem():
    data = quarters()
    return taught(data), data


def plan(teacher, data, config):
    return planned.plan(Reference.of(teacher, data, config), data, config)


def test_the_size_of_the_search_and_its_time_by_one_rollout(problem):
    found = plan(*problem, TINY)
    removals, shrinkages = found["choices"]["removal"], found["choices"]["shrinkage"]
    assert found["architectures_log10"] == {
        "removal": pytest.approx(removals * math.log10(2)),
        "shrinkage": pytest.approx(shrinkages * math.log10(len(TINY.ratios))),
    }
    assert found["rollouts"] == 2 * TINY.updates * TINY.rollouts
    anchors, steps_per_epoch = 2 * 5, len(problem[1].train) // TINY.batch_size
    assert found["training_steps"] == round((anchors * 0.5 + 0.5 + 2 * 1) * steps_per_epoch)
    trainings = found["training_steps"] * found["step_seconds"]
    learning = 2 * TINY.updates * found["learning_seconds"]
    assert learning > 0
    assert found["seconds"] == pytest.approx(found["rollouts"] * found["rollout_seconds"] + trainings + learning)
    assert found["step_seconds"] > 0
    assert plan(*problem, replace(TINY, imagined_steps=0))["learning_seconds"] == 0
    assert found["gaps"] == {}


def test_more_steps_take_longer_than_is_timed(problem):
    few, many = (plan(*problem, replace(TINY, stages="shrinkage", epochs=epochs)) for epochs in (0.5, 50.0))
    assert list(few["choices"]) == ["shrinkage"]
    assert many["rollout_seconds"] > 10 * few["rollout_seconds"]


@pytest.mark.parametrize("stages", ["removal", "both"])
def test_a_limit_that_no_student_meets_is_told(stages, problem):
    found = plan(*problem, replace(TINY, stages=stages, max_params=10, max_macs=10**9, max_drop=1.0, max_latency=1e-6))
    assert found["limits"] == {"params": 10, "macs": 10**9, "latency": 1e-6}
    assert set(found["gaps"]) == {"params", "latency"}
    assert found["gaps"]["params"] > 1


def test_a_student_that_is_not_finite_is_told(problem, monkeypatch):
    monkeypatch.setattr("n2n_fast.search.environment.accuracy", lambda *_, **__: 1 / 0)
    with pytest.raises(BadInput, match="half the teacher's widths cannot be evaluated"):
        plan(*problem, TINY)
