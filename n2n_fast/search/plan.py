"""What a search would do: how large its spaces are, whether its limits can be met, and about how long it takes."""

import contextlib
import math
import time
from dataclasses import replace
from typing import Any

import torch

from n2n_fast.files.errors import BadInput, DegenerateArchitecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.config import STAGES, SearchConfig
from n2n_fast.search.environment import Evaluator, passes
from n2n_fast.search.imagination import OWN, SHOWN
from n2n_fast.search.policies import new_policy, on_one_thread
from n2n_fast.search.reward import Cost
from n2n_fast.search.teacher import Reference, latency_of
from n2n_fast.training.data import ImageData

TIMED_STEPS = 20  # at most, of the training of the student that is timed


def plan(reference: Reference, data: ImageData, config: SearchConfig) -> dict[str, Any]:
    """Look at a teacher's space, and time the evaluation of one student; nothing is written.

    params, macs, accuracy: the teacher's. choices: in each stage, of layers, or of widths and kernels.
    architectures_log10: of how many architectures that gives, at most; of the second stage as if the first had removed
    nothing. limits: on costs; gaps: how far even the smallest student stays from them, relative to them.
    training_steps: of all full trainings. seconds: of all of it, about. Raises BadInput where no student can
    be evaluated.
    """
    names, space, limits = STAGES[config.stages], reference.space, reference.limits(config)
    removals = sum(layer.removable for layer in space.layers)
    shrinkages = sum(map(sum, space.choices(space.teacher)))
    choices = {"removal": (removals, 2), "shrinkage": (shrinkages, len(config.ratios))}
    smallest, count = space.teacher, len(space.layers)
    if config.stages != "removal":
        smallest = space.shrink_within(space.teacher, [1.0] * count, [min(config.ratios)] * count, params=1)
    else:
        with contextlib.suppress(DegenerateArchitecture):
            smallest = space.remove(space.teacher, [False] * count)
    cost = Cost(smallest.params, smallest.macs, latency_of(space.build(smallest, "sliced"), data, config))
    rollout, step = _timed(reference, data, config)
    learning = _learning(space, config)
    updates, steps = len(names) * config.updates, _training_steps(config, len(data.train))
    rollouts = updates * config.rollouts
    return {
        "params": space.teacher.params,
        "macs": space.teacher.macs,
        "accuracy": reference.accuracy,
        "choices": {name: choices[name][0] for name in names},
        "architectures_log10": {name: choices[name][0] * math.log10(choices[name][1]) for name in names},
        "limits": limits.costs,
        "gaps": limits.gaps(cost, accuracy=1.0),  # only a search can tell whether a limit on that can be met
        "rollouts": rollouts,
        "rollout_seconds": rollout,
        "training_steps": steps,
        "step_seconds": step,
        "updates": updates,
        "learning_seconds": learning,
        "seconds": rollouts * rollout + steps * step + updates * learning,
        "warnings": reference.warnings,
    }


def _timed(reference: Reference, data: ImageData, config: SearchConfig) -> tuple[float, float]:
    """Seconds of a rollout and of a training step, by the second of two evaluations: the first prepares what is shared.

    The student has half the teacher's widths, or fewer where limits ask for it.
    """
    space, epoch = reference.space, max(1, len(data.train) // config.batch_size)
    steps = config.rollout_steps if config.epochs is None else config.epochs * epoch
    timed = replace(config, epochs=None, rollout_steps=min(TIMED_STEPS, max(1, round(steps))))
    halves = [0.5] * len(space.layers)
    arch = space.shrink_within(space.teacher, halves, params=config.max_params, macs=config.max_macs)
    evaluator = Evaluator("plan", space, data, reference.logits, reference.calibration, timed)
    evaluation = [evaluator.evaluate(arch, seed=0) for _ in range(2)][1]
    if evaluation.error is not None:
        raise BadInput(f"a student of half the teacher's widths cannot be evaluated ({evaluation.error})")
    step = evaluation.seconds["train"] / timed.rollout_steps
    return sum(evaluation.seconds.values()) + (steps - timed.rollout_steps) * step, step


def _learning(space: ArchitectureSpace, config: SearchConfig) -> float:
    """Seconds for which a policy learns from imagined students after an update."""
    x, mask = space.features(), torch.tensor(space.choices(space.teacher)).T
    policy, generator = new_policy("shrinkage", x.shape[1], config, {}), torch.Generator().manual_seed(0)
    with on_one_thread():
        start = time.perf_counter()
        actions = policy.sample(x, mask, OWN + SHOWN, generator)
        log_probs, entropies = policy.score(x, mask, actions)
        (log_probs.mean() + entropies.mean()).backward()  # type: ignore[no-untyped-call]
        return (time.perf_counter() - start) * config.imagined_steps


def _training_steps(config: SearchConfig, images: int) -> int:
    """Steps of all full trainings: of anchors, of the best student between stages, and of the last stage's best."""
    stages = len(STAGES[config.stages])
    later = (config.updates - 1) // config.anchor_every if config.anchors and config.anchor_every else 0
    epochs = stages * (config.anchors + later) * config.anchor_epochs
    epochs += (stages - 1) * config.stage_epochs + config.keep_top * config.final_epochs
    return round(epochs * passes(config, images) * max(1, images // config.batch_size))
