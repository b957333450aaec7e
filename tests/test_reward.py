"""The reward and the constraints, by their formulas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from n2n_fast.search.reward import ANNEALING_UPDATES, DEGENERATE, Constraints, Cost, reward

FRACTION = st.floats(0.01, 1)


@pytest.mark.parametrize(
    ("accuracy", "params", "teacher_accuracy", "teacher_params", "expected"),
    [
        (0.9, 50, 0.9, 100, 0.75),  # C = 1/2
        (0.45, 50, 0.9, 100, 0.375),
        (0.9, 10, 0.9, 100, 0.99),  # C = 0.9
        (0.9, 0, 0.9, 100, 1.0),
        (1.0, 25, 0.5, 100, 1.875),  # better than the teacher
        (0.0, 25, 0.5, 100, 0.0),
    ],
)
def test_reward_is_c_times_two_minus_c_times_relative_accuracy(
    accuracy: float, params: int, teacher_accuracy: float, teacher_params: int, expected: float
) -> None:
    assert reward(accuracy, params, teacher_accuracy, teacher_params) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("params", [100, 101, 10**9])
def test_a_student_that_is_no_smaller_is_degenerate(params: int) -> None:
    assert reward(1.0, params, 0.5, 100) == DEGENERATE == -1


@given(FRACTION, FRACTION, st.integers(2, 10**8), st.data())
def test_reward_grows_with_accuracy_and_with_compression(
    accuracy: float, teacher_accuracy: float, teacher_params: int, data: st.DataObject
) -> None:
    # of students over a million times smaller, one parameter is below a float's precision
    params = data.draw(st.integers(max(1, teacher_params // 10**6), teacher_params - 1))
    given_reward = reward(accuracy, params, teacher_accuracy, teacher_params)
    assert reward(accuracy, params - 1, teacher_accuracy, teacher_params) > given_reward > 0
    assert reward(accuracy * 1.1, params, teacher_accuracy, teacher_params) > given_reward


@given(st.floats(0, 2))
def test_annealing_goes_from_the_reward_to_minus_one(r: float) -> None:
    assert Constraints.anneal(r, 0) == r
    assert Constraints.anneal(r, ANNEALING_UPDATES) == -1
    assert Constraints.anneal(r, ANNEALING_UPDATES + 7) == -1
    softened = [Constraints.anneal(r, t) for t in range(ANNEALING_UPDATES + 1)]
    assert softened == sorted(softened, reverse=True)


@given(st.floats(0, 2), st.integers(0, 20), FRACTION)
def test_a_mild_violation_costs_its_share(r: float, update: int, severity: float) -> None:
    whole = r - Constraints.anneal(r, update)
    assert r - Constraints.anneal(r, update, severity) == pytest.approx(severity * whole, abs=1e-12)
    assert Constraints.anneal(r, update, 0.0) == r


def test_annealing_between() -> None:
    assert ANNEALING_UPDATES == 15
    softness = (1 - 5 / 15) ** 4
    assert Constraints.anneal(0.6, 5) == pytest.approx(softness - 1 + softness * 0.6, rel=1e-12)
    assert Constraints.anneal(0.6, 14) == pytest.approx(-0.99996839506, abs=1e-9)


@pytest.mark.parametrize(
    ("constraints", "params", "accuracy", "expected"),
    [
        (Constraints(), 10**9, 0.0, 0.0),
        (Constraints(max_params=100), 100, 0.0, 0.0),
        (Constraints(max_params=100), 150, 1.0, 0.5),
        (Constraints(min_accuracy=0.8), 10**9, 0.8, 0.0),
        (Constraints(min_accuracy=0.8), 1, 0.6, 0.25),
        (Constraints(min_accuracy=0.0), 1, 0.0, 0.0),
        (Constraints(max_params=100, min_accuracy=0.8), 150, 0.6, 0.75),
        (Constraints(max_params=100, min_accuracy=0.8), 99, 0.81, 0.0),
        (Constraints(max_macs=1000), 10**9, 0.5, 1.0),
        (Constraints(max_macs=4000, max_latency=2.0), 10**9, 0.5, 0.25),
    ],
)
def test_violation_is_the_sum_of_the_relative_distances(
    constraints: Constraints, params: int, accuracy: float, expected: float
) -> None:
    cost = Cost(params, 2000, 2.5)
    assert constraints.violation(cost, accuracy) == pytest.approx(expected, abs=1e-12)
    gaps = constraints.gaps(cost, accuracy)
    assert all(gap > 0 for gap in gaps.values())
    assert sum(gaps.values()) == pytest.approx(expected, abs=1e-12)


def test_gaps_name_the_limits_that_are_missed() -> None:
    limits = Constraints(max_params=100, max_macs=10, max_latency=2.0, min_accuracy=0.9)
    assert set(limits.gaps(Cost(101, 9, 2.5), 0.8)) == {"params", "latency", "accuracy"}
    assert limits.gaps(Cost(100, 10, 2.0), 0.9) == {}
