"""N2N learning: two stages of REINFORCE over a teacher's architecture space, then the final training (section 3)."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from n2n_fast.files.errors import BadInput, check_type, telling_device_faults
from n2n_fast.files.whole import check_room
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.tracing import unwrapped
from n2n_fast.search.anchors import train_anchors, warm_start
from n2n_fast.search.checkpoint import RunDirectory, read_state
from n2n_fast.search.config import STAGES, SearchConfig
from n2n_fast.search.environment import Executor, Training
from n2n_fast.search.imagination import Imagination, learn_from_imagined
from n2n_fast.search.policies import new_policy, on_one_thread
from n2n_fast.search.result import Result, finish, train_best
from n2n_fast.search.reward import RewardFunction
from n2n_fast.search.stage import Rollout, Search, SearchProgress, Stage
from n2n_fast.search.teacher import Reference, space_of
from n2n_fast.search.workers import RayExecutor, Workers
from n2n_fast.training.data import ImageData
from n2n_fast.training.teachers import digest

__all__ = ["Rollout", "SearchProgress", "compress", "prepared", "read_policies"]

DRAWS = 4  # for each rollout, of which one that is new is taken


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
    trained_on: str | None = None,
) -> Result:
    """Search for the student of best reward, train it fully and write the run directory `out`.

    teacher: a trained classifier of images (N, C, H, W), its wrappers such as DataParallel taken off; `data` on its
    device. The test split is read once, at the end. On a CPU the same seed gives the same result, unless latencies
    count. out: does not exist yet, or is empty. resume: go on with the run in `out`, to the very same end. policies:
    another run's policies.pt to start from. command: what config.json shall note of how this was called. workers:
    evaluate students in Ray workers, whose number does not change the result on CPUs. training: trains a student in
    place for so many epochs, a fraction for a rollout; instead of distillation. Where a run goes on, such a training
    begins again. reward: of a validation accuracy and a `Cost`; instead of C (2 - C) · A / A_teacher. Limits apply to
    either. trained_on: `data.digest`, where the teacher is known to have seen none of the validation and test images;
    otherwise the run says what it may have seen. Raises TypeError; BadInput where teacher, data or `out` cannot be
    used; DeviceFault, which is one; and Interrupted where `progress` says to stop. What is done is kept.
    """
    _check_types(teacher, data, config, out, progress, policies, workers)
    config, progress = config or SearchConfig(), progress or SearchProgress()
    with contextlib.ExitStack() as stack:
        stack.enter_context(telling_device_faults())
        executor = stack.enter_context(contextlib.closing(RayExecutor(workers) if workers else Executor()))
        how = resume, policies, command, trained_on, progress.stopping
        directory, reference, trained = stack.enter_context(prepared(teacher, data, config, out, *how))
        for line in (reference.summary, *(f"warning: {text}" for text in reference.warnings)):
            progress.message(line)
        directory.begin()
        shared = config, data, reference, reference.limits(config), directory, progress, executor
        return _search_in_stages(Search(*shared, trained, training, reward))


@contextlib.contextmanager
def prepared(
    teacher: nn.Module,
    data: ImageData,
    config: SearchConfig,
    out: str | os.PathLike[str],
    resume: bool = False,
    policies: str | os.PathLike[str] | None = None,
    command: Mapping[str, Any] | None = None,
    trained_on: str | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[RunDirectory, Reference, dict[str, Any]]]:
    """The directory, the teacher and the policies of a search that could begin; as of `compress`, which raises so."""
    teacher = unwrapped(teacher)
    trained = {} if policies is None else read_policies(Path(policies))
    with RunDirectory(Path(out), _settings(teacher, data, config, command), resume, stopping) as directory:
        check_room(directory.path, teacher.state_dict(), sum(file.lstat().st_size for file in directory.path.iterdir()))
        reference = Reference.of(teacher, data, config, trained_on)
        for stage in STAGES[config.stages]:  # refuses one that does not fit
            new_policy(stage, reference.space.features().shape[1], config, trained)
        yield directory, reference, trained


def _check_types(*arguments: Any) -> None:
    """Raise for arguments of `compress` of another type, or no name of a directory."""
    path: Any = str | os.PathLike
    wanted: dict[str, tuple[Any, str]] = {
        "teacher": (nn.Module, "a trained torch.nn.Module, not its file or state dict"),
        "data": (ImageData, "an ImageData, as n2n_fast.load and n2n_fast.from_tensors give it"),
        "config": (SearchConfig | None, "an n2n_fast.SearchConfig, such as SearchConfig(updates=20)"),
        "out": (path, "the path of a directory"),
        "progress": (SearchProgress | None, "an n2n_fast.SearchProgress"),
        "policies": (path | None, "the path of another run's policies.pt"),
        "workers": (Workers | None, "n2n_fast.Workers, such as Workers(4)"),
    }
    by_name = dict(zip(wanted, arguments, strict=True))
    for name, value in by_name.items():
        check_type(name, value, *wanted[name])
    if by_name["out"] == "":
        raise BadInput("out: an empty path; give the name of a directory")


def _search_in_stages(search: Search) -> Result:
    """Removal, then shrinkage of what it leaves; each ends with the full training of its best students."""
    student, space = search.teacher.module, search.teacher.space
    for name in STAGES[search.config.stages]:
        if search.stages:  # stage 2 starts from the trained student of stage 1
            space = space_of(student, search.teacher.calibration, search.config)
        stage = Stage(name, space, search)
        if not stage.done:
            stage.begin()
            _reinforce(stage)
            train_best(stage)
        student = stage.student()
    return finish(search, student)


def _reinforce(stage: Stage) -> None:
    """One stage of REINFORCE (equation 3): the policy learns by the rewards of the students that it samples."""
    config, progress = stage.config, stage.search.progress
    best: Rollout | None = None
    progress.phase(stage.name, config.updates * config.rollouts)
    while stage.update < config.updates:
        train_anchors(stage)
        if stage.update == 0:
            warm_start(stage)
        actions = drawn(stage)
        rewards = []
        for rollout in _rollouts(stage, actions):
            rewards.append(rollout.reward)
            shown = (one for one in (best, rollout) if one is not None and one.predicted_accuracy is not None)
            best = max(shown, key=lambda one: (one.feasible, one.reward), default=None)
            compression = stage.search.teacher.cost.params / best.params if best and best.params else None
            progress.rollout(rollout, best, compression)
        if config.imagined_steps and stage.learns:
            learn_from_imagined(stage)
        else:
            _update_policy(stage, actions, torch.tensor(rewards))
        stage.update += 1
        stage.search.save()
    if all(evaluation.error is not None for _, evaluation in stage.evaluated.values()):
        raise BadInput(
            f"{stage.name}: none of {config.updates * config.rollouts} students could be evaluated; "
            "raise --rollouts or lower --learning-rate"
        )


def drawn(stage: Stage) -> Tensor:
    """Actions of an update's rollouts, (rollouts, ...), drawn by the policy; students that are not known come first."""
    config, draw = stage.config, functools.partial(stage.policy.sample, stage.x, stage.mask)
    if not (config.reuse and config.imagined_steps):
        return draw(config.rollouts, stage.generator)
    actions = draw(DRAWS * config.rollouts, stage.generator)
    known, new, others = set(stage.evaluated), list[int](), list[int]()
    for i, arch in enumerate(stage.architectures(actions)):
        if isinstance(arch, Architecture) and arch.key not in known:
            known.add(arch.key)
            new.append(i)
        else:
            others.append(i)
    return actions[[*new, *others][: config.rollouts]]


