"""Both policies: what is drawn, how it is scored, what trains."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from n2n_fast.search.policies import LIKENESS, MUTATIONS, RemovalPolicy, ShrinkagePolicy, clone_behaviour

FEATURES, LAYERS, RATIOS = 5, 6, 4
both = pytest.mark.parametrize("kind", ["removal", "shrinkage"])


def make(kind, seed=0, ratios=RATIOS):
    torch.manual_seed(seed)
    of = [(i + 1) / ratios for i in range(ratios)]
    return RemovalPolicy(FEATURES, 12) if kind == "removal" else ShrinkagePolicy(FEATURES, of, 12)


def sequence(layers=LAYERS):
    return torch.rand(layers, FEATURES, generator=torch.Generator().manual_seed(1))


def mask_of(kind, bits):
    """(layers,) for the removal policy, (layers, 2) for the shrinkage policy, whose second column is reversed."""
    return torch.tensor(bits) if kind == "removal" else torch.tensor([bits, bits[::-1]]).T


def top(kind, ratios=RATIOS):
    """The action that changes nothing."""
    return 1 if kind == "removal" else ratios - 1


def sample(policy, x, mask, count, seed=0):
    return policy.sample(x, mask, count, torch.Generator().manual_seed(seed))


@both
@given(bits=st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_masked_actions_never_vary_and_add_nothing(kind, bits, seed):
    policy, x, mask = make(kind, seed), sequence(), mask_of(kind, bits)
    actions = sample(policy, x, mask, 40, seed)
    assert actions.shape == (40, *mask.shape)
    assert actions.dtype == torch.int64
    assert actions.min() >= 0
    assert actions.max() <= top(kind)
    assert (actions[:, ~mask] == top(kind)).all()
    with torch.no_grad():
        flipped = policy.log_prob(x, mask, torch.where(mask, actions, top(kind) - 1))
        assert not policy.log_prob(x, torch.zeros_like(mask), actions).any()
        if kind == "removal":
            assert torch.equal(policy.log_prob(x, mask, actions), flipped)


@both
def test_what_policies_draw_before_any_training(kind):
    mask = mask_of(kind, [True] * LAYERS)
    kept = (sample(make(kind), sequence(), mask, 2000) == top(kind)).float().mean(0)
    whole, widths = (kept, None) if kind == "removal" else (kept[:, 1], kept[:, 0])
    assert 0.7 < whole.mean() < 0.9
    if widths is not None:
        assert 0.5 / RATIOS < widths.mean() < 2 / RATIOS


@both
def test_a_warm_started_policy_draws_around_what_it_was_shown(kind):
    policy, x, mask = make(kind), sequence(), mask_of(kind, [True, True, False, True, True, True])
    shown = policy.spread(mask, 0.7, torch.Generator().manual_seed(3))
    clone_behaviour(policy, x, mask, shown)
    drawn, wanted = sample(policy, x, mask, 2000), policy.around(shown)
    if kind == "removal":
        found = drawn.double().mean(0)
        assert torch.allclose(wanted, torch.where(shown == 1, LIKENESS, 1 - LIKENESS))
    else:
        found = nn.functional.one_hot(drawn, RATIOS).double().mean(0)
        assert torch.allclose(wanted.sum(2), torch.ones(LAYERS, 2))
        assert torch.equal(wanted.argmax(2), shown)
        assert (wanted[:, 1].max(1).values >= LIKENESS - 1e-6).all()
    assert torch.allclose(found[mask], wanted[mask].double(), atol=0.12)
    assert (drawn != shown).any()
    clone_behaviour(policy, x, torch.zeros_like(mask), shown)  # nothing to choose: nothing to learn
    assert torch.equal(sample(policy, x, mask, 2000), drawn)


@both
def test_the_divergence_is_none_from_what_a_policy_draws_itself(kind):
    policy, x, mask = make(kind), sequence(1), mask_of(kind, [True])
    generator = torch.Generator().manual_seed(0)
    own = policy(x).sigmoid() if kind == "removal" else policy(x, torch.zeros(1, 1, 2, dtype=torch.int64))[0].exp()
    assert policy.divergence(x, mask, own.detach(), generator).item() == pytest.approx(0, abs=1e-5)
    other = policy.around(policy.spread(mask, 0.5, generator))
    assert policy.divergence(x, mask, other, generator).item() > 0.01
    assert policy.divergence(x, torch.zeros_like(mask), other, generator).item() == 0


@given(st.integers(0, 999))
@settings(deadline=None, max_examples=10)
def test_shrinkage_log_prob_is_the_product_of_the_steps(seed):
    policy, x = make("shrinkage", seed), sequence()
    mask = torch.rand(LAYERS, 2, generator=torch.Generator().manual_seed(seed)) < 0.7
    actions = sample(policy, x, mask, 5, seed)
    with torch.no_grad():
        for row, expected in zip(actions, policy.log_prob(x, mask, actions), strict=True):
            state, before, probability = None, torch.tensor([RATIOS - 1, RATIOS - 1]), 1.0
            for t in range(LAYERS):
                seen = nn.functional.one_hot(before, RATIOS).flatten()
                output, state = policy.lstm(torch.cat([x[t], seen])[None, None], state)
                chances = policy.head(output)[0, 0].view(2, RATIOS).softmax(1)
                before = row[t]
                probability *= chances.gather(1, before[:, None])[:, 0][mask[t]].prod().item()
            assert expected.exp().item() == pytest.approx(probability, rel=1e-4)


def test_shrinkage_samples_are_the_largest_of_noisy_logits():
    policy, x = make("shrinkage"), sequence()
    mask = torch.rand(LAYERS, 2, generator=torch.Generator().manual_seed(2)) < 0.7
    actions = sample(policy, x, mask, 6, seed=5)
    noise = -torch.empty(LAYERS, 6, 2, RATIOS).exponential_(generator=torch.Generator().manual_seed(5)).log()
    with torch.no_grad():
        wanted = (policy(x, actions) + noise.transpose(0, 1)).argmax(3)
    assert torch.equal(actions, torch.where(mask, wanted, RATIOS - 1))


@both
def test_probabilities_sum_to_one_and_are_those_of_the_samples(kind):
    policy, mask, x = make(kind, ratios=2), mask_of(kind, [True, False, True]), sequence(3)
    options = [range(2) if free else (1,) for free in mask.flatten().tolist()]
    every = torch.tensor(list(itertools.product(*options))).view(-1, *mask.shape)
    with torch.no_grad():
        probability = policy.log_prob(x, mask, every).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = sample(policy, x, mask, 4000)
    frequency = (drawn[:, None] == every).flatten(2).all(2).float().mean(0)
    assert frequency.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(frequency, probability, atol=0.035)  # more than four standard deviations


def test_shrinkage_looks_back_and_removal_both_ways():
    x, changed = sequence(), sequence()
    changed[-1] += 1
    removal, shrinkage = make("removal"), make("shrinkage")
    actions = torch.zeros(1, LAYERS, 2, dtype=torch.int64)
    with torch.no_grad():
        assert (removal(x)[0] - removal(changed)[0]).abs() > 0
        assert torch.equal(shrinkage(x, actions)[:, :-1], shrinkage(changed, actions)[:, :-1])
        actions[0, 1] = 1
        after = shrinkage(x, actions) - shrinkage(x, torch.zeros_like(actions))
    assert not after[0, :2].any()
    assert (after[0, 2:].abs().amax((1, 2)) > 0).all()


@both
def test_gradients_reach_every_parameter(kind):
    policy, mask = make(kind), mask_of(kind, [True] * LAYERS)
    policy.log_prob(sequence(), mask, sample(policy, sequence(), mask, 3)).sum().backward()
    names = dict(policy.named_parameters())
    assert ("lstm.weight_ih_l1_reverse" in names) == (kind == "removal")
    assert all(parameter.grad.abs().max() > 0 for parameter in names.values())


@both
def test_sampling_depends_on_its_generator_alone(kind):
    policy, mask = make(kind), mask_of(kind, [True] * LAYERS)
    first = sample(policy, sequence(), mask, 10, seed=3)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert torch.equal(first, sample(policy, sequence(), mask, 10, seed=3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, sample(policy, sequence(), mask, 10, seed=4))


@both
def test_spread_grows_with_severity_and_respects_the_mask(kind):
    policy, generator = make(kind), torch.Generator().manual_seed(0)
    free = mask_of(kind, [True] * 400)
    kept = [policy.spread(free, severity, generator).float().mean() for severity in (0.1, 0.5, 0.9)]
    assert kept[0] > kept[1] > kept[2] > 0
    assert (policy.spread(~free, 0.9, generator) == top(kind)).all()


@both
@given(bits=st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_mutations_move_a_few_free_actions_and_no_others(kind, bits, seed):
    policy, mask, generator = make(kind), mask_of(kind, bits), torch.Generator().manual_seed(seed)
    actions = sample(policy, sequence(), mask, 40, seed)
    mutated = policy.mutated(actions, mask, generator)
    assert 0 <= mutated.min() <= mutated.max() <= top(kind)
    moved = (mutated != actions).flatten(1).sum(1)
    assert torch.equal(mutated[:, ~mask], actions[:, ~mask])
    assert moved.max() <= min(MUTATIONS, mask.sum())
    if kind == "removal" and mask.any():
        assert moved.min() >= 1


@both
def test_entropy_is_a_share_that_falls_as_a_policy_settles(kind):
    policy, x, mask = make(kind), sequence(), mask_of(kind, [True] * LAYERS)
    actions = sample(policy, x, mask, 30)
    with torch.no_grad():
        _, before = policy.score(x, mask, actions)
        policy.head.weight.mul_(0)
        policy.head.bias.mul_(0)
        _, even = policy.score(x, mask, actions)
        policy.head.bias[:1].fill_(50.0)
        policy.head.bias[RATIOS : RATIOS + 1].fill_(50.0)
        _, settled = policy.score(x, mask, actions)
    assert ((before > 0) & (before <= 1 + 1e-5)).all()
    assert torch.allclose(even, torch.ones(30), atol=1e-5)
    assert (settled < 1e-5).all()
