"""The search: two stages of REINFORCE over one teacher's architecture space, then the final training (section 3)."""

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from n2n_fast.files.errors import BadInput, DegenerateArchitecture, first_line, telling_device_faults
from n2n_fast.files.safe_load import parse_json, understood
from n2n_fast.files.states import checked, load_finite, load_optimizer
from n2n_fast.networks.graph import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.networks.student import independent_copy
from n2n_fast.search.checkpoint import Interrupted, RunDirectory, read_state
from n2n_fast.search.config import STAGES, SearchConfig
from n2n_fast.search.evaluation import (
    NOT_FINITE,
    Evaluation,
    Evaluator,
    Recipe,
    Training,
    giving_logits,
    latency_of,
    restored,
    space_of,
)
from n2n_fast.search.pareto import Point
from n2n_fast.search.policies import KEEP_PROBABILITY, RemovalPolicy, ShrinkagePolicy, imitate
from n2n_fast.search.predictor import Anchor, ProxyMap
from n2n_fast.search.result import Chosen, Result, finish
from n2n_fast.search.reward import DEGENERATE, Constraints, Cost, reward
from n2n_fast.search.transition import MOST_TILTED, Transition
from n2n_fast.search.workers import Engine, Job, Workers, engine
from n2n_fast.training.batches import TeacherLogits
from n2n_fast.training.clock import now
from n2n_fast.training.data import ImageData, accuracy
from n2n_fast.training.distill import Progress, seeded
from n2n_fast.training.seeds import derived

SPREAD_TRIES = 20  # at an anchor that is not degenerate
MOST_DIVERGED = 3  # full trainings, after which others are not tried either

RewardFunction = Callable[[float, Cost], float]  # of the validation accuracy and of what the student costs


@dataclass(frozen=True)
class Rollout:
    """One evaluated student; a line of history.jsonl. `actions` as the policy drew them, one entry a layer.

    proxy_accuracy: after the few steps of a rollout; accuracy: what a full training is expected to make of it, which
    the reward counts, and accuracy_error its standard error; None where `error` says why. cached: evaluated before.
    """

    stage: str
    update: int
    index: int
    actions: list[Any]
    architecture: str | None
    params: int | None
    macs: int | None
    latency: float | None
    proxy_accuracy: float | None
    accuracy: float | None
    accuracy_error: float | None
    reward: float
    feasible: bool
    cached: bool
    seconds: dict[str, float]
    error: str | None = None


class SearchProgress(Progress):
    """What `compress` tells while it works; override what you want to show."""

    def rollout(self, rollout: Rollout, best: Rollout | None, compression: float | None) -> None:
        """A rollout was evaluated; compression: how many times fewer params than the teacher the best has."""

    def stopping(self) -> bool:
        """Whether to stop as soon as the work at hand is kept; the search then raises Interrupted."""
        return False


@dataclass
class _Stage:
    """A stage of the search: what stays the same in it, and behind that its state."""

    name: str
    space: ArchitectureSpace
    evaluator: Evaluator
    policy: RemovalPolicy | ShrinkagePolicy
    mask: Tensor
    limits: Constraints
    enough: dict[str, float]  # by objective, for those that are limited: less than this is not rewarded
    transition: Transition
    optimizer: torch.optim.Optimizer
    generator: torch.Generator

    update: int = 0
    baseline: float | None = None
    evaluated: dict[str, tuple[Architecture, Evaluation]] = field(default_factory=dict)
    anchors: list[tuple[str, float | None, float | None]] = field(default_factory=list)  # key, accuracy, final one
    finals: list[tuple[str, float, dict[str, Tensor]]] = field(default_factory=list)
    finished: list[tuple[float, float]] = field(default_factory=list)  # both accuracies, of the stages before
    map: ProxyMap = field(default_factory=ProxyMap)


@dataclass(frozen=True)
class _Judged:
    """An architecture with what is thought of it, by the map as it is now."""

    architecture: Architecture
    cost: Cost
    accuracy: float
    error: float
    reward: float
    violation: float

    @property
    def rank(self) -> tuple[float, float]:
        """Feasible before infeasible, then by reward; among the infeasible, the nearest first."""
        return (-self.violation, self.reward)