@on_one_thread()
def _update_policy(stage: Stage, actions: Tensor, rewards: Tensor) -> None:
    """One step of the policy's gradient, each rollout's actions credited with its own advantage.

    actions: (rollouts, layers) or (rollouts, layers, 2). rewards: (rollouts,). The baseline is their moving average.
    """
    config, policy, mean = stage.config, stage.policy, float(rewards.mean())
    baseline = mean if stage.baseline is None else stage.baseline
    advantages = rewards - baseline
    if config.normalise and len(rewards) > 1:
        advantages = advantages / advantages.square().mean().sqrt().clamp_min(1e-3)
    loss = -(advantages * policy.log_prob(stage.x, stage.mask, actions)).mean()
    stage.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    stage.optimizer.step()
    stage.baseline = baseline + (1 - config.baseline_decay) * (mean - baseline)


def _rollouts(stage: Stage, actions: Tensor) -> Iterator[Rollout]:
    """An update's rollouts: each row of actions gives an architecture, its student's accuracy, and a reward."""
    rows, archs = actions.tolist(), stage.architectures(actions)
    valid = {i: arch for i, arch in enumerate(archs) if isinstance(arch, Architecture)}
    imagination = Imagination.of(stage) if valid and stage.config.imagined_steps else None
    unknown = [(None, None)] * len(valid)
    expected = iter(imagination.short_accuracies(list(valid.values())) if imagination else unknown)
    are_new = stage.evaluate(valid, [rows[i] for i in valid])
    for index, (row, arch) in enumerate(zip(rows, archs, strict=True)):
        if isinstance(arch, Architecture):
            outcome = _judged(stage, arch, cached=not next(are_new))
            outcome["expected_accuracy"], outcome["expected_error"] = next(expected)
        else:
            outcome = {"error": arch.reason}
        rollout = Rollout(stage.name, stage.update, index, row, **outcome)
        stage.search.directory.log({"kind": "rollout", **asdict(rollout)})
        yield rollout


def _judged(stage: Stage, arch: Architecture, cached: bool) -> dict[str, Any]:
    """What becomes of an evaluated student: its accuracies, and its reward by the predictor of this moment."""
    outcome, judged = {**stage.shown(arch.key), "cached": cached}, stage.judge(arch.key)
    if cached:
        outcome["seconds"] = {}
    if judged is not None:
        outcome |= {"predicted_accuracy": judged.accuracy, "accuracy_error": judged.error}
        outcome["reward"] = stage.reward.penalised(judged.reward, judged.violation, stage.update)
        outcome["feasible"] = judged.violation == 0
    return outcome


def read_policies(path: Path) -> dict[str, Any]:
    """The policies of another run, by stage. Raises BadInput where the file holds none."""
    policies = read_state(path)
    if not policies.keys() & set(STAGES["both"]):
        raise BadInput(f"{path}: holds no policy; give the policies.pt of a run")
    return policies


def _settings(
    teacher: nn.Module, data: ImageData, config: SearchConfig, command: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What config.json says of a run; the data's preprocessing, by which `evaluate` shows the student images."""
    noted = {} if command is None else {"command": dict(command)}
    described = data.described()
    told = {name: described.pop(name) for name in ("name", "parts", "notes")}  # where they lie
    return {**asdict(config), "data": described, "teacher": digest(teacher), "data_read": told, **noted}
