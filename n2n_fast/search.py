"""The search: two stages of REINFORCE over one teacher's architecture space, then the final training (section 3)."""

import copy
import hashlib
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, fx, nn

from n2n_fast.data import Batches, ImageData, TeacherLogits, accuracy
from n2n_fast.distill import Diverged, Progress, fit, latency_ms, recalibrate, seeded
from n2n_fast.errors import BadInput, DegenerateArchitecture, first_line
from n2n_fast.graph import Architecture
from n2n_fast.policies import RemovalPolicy, ShrinkagePolicy
from n2n_fast.reward import DEGENERATE, Constraints, reward
from n2n_fast.space import INITS, SALIENCIES, ArchitectureSpace
from n2n_fast.student import independent_copy
from n2n_fast.tracing import run

STAGES = {"both": ("removal", "shrinkage"), "removal": ("removal",), "shrinkage": ("shrinkage",)}


@dataclass(frozen=True)
class SearchConfig:
    """The settings of a search; written to config.json of its run directory."""

    stages: str = "both"  # both, removal or shrinkage
    updates: int = 20  # of the policy, in each stage
    rollouts: int = 5  # students evaluated for each update
    epochs: float = 1.0  # a rollout's student is trained for this many epochs; may be a fraction
    final_epochs: float = 10.0  # for the best student of each stage
    init: str = "reconstructed"  # what students start from: reconstructed, calibrated, inherit or random
    saliency: str | None = None  # activations or l1; default: activations where weights are fitted to them
    batch_size: int = 128
    learning_rate: float = 0.01  # peak, for a rollout's student: fitted weights of a wide net want small steps
    final_learning_rate: float = 0.05  # peak, for the best student of each stage
    kd_weight: float = 0.1  # λ in L = L_hard + λ L_KD
    round_to: int = 1  # shrunk widths are multiples of this many channels
    leaf: tuple[str, ...] = ()  # submodules of the teacher that are each one opaque layer
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of stage 2, ending with 1
    keep_probability: float = 0.8  # of stage 1's untrained policy
    hidden: int = 30  # units of each LSTM layer
    lstm_layers: int = 2
    removal_learning_rate: float = 0.003  # Adam's, stage 1
    shrinkage_learning_rate: float = 0.01  # Adam's, stage 2
    baseline_decay: float = 0.8  # of the moving average of rewards
    max_params: int | None = None
    min_accuracy: float | None = None  # on the validation split, in [0, 1]
    calibration_images: int = 1024  # unlabelled, for fitted weights and batch norm statistics
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise BadInput for values that no search can use."""
        rules: dict[str, tuple[bool, str]] = {
            "stages": (self.stages in STAGES, f"one of {', '.join(STAGES)}"),
            "init": (self.init in INITS, f"one of {', '.join(INITS)}"),
            "saliency": (self.saliency in (None, *SALIENCIES), f"one of {', '.join(SALIENCIES)}"),
            **{
                name: (getattr(self, name) >= 1, "at least 1")
                for name in ("updates", "rollouts", "batch_size", "round_to")
            },
            **{name: (0 <= getattr(self, name) < math.inf, "at least 0") for name in ("epochs", "final_epochs")},
            **{n: (0 < getattr(self, n) < math.inf, "above 0") for n in ("learning_rate", "final_learning_rate")},
            "kd_weight": (0 <= self.kd_weight < math.inf, "at least 0"),
            "ratios": (
                len(self.ratios) > 0 and self.ratios[-1] == 1 and all(0 < r <= 1 for r in self.ratios),
                "ratios in (0, 1], the last of them 1",
            ),
            "keep_probability": (0 < self.keep_probability < 1, "between 0 and 1"),
            "max_params": (self.max_params is None or self.max_params >= 1, "at least 1"),
            "min_accuracy": (self.min_accuracy is None or 0 <= self.min_accuracy <= 1, "between 0 and 1"),
        }
        for name, (valid, allowed) in rules.items():
            if not valid:
                raise BadInput(f"{name}: {getattr(self, name)}; give {allowed}")


@dataclass(frozen=True)
class Rollout:
    """One evaluated student; a line of history.jsonl. `actions` as the policy drew them, one entry a layer."""

    stage: str
    update: int
    index: int
    seed: int
    actions: list[Any]
    architecture: str | None
    params: int | None
    macs: int | None
    accuracy: float | None
    reward: float
    feasible: bool
    seconds: float
    error: str | None = None


class SearchProgress(Progress):
    """What `compress` tells while it works; override what you want to show."""

    def rollout(self, rollout: Rollout, best: Rollout | None, compression: float | None) -> None:
        """A rollout was evaluated; compression: how many times fewer params than the teacher the best has."""


@dataclass(frozen=True)
class Result:
    """What a search gives. student: trained, in eval mode. table: as in result.json. feasible: meets the limits."""

    student: nn.Module
    table: dict[str, Any]
    feasible: bool
    out: Path


@dataclass(frozen=True)
class _Candidate:
    rollout: Rollout
    architecture: Architecture
    violation: float

    @property
    def rank(self) -> tuple[float, float]:
        """Feasible before infeasible, then by reward; among the infeasible, the nearest first."""
        return (-self.violation, self.rollout.reward)


@dataclass(frozen=True)
class _Stage:
    """A stage of the search: its space, its policy and the mask of meaningful actions, and what actions stand for."""

    name: str
    space: ArchitectureSpace
    policy: RemovalPolicy | ShrinkagePolicy
    mask: Tensor
    learning_rate: float
    batches: Batches
    architecture_of: Callable[[list[Any]], Architecture]


def _remove(space: ArchitectureSpace) -> Callable[[list[int]], Architecture]:
    return lambda actions: space.remove(space.teacher, [action == 1 for action in actions])


def _shrink(space: ArchitectureSpace, ratios: Sequence[float]) -> Callable[[list[list[int]]], Architecture]:
    return lambda actions: space.shrink(
        space.teacher, [ratios[channels] for channels, _ in actions], [ratios[kernel] for _, kernel in actions]
    )


@dataclass(frozen=True)
class _Reference:
    """The teacher, which every stage's logits and rewards refer to."""

    module: nn.Module
    params: int
    accuracy: float
    logits: TeacherLogits