@dataclass(frozen=True)
class _Teacher:
    """The teacher, which every stage's logits and rewards refer to."""

    module: nn.Module
    cost: Cost
    accuracy: float
    logits: TeacherLogits


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
    C (2 - C) · A / A_teacher. Limits are held as ever.
    """
    with telling_device_faults(), contextlib.closing(engine(workers)) as engine_of_run:
        search = _Search(
            teacher,
            data,
            config or SearchConfig(),
            progress or SearchProgress(),
            policies,
            engine_of_run,
            training,
            reward,
        )
        with RunDirectory(Path(out), search.settings(), resume, command) as directory:
            return search.run(directory)


class _Search:
    directory: RunDirectory

    def __init__(
        self,
        teacher: nn.Module,
        data: ImageData,
        config: SearchConfig,
        progress: SearchProgress,
        policies: str | os.PathLike[str] | None,
        engine: Engine,
        training: Training | None,
        reward: RewardFunction | None,
    ) -> None:
        self.training, self.reward = training, reward
        self.config, self.data, self.progress, self.engine = config, data, progress, engine
        self.device = data.train.images.device
        self.policies = {} if policies is None else read_policies(Path(policies))
        self.calibration = self._calibration_images()
        self.given = copy.deepcopy(teacher).eval().to(self.device, torch.float32)

    def settings(self) -> dict[str, Any]:
        """What config.json says of this run."""
        return {**asdict(self.config), "data": _preprocessing(self.data), "teacher": _digest(self.given)}

    def run(self, directory: RunDirectory) -> Result:
        self.directory = directory
        self._prepare()
        directory.begin()
        file = directory.path / "checkpoint.pt"
        held = directory.checkpoint or {"trained": [], "stage": None}
        with understood(file):
            self.trained: list[dict[str, Any]] = [dict(done) for done in held["trained"]]
            for done in self.trained:
                done["finished"] = _pairs(done["finished"])
            points = [Point(**point) for done in self.trained for point in parse_json(done["points"])]
            at = None if held["stage"] is None else dict(held["stage"])
            if at is not None and at["name"] not in STAGES[self.config.stages]:
                raise ValueError(f"of stage {at['name']!r:.40}")
        student: nn.Module = self.teacher.module
        chosen: list[Chosen] = []
        policies: dict[str, Any] = {}
        names = STAGES[self.config.stages]
        for name in names:
            # stage 2 starts from the trained student of stage 1
            space = space_of(student, self.calibration, self.config) if chosen else self.space
            if len(chosen) == len(self.trained):
                stage = self._stage(name, space)
                if at is not None and at["name"] == name:
                    with understood(file):
                        self._restore(stage, at)
                self.engine.begin(stage.evaluator, self._recipe(name))
                self._search(stage)
                self._train_best(stage)
                points += [Point(**point) for point in json.loads(self.trained[-1]["points"])]
            with understood(file):
                done = self.trained[len(chosen)]
                arch = space.member(Architecture.from_json(done["architecture"]))
                chosen.append(Chosen(name, space, arch))
                student = restored(space, arch, done["student"])
                policies[name] = dict(done["policy"])
        directory.write_tensors("policies.pt", policies)
        return finish(
            directory=directory,
            data=self.data,
            config=self.config,
            constraints=self.constraints,
            teacher=self.teacher.module,
            student=student,
            chosen=chosen,
            points=points,
            progress=self.progress,
        )

    # What all stages share

    def _prepare(self) -> None:
        """Look at the teacher: its space, accuracy and costs."""
        teacher, config = self.given, self.config
        space = space_of(teacher, self.calibration, config)
        teacher = giving_logits(teacher, space, self.calibration)
        found = _checked_accuracy(teacher, self.data)
        latency = latency_of(teacher, self.data, config)
        self.teacher = _Teacher(
            module=teacher,
            cost=Cost(space.teacher.params, space.teacher.macs, latency),
            accuracy=found,
            logits=TeacherLogits(teacher, self.data.train),
        )
        least = config.min_accuracy
        if config.max_drop is not None:
            least = max(least or 0.0, found - config.max_drop / 100)
        self.constraints = Constraints(config.max_params, config.max_macs, config.max_latency, least)
        for warning in space.warnings:
            self.progress.message(f"warning: {warning}")
        timed = "" if latency is None else f", {latency:.2f} ms"
        self.progress.message(f"teacher: {space.teacher.params:,} params{timed}, validation accuracy {found:.2%}")
        self.space = space

    def _recipe(self, stage: str) -> Recipe:
        earlier = tuple((done["architecture"], done["student"]) for done in self.trained)
        return Recipe(stage, self.given, self.data, self.calibration, self.config, earlier, self.training)

    def _stage(self, name: str, space: ArchitectureSpace) -> _Stage:
        """A stage at its beginning."""
        config = self.config
        removes = name == "removal"
        features = space.features().shape[1]
        policy: RemovalPolicy | ShrinkagePolicy
        keep = config.keep_probability or KEEP_PROBABILITY
        with seeded(derived(config.seed, name, "policy"), torch.device("cpu")):
            if removes:
                policy = RemovalPolicy(features, config.hidden, config.lstm_layers, keep)
            else:
                policy = ShrinkagePolicy(features, config.ratios, config.hidden, config.lstm_layers, keep)
        if self.policies:
            _transfer(policy, self.policies, name)
        rate = config.removal_learning_rate if removes else config.shrinkage_learning_rate
        last = self._is_last(name)
        enough = self.constraints.enough(self.teacher.cost, last)
        return _Stage(
            name=name,
            space=space,
            evaluator=Evaluator(name, space, self.data, self.teacher.logits, self.calibration, config, self.training),
            policy=policy,
            mask=torch.tensor([layer.removable for layer in space.layers])
            if removes
            else torch.tensor(space.choices(space.teacher)).T,
            limits=self.constraints if last else self.constraints.untimed,
            enough=enough,
            transition=Transition.of(space, config, removes, last, enough, self.reward is not None),
            optimizer=torch.optim.Adam(policy.parameters(), rate),
            generator=torch.Generator().manual_seed(derived(config.seed, name, "actions")),
            finished=[pair for done in self.trained for pair in done["finished"]],
        )

    def _is_last(self, stage: str) -> bool:
        return stage == STAGES[self.config.stages][-1]

    # One stage

    def _search(self, stage: _Stage) -> None:
        """REINFORCE with a moving-average baseline (equation 3)."""
        config, policy = self.config, stage.policy
        features = stage.space.features()
        best: Rollout | None = None
        self.progress.stage(stage.name, config.updates * config.rollouts)
        while stage.update < config.updates:
            self._train_anchors(stage)
            if stage.update == 0:
                self._begin_at_the_best_anchor(stage, features)
            actions = policy.sample(features, stage.mask, config.rollouts, stage.generator)
            rewards = []
            for rollout in self._evaluate(stage, actions):
                rewards.append(rollout.reward)
                if rollout.accuracy is not None and (best is None or _better(rollout, best)):
                    best = rollout
                self.progress.rollout(rollout, best, self._compression(best))
                if self.progress.stopping() and (self.engine.one_at_a_time or len(rewards) == config.rollouts):
                    raise Interrupted(self.directory.path)
            self._learn(stage, features, actions, torch.tensor(rewards))
            stage.update += 1
            self._save(stage)
        if all(evaluation.accuracy is None for _, evaluation in stage.evaluated.values()):
            raise BadInput(
                f"{stage.name}: none of {config.updates * config.rollouts} students could be evaluated; "
                "raise --rollouts or lower --learning-rate"
            )

    def _learn(self, stage: _Stage, features: Tensor, actions: Tensor, rewards: Tensor) -> None:
        """One step of the policy, each rollout's actions credited with its own advantage."""
        config, mean = self.config, float(rewards.mean())
        baseline = mean if stage.baseline is None else stage.baseline
        advantages = rewards - baseline
        if config.normalise and len(rewards) > 1:
            advantages = advantages / advantages.square().mean().sqrt().clamp_min(1e-3)
        loss = -(advantages * stage.policy.log_prob(features, stage.mask, actions)).mean()
        if config.entropy:
            loss = loss - config.entropy * stage.policy.entropy(features, stage.mask, actions)
        stage.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        stage.optimizer.step()
        stage.baseline = baseline + (1 - config.baseline_decay) * (mean - baseline)

    def _evaluate(self, stage: _Stage, actions: Tensor) -> Iterator[Rollout]:
        """The rollouts of one update, in order; each is in the journal before it is given."""
        rows = actions.tolist()
        archs = [self._architecture(stage, row) for row in rows]
        news = self._news(stage, archs)
        evaluations = self._found(stage, "rollout", news)
        for index, (row, arch) in enumerate(zip(rows, archs, strict=True)):
            if isinstance(arch, DegenerateArchitecture):
                rollout = self._degenerate(stage, index, row, arch.reason)
            else:
                if index in news:
                    stage.evaluated[arch.key] = arch, next(evaluations)
                rollout = self._credited(stage, index, row, arch, stage.evaluated[arch.key][1], index not in news)
            self.directory.append({"kind": "rollout", **asdict(rollout)})
            yield rollout

    def _architecture(self, stage: _Stage, actions: list[Any]) -> Architecture | DegenerateArchitecture:
        """What the actions lead to, or why that cannot be or is worth nothing."""
        try:
            arch = stage.transition(actions)
        except DegenerateArchitecture as reason:
            return reason
        return arch if arch.params < self.teacher.cost.params else DegenerateArchitecture("no smaller than the teacher")

    def _news(self, stage: _Stage, archs: Sequence[Architecture | DegenerateArchitecture]) -> dict[int, Architecture]:
        """Those of the architectures that have to be evaluated, by index."""
        seen = set(stage.evaluated) if self.config.reuse else set()
        news = {}
        for i, arch in enumerate(archs):
            if isinstance(arch, Architecture) and arch.key not in seen:
                news[i] = arch
                if self.config.reuse:
                    seen.add(arch.key)
        return news

    def _found(self, stage: _Stage, kind: str, archs: Mapping[int, Architecture]) -> Iterator[Evaluation]:
        """The evaluations of architectures by index, from the journal where a run that was cut off had them already."""
        known = {index: self._recovered(stage, kind, index, arch) for index, arch in archs.items()}
        jobs: list[Job] = []
        for index, arch in archs.items():
            if known[index] is None:
                of = (arch.key,) if self.config.reuse else (stage.update, index)
                jobs.append((arch, derived(self.config.seed, stage.name, *of)))
        found = self.engine.evaluate(jobs)
        for held in known.values():
            yield next(found) if held is None else held

    def _recovered(self, stage: _Stage, kind: str, index: int, arch: Architecture) -> Evaluation | None:
        line = self.directory.recovered.get((kind, stage.name, stage.update, index))
        timed = line is not None and (line["latency"] is not None or not self.config.times)
        if line is None or not timed or line["architecture"] != arch.key or line.get("cached"):
            return None
        return Evaluation(line["proxy_accuracy"], line["latency"], line["seconds"], line["error"])

    def _credited(
        self, stage: _Stage, index: int, actions: list[Any], arch: Architecture, evaluation: Evaluation, cached: bool
    ) -> Rollout:
        """The line of an evaluated student, with its reward by the map of this moment."""
        judged = self._judge(stage, arch, evaluation)
        value = DEGENERATE
        if judged is not None:
            value = judged.reward
            if judged.violation > 0:
                value = stage.limits.anneal(value, stage.update, self._severity(judged.violation))
        return Rollout(
            stage=stage.name,
            update=stage.update,
            index=index,
            actions=actions,
            architecture=arch.key,
            params=arch.params,
            macs=arch.macs,
            latency=evaluation.latency,
            proxy_accuracy=evaluation.accuracy,
            accuracy=judged.accuracy if judged else None,
            accuracy_error=judged.error if judged else None,
            reward=value,
            feasible=judged is not None and judged.violation == 0,
            cached=cached,
            seconds={} if cached else evaluation.seconds,
            error=evaluation.error,
        )

    def _severity(self, violation: float) -> float:
        """How much of the penalty a student gets: near a limit what it misses by counts, as no map is exact."""
        penalty = self.config.penalty
        return 1.0 if penalty is None else min(1.0, penalty * violation)

    def _degenerate(self, stage: _Stage, index: int, actions: list[Any], reason: str) -> Rollout:
        """The line of a student that is known to be worth nothing before anything is built."""
        none = dict.fromkeys(
            ("architecture", "params", "macs", "latency", "proxy_accuracy", "accuracy", "accuracy_error")
        )
        return Rollout(
            stage=stage.name,
            update=stage.update,
            index=index,
            actions=actions,
            reward=DEGENERATE,
            feasible=False,
            cached=False,
            seconds={},
            error=reason,
            **none,
        )

    def _judge(self, stage: _Stage, arch: Architecture, evaluation: Evaluation) -> _Judged | None:
        """What a student is expected to be worth; None where its training failed."""
        if evaluation.accuracy is None:
            return None
        expected, error = stage.map(evaluation.accuracy)
        return self._judged(stage, arch, evaluation, expected, error)

    def _judged(
        self, stage: _Stage, arch: Architecture, evaluation: Evaluation, accuracy: float, error: float
    ) -> _Judged:
        teacher, objective = self.teacher, self.config.objective
        cost = Cost(arch.params, arch.macs, evaluation.latency)
        if self.reward is not None:
            value = float(self.reward(accuracy, cost))
        else:
            counted = max(cost.of(objective), stage.enough.get(objective, 0.0))
            value = reward(accuracy, counted, teacher.accuracy, teacher.cost.of(objective))
        return _Judged(arch, cost, accuracy, error, value, stage.limits.violation(cost, accuracy))

    # Anchors

    def _train_anchors(self, stage: _Stage) -> None:
        """Train the anchors that are due: all of the first at once, later one from where the policy is."""
        config = self.config
        if config.anchors == 0:
            return
        later = stage.update // config.anchor_every if config.anchor_every else 0
        due = config.anchors + later
        while len(stage.anchors) < due:
            number = len(stage.anchors)
            found = self._spread(stage, number) if number < config.anchors else None
            arch = found[1] if found else self._best_unanchored(stage) if number >= config.anchors else None
            if arch is None:
                stage.anchors.append(("", None, None))
                continue
            self._train_anchor(stage, arch, number)
            self._fit_map(stage)
            if stage.map.count:
                error = "" if stage.map.error is None else f", {100 * stage.map.error:.1f} points off when left out"
                self.progress.message(f"{stage.name}: accuracies are corrected by {stage.map.count} anchors{error}")
            self._save(stage)
            self.directory.drop_training()
            self.progress.stage(stage.name, (config.updates - stage.update) * config.rollouts)

    def _train_anchor(self, stage: _Stage, arch: Architecture, number: int) -> None:
        line = self.directory.recovered.get(("anchor", stage.name, stage.update, number))
        if arch.key not in stage.evaluated:
            stage.evaluated[arch.key] = arch, next(self._found(stage, "anchor", {number: arch}))
        evaluation = stage.evaluated[arch.key][1]
        start = now(self.device)
        if line is not None and line["architecture"] == arch.key:
            found, final, seconds = line["accuracy"], line["final_accuracy"], line["training_seconds"]
        else:
            purpose, final = f"anchor {number + 1} of {stage.name}", None
            found, _ = self._trained(stage, arch, self.config.anchor_epochs, purpose)
            if found is not None and self._is_finished(stage, number):
                final, _ = self._trained(stage, arch, self.config.final_epochs, f"{purpose}, as a final student")
            seconds = round(now(self.device) - start, 4)
        stage.anchors.append((arch.key, found, final))
        self.directory.append(
            {
                "kind": "anchor",
                "stage": stage.name,
                "update": stage.update,
                "index": number,
                "architecture": arch.key,
                "params": arch.params,
                "macs": arch.macs,
                "latency": evaluation.latency,
                "proxy_accuracy": evaluation.accuracy,
                "accuracy": found,
                "final_accuracy": final,
                "seconds": evaluation.seconds,
                "training_seconds": seconds,
                "error": evaluation.error,
            }
        )

    def _fit_map(self, stage: _Stage) -> None:
        """Fit the map anew; rewards given before stay as they are."""
        before, stage.map = stage.map, self._map_of(stage)
        if stage.map != before:
            self.directory.append({"kind": "map", "stage": stage.name, "update": stage.update, **asdict(stage.map)})

    def _is_finished(self, stage: _Stage, number: int) -> bool:
        """Whether an anchor gets the final training as well: one in the middle, where accuracies decide."""
        first = stage.name == STAGES[self.config.stages][0]
        return first and self.constraints.min_accuracy is not None and number == self.config.anchors // 2

    def _map_of(self, stage: _Stage) -> ProxyMap:
        proxies = {key: evaluation.accuracy for key, (_, evaluation) in stage.evaluated.items()}
        anchors = [(key, proxies[key], found) for key, found, _ in stage.anchors if found is not None]
        fitted = ProxyMap.fit([Anchor(key, proxy, found) for key, proxy, found in anchors if proxy is not None])
        finished = stage.finished + _finished(stage)
        if self._is_last(stage.name):
            known = {key: found for key, _, found in anchors}
            for key, final, _ in stage.finals:
                proxy = proxies[key]
                if proxy is not None:
                    finished.append((known.get(key) or fitted(proxy)[0], final))
        return fitted.finishing(finished, self.teacher.accuracy)

    def _spread(self, stage: _Stage, number: int) -> tuple[Tensor, Architecture] | None:
        """Actions and architecture of one of the first anchors, from mild to severe; None if none was found.

        At the limits the mildest is the teacher, narrowed. In stage 2 that is done evenly, for those after it more
        where it saves more, for the last by chance: the map has to know what bad students come to.
        """
        count = self.config.anchors
        at_limits = stage.transition.saves is not None
        severity = (number if at_limits else number + 0.5) / count
        others = {key for key, *_ in stage.anchors[:number]}
        generator = torch.Generator().manual_seed(derived(self.config.seed, stage.name, "anchor", number))
        tilts = at_limits and stage.name == "shrinkage" and number < max(1, count - 1)
        for attempt in range(SPREAD_TRIES):
            if tilts and attempt == 0:
                tilted = stage.transition.tilted(MOST_TILTED * number / max(1, count - 2))
                actions = tilted.where(stage.mask, len(self.config.ratios) - 1)
            else:
                actions = stage.policy.spread(stage.mask, severity, generator)
            arch = self._architecture(stage, actions.tolist())
            if isinstance(arch, Architecture) and arch.key not in others:
                return actions, arch
        return None

    def _begin_at_the_best_anchor(self, stage: _Stage, features: Tensor) -> None:
        """Let the policy imitate the best of the first anchors, unless it was told how to begin, or was trained."""
        if self.config.keep_probability is not None or stage.name in self.policies:
            return
        ranks = {
            number: self._judged(stage, *stage.evaluated[key], stage.map.finished(found), 0.0).rank
            for number, (key, found, _) in enumerate(stage.anchors[: self.config.anchors])
            if found is not None
        }
        best = self._spread(stage, max(ranks, key=ranks.__getitem__)) if ranks else None
        if best is not None:
            imitate(stage.policy, features, stage.mask, best[0])

    def _best_unanchored(self, stage: _Stage) -> Architecture | None:
        """The best of the last students that were evaluated, which tell where the policy is."""
        anchored = {key for key, *_ in stage.anchors}
        recent = list(stage.evaluated.items())[-2 * self.config.rollouts :]
        found = [self._judge(stage, *pair) for key, pair in recent if key not in anchored]
        best = max((judged for judged in found if judged is not None), key=lambda judged: judged.rank, default=None)
        return None if best is None else best.architecture

    # The best

    def _train_best(self, stage: _Stage) -> None:
        """Train the best of a stage in full, and keep the best of these.

        In the first stage there is only one: what its removals leave at full width, or the teacher itself.

        What each came to is known when the next is chosen. One whose training diverges is passed over.
        """
        config, last = self.config, self._is_last(stage.name)
        epochs, count = (config.final_epochs, config.keep_top) if last else (config.stage_epochs, 1)
        diverged: set[str] = set()
        while len(stage.finals) < count and len(diverged) <= MOST_DIVERGED:
            passed = diverged | {key for key, *_ in stage.finals}
            arch = next((j.architecture for j in self._ranked(stage) if j.architecture.key not in passed), None)
            if arch is None:
                break
            number = len(stage.finals)
            which = f" {number + 1}" if count > 1 else ""
            whole = self._whole(stage, arch)
            found: float | None
            student: fx.GraphModule | None
            if not last and whole == stage.space.teacher:  # nothing is removed, nothing to train
                found, student = self.teacher.accuracy, stage.space.build(whole, "sliced")
            else:
                found, student = self._trained(stage, whole, epochs, f"the best{which} of {stage.name}")
            if student is None:
                diverged.add(arch.key)
                continue
            line = {"kind": "final", "stage": stage.name, "update": stage.update, "index": number}
            described = {"architecture": whole.key, "params": whole.params, "macs": whole.macs, "accuracy": found}
            self.directory.append({**line, **described})
            stage.finals.append((arch.key, float(found or 0), independent_copy(student).state_dict()))
            self._fit_map(stage)
            self._save(stage)
            self.directory.drop_training()
        if not stage.finals:
            raise BadInput("the training of the best student diverged; lower --final-learning-rate")
        finals = [(self._judged(stage, *stage.evaluated[key], found, 0.0), state) for key, found, state in stage.finals]
        best, state = max(finals, key=lambda pair: pair[0].rank)
        self.trained.append(
            {
                "name": stage.name,
                "architecture": self._whole(stage, best.architecture).to_json(),
                "student": state,
                "policy": stage.policy.state_dict(),
                "points": json.dumps([asdict(point) for point in self._points(stage)]),
                "finished": _finished(stage),
            }
        )
        self._save(None)

    def _whole(self, stage: _Stage, arch: Architecture) -> Architecture:
        """An architecture as the next stage gets it: where one follows, only its removals count."""
        return arch if self._is_last(stage.name) else stage.space.remove(stage.space.teacher, arch.keep)

    def _ranked(self, stage: _Stage) -> list[_Judged]:
        """All evaluated students, the best first, by the map as it is now."""
        judged = [self._judge(stage, arch, evaluation) for arch, evaluation in stage.evaluated.values()]
        return sorted((j for j in judged if j is not None), key=lambda j: j.rank, reverse=True)

    def _trained(
        self, stage: _Stage, arch: Architecture, epochs: float, purpose: str
    ) -> tuple[float | None, fx.GraphModule | None]:
        """A fully trained student and its validation accuracy; None where the training diverged."""
        keeper = self.directory.training(f"{purpose} {arch.key}", self.progress.stopping)
        try:
            student = stage.evaluator.train(arch, epochs, purpose, self.progress, keeper)
            return accuracy(student, self.data.validation, strict=True), student
        except NOT_FINITE as error:
            self.progress.message(f"{purpose}: the training diverged ({first_line(error)})")
            return None, None

    def _points(self, stage: _Stage) -> list[Point]:
        """Every evaluated student with the best that is known of its accuracy."""
        known = {key: found if final is None else final for key, found, final in stage.anchors if found is not None}
        points = []
        for key, found, _ in stage.finals:
            whole = self._whole(stage, arch := stage.evaluated[key][0])
            if whole == arch:
                known[key] = found
            else:
                points.append(Point(stage.name, whole.key, whole.params, whole.macs, found, True))
        for key, (arch, evaluation) in stage.evaluated.items():
            judged = self._judge(stage, arch, evaluation)
            if judged is not None:
                trained = key in known
                points.append(Point(stage.name, key, arch.params, arch.macs, known.get(key, judged.accuracy), trained))
        return points

    def _compression(self, best: Rollout | None) -> float | None:
        return None if best is None or best.params is None else self.teacher.cost.params / max(1, best.params)

    # State

    def _save(self, stage: _Stage | None) -> None:
        """The checkpoint: all that `_restore` needs to go on as if nothing had happened."""
        self.directory.save({"trained": self.trained, "stage": None if stage is None else _state_of(stage)})

    def _restore(self, stage: _Stage, state: dict[str, Any]) -> None:
        """Put back what `_state_of` gave; raises ValueError and the like where it is not of this stage."""
        stage.update = checked(state["update"], int)
        stage.baseline = None if state["baseline"] is None else checked(state["baseline"], float)
        load_finite(stage.policy, state["policy"])
        load_optimizer(stage.optimizer, state["optimizer"])
        stage.generator.set_state(state["generator"])
        for arch, evaluation in parse_json(state["evaluated"]):
            found = stage.space.member(Architecture.from_json(json.dumps(arch)))
            stage.evaluated[found.key] = found, Evaluation.from_record(evaluation, self.config.times)
        stage.anchors = [(key, _optional(found), _optional(final)) for key, found, final in state["anchors"]]
        stage.finals = [(key, checked(found, float), student) for key, found, student in state["finals"]]
        unknown = {key for key, *_ in stage.anchors if key} | {key for key, *_ in stage.finals}
        if unknown - stage.evaluated.keys():
            raise ValueError("an anchor or a trained student was never evaluated")
        stage.map = self._map_of(stage)

    def _calibration_images(self) -> Tensor:
        """Unlabelled training images, (n, C, H, W) normalised, drawn by the seed."""
        split = self.data.train
        generator = torch.Generator().manual_seed(derived(self.config.seed, "calibration"))
        index = torch.randperm(len(split), generator=generator)[: self.config.calibration_images]
        images, _ = split.batch(index.to(self.device))
        return images


