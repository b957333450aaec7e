"""What a search would do: how large its spaces are, and, by a timed rollout, how long it will take."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from n2n_fast.files.errors import BadInput, DegenerateArchitecture
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.config import STAGES, SearchConfig
from n2n_fast.search.evaluation import Evaluation, Evaluator
from n2n_fast.search.policies import KEEP_PROBABILITY
from n2n_fast.search.reward import Constraints, Cost
from n2n_fast.search.teacher import giving_logits, latency_of, space_of
from n2n_fast.search.transition import MOST_TILTED, Transition
from n2n_fast.training.batches import TeacherLogits
from n2n_fast.training.clock import now
from n2n_fast.training.data import ImageData
from n2n_fast.training.seeds import derived

TIMED_STEPS = 20  # at most, of the training of a timed rollout
STEP_TO_LOGITS = 3  # a training step to a forward pass alone, about
TRIES = 20  # at an architecture that is not degenerate


@dataclass(frozen=True)
class StagePlan:
    """A stage to come. choices: layers, or widths and kernels, to be decided. architectures_log10: of their number, at
    most. trainings: full ones. rollout_seconds: of one rollout; seconds: of the stage.
    """

    name: str
    choices: int
    architectures_log10: float
    rollouts: int
    rollout_seconds: float
    trainings: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A search to come. seconds: of all of it, about."""

    params: int
    macs: int
    stages: tuple[StagePlan, ...]
    seconds: float
    warnings: tuple[str, ...]


def plan(teacher: nn.Module, data: ImageData, config: SearchConfig) -> Plan:
    """Look at the teacher's space and time one rollout of each stage; nothing is written.

    The second stage is counted and timed as if the first had removed nothing: both figures are upper bounds. Raises
    BadInput where the teacher cannot be used.
    """
    count = min(config.calibration_images, len(data.train))
    images = data.train.batch(torch.arange(count, device=data.train.labels.device))[0]
    space = space_of(teacher.eval(), images, config)
    teacher = giving_logits(teacher, space, images)
    logits = TeacherLogits(teacher, data.train)
    steps = max(1, round(_steps(config, len(data.train))))
    timed = replace(config, epochs=None, rollout_steps=min(TIMED_STEPS, steps))
    constraints = Constraints(config.max_params, config.max_macs, config.max_latency)
    cost = Cost(space.teacher.params, space.teacher.macs, latency_of(teacher, data, config))
    each = _logits_seconds(logits, data)
    names, stages = STAGES[config.stages], []
    for name in names:
        last = name == names[-1]
        transition = Transition.of(space, config, name == "removal", last, constraints.enough(cost, last))
        evaluation = _timed(name, transition, Evaluator(name, space, data, logits, images, timed))
        stages.append(_stage(name, space, evaluation, timed, config, data, last, each))
    seconds = sum(stage.seconds for stage in stages) + each * _logits_to_come(data, config)
    return Plan(space.teacher.params, space.teacher.macs, tuple(stages), seconds, space.warnings)


def _steps(config: SearchConfig, images: int) -> float:
    """Training steps of a rollout."""
    return config.rollout_steps if config.epochs is None else config.epochs * max(1, images // config.batch_size)


def _stage(
    name: str,
    space: ArchitectureSpace,
    evaluation: Evaluation,
    timed: SearchConfig,
    config: SearchConfig,
    data: ImageData,
    last: bool,
    each: float,
) -> StagePlan:
    """Scale the timed rollout to a stage. timed: the settings that it had. each: the teacher's seconds for an image."""
    step = evaluation.seconds["train"] / timed.rollout_steps
    others = sum(seconds for part, seconds in evaluation.seconds.items() if part != "train")
    rollout = others + step * _steps(config, len(data.train))
    later = (config.updates - 1) // config.anchor_every if config.anchors and config.anchor_every else 0
    anchors = config.anchors + later
    steps_per_epoch = max(1, len(data.train) // config.batch_size)
    best = config.keep_top if last else 1
    if last:
        training = best * config.final_epochs * step
    else:  # what removals leave is trained at its whole width, however narrow it is tried
        training = config.stage_epochs * max(step, STEP_TO_LOGITS * each * config.batch_size)
    training += anchors * config.anchor_epochs * step
    choices, size = _removals(space) if name == "removal" else _shrinkages(space, config.ratios)
    rollouts = config.updates * config.rollouts
    seconds = (rollouts + anchors) * rollout + steps_per_epoch * training
    return StagePlan(name, choices, size, rollouts, rollout, anchors + best, seconds)


def _removals(space: ArchitectureSpace) -> tuple[int, float]:
    """(layers that may be removed, log10 of how many architectures that gives)."""
    count = sum(layer.removable for layer in space.layers)
    return count, count * math.log10(2)


def _shrinkages(space: ArchitectureSpace, ratios: tuple[float, ...]) -> tuple[int, float]:
    """(widths and kernels to choose, log10 of how many architectures that gives), each choice being free of others."""
    whole, total, count = [1.0] * len(space.layers), 0.0, 0
    for position, chosen in enumerate(space.choices(space.teacher)):
        for layer in (i for i, chooses in enumerate(chosen) if chooses):
            keys = set()
            for ratio in ratios:
                tried = [whole, whole]
                tried[position] = [*whole[:layer], ratio, *whole[layer + 1 :]]
                keys.add(space.shrink(space.teacher, *tried).key)
            count, total = count + 1, total + math.log10(len(keys))
    return count, total


def _timed(name: str, transition: Transition, evaluator: Evaluator) -> Evaluation:
    """The second of two rollouts: the first prepares what all others share."""
    config = evaluator.config
    rng = random.Random(derived(config.seed, "plan", name))
    drawn = (arch for _ in range(TRIES) if (arch := _drawn(transition, config, rng)) is not None)
    evaluations = [evaluator.evaluate(arch, seed) for seed, arch in zip(range(2), drawn, strict=False)]
    if len(evaluations) < 2:
        raise BadInput(
            f"{name}: no student could be drawn in {TRIES} tries; the teacher leaves next to nothing to change"
        )
    return evaluations[1]


def _drawn(transition: Transition, config: SearchConfig, rng: random.Random) -> Architecture | None:
    """An architecture as policies propose them when they begin; None where none can be.

    At limits on widths that is an anchor, of those that take longest: what they save is where it costs least time.
    """
    count, actions = len(transition.space.layers), list[Any]()
    if transition.removes:
        keep = config.keep_probability or KEEP_PROBABILITY
        actions = [int(rng.random() < keep) for _ in range(count)]
    elif transition.saves is not None:
        actions = transition.tilted(rng.uniform(MOST_TILTED / 2, MOST_TILTED)).tolist()
    else:
        actions = [rng.choices(range(len(config.ratios)), k=2) for _ in range(count)]
    try:
        return transition(actions)
    except DegenerateArchitecture:
        return None


def _logits_seconds(logits: TeacherLogits, data: ImageData) -> float:
    """Seconds of the teacher for one image."""
    images = data.train.batch(torch.arange(min(128, len(data.train)), device=data.train.labels.device))[0]
    logits(images)
    start = now(images.device)
    logits(images)
    return (now(images.device) - start) / len(images)


def _logits_to_come(data: ImageData, config: SearchConfig) -> int:
    """How many images the teacher will see: those of the training, each of their views where they are augmented."""
    epochs = math.ceil(max(config.anchor_epochs if config.anchors else 0.0, config.stage_epochs, config.final_epochs))
    views = 1 if data.augmentation is None else max(1, min(data.augmentation.views or epochs, epochs))
    return len(data.train) * views
