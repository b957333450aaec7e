"""The few students of a stage that are trained fully: they teach the accuracy predictor and warm-start the policy.

The first ones, trained before the first update, are spread from mild to severe compression by chance. Later ones are
taken from where the policy is, every few updates.
"""

import torch
from torch import Tensor

from n2n_fast.networks.architecture import Architecture
from n2n_fast.search.config import STAGES
from n2n_fast.search.policies import clone_behaviour
from n2n_fast.search.stage import Anchor, Stage
from n2n_fast.search.transition import MOST_TILTED
from n2n_fast.training.clock import now
from n2n_fast.training.seeds import derived

SPREAD_TRIES = 20  # at an anchor that is not degenerate


def train_anchors(stage: Stage) -> None:
    """Train the anchors that are due at this update, and let the predictor learn from each."""
    config, progress = stage.config, stage.search.progress
    later = stage.update // config.anchor_every if config.anchor_every else 0
    while config.anchors and len(stage.anchors) < config.anchors + later:
        number = len(stage.anchors)
        arch = _next_architecture(stage, number)
        if arch is None:
            stage.anchors.append(Anchor())
            continue
        _train(stage, arch, number)
        stage.learn_accuracies()
        predictor = stage.predictor
        if predictor.count:
            error = "" if predictor.error is None else f", {100 * predictor.error:.1f} points off when left out"
            progress.message(f"{stage.name}: accuracies are corrected by {predictor.count} anchors{error}")
        stage.save()
        progress.phase(stage.name, (config.updates - stage.update) * config.rollouts)


def warm_start(stage: Stage) -> None:
    """Let the policy begin at the best of the first anchors, unless it was told how to begin, or trained before."""
    if stage.config.keep_probability is not None or stage.name in stage.search.policies:
        return
    ranks = {}
    for number, (key, full_accuracy, _) in enumerate(stage.anchors[: stage.config.anchors]):
        if full_accuracy is not None:
            ranks[number] = stage.judge_at(key, stage.predictor.after_final_training(full_accuracy)).rank
    best = _spread(stage, max(ranks, key=ranks.__getitem__)) if ranks else None
    if best is not None:
        actions, _ = best
        clone_behaviour(stage.policy, stage.x, stage.mask, actions)


def _next_architecture(stage: Stage, number: int) -> Architecture | None:
    """What the anchor of this number shall be; None if there is nothing new."""
    if number >= stage.config.anchors:
        return _best_recent(stage)
    spread = _spread(stage, number)
    return None if spread is None else spread[1]


def _spread(stage: Stage, number: int) -> tuple[Tensor, Architecture] | None:
    """Actions and architecture of one of the first anchors, from mild to severe; None if all tries are degenerate.

    At limits the mildest is the teacher, narrowed. In stage 2 it is narrowed evenly, those after it more where that
    saves more, and the last by chance: the predictor has to know what bad students come to.
    """
    config, transition = stage.config, stage.transition
    at_limits = transition.saves is not None
    severity = (number if at_limits else number + 0.5) / config.anchors
    earlier = {anchor.key for anchor in stage.anchors[:number]}
    generator = torch.Generator().manual_seed(derived(config.seed, stage.name, "anchor", number))
    tilts = at_limits and stage.name == "shrinkage" and number < max(1, config.anchors - 1)
    for attempt in range(SPREAD_TRIES):
        if tilts and attempt == 0:
            tilted = transition.tilted(MOST_TILTED * number / max(1, config.anchors - 2))
            actions = tilted.where(stage.mask, len(config.ratios) - 1)
        else:
            actions = stage.policy.spread(stage.mask, severity, generator)
        arch = stage.architecture(actions.tolist())
        if isinstance(arch, Architecture) and arch.key not in earlier:
            return actions, arch
    return None


def _best_recent(stage: Stage) -> Architecture | None:
    """The best of the last students that were evaluated, which tell where the policy is, and are no anchors yet."""
    anchored = {anchor.key for anchor in stage.anchors}
    recent = [key for key in list(stage.evaluated)[-2 * stage.config.rollouts :] if key not in anchored]
    judged = [judged for key in recent if (judged := stage.judge(key)) is not None]
    return max(judged, key=lambda student: student.rank).architecture if judged else None


def _train(stage: Stage, arch: Architecture, number: int) -> None:
    """Evaluate the architecture, train it fully, and add it to the stage's anchors."""
    config, device = stage.config, stage.evaluator.device
    if arch.key not in stage.evaluated:
        next(stage.evaluate({number: arch}))
    evaluation = stage.evaluated[arch.key][1]
    purpose, final_accuracy = f"anchor {number + 1} of {stage.name}", None
    start = now(device)
    full_accuracy, _ = stage.train(arch, config.anchor_epochs, purpose)
    if full_accuracy is not None and _gets_final_training(stage, number):
        final_accuracy, _ = stage.train(arch, config.final_epochs, f"{purpose}, as a final student")
    stage.anchors.append(Anchor(arch.key, full_accuracy, final_accuracy))
    stage.log(
        "anchor",
        index=number,
        architecture=arch.key,
        params=arch.params,
        macs=arch.macs,
        latency=evaluation.latency,
        short_accuracy=evaluation.short_accuracy,
        full_accuracy=full_accuracy,
        final_accuracy=final_accuracy,
        seconds=evaluation.seconds,
        training_seconds=round(now(device) - start, 4),
        error=evaluation.error,
    )


def _gets_final_training(stage: Stage, number: int) -> bool:
    """Whether an anchor gets the final training as well: a middle one, where a limit on accuracy decides."""
    is_first = stage.name == STAGES[stage.config.stages][0]
    is_limited = stage.search.constraints.min_accuracy is not None
    return is_first and is_limited and number == stage.config.anchors // 2