def _better(rollout: Rollout, best: Rollout) -> bool:
    """Whether a rollout is to be shown as the best so far."""
    return (rollout.feasible, rollout.reward) > (best.feasible, best.reward)


def _state_of(stage: _Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "update": stage.update,
        "baseline": stage.baseline,
        "policy": stage.policy.state_dict(),
        "optimizer": stage.optimizer.state_dict(),
        "generator": stage.generator.get_state(),
        "evaluated": json.dumps([[asdict(arch), asdict(found)] for arch, found in stage.evaluated.values()]),
        "anchors": [list(anchor) for anchor in stage.anchors],
        "finals": [list(final) for final in stage.finals],
    }


def _finished(stage: _Stage) -> list[tuple[float, float]]:
    """Both accuracies of the anchors that got the final training too."""
    return [(found, final) for _, found, final in stage.anchors if found is not None and final is not None]


def _pairs(held: Any) -> list[tuple[float, float]]:
    """Such accuracies as a checkpoint holds them."""
    return [(checked(found, float), checked(final, float)) for found, final in held]


def _optional(held: Any) -> float | None:
    return None if held is None else checked(held, float)


def read_policies(path: Path) -> dict[str, Any]:
    """The policies of another run, by stage. Raises BadInput where the file holds none."""
    held = read_state(path)
    if not held.keys() & set(STAGES["both"]):
        raise BadInput(f"{path}: holds no policy; give the policies.pt of a run")
    return held


