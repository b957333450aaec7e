"""What is told of a search before it begins."""

import itertools
import math
import random

import pytest

from n2n_fast import SearchConfig, plan
from n2n_fast.errors import DegenerateArchitecture
from networks import space_of


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
    for name in ("removal", "shrinkage"):
        drawn = plan._drawn(name, space, limited, random.Random(1), last=name == "shrinkage")
        assert drawn is not None
        assert 0.7 * limit < getattr(drawn, by) <= limit
    alone = plan._drawn("removal", space, limited, random.Random(1), last=True)
    assert alone == plan._drawn("removal", space, SearchConfig(), random.Random(1), last=True)
    assert alone is not None
    assert getattr(alone, by) > limit
