"""Both policies: what is drawn, how it is scored, what trains."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from n2n_fast.search.policies import LIKENESS, RemovalPolicy, ShrinkagePolicy, clone_behaviour

Policy = RemovalPolicy | ShrinkagePolicy
FEATURES, LAYERS, RATIOS = 5, 6, 4
KINDS = ["removal", "shrinkage"]


def make(kind: str, seed: int = 0, ratios: int = RATIOS) -> Policy:
    torch.manual_seed(seed)
    of = [(i + 1) / ratios for i in range(ratios)]
    return RemovalPolicy(FEATURES, 12) if kind == "removal" else ShrinkagePolicy(FEATURES, of, 12)


def sequence(layers: int = LAYERS) -> Tensor:
    return torch.rand(layers, FEATURES, generator=torch.Generator().manual_seed(1))


def mask_of(kind: str, bits: list[bool]) -> Tensor:
    """(layers,) for the removal policy, (layers, 2) for the shrinkage policy, whose second column is reversed."""
    return torch.tensor(bits) if kind == "removal" else torch.tensor([bits, bits[::-1]]).T


def sample(policy: Policy, x: Tensor, mask: Tensor, count: int, seed: int = 0) -> Tensor:
    return policy.sample(x, mask, count, torch.Generator().manual_seed(seed))


def all_true(kind: str, layers: int = LAYERS) -> Tensor:
    return mask_of(kind, [True] * layers)


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS), st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_masked_actions_never_vary(kind: str, bits: list[bool], seed: int) -> None:
    policy, mask = make(kind, seed), mask_of(kind, bits)
    actions = sample(policy, sequence(), mask, 40, seed)
    assert actions.shape == (40, *mask.shape)
    assert actions.dtype == torch.int64
    top = 1 if kind == "removal" else RATIOS - 1
    assert actions.min() >= 0
    assert actions.max() <= top
    assert (actions[:, ~mask] == top).all()
    with torch.no_grad():
        assert policy.log_prob(sequence(), mask, actions).shape == (40,)
        assert not policy.log_prob(sequence(), torch.zeros_like(mask), actions).any()


@pytest.mark.parametrize("kind", KINDS)
def test_unmasked_actions_do_vary(kind: str) -> None:
    actions = sample(make(kind), sequence(), all_true(kind), 300)
    assert (actions.min(0).values == 0).all()
    assert (actions.max(0).values == (1 if kind == "removal" else RATIOS - 1)).all()


def test_a_masked_layer_adds_nothing_to_the_log_probability_of_removal() -> None:
    policy, mask = make("removal"), torch.tensor([True, False, True, True, False, True])
    kept = torch.ones(1, LAYERS, dtype=torch.int64)
    flipped = torch.where(mask, kept, 0)
    assert torch.equal(policy.log_prob(sequence(), mask, kept), policy.log_prob(sequence(), mask, flipped))
    p = policy(sequence()).sigmoid().double()
    assert policy.log_prob(sequence(), mask, kept).item() == pytest.approx(p[mask].log().sum().item(), abs=1e-5)


def test_masked_entries_add_nothing_to_the_log_probability_of_shrinkage() -> None:
    policy, mask = make("shrinkage"), mask_of("shrinkage", [True, False, True, True, False, False])
    actions = sample(policy, sequence(), mask, 7)
    each = torch.stack(
        [
            policy.log_prob(sequence(), torch.zeros_like(mask).index_put((i, j), torch.tensor(True)), actions)
            for i, j in (index.unbind() for index in mask.nonzero())
        ]
    )
    assert torch.allclose(each.sum(0), policy.log_prob(sequence(), mask, actions), atol=1e-5)
    assert (each < 0).all()


def test_removal_starts_at_its_keep_probability() -> None:
    torch.manual_seed(0)
    policy = RemovalPolicy(FEATURES, keep_probability=0.9)
    assert policy(sequence()).sigmoid().mean().item() == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_started_policy_draws_around_what_it_was_shown(kind: str) -> None:
    policy, x, mask = make(kind), sequence(), mask_of(kind, [True, True, False, True, True, True])
    shown = policy.spread(mask, 0.7, torch.Generator().manual_seed(3))
    clone_behaviour(policy, x, mask, shown)
    drawn = sample(policy, x, mask, 2000)
    wanted = policy.around(shown)
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_is_none_from_what_a_policy_draws_itself(kind: str) -> None:
    policy, x, mask = make(kind), sequence(1), mask_of(kind, [True])
    generator = torch.Generator().manual_seed(0)
    first = torch.full((1, 1, 2), RATIOS - 1)
    own = policy(x).sigmoid() if kind == "removal" else policy(x, first)[0].exp()
    assert policy.divergence(x, mask, own.detach(), generator).item() == pytest.approx(0, abs=1e-5)
    other = policy.around(policy.spread(mask, 0.5, generator))
    assert policy.divergence(x, mask, other, generator).item() > 0.01
    assert policy.divergence(x, torch.zeros_like(mask), other, generator).item() == 0


def test_removal_log_prob_is_the_product_of_the_layers_probabilities() -> None:
    policy, mask = make("removal"), all_true("removal")
    actions = sample(policy, sequence(), mask, 20)
    keep = policy(sequence()).sigmoid().double()
    expected = torch.where(actions == 1, keep, 1 - keep).prod(1)
    assert torch.allclose(policy.log_prob(sequence(), mask, actions).double().exp(), expected, rtol=1e-4)


@given(st.integers(0, 999))
@settings(deadline=None, max_examples=10)
def test_shrinkage_log_prob_is_the_product_of_the_steps(seed: int) -> None:
    policy, x = make("shrinkage", seed), sequence()
    mask = torch.rand(LAYERS, 2, generator=torch.Generator().manual_seed(seed)) < 0.7
    actions = sample(policy, x, mask, 5, seed)
    with torch.no_grad():
        scored = policy.log_prob(x, mask, actions)
        for row, expected in zip(actions, scored, strict=True):
            state, before, probability = None, [RATIOS - 1, RATIOS - 1], 1.0
            for t in range(LAYERS):
                one_hot = torch.zeros(2, RATIOS)
                one_hot[0, before[0]] = one_hot[1, before[1]] = 1
                output, state = policy.lstm(torch.cat([x[t], one_hot.flatten()])[None, None], state)
                chances = policy.head(output)[0, 0].view(2, RATIOS).softmax(1)
                before = row[t].tolist()
                for j in range(2):
                    probability *= chances[j, before[j]].item() if mask[t, j] else 1.0
            assert expected.exp().item() == pytest.approx(probability, rel=1e-4)


def test_shrinkage_samples_are_the_largest_of_noisy_logits() -> None:
    policy, x, mask = (
        make("shrinkage"),
        sequence(),
        torch.rand(LAYERS, 2, generator=torch.Generator().manual_seed(2)) < 0.7,
    )
    actions = sample(policy, x, mask, 6, seed=5)
    noise = -torch.empty(LAYERS, 6, 2, RATIOS).exponential_(generator=torch.Generator().manual_seed(5)).log()
    before = torch.cat([torch.full((6, 1, 2), RATIOS - 1), actions[:, :-1]], 1)
    with torch.no_grad():
        wanted = (policy(x, before) + noise.transpose(0, 1)).argmax(3)
    assert torch.equal(actions, torch.where(mask, wanted, RATIOS - 1))


def outcomes(kind: str, mask: Tensor, choices: int) -> Tensor:
    """Every action sequence that `mask` allows."""
    options = [range(choices) if free else (choices - 1,) for free in mask.flatten().tolist()]
    return torch.tensor(list(itertools.product(*options))).view(-1, *mask.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_sum_to_one_and_are_those_of_the_samples(kind: str) -> None:
    policy, mask = make(kind, ratios=2), mask_of(kind, [True, False, True])
    x = sequence(3)
    every = outcomes(kind, mask, 2)
    with torch.no_grad():
        probability = policy.log_prob(x, mask, every).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = sample(policy, x, mask, 4000)
    frequency = (drawn[:, None] == every).flatten(2).all(2).float().mean(0)
    assert frequency.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(frequency, probability, atol=0.035)  # more than four standard deviations


def test_shrinkage_looks_back_and_removal_both_ways() -> None:
    x, changed = sequence(), sequence()
    changed[-1] += 1
    removal, shrinkage = make("removal"), make("shrinkage")
    previous = torch.zeros(1, LAYERS, 2, dtype=torch.int64)
    with torch.no_grad():
        assert (removal(x)[0] - removal(changed)[0]).abs() > 0
        assert torch.equal(shrinkage(x, previous)[:, :-1], shrinkage(changed, previous)[:, :-1])
        previous[0, 2] = 1
        after = shrinkage(x, previous) - shrinkage(x, torch.zeros_like(previous))
    assert not after[0, :2].any()
    assert (after[0, 2:].abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    policy, mask = make(kind), all_true(kind)
    policy.log_prob(sequence(), mask, sample(policy, sequence(), mask, 3)).sum().backward()
    names = dict(policy.named_parameters())
    assert "lstm.weight_ih_l1" in names
    assert ("lstm.weight_ih_l1_reverse" in names) == (kind == "removal")
    for name, parameter in names.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_depends_on_its_generator_alone(kind: str) -> None:
    policy, mask = make(kind), all_true(kind)
    first = sample(policy, sequence(), mask, 10, seed=3)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert torch.equal(first, sample(policy, sequence(), mask, 10, seed=3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, sample(policy, sequence(), mask, 10, seed=4))


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_depend_on_the_global_seed(kind: str) -> None:
    first, same, other = (nn.utils.parameters_to_vector(make(kind, seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_reinforce_finds_a_rewarded_pattern(kind: str) -> None:
    pattern = torch.tensor([0, 1, 1, 0]) if kind == "removal" else torch.tensor([[0, 3], [2, 1]])
    policy, mask, x = make(kind, 5), all_true(kind, len(pattern)), torch.eye(len(pattern), FEATURES)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)

    def chance() -> float:
        with torch.no_grad():
            return policy.log_prob(x, mask, pattern[None]).exp().item()

    before, baseline = chance(), 0.0
    for _ in range(100):
        actions = policy.sample(x, mask, 32, generator)
        rewards = (actions == pattern).flatten(1).float().mean(1)
        loss = -((rewards - baseline) * policy.log_prob(x, mask, actions)).mean()
        baseline = 0.7 * baseline + 0.3 * rewards.mean().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.1
    assert chance() > 0.9


def test_kernels_keep_their_size_at_first_and_widths_are_free() -> None:
    policy = make("shrinkage")
    mask = torch.ones(LAYERS, 2, dtype=torch.bool)
    drawn = sample(policy, sequence(), mask, 2000)
    kept = (drawn == RATIOS - 1).float().mean((0, 1))
    assert 0.7 < kept[1] < 0.9
    assert 0.5 / RATIOS < kept[0] < 2 / RATIOS


@pytest.mark.parametrize("kind", ["removal", "shrinkage"])
def test_spread_grows_with_severity_and_respects_the_mask(kind: str) -> None:
    policy = make(kind)
    generator = torch.Generator().manual_seed(0)
    free, fixed = all_true(kind, 400), ~all_true(kind, 400)
    kept = [policy.spread(free, severity, generator).float().mean() for severity in (0.1, 0.5, 0.9)]
    assert kept[0] > kept[1] > kept[2] > 0
    assert set(policy.spread(fixed, 0.9, generator).flatten().tolist()) == {1 if kind == "removal" else RATIOS - 1}
