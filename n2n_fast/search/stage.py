"""A search and its stages: what they share, what they tell, and the state that changes while they run."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from n2n_fast.files.errors import DegenerateArchitecture, first_line
from n2n_fast.files.safe_load import parse_json, understood
from n2n_fast.files.states import checked, load_finite, load_optimizer
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.checkpoint import CHECKPOINT, RunDirectory
from n2n_fast.search.config import STAGES, SearchConfig
from n2n_fast.search.environment import NOT_FINITE, Evaluation, Evaluator, Executor, Recipe, Training, Transition
from n2n_fast.search.policies import new_policy
from n2n_fast.search.predictor import AccuracyPredictor, Trained
from n2n_fast.search.reward import DEGENERATE, Constraints, Cost, RewardFunction, StageReward
from n2n_fast.search.teacher import Reference, restored
from n2n_fast.training.data import ImageData, accuracy
from n2n_fast.training.distill import Progress
from n2n_fast.training.seeds import derived


@dataclass(frozen=True)
class Rollout:
    """One student of an update; a line of history.jsonl. `actions` as the policy drew them, one entry a layer.

    expected_accuracy, expected_error: what was expected of short_accuracy before the evaluation, and the deviation of
    that; None as long as too little is known.
    short_accuracy: after the steps of a rollout, if any; predicted_accuracy: after a full training, which the reward
    counts, and accuracy_error its standard error; all None where `error` says why. latency: ms. cached: evaluated
    before.
    """

    stage: str
    update: int
    index: int
    actions: list[Any]
    architecture: str | None = None
    params: int | None = None
    macs: int | None = None
    latency: float | None = None
    expected_accuracy: float | None = None
    expected_error: float | None = None
    short_accuracy: float | None = None
    predicted_accuracy: float | None = None
    accuracy_error: float | None = None
    reward: float = DEGENERATE
    feasible: bool = False
    cached: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class SearchProgress(Progress):
    """What `compress` tells while it works; override what you want to show."""

    def rollout(self, rollout: Rollout, best: Rollout | None, compression: float | None) -> None:
        """A rollout was evaluated; compression: how many times fewer params than the teacher the best has."""

    def stopping(self) -> bool:
        """Whether to stop as soon as the current update or training is kept; the search then raises Interrupted."""
        return False


@dataclass(frozen=True)
class Search:
    """What the stages of a search share, and the stages that have begun, the current one last.

    policies: of another run, by stage. training, reward: the user's own.
    """

    config: SearchConfig
    data: ImageData
    teacher: Reference
    constraints: Constraints
    directory: RunDirectory
    progress: SearchProgress
    executor: Executor
    policies: Mapping[str, Any]
    training: Training | None
    reward: RewardFunction | None
    stages: list["Stage"] = field(default_factory=list)

    def save(self) -> None:
        """Write the checkpoint, from which the search goes on as if nothing had happened.

        Raises Interrupted after that where the search was asked to stop.
        """
        self.directory.save({"stages": [stage.state_dict() for stage in self.stages]})


class Anchor(NamedTuple):
    """A student trained as an anchor. final_accuracy: if it got the final training too. All empty if none was left."""

    key: str = ""
    full_accuracy: float | None = None
    final_accuracy: float | None = None


class Final(NamedTuple):
    """One of the best students, trained fully; student: its state dict."""

    key: str
    full_accuracy: float
    student: dict[str, Tensor]


@dataclass(frozen=True)
class Judged:
    """An architecture with what is predicted of it. violation: by how much it misses limits, 0 if it meets them."""

    architecture: Architecture
    accuracy: float
    error: float
    reward: float
    violation: float

    @property
    def rank(self) -> tuple[float, float]:
        """Feasible before infeasible, then by reward; among the infeasible, the nearest first."""
        return (-self.violation, self.reward)


class Stage:
    """One stage: its space, policy and reward, and the state that changes while it runs.

    x: the layers' features, (layers, features). mask: which actions change anything, as the policy takes it. done:
    whether its best students are trained.
    """

    def __init__(self, name: str, space: ArchitectureSpace, search: Search) -> None:
        """The stage as the run's checkpoint left it, or before its first update; it is the current one from now on."""
        config, teacher, constraints = search.config, search.teacher, search.constraints
        self.name, self.space, self.search, self.config = name, space, search, config
        self.is_last = name == STAGES[config.stages][-1]
        removes = name == "removal"
        limited = constraints.enough(teacher.cost, self.is_last)
        limits = constraints if self.is_last else replace(constraints, max_latency=None)
        reached = () if removes and self.is_last else limited  # nothing but removals could do that
        self.transition = Transition.of(space, config, removes, reached, grows=search.reward is None)
        self.reward = StageReward(
            teacher.cost, teacher.accuracy, config.objective, limits, limited, config.penalty, search.reward
        )
        self.x = space.features()
        removable = torch.tensor([layer.removable for layer in space.layers])
        self.mask = removable if removes else torch.tensor(space.choices(space.teacher)).T
        self.policy = new_policy(name, self.x.shape[1], config, search.policies)
        rate = config.removal_learning_rate if removes else config.shrinkage_learning_rate
        self.learns = rate > 0
        self.optimizer = torch.optim.Adam(self.policy.parameters(), rate)
        self.generator = torch.Generator().manual_seed(derived(config.seed, name, "actions"))
        self.spread = 0.03  # weight of the policy's entropy
        self.update = 0
        self.baseline: float | None = None
        self.evaluated: dict[str, tuple[Architecture, Evaluation]] = {}
        self.actions: dict[str, list[Any]] = {}  # that gave each evaluated architecture
        self.imagination: Any = None  # kept by `Imagination.of`
        self.anchors: list[Anchor] = []
        self.finals: list[Final] = []
        self.done = False
        self.predictor = AccuracyPredictor()
        search.stages.append(self)
        self._load()

    def begin(self) -> None:
        """Have the executor evaluate this stage's students."""
        search, teacher = self.search, self.search.teacher
        earlier = tuple((stage.result.to_json(), stage.best.student) for stage in search.stages[:-1])
        shared = search.data, teacher.logits, teacher.calibration, self.config, search.training
        recipe = Recipe(
            self.name, teacher.original, search.data, teacher.calibration, self.config, earlier, search.training
        )
        search.executor.begin(Evaluator(self.name, self.space, *shared), recipe)

    # Evaluation

    def architectures(self, actions: Tensor) -> list[Architecture | DegenerateArchitecture]:
        """T(s, a) of section 3.1 for each row of actions, or why that is no student that is worth anything."""
        most, useless = self.search.teacher.cost.params, DegenerateArchitecture("no smaller than the teacher")
        found = self.transition(actions)
        return [useless if isinstance(arch, Architecture) and arch.params >= most else arch for arch in found]

    def evaluate(self, archs: Mapping[int, Architecture], actions: Sequence[list[Any]]) -> Iterator[bool]:
        """Have architectures evaluated, by their index in the update; tells of each, in order, whether it was new.

        actions: that gave each. What they show is in `evaluated`.
        """
        reuse, jobs = self.config.reuse, dict[tuple[object, ...], Architecture]()
        keys = [((arch.key,) if reuse else (self.update, index), arch) for index, arch in archs.items()]
        for key, arch in keys:
            if not reuse or arch.key not in self.evaluated:
                jobs.setdefault(key, arch)
        seeds = (derived(self.config.seed, self.name, *key) for key in jobs)
        evaluations = self.search.executor.evaluate(list(zip(jobs.values(), seeds, strict=True)))
        for (key, arch), row in zip(keys, actions, strict=True):
            is_new = jobs.pop(key, None) is not None
            if is_new:
                self.evaluated[arch.key] = arch, next(evaluations)
                self.actions[arch.key] = row
            yield is_new

    def train(self, arch: Architecture, epochs: float, purpose: str) -> tuple[float | None, fx.GraphModule | None]:
        """A fully trained student with its validation accuracy before it; None where the training diverged."""
        search = self.search
        checkpointer = search.directory.training(f"{purpose} {arch.key}")
        try:
            student = search.executor.evaluator.train(arch, epochs, purpose, search.progress, checkpointer)
            return accuracy(student, search.data.validation, strict=True), student
        except NOT_FINITE as error:
            search.progress.message(f"{purpose}: the training diverged ({first_line(error)})")
            return None, None

    def shown(self, key: str) -> dict[str, Any]:
        """An evaluated student and what it shows, for history.jsonl."""
        arch, evaluation = self.evaluated[key]
        return {"architecture": key, "params": arch.params, "macs": arch.macs, **asdict(evaluation)}

    # Judgement

    def judge(self, key: str) -> Judged | None:
        """An evaluated student by its predicted accuracy, as of now; None where its evaluation failed."""
        short_accuracy = self.evaluated[key][1].short_accuracy
        if short_accuracy is None:
            return None
        return self.judge_at(key, *self.corrected(self.evaluated[key][0], short_accuracy))

    def corrected(self, arch: Architecture, short_accuracy: float) -> tuple[float, float]:
        """What a student with this short accuracy comes to by a full training, and the error of that."""
        return self.predictor(short_accuracy, _log_macs(arch))

    def judge_at(self, key: str, accuracy: float, error: float = 0.0) -> Judged:
        """An evaluated student by an accuracy with this standard error."""
        arch, evaluation = self.evaluated[key]
        cost = Cost(arch.params, arch.macs, evaluation.latency)
        value, violation = self.reward(accuracy, cost), self.reward.limits.violation(cost, accuracy)
        return Judged(arch, accuracy, error, value, violation)

    def learn_accuracies(self) -> None:
        """Let the predictor learn from all full trainings so far; earlier rewards stay as they are."""
        before, self.predictor = self.predictor, _learned(self)
        if self.predictor != before:
            self.log("predictor", **asdict(self.predictor))

    # What it ends with

    @property
    def best(self) -> Final:
        """The best of the students that were trained fully."""
        return max(self.finals, key=lambda final: self.judge_at(final.key, final.full_accuracy).rank)

    @property
    def result(self) -> Architecture:
        """The architecture of the best."""
        return self.passed_on(self.evaluated[self.best.key][0])

    def passed_on(self, arch: Architecture) -> Architecture:
        """An architecture as the next stage gets it: where one follows, only its removals count."""
        return arch if self.is_last else self.space.remove(self.space.teacher, arch.keep)

    def student(self) -> fx.GraphModule:
        """The best student, trained."""
        with understood(self.search.directory.path / CHECKPOINT):
            return restored(self.space, self.result, self.best.student)

    # State

    def log(self, kind: str, **fields: Any) -> None:
        """Add a line to history.jsonl."""
        self.search.directory.log({"kind": kind, "stage": self.name, "update": self.update, **fields})

    def state_dict(self) -> dict[str, Any]:
        """All that changes while the stage runs, but for the predictor, which follows from it."""
        return {
            "name": self.name,
            "update": self.update,
            "baseline": self.baseline,
            "spread": self.spread,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "evaluated": json.dumps([[asdict(one) for one in pair] for pair in self.evaluated.values()]),
            "actions": json.dumps(list(self.actions.values())),
            "anchors": [list(anchor) for anchor in self.anchors],
            "finals": [list(final) for final in self.finals],
            "done": self.done,
        }

    def _load(self) -> None:
        """Take up what the run's checkpoint has of this stage. Raises BadInput where it is of no such stage."""
        saved, place = self.search.directory.checkpoint, len(self.search.stages) - 1
        with understood(self.search.directory.path / CHECKPOINT):
            if saved is None or place >= len(saved["stages"]):
                return
            state = dict(saved["stages"][place])
            if state["name"] != self.name:
                raise ValueError(f"of the stage {state['name']!s:.80}")
            self.update = checked(state["update"], int)
            self.baseline = _checked_or_none(state["baseline"])
            self.spread = checked(state["spread"], float)
            load_finite(self.policy, state["policy"])
            load_optimizer(self.optimizer, state["optimizer"])
            self.generator.set_state(state["generator"])
            for record, evaluation in parse_json(state["evaluated"]):
                arch = self.space.member(Architecture.from_json(json.dumps(record)))
                self.evaluated[arch.key] = arch, Evaluation.from_record(evaluation, self.config.times)
            rows = torch.tensor(parse_json(state["actions"]))
            if self.evaluated:
                archs = self.architectures(rows.reshape(-1, *self.mask.shape))
                same = [isinstance(arch, Architecture) and arch.key for arch in archs] == list(self.evaluated)
                if not same:
                    raise ValueError("actions of other architectures")
                self.actions = dict(zip(self.evaluated, rows.tolist(), strict=True))
            self.anchors = [
                Anchor(key, _checked_or_none(full), _checked_or_none(final)) for key, full, final in state["anchors"]
            ]
            self.finals = [Final(key, checked(full, float), student) for key, full, student in state["finals"]]
            trained = {anchor.key for anchor in self.anchors if anchor.key} | {final.key for final in self.finals}
            if trained - self.evaluated.keys():
                raise ValueError("an anchor or a trained student was never evaluated")
            if not isinstance(state["done"], bool) or (state["done"] and not self.finals):
                raise ValueError("a stage that is done without a student")
            self.done = state["done"]
            self.predictor = _learned(self)


def _checked_or_none(value: Any) -> float | None:
    return None if value is None else checked(value, float)


def _log_macs(arch: Architecture) -> float:
    return math.log(max(1, arch.macs))


def _learned(stage: Stage) -> AccuracyPredictor:
    """What all full trainings so far teach of the stage's accuracies."""
    short = {key: evaluation.short_accuracy for key, (_, evaluation) in stage.evaluated.items()}
    full = {anchor.key: anchor.full_accuracy for anchor in stage.anchors if anchor.full_accuracy is not None}
    predictor = AccuracyPredictor.learned(
        [
            Trained(known, _log_macs(stage.evaluated[key][0]), full[key])
            for key in full
            if (known := short[key]) is not None
        ]
    )
    trained = [
        (anchor.full_accuracy, anchor.final_accuracy)
        for one in stage.search.stages
        for anchor in one.anchors
        if anchor.full_accuracy is not None and anchor.final_accuracy is not None
    ]
    for key, final, _ in stage.finals if stage.is_last else ():
        if (known := short[key]) is not None:
            log_macs = _log_macs(stage.evaluated[key][0])
            trained.append((full.get(key) or predictor(known, log_macs)[0], final))
    return predictor.learned_final(trained, stage.search.teacher.accuracy)
