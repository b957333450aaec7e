"""The predictor of full accuracies from short ones, against lines that are known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from n2n_fast.search.predictor import MIN_ANCHORS, MIN_REMAINING, AccuracyPredictor

ACCURACY = st.floats(0.01, 0.99)


def logistic(x):
    return 1 / (1 + math.exp(-x))


def on_a_line(slope, intercept, xs):
    return [(logistic(x), logistic(intercept + slope * x)) for x in xs]


# An anchor's training adds half a logit; the final one then takes logit 1 to 2, half of the way to the teacher's 3.
ANCHORED = AccuracyPredictor.learned(on_a_line(1.0, 0.5, [-1.0, 0.0, 1.0]))
FINISHING = ANCHORED.learned_final([(logistic(1.0), logistic(2.0))], logistic(3.0))


def test_a_line_in_logits_is_found_and_followed():
    found = AccuracyPredictor.learned(on_a_line(0.4, 1.5, [-2.0, -0.5, 0.3, 2.0]))
    assert (found.slope, found.intercept) == (pytest.approx(0.4), pytest.approx(1.5))
    assert found.error == pytest.approx(0, abs=1e-9)
    for x in (-4.0, 0.0, 5.0):
        assert found(logistic(x))[0] == pytest.approx(logistic(1.5 + 0.4 * x))


@given(st.lists(st.tuples(ACCURACY, ACCURACY), min_size=MIN_ANCHORS, max_size=12), ACCURACY, ACCURACY)
def test_it_is_monotone_and_its_errors_are_positive(pairs, a, b):
    found = AccuracyPredictor.learned(pairs)
    (low, low_error), (high, high_error) = found(min(a, b)), found(max(a, b))
    assert 0 <= low <= high <= 1
    assert low_error >= 0
    assert high_error >= 0
    assert (found.error is None) == (len(pairs) == MIN_ANCHORS)


def test_errors_grow_away_from_the_anchors():
    anchors = [(logistic(x), logistic(x / 2 + e)) for x, e in ((-1, 0.1), (0, -0.1), (1, 0.1), (2, -0.1))]
    found = AccuracyPredictor.learned(anchors)
    errors = [found(logistic(x))[1] / (p * (1 - p)) for x in (0.5, 2.0, 4.0) for p in (found(logistic(x))[0],)]
    assert errors[0] < errors[1] < errors[2]


def test_leave_one_out_error_is_what_it_says():
    anchors = [(0.2, 0.5), (0.4, 0.7), (0.6, 0.65), (0.9, 0.95)]
    by_hand = [abs(AccuracyPredictor.learned([x for x in anchors if x is not a])(a[0])[0] - a[1]) for a in anchors]
    assert AccuracyPredictor.learned(anchors).error == pytest.approx(sum(by_hand) / 4)


def test_anchors_too_few_all_alike_or_at_the_edge_are_survived():
    for count in range(MIN_ANCHORS):
        assert AccuracyPredictor.learned([(0.5, 0.9)] * count)(0.3) == (0.3, 0.0)
    assert AccuracyPredictor.learned([(0.5, 0.9)] * 4)(0.2)[0] == pytest.approx(0.9)
    found = AccuracyPredictor.learned([(0.0, 0.1), (0.5, 0.9), (1.0, 1.0)])
    assert 0 < found(0.0)[0] < found(1.0)[0] < 1


def test_one_anchor_beyond_help_does_not_turn_the_line():
    """The anchors of a real search: a student that stays at chance, and four that follow a line."""
    good = [(0.901, 0.903), (0.846, 0.896), (0.7985, 0.866), (0.8575, 0.892)]
    alone, both = AccuracyPredictor.learned(good), AccuracyPredictor.learned([*good, (0.0975, 0.1)])
    assert both(0.85)[0] == pytest.approx(alone(0.85)[0], abs=0.01)
    assert both(0.93)[0] == pytest.approx(alone(0.93)[0], abs=0.03)
    assert both(0.85)[1] > alone(0.85)[1]


def test_the_final_training_closes_the_share_of_the_distance_that_it_closed_before():
    assert FINISHING.remaining == pytest.approx(0.5)
    assert FINISHING.gain == pytest.approx(1.0)
    assert FINISHING(logistic(0.6))[0] == pytest.approx(logistic(3.0 - 0.5 * 1.9))
    assert FINISHING(logistic(2.5))[0] == pytest.approx(logistic(3.0))
    assert FINISHING(logistic(4.0))[0] == ANCHORED(logistic(4.0))[0]  # above the teacher nothing is added
    assert FINISHING(logistic(0.6))[1] < ANCHORED(logistic(0.6))[1]


def test_the_final_training_adds_to_none_more_than_it_was_seen_to_add():
    assert FINISHING(logistic(-2.0))[0] == pytest.approx(logistic(-2.0 + 0.5 + 1.0))
    assert FINISHING.after_final_training(logistic(-2.0)) == pytest.approx(logistic(-1.0))
    grid = [FINISHING(logistic(x / 10))[0] for x in range(-40, 40)]
    assert grid == sorted(grid)


def test_what_the_final_training_adds_is_bounded_and_may_be_unknown():
    assert ANCHORED.learned_final([], 0.9) == ANCHORED
    assert ANCHORED.learned_final([(0.9, 0.95)], 0.9) == ANCHORED  # that anchor was the teacher's equal before
    assert ANCHORED.learned_final([(0.5, 0.95)], 0.9).remaining == MIN_REMAINING
    assert ANCHORED.learned_final([(0.5, 0.4)], 0.9).remaining == 1
    assert AccuracyPredictor().learned_final([(0.5, 0.7)], 0.9) == AccuracyPredictor()
