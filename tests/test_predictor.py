"""The map from a cheap accuracy to a full one, against lines that are known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from n2n_fast.search.predictor import MIN_ANCHORS, MIN_REMAINING, Anchor, ProxyMap

ACCURACY = st.floats(0.01, 0.99)


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def on_a_line(slope: float, intercept: float, xs: list[float]) -> list[Anchor]:
    return [Anchor(str(x), logistic(x), logistic(intercept + slope * x)) for x in xs]


def test_a_line_in_logits_is_found_and_followed() -> None:
    found = ProxyMap.fit(on_a_line(0.4, 1.5, [-2.0, -0.5, 0.3, 2.0]))
    assert (found.slope, found.intercept) == (pytest.approx(0.4), pytest.approx(1.5))
    assert found.error == pytest.approx(0, abs=1e-9)
    for x in (-4.0, 0.0, 5.0):
        assert found(logistic(x))[0] == pytest.approx(logistic(1.5 + 0.4 * x))


@given(st.lists(st.tuples(ACCURACY, ACCURACY), min_size=MIN_ANCHORS, max_size=12), ACCURACY, ACCURACY)
def test_it_is_monotone_and_its_errors_are_positive(pairs: list[tuple[float, float]], a: float, b: float) -> None:
    found = ProxyMap.fit([Anchor(str(i), x, y) for i, (x, y) in enumerate(pairs)])
    (low, low_error), (high, high_error) = found(min(a, b)), found(max(a, b))
    assert 0 <= low <= high <= 1
    assert low_error >= 0
    assert high_error >= 0
    assert (found.error is None) == (len(pairs) == MIN_ANCHORS)


def test_errors_grow_away_from_the_anchors() -> None:
    anchors = [Anchor(str(x), logistic(x), logistic(x / 2 + e)) for x, e in ((-1, 0.1), (0, -0.1), (1, 0.1), (2, -0.1))]
    found = ProxyMap.fit(anchors)
    errors = [found(logistic(x))[1] / (p * (1 - p)) for x in (0.5, 2.0, 4.0) for p in (found(logistic(x))[0],)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_leave_one_out_error_is_what_it_says() -> None:
    anchors = [Anchor("a", 0.2, 0.5), Anchor("b", 0.4, 0.7), Anchor("c", 0.6, 0.65), Anchor("d", 0.9, 0.95)]
    found = ProxyMap.fit(anchors)
    by_hand = [abs(ProxyMap.fit([x for x in anchors if x is not a])(a.proxy_accuracy)[0] - a.accuracy) for a in anchors]
    assert found.error == pytest.approx(sum(by_hand) / 4)


@pytest.mark.parametrize("count", range(MIN_ANCHORS))
def test_too_few_anchors_correct_nothing(count: int) -> None:
    found = ProxyMap.fit([Anchor("a", 0.5, 0.9)] * count)
    assert found(0.3) == (0.3, 0.0)


def test_anchors_all_alike_or_at_the_edge_are_survived() -> None:
    assert ProxyMap.fit([Anchor("a", 0.5, 0.9)] * 4)(0.2)[0] == pytest.approx(0.9)
    found = ProxyMap.fit([Anchor("a", 0.0, 0.1), Anchor("b", 0.5, 0.9), Anchor("c", 1.0, 1.0)])
    assert 0 < found(0.0)[0] < found(1.0)[0] < 1


def test_one_anchor_beyond_help_does_not_turn_the_line() -> None:
    """The anchors of a real search: a student that stays at chance, and four that follow a line."""
    good = [
        Anchor("a", 0.901, 0.903),
        Anchor("b", 0.846, 0.896),
        Anchor("c", 0.7985, 0.866),
        Anchor("d", 0.8575, 0.892),
    ]
    lost = Anchor("e", 0.0975, 0.1)
    alone, both = ProxyMap.fit(good), ProxyMap.fit([*good, lost])
    assert both(0.85)[0] == pytest.approx(alone(0.85)[0], abs=0.01)
    assert both(0.93)[0] == pytest.approx(alone(0.93)[0], abs=0.03)
    assert both(0.85)[1] > alone(0.85)[1]


def test_the_final_training_closes_the_share_of_the_distance_that_it_closed_before() -> None:
    found = ProxyMap.fit(on_a_line(1.0, 0.5, [-1.0, 0.0, 1.0]))
    finishing = found.finishing([(logistic(1.0), logistic(2.0))], logistic(3.0))
    assert finishing.remaining == pytest.approx(0.5)
    assert finishing.gain == pytest.approx(1.0)
    assert finishing(logistic(0.6))[0] == pytest.approx(logistic(3.0 - 0.5 * 1.9))
    assert finishing(logistic(2.5))[0] == pytest.approx(logistic(3.0))
    assert finishing(logistic(4.0))[0] == found(logistic(4.0))[0]  # above the teacher nothing is added
    assert finishing(logistic(0.6))[1] < found(logistic(0.6))[1]


def test_the_final_training_adds_to_none_more_than_it_was_seen_to_add() -> None:
    found = ProxyMap.fit(on_a_line(1.0, 0.5, [-1.0, 0.0, 1.0]))
    finishing = found.finishing([(logistic(1.0), logistic(2.0))], logistic(3.0))
    assert finishing(logistic(-2.0))[0] == pytest.approx(logistic(-2.0 + 0.5 + 1.0))
    assert finishing.finished(logistic(-2.0)) == pytest.approx(logistic(-1.0))
    grid = [finishing(logistic(x / 10))[0] for x in range(-40, 40)]
    assert grid == sorted(grid)


def test_what_the_final_training_adds_is_bounded_and_may_be_unknown() -> None:
    found = ProxyMap.fit(on_a_line(1.0, 0.5, [-1.0, 0.0, 1.0]))
    assert found.finishing([], 0.9) == found
    assert found.finishing([(0.9, 0.95)], 0.9) == found  # that anchor was the teacher's equal before
    assert found.finishing([(0.5, 0.95)], 0.9).remaining == MIN_REMAINING
    assert found.finishing([(0.5, 0.4)], 0.9).remaining == 1
    assert ProxyMap().finishing([(0.5, 0.7)], 0.9) == ProxyMap()