def compress(
    teacher: nn.Module,
    data: ImageData,
    config: SearchConfig | None = None,
    out: str | os.PathLike[str] = "runs/n2n",
    progress: SearchProgress | None = None,
) -> Result:
    """Search for the student of best reward, train it fully and write the run directory `out`.

    teacher: a trained classifier of images (N, C, H, W); `data` on its device. The test split is read once, at the
    end. On a CPU the same seed gives the same result. Raises BadInput where teacher, data or `out` cannot be used.
    """
    return _Search(teacher, data, config or SearchConfig(), Path(out), progress or SearchProgress()).run()


class _Search:
    def __init__(
        self, teacher: nn.Module, data: ImageData, config: SearchConfig, out: Path, progress: SearchProgress
    ) -> None:
        self.config, self.data, self.progress = config, data, progress
        self.constraints = Constraints(config.max_params, config.min_accuracy)
        self.device = data.train.images.device
        self.calibration = self._calibration_images()
        teacher = copy.deepcopy(teacher).eval().to(self.device, torch.float32)
        self.out = _claim(out)
        space = self._space(teacher)
        if not isinstance(run(teacher, self.calibration[:2]), Tensor):
            teacher = space.build(space.teacher, "inherit")  # of several outputs it gives the logits
        self.teacher = _Reference(
            module=teacher,
            params=space.teacher.params,
            accuracy=_checked_accuracy(teacher, data),
            logits=TeacherLogits(teacher, data.train),
        )
        for warning in space.warnings:
            progress.message(f"warning: {warning}")
        progress.message(f"teacher: {space.teacher.params:,} params, validation accuracy {self.teacher.accuracy:.2%}")
        self.space = space

    def run(self) -> Result:
        student: nn.Module = self.teacher.module
        chosen: list[tuple[str, ArchitectureSpace, Architecture]] = []
        _write_json(self.out / "config.json", {**asdict(self.config), "data": _preprocessing(self.data)})
        with (self.out / "history.jsonl").open("w", encoding="utf-8") as history:
            for name in STAGES[self.config.stages]:
                # stage 2 starts from the trained student of stage 1
                space = self._space(student) if chosen else self.space
                best = self._search(self._stage(name, space), history)
                chosen.append((name, space, best.architecture))
                student = self._train_best(name, space, best.architecture)
        return self._finish(student, chosen)

    def _space(self, teacher: nn.Module) -> ArchitectureSpace:
        looks = self.config.init in ("reconstructed", "calibrated") or self.config.saliency == "activations"
        images = self.calibration if looks else None
        config = self.config
        return ArchitectureSpace(
            teacher, self.calibration[:2], images, saliency=config.saliency, leaf=config.leaf, round_to=config.round_to
        )

    # One stage

    def _search(self, stage: _Stage, history: TextIO) -> _Candidate:
        """REINFORCE with a moving-average baseline (equation 3); returns the best student seen."""
        config, policy = self.config, stage.policy
        optimizer = torch.optim.Adam(policy.parameters(), stage.learning_rate)
        generator = torch.Generator().manual_seed(_seed(config.seed, stage.name, "actions"))
        features = stage.space.features()
        baseline: float | None = None
        best: _Candidate | None = None
        self.progress.stage(stage.name, config.updates * config.rollouts)
        for update in range(config.updates):
            actions = policy.sample(features, stage.mask, config.rollouts, generator)
            rewards = []
            for index, row in enumerate(actions.tolist()):
                candidate = self._evaluate(stage, update, index, row)
                rewards.append(candidate.rollout.reward)
                if candidate.rollout.accuracy is not None and (best is None or candidate.rank > best.rank):
                    best = candidate
                history.write(json.dumps(asdict(candidate.rollout)) + "\n")
                history.flush()
                self._show(candidate, best)
            reward_of = torch.tensor(rewards)
            mean = float(reward_of.mean())
            baseline = mean if baseline is None else baseline
            loss = -((reward_of - baseline) * policy.log_prob(features, stage.mask, actions)).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            baseline += (1 - config.baseline_decay) * (mean - baseline)
        if best is None:
            raise BadInput(
                f"{stage.name}: none of {config.updates * config.rollouts} students could be evaluated; "
                "raise --rollouts or lower --learning-rate"
            )
        return best

    def _stage(self, name: str, space: ArchitectureSpace) -> _Stage:
        config, ratios = self.config, self.config.ratios
        features = space.features().shape[1]
        batches = self._batches(config.epochs, f"{name} rollouts")
        policy: RemovalPolicy | ShrinkagePolicy
        with seeded(_seed(config.seed, name, "policy"), torch.device("cpu")):
            if name == "removal":
                policy = RemovalPolicy(features, config.hidden, config.lstm_layers, config.keep_probability)
                mask = torch.tensor([layer.removable for layer in space.layers])
                return _Stage(name, space, policy, mask, config.removal_learning_rate, batches, _remove(space))
            policy = ShrinkagePolicy(features, len(ratios), config.hidden, config.lstm_layers)
        mask = torch.tensor(space.choices(space.teacher)).T
        return _Stage(name, space, policy, mask, config.shrinkage_learning_rate, batches, _shrink(space, ratios))

    def _evaluate(self, stage: _Stage, update: int, index: int, actions: list[Any]) -> _Candidate:
        """The reward of one action sequence; a degenerate student is known before anything is built."""
        start = time.perf_counter()
        seed = _seed(self.config.seed, stage.name, update, index)
        arch: Architecture | None = None
        found, error, value, violation = None, None, DEGENERATE, math.inf
        try:
            arch = stage.architecture_of(actions)
            if arch.params >= self.teacher.params:
                raise DegenerateArchitecture("no smaller than the teacher")
            student = self._trained(stage.space, arch, stage.batches, self.config.learning_rate, seed)
            found = accuracy(student, self.data.validation)
            value = reward(found, arch.params, self.teacher.accuracy, self.teacher.params)
            violation = self.constraints.violation(arch.params, found)
            value = value if violation == 0 else self.constraints.anneal(value, update)
        except (DegenerateArchitecture, Diverged) as reason:
            error = str(reason)
        rollout = Rollout(
            stage=stage.name,
            update=update,
            index=index,
            seed=seed,
            actions=actions,
            architecture=arch.key if arch else None,
            params=arch.params if arch else None,
            macs=arch.macs if arch else None,
            accuracy=found,
            reward=value,
            feasible=violation == 0,
            seconds=round(time.perf_counter() - start, 4),
            error=error,
        )
        return _Candidate(rollout, arch or stage.space.teacher, violation)

    def _trained(
        self,
        space: ArchitectureSpace,
        arch: Architecture,
        batches: Batches,
        learning_rate: float,
        seed: int,
        progress: Progress | None = None,
    ) -> fx.GraphModule:
        """The student of `arch`, its norms re-estimated and trained on `batches`. Raises Diverged."""
        with seeded(seed, self.device):
            student = space.build(arch, self.config.init)
            if self.config.init != "reconstructed":  # which has done so on the way
                recalibrate(student, torch.split(self.calibration, 128))
            fit(
                student,
                batches,
                learning_rate=learning_rate,
                kd_weight=self.config.kd_weight,
                progress=progress,
            )
        return student

    def _train_best(self, stage: str, space: ArchitectureSpace, arch: Architecture) -> fx.GraphModule:
        batches = self._batches(self.config.final_epochs, f"{stage} final")
        self.progress.stage(f"training the best of {stage}", len(batches))
        seed = _seed(self.config.seed, stage, "final")
        try:
            return self._trained(space, arch, batches, self.config.final_learning_rate, seed, self.progress)
        except Diverged as error:
            raise BadInput(
                f"the training of the best student diverged ({error}); lower --final-learning-rate"
            ) from None

    def _batches(self, epochs: float, purpose: str) -> Batches:
        config, data = self.config, self.data
        seed = _seed(config.seed, purpose)
        return Batches(data.train, self.teacher.logits, epochs, config.batch_size, data.augmentation, seed)

    def _calibration_images(self) -> Tensor:
        """Unlabelled training images, (n, C, H, W) normalised, drawn by the seed."""
        split = self.data.train
        generator = torch.Generator().manual_seed(_seed(self.config.seed, "calibration"))
        index = torch.randperm(len(split), generator=generator)[: self.config.calibration_images]
        images, _ = split.batch(index.to(self.device))
        return images

    def _show(self, candidate: _Candidate, best: _Candidate | None) -> None:
        compression = None if best is None else self.teacher.params / max(1, best.architecture.params)
        self.progress.rollout(candidate.rollout, None if best is None else best.rollout, compression)

    # The end

    def _finish(self, student: nn.Module, chosen: Sequence[tuple[str, ArchitectureSpace, Architecture]]) -> Result:
        """Measure teacher and student, the test split among it for the first time, and write the artifacts."""
        student = independent_copy(student)
        self.progress.message("measuring teacher and student")
        arch = chosen[-1][2]
        table: dict[str, Any] = {
            "data": self.data.name,
            "teacher": self._measure(self.teacher.module, self.space.teacher),
            "student": self._measure(student, arch),
        }
        table["compression"] = table["teacher"]["params"] / max(1, arch.params)
        violation = self.constraints.violation(arch.params, table["student"]["validation_accuracy"])
        table["feasible"] = violation == 0
        architectures = [
            {"stage": stage, "layers": [layer.name for layer in space.layers], **asdict(arch)}
            for stage, space, arch in chosen
        ]
        _write_json(self.out / "architecture.json", architectures)
        torch.save(student.state_dict(), self.out / "student.pt")
        _write_json(self.out / "result.json", table)
        try:
            _export(student, self.calibration[:2], self.out / "student.pt2")
        except Exception as error:  # noqa: BLE001 - what a leaf's own code raises; nothing else may be lost by it
            self.progress.message(
                f"warning: student.pt2 was not written, torch.export does not take the student ({first_line(error)}); "
                "its weights are in student.pt"
            )
        return Result(student, table, violation == 0, self.out)

    def _measure(self, model: nn.Module, arch: Architecture) -> dict[str, Any]:
        split = self.data.validation
        images = split.batch(torch.arange(64, device=self.device) % len(split))[0]
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return {
            "params": arch.params,
            "macs": arch.macs,
            "bytes": file.getbuffer().nbytes,
            "latency_ms": latency_ms(model, images[:1]),
            "latency_ms_64": latency_ms(model, images),
            "validation_accuracy": accuracy(model, split),
            "test_accuracy": None if self.data.test is None else accuracy(model, self.data.test),
        }


