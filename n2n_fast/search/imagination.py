"""What policies learn from between evaluations: students that nobody built, judged by a predictor.

Some hundred evaluations are too few for a policy gradient, and each would be used once. A model of all of them is
asked instead (Dyna, Sutton 1990): a search on it proposes students, which the policy learns to draw (expert iteration,
Anthony et al. 2017). Whatever is evaluated is drawn by the policy.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from n2n_fast.networks.architecture import Architecture
from n2n_fast.search.policies import on_one_thread
from n2n_fast.search.predictor import ArchitecturePredictor, logistic, logit
from n2n_fast.search.reward import DEGENERATE, Cost
from n2n_fast.search.stage import Judged, Stage

KNOWN = 5  # evaluations, before which nothing is expected
OPTIMISM = 0.1  # deviations by which an expectation is raised where the policy is to learn from it
PARENTS = 10  # of the first generation: the best that were evaluated
PROPOSED = 24
OWN, SHOWN = 32, 12  # students of the policy and of the proposals, in one step
FARTHEST, PROPOSALS_FARTHEST = 3.0, 2.0  # advantages, in deviations of rewards
ENTROPY = 0.13  # of a choice, as a share of the largest there is, which the policy keeps; more where choices are few:
LEAST_ENTROPY, MOST_ENTROPY = 6.0, 0.5  # of all together, in nats, as far as that share allows
SPREADING, LEAST_SPREAD, MOST_SPREAD = 1.05, 3e-4, 10.0  # by which the weight of entropy follows that, and its bounds
GENERATIONS = 6
OFFSPRING = 100


class Imagination:
    """What is expected of a stage's architectures, by all its evaluations so far."""

    @classmethod
    def of(cls, stage: Stage) -> "Imagination | None":
        """None where fewer than KNOWN students were evaluated, and timed where latency counts.

        It is learned anew where there are other evaluations than before.
        """
        shown = [(key, one.short_accuracy, one.latency) for key, (_, one) in stage.evaluated.items()]
        if sum(latency is not None or not stage.config.times for _, _, latency in shown) < KNOWN:
            return None
        if stage.imagination is None or stage.imagination.shown != shown:
            stage.imagination = cls(stage)
            stage.imagination.shown = shown
        return stage.imagination  # type: ignore[no-any-return]

    @on_one_thread()
    def __init__(self, stage: Stage) -> None:
        """Learn from the stage's evaluations; those that failed are taken for chance."""
        self.shown: list[tuple[str, float | None, float | None]] = []
        self._stage, chance = stage, 1 / stage.search.data.classes
        evaluations = [evaluation for _, evaluation in stage.evaluated.values()]
        points = stage.space.coordinates([arch for arch, _ in stage.evaluated.values()])
        shown = (chance if one.short_accuracy is None else one.short_accuracy for one in evaluations)
        self._accuracy = ArchitecturePredictor(points, torch.tensor(list(map(logit, shown))))
        self._log_latency = None
        if stage.config.times:
            timed = [i for i, one in enumerate(evaluations) if one.latency is not None]
            times = torch.tensor([one.latency for one in evaluations if one.latency is not None])
            self._log_latency = ArchitecturePredictor([part[timed] for part in points], times.clamp_min(1e-6).log())

    @on_one_thread()
    def short_accuracies(self, archs: Sequence[Architecture]) -> list[tuple[float, float]]:
        """What an evaluation of each would show, and the standard deviation of that."""
        means, deviations = (part.tolist() for part in self._accuracy(self._stage.space.coordinates(archs)))
        accuracies = map(logistic, means)
        return [(a, a * (1 - a) * deviation) for a, deviation in zip(accuracies, deviations, strict=True)]

    def rewards_of(self, actions: Tensor) -> Tensor:
        """The rewards, (n,), that are expected of actions (n, ...), raised by OPTIMISM; DEGENERATE for no student."""
        archs = self._stage.architectures(actions)
        rewards = iter(self.rewards([arch for arch in archs if isinstance(arch, Architecture)], OPTIMISM))
        return torch.tensor([next(rewards) if isinstance(arch, Architecture) else DEGENERATE for arch in archs])

    def rewards(self, archs: Sequence[Architecture], optimism: float = 0.0) -> list[float]:
        """The reward that is expected of each, as the policy would get it now."""
        if not archs:
            return []
        stage, points = self._stage, self._stage.space.coordinates(archs)
        means, deviations = self._accuracy(points)
        latencies = [None] * len(archs) if self._log_latency is None else self._log_latency(points)[0].exp().tolist()
        found = []
        for arch, value, latency in zip(archs, (means + optimism * deviations).tolist(), latencies, strict=True):
            accuracy, _ = stage.corrected(arch, logistic(value))
            cost = Cost(arch.params, arch.macs, latency)
            violation = stage.reward.limits.violation(cost, accuracy)
            found.append(stage.reward.penalised(stage.reward(accuracy, cost), violation, stage.update))
        return found


