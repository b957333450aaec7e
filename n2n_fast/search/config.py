"""The settings of a search."""

import math
from dataclasses import dataclass
from typing import Any

from n2n_fast.files.errors import BadInput
from n2n_fast.networks.space import INITS, SALIENCIES
from n2n_fast.search.reward import OBJECTIVES

STAGES = {"both": ("removal", "shrinkage"), "removal": ("removal",), "shrinkage": ("shrinkage",)}


@dataclass(frozen=True)
class SearchConfig:
    """The settings of a search; written to config.json of its run directory. `paper` gives the paper's."""

    stages: str = "both"  # both, removal or shrinkage
    updates: int = 20  # of the policy, in each stage
    rollouts: int = 5  # students evaluated for each update
    rollout_steps: int = 20  # training steps of a rollout's student; 0: as its fitted weights are
    epochs: float | None = None  # instead of rollout_steps: a rollout's student is trained for this many epochs
    validation_images: int | None = 2000  # that a rollout's student is tried on, always the same; None: all
    reuse: bool = True  # an architecture seen before is not evaluated again
    anchors: int = 5  # students trained fully before a stage, to correct the accuracy after rollout_steps; 0: none
    anchor_epochs: float = 1.0  # of their training
    anchor_every: int = 10  # updates after which another anchor is taken from where the policy is; 0: never
    stage_epochs: float = 1.0  # for the best student of stage 1, from which stage 2 starts
    final_epochs: float = 10.0  # for the best students of the last stage
    keep_top: int = 2  # how many of them are trained so; the best by validation is the result
    init: str = "fitted"  # what students start from: fitted, sliced or random
    saliency: str | None = None  # activations or l1; default: activations where weights are fitted to them
    batch_size: int = 128
    learning_rate: float = 0.01  # peak, for a rollout's student: fitted weights of a wide net want small steps
    final_learning_rate: float = 0.05  # peak, for longer trainings; times the root of steps / 400 for fewer
    kd_weight: float = 0.1  # λ in L = L_hard + λ L_KD
    round_to: int = 1  # shrunk widths are multiples of this many channels
    leaf: tuple[str, ...] = ()  # submodules of the teacher that are each one opaque layer
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of stage 2, ending with 1
    keep_probability: float | None = None  # that untrained policies keep a layer, or a kernel's size; None: they
    # begin by imitating the best of the first anchors, 0.8 without anchors
    hidden: int = 30  # units of each LSTM layer
    lstm_layers: int = 2
    removal_learning_rate: float = 0.003  # Adam's, stage 1; 0: the policy stays as it is, a random search
    shrinkage_learning_rate: float = 0.003  # Adam's, stage 2; the same
    normalise: bool = True  # divide the advantages of an update by their root mean square
    entropy: float = 0.0  # weight of the policy's entropy, which holds it from settling early
    baseline_decay: float = 0.8  # of the moving average of rewards
    objective: str = "params"  # what C counts: params, macs or latency
    max_params: int | None = None
    max_macs: int | None = None
    max_latency: float | None = None  # ms on this device, for latency_batch images
    latency_batch: int = 1
    min_accuracy: float | None = None  # on the validation split, in [0, 1]
    max_drop: float | None = None  # of validation accuracy below the teacher's, in points
    penalty: float | None = 20.0  # times the share by which limits are missed: the part of the way to -1; None: all
    calibration_images: int = 512  # unlabelled, for fitted weights and batch norm statistics
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise BadInput for values that no search can use."""
        for name, (valid, allowed) in self._rules().items():
            if not valid:
                raise BadInput(f"{name}: {getattr(self, name)}; give {allowed}")

    def _rules(self) -> dict[str, tuple[bool, str]]:
        """For each setting that can be wrong, whether it is right, and what would be."""

        def every(allowed: str, test: Any, *names: str) -> dict[str, tuple[bool, str]]:
            values = {name: getattr(self, name) for name in names}
            return {name: (value is None or bool(test(value)), allowed) for name, value in values.items()}

        def choice(name: str, *among: str) -> dict[str, tuple[bool, str]]:
            return every(f"one of {', '.join(among)}", lambda value: value in among, name)

        return {
            **choice("stages", *STAGES),
            **choice("init", *INITS),
            **choice("saliency", *SALIENCIES),
            **choice("objective", *OBJECTIVES),
            **every("at least 1", lambda n: n >= 1, "updates", "rollouts", "batch_size", "round_to", "keep_top",
                    "validation_images", "max_params", "max_macs", "latency_batch", "hidden", "lstm_layers",
                    "calibration_images"),
            **every("at least 0", lambda x: 0 <= x < math.inf, "rollout_steps", "epochs", "anchors", "anchor_epochs",
                    "anchor_every", "stage_epochs", "final_epochs", "kd_weight", "removal_learning_rate",
                    "shrinkage_learning_rate", "entropy", "max_drop", "penalty"),
            **every("above 0", lambda x: 0 < x < math.inf, "learning_rate", "final_learning_rate", "max_latency"),
            **every("between 0 and 1", lambda x: 0 < x < 1, "keep_probability"),
            **every("between 0 and 1", lambda x: 0 <= x <= 1, "min_accuracy"),
            **every("at least 0 and below 1", lambda x: 0 <= x < 1, "baseline_decay"),
            **every("ratios in (0, 1], the last of them 1", lambda ratios: ratios and ratios[-1] == 1
                    and all(0 < ratio <= 1 for ratio in ratios), "ratios"),
        }  # fmt: skip

    @property
    def times(self) -> bool:
        """Whether students' latency has to be measured."""
        return self.objective == "latency" or self.max_latency is not None

    @classmethod
    def paper(cls, **settings: Any) -> "SearchConfig":
        """The paper's own protocol, the control; settings override it.

        Random initial weights, five epochs for each student, every one of them evaluated and none corrected; plain
        advantages and the learning rates of its section 4.
        """
        return cls(**{**PAPER, **settings})


PAPER: dict[str, Any] = {
    "epochs": 5.0,
    "validation_images": None,
    "reuse": False,
    "anchors": 0,
    "anchor_every": 0,
    "keep_top": 1,
    "init": "random",
    "learning_rate": 0.05,
    "stage_epochs": 5.0,
    "removal_learning_rate": 0.003,
    "shrinkage_learning_rate": 0.01,
    "normalise": False,
    "penalty": None,
}
PROTOCOLS: dict[str, dict[str, Any]] = {"fast": {}, "paper": PAPER}
