"""What is told of a search before it begins."""

import itertools
import math
import random

import pytest

from n2n_fast import SearchConfig
from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.search import plan
from n2n_fast.search.transition import Transition
from networks import space_of
from small_sets import make


def test_the_number_of_removals_is_that_of_all_choices():
    space = space_of("chain")
    free = [i for i, layer in enumerate(space.layers) if layer.removable]
    choices, size = plan._removals(space)
    assert choices == len(free) <= 12
    keys = set()
    for kept in itertools.product([True, False], repeat=len(free)):
        keep = [True] * len(space.layers)
        for i, value in zip(free, kept, strict=True):
            keep[i] = value
        try:
            keys.add(space.remove(space.teacher, keep).key)
        except DegenerateArchitecture:
            keys.add(str(kept))
    assert size == pytest.approx(math.log10(len(keys)))


def test_the_number_of_shrinkages_is_that_of_all_choices():
    space, ratios = space_of("chain"), (0.3, 0.34, 1.0)
    channels, kernels = space.choices(space.teacher)
    choices, size = plan._shrinkages(space, ratios)
    assert choices == sum(channels) + sum(kernels) <= 8
    keys = set()
    for drawn in itertools.product(ratios, repeat=choices):
        given = iter(drawn)
        tried = [[next(given) if chooses else 1.0 for chooses in chosen] for chosen in (channels, kernels)]
        keys.add(space.shrink(space.teacher, *tried).key)
    assert size == pytest.approx(math.log10(len(keys)))
    assert len(keys) < len(ratios) ** choices


@pytest.mark.parametrize("by", ["params", "macs"])
def test_what_is_timed_is_at_the_limits_like_what_is_searched(by):
    space = space_of("mobile")
    limit = getattr(space.teacher, by) // 8
    limited = SearchConfig(**{f"max_{by}": limit})
    for removes, last in ((True, False), (False, True)):
        drawn = plan._drawn(Transition.of(space, limited, removes, last, {by}), limited, random.Random(1))
        assert drawn is not None
        assert 0.7 * limit < getattr(drawn, by) <= limit
    alone = [
        plan._drawn(Transition.of(space, config, True, True, {by}), config, random.Random(1))
        for config in (limited, SearchConfig())
    ]
    assert alone[0] is not None
    assert alone[0] == alone[1]
    assert getattr(alone[0], by) > limit


def test_of_students_at_a_limit_those_are_timed_that_take_longest():
    space = space_of("mobile")
    limited = SearchConfig(max_params=space.teacher.params // 8)
    even = space.shrink_within(space.teacher, [1.0] * len(space.layers), params=limited.max_params)
    transition = Transition.of(space, limited, False, True, {"params"})
    for seed in range(5):
        drawn = plan._drawn(transition, limited, random.Random(seed))
        assert drawn is not None
        assert drawn.macs > 1.1 * even.macs


def test_without_a_limit_widths_are_drawn_by_chance():
    space = space_of("mobile")
    transition = Transition.of(space, SearchConfig(), False, True, {})
    drawn = [plan._drawn(transition, SearchConfig(), random.Random(seed)) for seed in range(5)]
    assert len({arch.key for arch in drawn if arch is not None}) == 5


def test_the_teacher_is_timed_from_a_device_at_rest_to_a_device_at_rest(monkeypatch):
    events, data = [], make(150)
    monkeypatch.setattr(plan, "now", lambda device: events.append(device.type) or float(len(events)))
    seconds = plan._logits_seconds(lambda images: events.append("teacher"), data)
    assert events == ["teacher", "cpu", "teacher", "cpu"]
    assert seconds == 2 / min(128, len(data.train))
