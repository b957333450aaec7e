"""N2N learning: two stages of REINFORCE over a teacher's architecture space, then the final training (section 3)."""

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from n2n_fast.files.errors import BadInput, DegenerateArchitecture, telling_device_faults
from n2n_fast.files.safe_load import understood
from n2n_fast.networks.architecture import Architecture
from n2n_fast.search.anchors import train_anchors, warm_start
from n2n_fast.search.checkpoint import CHECKPOINT, RunDirectory, read_state
from n2n_fast.search.config import STAGES, SearchConfig
from n2n_fast.search.evaluation import Training
from n2n_fast.search.progress import Rollout, SearchProgress
from n2n_fast.search.result import Chosen, Result, finish, train_best
from n2n_fast.search.reward import RewardFunction
from n2n_fast.search.shared import Search, finished_stages, limits_of, settings_of
from n2n_fast.search.stage import Stage
from n2n_fast.search.teacher import Teacher, space_of
from n2n_fast.search.workers import Workers, make_executor
from n2n_fast.training.data import ImageData

__all__ = ["Rollout", "SearchProgress", "compress", "read_policies"]


def compress(
    teacher: nn.Module,
    data: ImageData,
    config: SearchConfig | None = None,
    out: str | os.PathLike[str] = "runs/n2n",
    progress: SearchProgress | None = None,
    *,
    resume: bool = False,
    policies: str | os.PathLike[str] | None = None,
    command: Mapping[str, Any] | None = None,
    workers: Workers | None = None,
    training: Training | None = None,
    reward: RewardFunction | None = None,
) -> Result:
    """Search for the student of best reward, train it fully and write the run directory `out`.

    teacher: a trained classifier of images (N, C, H, W); `data` on its device. The test split is read once, at the
    end. On a CPU the same seed gives the same result, unless latencies count. resume: go on with the run in `out`, to
    the very same end. policies: file with the policies of another run to start from, its policies.pt. command: what
    config.json shall note of how this was called. workers: evaluate students in Ray workers, whose number does not
    change the result on CPUs. Raises BadInput where teacher, data or `out` cannot be used, DeviceFault, which is one,
    where the device fails or its memory runs out, and Interrupted where `progress` says to stop; what is done is kept.

    training: trains a student in place for so many epochs, a fraction for a rollout; instead of distillation. Where a
    run goes on, such a training begins again. reward: of a validation accuracy and a `Cost`; instead of
    C (2 - C) · A / A_teacher. Limits apply to either.
    """
    config, progress = config or SearchConfig(), progress or SearchProgress()
    with telling_device_faults(), contextlib.closing(make_executor(workers)) as executor:
        trained = {} if policies is None else read_policies(Path(policies))
        given = copy.deepcopy(teacher).eval().to(data.train.images.device, torch.float32)
        settings = settings_of(given, data, config)
        with RunDirectory(Path(out), settings, resume, command, progress.stopping) as directory:
            shown = Teacher.of(given, data, config)
            limits = limits_of(config, shown, progress)
            directory.begin()
            finished = finished_stages(directory, config)
            shared = config, data, shown, limits, finished, directory, progress, executor
            return _search_in_stages(Search(*shared, trained, training, reward))


def _search_in_stages(search: Search) -> Result:
    """Removal, then shrinkage of what it leaves; each ends with the full training of its best students."""
    student, space, chosen = search.teacher.module, search.teacher.space, list[Chosen]()
    for number, name in enumerate(STAGES[search.config.stages]):
        if chosen:  # stage 2 starts from the trained student of stage 1
            space = space_of(student, search.teacher.calibration, search.config)
        if number == len(search.finished):
            stage = Stage.begun(name, space, search)
            _reinforce(stage)
            search.finished.append(train_best(stage))
            search.save(None)
        with understood(search.directory.path / CHECKPOINT):
            arch, student = search.finished[number].restored(space)
        chosen.append(Chosen(name, space, arch))
    search.directory.write_tensors("policies.pt", {done.name: done.policy for done in search.finished})
    return finish(search, student, chosen)