def believed(stage: Stage) -> list[Judged]:
    """The evaluated students, each judged by what all evaluations together say of it: one alone is partly luck."""
    judged = [one for key in stage.evaluated if (one := stage.judge(key)) is not None]
    imagination = Imagination.of(stage) if judged and stage.config.imagined_steps else None
    if imagination is None:
        return judged
    archs = [one.architecture for one in judged]
    expected = imagination.short_accuracies(archs)
    return [stage.judge_at(arch.key, *stage.corrected(arch, of[0])) for arch, of in zip(archs, expected, strict=True)]


@on_one_thread()
def learn_from_imagined(stage: Stage) -> None:
    """REINFORCE on imagined students: those that the policy draws, and the best that a search on the model proposes.

    Proposals teach only by what they have ahead of the policy's own (self-imitation, Oh et al. 2018).
    """
    policy, free = stage.policy, int(stage.mask.sum())
    if not free or (imagination := Imagination.of(stage)) is None:
        return
    wanted, largest = proposed(stage, imagination), math.log(policy.options)
    kept = max(ENTROPY, min(MOST_ENTROPY, LEAST_ENTROPY / (free * largest)))
    for _ in range(stage.config.imagined_steps):
        own = policy.sample(stage.x, stage.mask, OWN, stage.generator)
        chosen = wanted[torch.randperm(len(wanted), generator=stage.generator)[:SHOWN]]
        actions = torch.cat([own, chosen])
        log_probs, entropies = policy.score(stage.x, stage.mask, actions)
        entropy = entropies[:OWN].mean()
        gain = (_advantages(imagination.rewards_of(actions)) * log_probs).sum() / (OWN * free)
        stage.optimizer.zero_grad()
        (-gain - stage.spread * entropy).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        stage.optimizer.step()
        towards = SPREADING if entropy.item() < kept else 1 / SPREADING
        stage.spread = min(max(stage.spread * towards, LEAST_SPREAD), MOST_SPREAD)


def _advantages(rewards: Tensor) -> Tensor:
    """By how many deviations each reward is above the policy's own, the first OWN; proposals' are not negative."""
    own = rewards[:OWN]
    valid = own[own > DEGENERATE]
    if not len(valid):
        valid = own
    deviation = valid.std(correction=0).clamp_min(1e-6)
    advantages = ((rewards - valid.mean()) / deviation).clamp(-FARTHEST, FARTHEST)
    advantages[OWN:].clamp_(0, PROPOSALS_FARTHEST)
    return advantages


def proposed(stage: Stage, imagination: Imagination) -> Tensor:
    """Actions of the students of highest expected reward, (n, ...), that an evolution from the best evaluated finds."""
    pool = _best(torch.tensor(list(stage.actions.values())), stage, imagination, PARENTS)
    for _ in range(GENERATIONS):
        parents = pool[torch.randint(len(pool), (OFFSPRING,), generator=stage.generator)]
        children = stage.policy.mutated(parents, stage.mask, stage.generator)
        pool = _best(torch.cat([pool, children]), stage, imagination, PROPOSED)
    return pool


def _best(actions: Tensor, stage: Stage, imagination: Imagination, count: int) -> Tensor:
    """The actions of the best students, each once."""
    archs = stage.architectures(actions)
    of_key = {arch.key: (i, arch) for i, arch in reversed(list(enumerate(archs))) if isinstance(arch, Architecture)}
    rewards = imagination.rewards([arch for _, arch in of_key.values()], OPTIMISM)
    ranked = sorted(zip(rewards, of_key.values(), strict=True), key=lambda one: -one[0])
    return actions[[i for _, (i, _) in ranked[:count]]]
