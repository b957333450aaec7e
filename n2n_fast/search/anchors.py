"""The few students of a stage that are trained fully: they teach the accuracy predictor and warm-start the policy.

The first ones, trained before the first update, are spread from mild to severe compression by chance. Later ones are
taken from where the policy is, every few updates.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from n2n_fast.networks.architecture import Architecture
from n2n_fast.search.environment import MOST_TILTED
from n2n_fast.search.policies import clone_behaviour
from n2n_fast.search.stage import Anchor, Stage
from n2n_fast.training.clock import now
from n2n_fast.training.seeds import derived

SPREAD_TRIES = 20  # at an anchor that is not degenerate


def train_anchors(stage: Stage) -> None:
    """Train the anchors that are due at this update, and let the predictor learn from each."""
    config, progress = stage.config, stage.search.progress
    later = stage.update // config.anchor_every if config.anchor_every else 0
    while config.anchors and (number := len(stage.anchors)) < config.anchors + later:
        arch = _spread(stage, number) if number < config.anchors else _best_recent(stage)
        if arch is None:
            stage.anchors.append(Anchor())
            continue
        _train(stage, arch, number)
        stage.learn_accuracies()
        predictor = stage.predictor
        if predictor.count:
            error = "" if predictor.error is None else f", {100 * predictor.error:.1f} points off when left out"
            progress.message(f"{stage.name}: accuracies are corrected by {predictor.count} anchors{error}")
        stage.search.save()
        progress.phase(stage.name, (config.updates - stage.update) * config.rollouts)


def warm_start(stage: Stage) -> None:
    """Let the policy begin at the best of the first anchors, unless it was told how to begin, or trained before."""
    if stage.config.keep_probability is not None or stage.name in stage.search.policies:
        return
    ranks = {
        key: stage.judge_at(key, stage.predictor.after_final_training(full_accuracy)).rank
        for key, full_accuracy, _ in stage.anchors[: stage.config.anchors]
        if full_accuracy is not None
    }
    if ranks:
        actions = stage.actions[max(ranks, key=ranks.__getitem__)]
        clone_behaviour(stage.policy, stage.x, stage.mask, torch.tensor(actions))


def _spread(stage: Stage, number: int) -> Architecture | None:
    """One of the first anchors, from mild to severe, evaluated as any student; None if all tries are degenerate.

    At limits the mildest is the teacher, narrowed. In stage 2 it is narrowed evenly, those after it more where that
    saves more, and the last by chance: the predictor has to know what bad students come to.
    """
    config, transition = stage.config, stage.transition
    at_limits = transition.saves is not None
    severity = (number if at_limits else number + 0.5) / config.anchors
    earlier = {anchor.key for anchor in stage.anchors[:number]}
    generator = torch.Generator().manual_seed(derived(config.seed, stage.name, "anchor", number))
    draws: Iterator[Tensor] = (stage.policy.spread(stage.mask, severity, generator) for _ in range(SPREAD_TRIES))
    if at_limits and stage.name == "shrinkage" and number < max(1, config.anchors - 1):
        tilted = transition.tilted(MOST_TILTED * number / max(1, config.anchors - 2))
        draws = itertools.chain([tilted.where(stage.mask, len(config.ratios) - 1)], draws)
    for actions in itertools.islice(draws, SPREAD_TRIES):
        arch = stage.architectures(actions[None])[0]
        if isinstance(arch, Architecture) and arch.key not in earlier:
            if arch.key not in stage.evaluated:
                next(stage.evaluate({number: arch}, [actions.tolist()]))
            return arch
    return None


def _best_recent(stage: Stage) -> Architecture | None:
    """The best of the last students that were evaluated, which tell where the policy is, and are no anchors yet."""
    anchored = {anchor.key for anchor in stage.anchors}
    recent = [key for key in list(stage.evaluated)[-2 * stage.config.rollouts :] if key not in anchored]
    judged = [judged for key in recent if (judged := stage.judge(key)) is not None]
    return max(judged, key=lambda student: student.rank).architecture if judged else None


def _train(stage: Stage, arch: Architecture, number: int) -> None:
    """Train an evaluated architecture fully, and add it to the stage's anchors.

    Where a limit on accuracy decides, a middle one of the first stage gets the final training as well.
    """
    config, device = stage.config, stage.search.executor.evaluator.device
    purpose, final_accuracy = f"anchor {number + 1} of {stage.name}", None
    is_measure = stage is stage.search.stages[0] and number == config.anchors // 2
    start = now(device)
    full_accuracy, _ = stage.train(arch, config.anchor_epochs, purpose)
    if full_accuracy is not None and is_measure and stage.search.constraints.min_accuracy is not None:
        final_accuracy, _ = stage.train(arch, config.final_epochs, f"{purpose}, as a final student")
    stage.anchors.append(Anchor(arch.key, full_accuracy, final_accuracy))
    told = {"full_accuracy": full_accuracy, "final_accuracy": final_accuracy}
    seconds = round(now(device) - start, 4)
    stage.log("anchor", index=number, **stage.shown(arch.key), **told, training_seconds=seconds)