def _reinforce(stage: Stage) -> None:
    """One stage of REINFORCE (equation 3): the policy learns by the rewards of the students that it samples."""
    config, policy, progress = stage.config, stage.policy, stage.search.progress
    best: Rollout | None = None
    progress.phase(stage.name, config.updates * config.rollouts)
    while stage.update < config.updates:
        train_anchors(stage)
        if stage.update == 0:
            warm_start(stage)
        actions = policy.sample(stage.x, stage.mask, config.rollouts, stage.generator)
        rewards = []
        for rollout in _rollouts(stage, actions):
            rewards.append(rollout.reward)
            best = _better(rollout, best)
            progress.rollout(rollout, best, _compression(stage, best))
        _update_policy(stage, actions, torch.tensor(rewards))
        stage.update += 1
        stage.save()
    if all(evaluation.error is not None for _, evaluation in stage.evaluated.values()):
        raise BadInput(
            f"{stage.name}: none of {config.updates * config.rollouts} students could be evaluated; "
            "raise --rollouts or lower --learning-rate"
        )


def _update_policy(stage: Stage, actions: Tensor, rewards: Tensor) -> None:
    """One step of the policy's gradient, each rollout's actions credited with its own advantage.

    actions: (rollouts, layers) or (rollouts, layers, 2). rewards: (rollouts,). The baseline is their moving average.
    """
    config, policy, mean = stage.config, stage.policy, float(rewards.mean())
    baseline = mean if stage.baseline is None else stage.baseline
    advantages = rewards - baseline
    if config.normalise and len(rewards) > 1:
        advantages = advantages / advantages.square().mean().sqrt().clamp_min(1e-3)
    log_probability = policy.log_prob(stage.x, stage.mask, actions)
    loss = -(advantages * log_probability).mean()
    if config.entropy:
        loss = loss - config.entropy * policy.entropy(stage.x, stage.mask, actions)
    stage.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    stage.optimizer.step()
    stage.baseline = baseline + (1 - config.baseline_decay) * (mean - baseline)


def _rollouts(stage: Stage, actions: Tensor) -> Iterator[Rollout]:
    """An update's rollouts: each row of actions gives an architecture, its student's accuracy, and a reward."""
    rows = actions.tolist()
    archs = [stage.architecture(row) for row in rows]
    new = stage.new(archs)
    evaluations = stage.evaluate(new)
    for index, (row, arch) in enumerate(zip(rows, archs, strict=True)):
        if isinstance(arch, DegenerateArchitecture):
            rollout = Rollout(stage.name, stage.update, index, row, error=arch.reason)
        else:
            if index in new:
                next(evaluations)
            rollout = _rewarded(stage, index, row, arch, cached=index not in new)
        stage.search.directory.log({"kind": "rollout", **asdict(rollout)})
        yield rollout


def _rewarded(stage: Stage, index: int, actions: list[Any], arch: Architecture, cached: bool) -> Rollout:
    """The rollout of an evaluated student, with its reward by the predictor of this moment."""
    evaluation, judged = stage.evaluated[arch.key][1], stage.judge(arch.key)
    rollout = Rollout(
        stage.name,
        stage.update,
        index,
        actions,
        architecture=arch.key,
        params=arch.params,
        macs=arch.macs,
        latency=evaluation.latency,
        short_accuracy=evaluation.short_accuracy,
        cached=cached,
        seconds={} if cached else evaluation.seconds,
        error=evaluation.error,
    )
    if judged is None:
        return rollout
    return replace(
        rollout,
        predicted_accuracy=judged.accuracy,
        accuracy_error=judged.error,
        reward=stage.reward.penalised(judged.reward, judged.violation, stage.update),
        feasible=judged.violation == 0,
    )


def _better(rollout: Rollout, best: Rollout | None) -> Rollout | None:
    """The one to show as the best so far."""
    if rollout.predicted_accuracy is None:
        return best
    is_better = best is None or (rollout.feasible, rollout.reward) > (best.feasible, best.reward)
    return rollout if is_better else best


def _compression(stage: Stage, best: Rollout | None) -> float | None:
    return None if best is None or best.params is None else stage.search.teacher.cost.params / max(1, best.params)


def read_policies(path: Path) -> dict[str, Any]:
    """The policies of another run, by stage. Raises BadInput where the file holds none."""
    policies = read_state(path)
    if not policies.keys() & set(STAGES["both"]):
        raise BadInput(f"{path}: holds no policy; give the policies.pt of a run")
    return policies
