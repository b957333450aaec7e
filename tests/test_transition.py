"""From actions to architectures, with and without limits."""

import pytest
import torch

from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.environment import MOST_TILTED, Transition
from n2n_fast.training.teachers import SmallResNet

RATIOS = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def space():
    return ArchitectureSpace(SmallResNet(2, 10, 1), torch.zeros(2, 1, 8, 8))


def gone(space, names):
    return [int(layer.name not in names) for layer in space.layers]


def test_without_limits_students_are_as_they_are_drawn(space):
    actions = gone(space, {next(layer.name for layer in space.layers if layer.removable)})
    assert Transition(space, True, RATIOS)(actions) == space.remove(space.teacher, [bool(a) for a in actions])
    drawn = [[i % 3, (i + 1) % 3] for i in range(len(space.layers))]
    channels, kernels = ([RATIOS[place] for place in places] for places in zip(*drawn, strict=True))
    assert Transition(space, False, RATIOS)(drawn) == space.shrink(space.teacher, channels, kernels)


@pytest.mark.parametrize("limited", ["params", "macs"])
def test_removals_are_judged_at_the_limit(space, limited):
    most = getattr(space.teacher, limited) // 5
    transition = Transition(space, True, RATIOS, limited, **{limited: most}, grows=True)
    whole = transition(gone(space, ()))
    narrowed = space.tilted(MOST_TILTED / 2, limited)
    assert whole == space.shrink_within(space.teacher, narrowed, **{limited: most}, grow=True)
    removable = [layer.name for layer in space.layers if layer.removable]
    for names in (removable[:1], removable[-2:]):
        arch = transition(gone(space, names))
        assert 0.8 * most < getattr(arch, limited) <= most
        removed = [layer.name for layer, kept in zip(space.layers, arch.keep, strict=True) if not kept]
        assert removed == names


def test_only_what_grows_reaches_the_limit_from_below(space):
    most = space.teacher.params // 3
    smallest = [[0, 2]] * len(space.layers)
    stays, grows = (Transition(space, False, RATIOS, "params", most, grows=grows)(smallest) for grows in (False, True))
    assert stays == space.shrink(space.teacher, [0.25] * len(space.layers))
    assert stays.params < 0.8 * most < grows.params <= most


def test_tilted_actions_save_ever_more_params_and_leave_kernels(space):
    transition = Transition(space, False, (0.1, 0.2, 0.4, 0.6, 0.8, 1.0), "params", space.teacher.params // 5)
    mild, most = (transition.tilted(tilt) for tilt in (0.0, MOST_TILTED))
    assert (mild == 5).all()
    assert (most[:, 0] <= mild[:, 0]).all()
    assert (most[:, 0] < 5).any()
    assert (most[:, 1] == 5).all()


def test_a_limit_out_of_reach_leads_to_the_smallest(space):
    arch = Transition(space, False, RATIOS, "params", 10)([[2, 2]] * len(space.layers))
    assert all(width == 1 for width, whole in zip(arch.widths, space.teacher.widths, strict=True) if width < whole)
    assert 10 < arch.params < space.teacher.params // 20
