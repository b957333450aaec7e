"""The predictor of full accuracies from short ones, against lines that are known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from n2n_fast.search.predictor import (
    MIN_ANCHORS,
    MIN_REMAINING,
    AccuracyPredictor,
    ArchitecturePredictor,
    Trained,
    logistic,
)

ACCURACY = st.floats(0.01, 0.99)


LOG_MACS = math.log(1e6)


def alike(pairs):
    """Anchors of the same MACs."""
    return [Trained(short, LOG_MACS, full) for short, full in pairs]


def on_a_line(slope, intercept, xs):
    return alike([(logistic(x), logistic(intercept + slope * x)) for x in xs])


# An anchor's training adds half a logit; the final one then takes logit 1 to 2, half of the way to the teacher's 3.
ANCHORED = AccuracyPredictor.learned(on_a_line(1.0, 0.5, [-1.0, 0.0, 1.0]))
FINISHING = ANCHORED.learned_final([(logistic(1.0), logistic(2.0))], logistic(3.0))


def test_a_line_in_logits_is_found_and_followed():
    found = AccuracyPredictor.learned(on_a_line(0.4, 1.5, [-2.0, -0.5, 0.3, 2.0]))
    assert found.slope == pytest.approx(0.4, abs=1e-3)
    assert found.error == pytest.approx(0, abs=2e-3)
    for x in (-4.0, 0.0, 5.0):
        assert found(logistic(x), LOG_MACS)[0] == pytest.approx(logistic(1.5 + 0.4 * x), abs=2e-3)


def test_more_macs_are_expected_to_gain_more_and_anchors_say_how_much():
    of = [(0.1, 0.0), (0.5, 2.0), (-0.3, 1.0), (0.9, 0.5), (-0.8, 1.5)]
    anchors = [Trained(logistic(x), LOG_MACS + m, logistic(1 + 0.5 * x + 0.3 * m)) for x, m in of]
    found = AccuracyPredictor.learned(anchors)
    assert found.macs_slope == pytest.approx(0.3, abs=0.02)
    assert found(0.5, LOG_MACS + 1)[0] == pytest.approx(logistic(1.3), abs=0.005)
    assert AccuracyPredictor.learned(on_a_line(0.4, 1.5, [-2.0, 0.3, 2.0])).macs_slope > 0  # nothing speaks against it


@given(st.lists(st.tuples(ACCURACY, ACCURACY), min_size=MIN_ANCHORS, max_size=12), ACCURACY, ACCURACY)
def test_it_is_monotone_and_its_errors_are_positive(pairs, a, b):
    found = AccuracyPredictor.learned(alike(pairs))
    (low, low_error), (high, high_error) = found(min(a, b), LOG_MACS), found(max(a, b), LOG_MACS)
    assert 0 <= low <= high <= 1
    assert low_error >= 0
    assert high_error >= 0
    assert (found.error is None) == (len(pairs) == MIN_ANCHORS)


def test_errors_grow_away_from_the_anchors():
    points = ((-1, 0.1), (0, -0.1), (1, 0.1), (2, -0.1))
    found = AccuracyPredictor.learned(alike([(logistic(x), logistic(x / 2 + e)) for x, e in points]))
    near = [found(logistic(x), LOG_MACS) for x in (0.5, 2.0, 4.0)]
    errors = [error / (p * (1 - p)) for p, error in near]
    assert errors[0] < errors[1] < errors[2]
    p, error = found(logistic(0.5), LOG_MACS + 3)
    assert error / (p * (1 - p)) > errors[0]


def test_leave_one_out_error_is_what_it_says():
    anchors = alike([(0.2, 0.5), (0.4, 0.7), (0.6, 0.65), (0.9, 0.95)])
    others = [AccuracyPredictor.learned([x for x in anchors if x is not a]) for a in anchors]
    by_hand = [abs(found(*a[:2])[0] - a[2]) for found, a in zip(others, anchors, strict=True)]
    assert AccuracyPredictor.learned(anchors).error == pytest.approx(sum(by_hand) / 4)


def test_anchors_too_few_all_alike_or_at_the_edge_are_survived():
    for count in range(MIN_ANCHORS):
        assert AccuracyPredictor.learned(alike([(0.5, 0.9)] * count))(0.3, LOG_MACS) == (0.3, 0.0)
    same = AccuracyPredictor.learned(alike([(0.5, 0.9)] * 4))
    assert same(0.5, LOG_MACS)[0] == pytest.approx(0.9)
    assert 0.8 < same(0.3, LOG_MACS)[0] < 0.9
    found = AccuracyPredictor.learned(alike([(0.0, 0.1), (0.5, 0.9), (1.0, 1.0)]))
    assert 0 < found(0.0, LOG_MACS)[0] < found(1.0, LOG_MACS)[0] < 1


def test_one_anchor_beyond_help_does_not_turn_the_line():
    """The anchors of a real search: a student that stays at chance, and four that follow a line."""
    good = [(0.901, 0.903), (0.846, 0.896), (0.7985, 0.866), (0.8575, 0.892)]
    alone, both = (AccuracyPredictor.learned(alike(of)) for of in (good, [*good, (0.0975, 0.1)]))
    assert both(0.85, LOG_MACS)[0] == pytest.approx(alone(0.85, LOG_MACS)[0], abs=0.02)
    assert both(0.93, LOG_MACS)[0] == pytest.approx(alone(0.93, LOG_MACS)[0], abs=0.04)


def final(predictor, x):
    return predictor(logistic(x), LOG_MACS)


def test_the_final_training_closes_the_share_of_the_distance_that_it_closed_before():
    assert FINISHING.remaining == pytest.approx(0.5)
    assert FINISHING.gain == pytest.approx(1.0)
    assert final(FINISHING, 0.6)[0] == pytest.approx(logistic(3.0 - 0.5 * 1.9), abs=2e-3)
    assert final(FINISHING, 2.5)[0] == pytest.approx(logistic(3.0), abs=2e-3)
    assert final(FINISHING, 4.0)[0] == final(ANCHORED, 4.0)[0]  # above the teacher nothing is added
    assert final(FINISHING, 0.6)[1] < final(ANCHORED, 0.6)[1]


def test_the_final_training_adds_to_none_more_than_it_was_seen_to_add():
    assert final(FINISHING, -2.0)[0] == pytest.approx(logistic(-2.0 + 0.5 + 1.0), abs=5e-3)
    assert FINISHING.after_final_training(logistic(-2.0)) == pytest.approx(logistic(-1.0))
    grid = [final(FINISHING, x / 10)[0] for x in range(-40, 40)]
    assert grid == sorted(grid)


def test_what_the_final_training_adds_is_bounded_and_may_be_unknown():
    assert ANCHORED.learned_final([], 0.9) == ANCHORED
    assert ANCHORED.learned_final([(0.9, 0.95)], 0.9) == ANCHORED  # that anchor was the teacher's equal before
    assert ANCHORED.learned_final([(0.5, 0.95)], 0.9).remaining == MIN_REMAINING
    assert ANCHORED.learned_final([(0.5, 0.4)], 0.9).remaining == 1
    assert AccuracyPredictor().learned_final([(0.5, 0.7)], 0.9) == AccuracyPredictor()


# What an architecture gives


def surface(points):
    """A smooth function with a ridge, of points (n, 4)."""
    return 1 + points[:, 0] - 0.5 * (points[:, 1] - points[:, 2]).square() + 0.2 * points[:, 3]


def drawn(count, seed=0):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_surface_is_found_with_an_error_that_is_true():
    points, others = drawn(120), drawn(200, seed=1)
    noise = 0.1 * torch.randn(120, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    predictor = ArchitecturePredictor([points[:, :3], points[:, 3:]], surface(points) + noise)
    mean, deviation = predictor([others[:, :3], others[:, 3:]])
    error = mean - surface(others)
    assert error.square().mean() < 0.05 * surface(others).var()
    assert 0.5 < (error / deviation).square().mean().sqrt() < 2
    far = predictor([torch.full((1, 3), 9.0), torch.zeros(1, 1)])
    assert far[1].item() > 3 * deviation.mean().item()


@pytest.mark.parametrize("values", [torch.zeros(6), torch.tensor([0.0, 0, 0, 0, 0, 9.0])])
def test_values_all_alike_points_all_alike_and_empty_blocks_are_survived(values):
    for points in (torch.zeros(6, 3), drawn(6)[:, :3]):
        mean, deviation = ArchitecturePredictor([points, torch.zeros(6, 0)], values)([points, torch.zeros(6, 0)])
        assert mean.isfinite().all()
        assert (deviation > 0).all()
        assert values.min() - 1 <= mean.min() <= mean.max() <= values.max() + 1
