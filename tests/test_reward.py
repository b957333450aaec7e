"""The reward and the constraints, by their formulas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from n2n_fast.search.reward import ANNEALING_UPDATES, DEGENERATE, Constraints, Cost, reward

FRACTION = st.floats(0.01, 1)


@pytest.mark.parametrize(
    ("accuracy", "params", "teacher_accuracy", "expected"),
    [
        (0.9, 50, 0.9, 0.75),  # C = 1/2
        (0.45, 50, 0.9, 0.375),
        (0.9, 10, 0.9, 0.99),  # C = 0.9
        (0.9, 0, 0.9, 1.0),
        (1.0, 25, 0.5, 1.875),  # better than the teacher
        (0.0, 25, 0.5, 0.0),
        (1.0, 100, 0.5, DEGENERATE),  # no smaller
        (1.0, 10**9, 0.5, -1),
    ],
)
def test_reward_is_c_times_two_minus_c_times_relative_accuracy(accuracy, params, teacher_accuracy, expected):
    assert reward(accuracy, params, teacher_accuracy, 100) == pytest.approx(expected, rel=1e-12)


@given(FRACTION, FRACTION, st.integers(2, 10**8), st.data())
def test_reward_grows_with_accuracy_and_with_compression(accuracy, teacher_accuracy, teacher_params, data):
    # of students over a million times smaller, one parameter is below a float's precision
    params = data.draw(st.integers(max(1, teacher_params // 10**6), teacher_params - 1))
    of_this = reward(accuracy, params, teacher_accuracy, teacher_params)
    assert reward(accuracy, params - 1, teacher_accuracy, teacher_params) > of_this > 0
    assert reward(accuracy * 1.1, params, teacher_accuracy, teacher_params) > of_this


@given(st.floats(0, 2), st.integers(0, 20), FRACTION)
def test_annealing_goes_from_the_reward_to_minus_one_by_the_share_of_the_violation(r, update, severity):
    softened = [Constraints.anneal(r, t) for t in range(ANNEALING_UPDATES + 8)]
    assert softened[0] == r
    assert set(softened[ANNEALING_UPDATES:]) == {-1}
    assert softened == sorted(softened, reverse=True)
    whole = r - Constraints.anneal(r, update)
    assert r - Constraints.anneal(r, update, severity) == pytest.approx(severity * whole, abs=1e-12)


def test_annealing_between():
    assert Constraints.anneal(0.6, 5) == pytest.approx((2 / 3) ** 4 * 1.6 - 1, rel=1e-12)
    assert Constraints.anneal(0.6, 14) == pytest.approx(-0.99996839506, abs=1e-9)


@pytest.mark.parametrize(
    ("limits", "params", "accuracy", "gaps"),
    [
        ({}, 10**9, 0.0, {}),
        ({"max_params": 100}, 100, 0.0, {}),
        ({"max_params": 100}, 150, 1.0, {"params": 0.5}),
        ({"min_accuracy": 0.8}, 10**9, 0.8, {}),
        ({"min_accuracy": 0.8}, 1, 0.6, {"accuracy": 0.25}),
        ({"min_accuracy": 0.0}, 1, 0.0, {}),
        ({"max_params": 100, "min_accuracy": 0.8}, 150, 0.6, {"params": 0.5, "accuracy": 0.25}),
        ({"max_macs": 1000}, 10**9, 0.5, {"macs": 1.0}),
        ({"max_macs": 4000, "max_latency": 2.0}, 10**9, 0.5, {"latency": 0.25}),
    ],
)
def test_gaps_name_the_limits_that_are_missed_and_the_violation_is_their_sum(limits, params, accuracy, gaps):
    cost, constraints = Cost(params, 2000, 2.5), Constraints(**limits)
    assert constraints.gaps(cost, accuracy) == {name: pytest.approx(gap) for name, gap in gaps.items()}
    assert constraints.violation(cost, accuracy) == pytest.approx(sum(gaps.values()))
