"""A stage of the search, removal or shrinkage: what it acts on, and its state, which a checkpoint holds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from n2n_fast.files.errors import DegenerateArchitecture, first_line
from n2n_fast.files.safe_load import parse_json, understood
from n2n_fast.files.states import checked, load_finite, load_optimizer
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.checkpoint import CHECKPOINT
from n2n_fast.search.config import STAGES
from n2n_fast.search.evaluation import NOT_FINITE, Evaluation, Evaluator
from n2n_fast.search.policies import new_policy
from n2n_fast.search.predictor import AccuracyPredictor
from n2n_fast.search.reward import Cost, StageReward
from n2n_fast.search.shared import Search
from n2n_fast.search.transition import Transition
from n2n_fast.training.data import accuracy
from n2n_fast.training.seeds import derived


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

    x: the layers' features, (layers, features). mask: which actions change anything, as the policy takes it.
    """

    def __init__(self, name: str, space: ArchitectureSpace, search: Search) -> None:
        """A stage before its first update; `begun` gives it as the run's checkpoint left it."""
        config, teacher, constraints = search.config, search.teacher, search.constraints
        self.name, self.space, self.search, self.config = name, space, search, config
        self.is_last = name == STAGES[config.stages][-1]
        removes = name == "removal"
        limited = constraints.enough(teacher.cost, self.is_last)
        limits = constraints if self.is_last else constraints.untimed
        self.transition = Transition.of(space, config, removes, self.is_last, limited, search.reward is not None)
        self.reward = StageReward(
            teacher.cost, teacher.accuracy, config.objective, limits, limited, config.penalty, search.reward
        )
        self.evaluator = Evaluator(
            name, space, search.data, teacher.logits, teacher.calibration, config, search.training
        )
        self.x = space.features()
        removable = torch.tensor([layer.removable for layer in space.layers])
        self.mask = removable if removes else torch.tensor(space.choices(space.teacher)).T
        self.policy = new_policy(name, self.x.shape[1], config, search.policies)
        rate = config.removal_learning_rate if removes else config.shrinkage_learning_rate
        self.optimizer = torch.optim.Adam(self.policy.parameters(), rate)
        self.generator = torch.Generator().manual_seed(derived(config.seed, name, "actions"))
        self.update = 0
        self.baseline: float | None = None
        self.evaluated: dict[str, tuple[Architecture, Evaluation]] = {}
        self.anchors: list[Anchor] = []
        self.finals: list[Final] = []
        self.predictor = AccuracyPredictor()

    @classmethod
    def begun(cls, name: str, space: ArchitectureSpace, search: Search) -> "Stage":
        """The stage as the run's checkpoint left it, if it is the one at hand there, with an executor for it."""
        stage, state = cls(name, space, search), search.stage_at_hand
        if state is not None and state["name"] == name:
            with understood(search.directory.path / CHECKPOINT):
                stage.load_state_dict(state)
        search.executor.begin(stage.evaluator, search.recipe(name))
        return stage

    # Evaluation

    def architecture(self, actions: list[Any]) -> Architecture | DegenerateArchitecture:
        """T(s, a) of section 3.1, or why that is no student that is worth anything."""
        try:
            arch = self.transition(actions)
        except DegenerateArchitecture as reason:
            return reason
        is_smaller = arch.params < self.search.teacher.cost.params
        return arch if is_smaller else DegenerateArchitecture("no smaller than the teacher")

    def new(self, archs: Sequence[Architecture | DegenerateArchitecture]) -> dict[int, Architecture]:
        """Those of the architectures that have to be evaluated, by index."""
        seen = set(self.evaluated) if self.config.reuse else set()
        new = {}
        for index, arch in enumerate(archs):
            if isinstance(arch, Architecture) and arch.key not in seen:
                new[index] = arch
                if self.config.reuse:
                    seen.add(arch.key)
        return new

    def evaluate(self, archs: Mapping[int, Architecture]) -> Iterator[Evaluation]:
        """Evaluations of architectures, by their index in the update, in this order; remembered in `evaluated`."""
        keys = {index: (arch.key,) if self.config.reuse else (self.update, index) for index, arch in archs.items()}
        seeds = (derived(self.config.seed, self.name, *key) for key in keys.values())
        evaluations = self.search.executor.evaluate(list(zip(archs.values(), seeds, strict=True)))
        for arch in archs.values():
            evaluation = next(evaluations)
            self.evaluated[arch.key] = arch, evaluation
            yield evaluation

    def train(self, arch: Architecture, epochs: float, purpose: str) -> tuple[float | None, fx.GraphModule | None]:
        """A fully trained student with its validation accuracy before it; None where the training diverged."""
        progress = self.search.progress
        checkpointer = self.search.directory.training(f"{purpose} {arch.key}")
        try:
            student = self.evaluator.train(arch, epochs, purpose, progress, checkpointer)
            return accuracy(student, self.search.data.validation, strict=True), student
        except NOT_FINITE as error:
            progress.message(f"{purpose}: the training diverged ({first_line(error)})")
            return None, None

    # Judgement

    def judge(self, key: str) -> Judged | None:
        """An evaluated student by its predicted accuracy, as of now; None where its evaluation failed."""
        short_accuracy = self.evaluated[key][1].short_accuracy
        return None if short_accuracy is None else self.judge_at(key, *self.predictor(short_accuracy))

    def judge_at(self, key: str, accuracy: float, error: float = 0.0) -> Judged:
        """An evaluated student by an accuracy with this standard error."""
        arch, evaluation = self.evaluated[key]
        cost = Cost(arch.params, arch.macs, evaluation.latency)
        value, violation = self.reward(accuracy, cost), self.reward.limits.violation(cost, accuracy)
        return Judged(arch, accuracy, error, value, violation)

    def ranked(self) -> list[Judged]:
        """All evaluated students, the best first."""
        judged = [self.judge(key) for key in self.evaluated]
        return sorted((j for j in judged if j is not None), key=lambda j: j.rank, reverse=True)

    def learn_accuracies(self) -> None:
        """Let the predictor learn from all full trainings so far; rewards that were given stay as they are."""
        before, self.predictor = self.predictor, self._learned()
        if self.predictor != before:
            self.log("predictor", **asdict(self.predictor))

    def _learned(self) -> AccuracyPredictor:
        short = {key: evaluation.short_accuracy for key, (_, evaluation) in self.evaluated.items()}
        full = {anchor.key: anchor.full_accuracy for anchor in self.anchors if anchor.full_accuracy is not None}
        pairs = [(known, full[key]) for key in full if (known := short[key]) is not None]
        predictor = AccuracyPredictor.learned(pairs)
        trained = [pair for done in self.search.finished for pair in done.accuracies] + self.accuracies()
        for key, final, _ in self.finals if self.is_last else ():
            if (known := short[key]) is not None:
                trained.append((full.get(key) or predictor(known)[0], final))
        return predictor.learned_final(trained, self.search.teacher.accuracy)

    def accuracies(self) -> list[tuple[float, float]]:
        """Of the anchors that got the final training too: after an anchor's training, and after that."""
        both = ((full, final) for _, full, final in self.anchors)
        return [(full, final) for full, final in both if full is not None and final is not None]

    # State

    def log(self, kind: str, **fields: Any) -> None:
        """Add a line to history.jsonl."""
        self.search.directory.log({"kind": kind, "stage": self.name, "update": self.update, **fields})

    def save(self) -> None:
        """Write the checkpoint; raises Interrupted after that where the search was asked to stop."""
        self.search.save(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that changes while the stage runs, but for the predictor, which follows from it."""
        return {
            "name": self.name,
            "update": self.update,
            "baseline": self.baseline,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "evaluated": json.dumps([[asdict(arch), asdict(found)] for arch, found in self.evaluated.values()]),
            "anchors": [list(anchor) for anchor in self.anchors],
            "finals": [list(final) for final in self.finals],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave; raises ValueError and the like where it is not of this stage."""
        self.update = checked(state["update"], int)
        self.baseline = _checked_or_none(state["baseline"])
        load_finite(self.policy, state["policy"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.generator.set_state(state["generator"])
        for record, evaluation in parse_json(state["evaluated"]):
            arch = self.space.member(Architecture.from_json(json.dumps(record)))
            self.evaluated[arch.key] = arch, Evaluation.from_record(evaluation, self.config.times)
        self.anchors = [Anchor(key, _checked_or_none(full), _checked_or_none(f)) for key, full, f in state["anchors"]]
        self.finals = [Final(key, checked(full, float), student) for key, full, student in state["finals"]]
        unknown = {anchor.key for anchor in self.anchors if anchor.key} | {final.key for final in self.finals}
        if unknown - self.evaluated.keys():
            raise ValueError("an anchor or a trained student was never evaluated")
        self.predictor = self._learned()


def _checked_or_none(value: Any) -> float | None:
    return None if value is None else checked(value, float)