def load_student(run: str | os.PathLike[str]) -> nn.Module:
    """The student of a run directory, ready for inference; needs neither the teacher nor its class.

    Takes images (N, C, H, W) preprocessed as the teacher's. Raises BadInput where there is no finished run.
    """
    path = Path(run) / "student.pt2"
    if not path.is_file():
        raise BadInput(f"{run}: no student.pt2 in it; give the directory of a finished run")
    if not zipfile.is_zipfile(path):
        raise BadInput(f"{path}: not a student, or a truncated one; run the search again")
    try:
        return torch.export.load(path).module()
    except (RuntimeError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: not a readable student ({first_line(error)})") from None


def _checked_accuracy(teacher: nn.Module, data: ImageData) -> float:
    """The teacher's validation accuracy; BadInput where it has learned nothing about this data."""
    found = accuracy(teacher, data.validation)
    chance = float(data.validation.labels.bincount().max()) / len(data.validation)
    if found <= 1.2 * chance:
        raise BadInput(
            f"the teacher's validation accuracy on {data.name} is {found:.1%}, no better than chance ({chance:.1%}): "
            "set --mean, --std and --image-size to the preprocessing that it was trained with"
        )
    return found


def _claim(out: Path) -> Path:
    """Make the run directory; BadInput where it cannot be written or holds a run already."""
    if (out / "config.json").exists():
        raise BadInput(f"{out}: holds a run already; give another --out or remove it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"{out}: cannot be written ({error.strerror}); give another --out") from None
    return out


def _export(student: nn.Module, example: Tensor, path: Path) -> None:
    """Write the student by torch.export, its batch size free."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(student.eval(), (example.contiguous(),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


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


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _seed(*parts: object) -> int:
    """A seed of its own for everything that is random, from the run's seed and what it is for."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