def _transfer(policy: nn.Module, held: dict[str, Any], stage: str) -> None:
    """Let the policy begin as another run's ended; one that the file does not hold begins anew."""
    if stage not in held:
        return
    try:
        load_finite(policy, held[stage])
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise BadInput(
            f"--policy: its policy of {stage} does not fit ({first_line(error)}); "
            "use the same ratios, hidden and lstm_layers"
        ) from None


def _checked_accuracy(teacher: nn.Module, data: ImageData) -> float:
    """The teacher's validation accuracy; BadInput where it has learned nothing about this data."""
    try:
        found = accuracy(teacher, data.validation, strict=True)
    except ArithmeticError as error:
        raise BadInput(f"the teacher cannot be used on {data.name}: {error}; its weights are damaged") from None
    chance = float(data.validation.labels.bincount().max()) / len(data.validation)
    if found <= 1.2 * chance:
        raise BadInput(
            f"the teacher's validation accuracy on {data.name} is {found:.1%}, no better than chance ({chance:.1%}): "
            "set --mean, --std and --image-size to the preprocessing that it was trained with"
        )
    return found


def _preprocessing(data: ImageData) -> dict[str, Any]:
    """What `evaluate` must know to show the student images as it was trained on them."""
    split = data.train
    return {
        "name": data.name,
        "image_size": split.image_size[0],
        "channels": split.channels,
        "mean": split.mean.tolist(),
        "std": split.std.tolist(),
    }


def _digest(teacher: nn.Module) -> str:
    """A short hash of a network's tensors, which tells one teacher from another."""
    found = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
