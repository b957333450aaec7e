"""The settings of a search: each is declared here alone, with its type, default, bounds and a line of help."""

import types
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args, get_origin

from n2n_fast.files.errors import BadInput
from n2n_fast.networks.space import IMPORTANCES, INITS
from n2n_fast.search.reward import OBJECTIVES

STAGES = {"both": ("removal", "shrinkage"), "removal": ("removal",), "shrinkage": ("shrinkage",)}

Rule = tuple[str, Callable[[Any], bool]]  # what is allowed, in words and as a test
MOST = 10**6  # of what is counted: a slip of the keyboard is refused, not begun
ANY: Rule = ("", lambda _: True)
COUNT: Rule = (f"1 to {MOST:,}", lambda n: 1 <= n <= MOST)
FEW: Rule = ("1 to 10,000", lambda n: 1 <= n <= 10_000)
AMOUNT: Rule = (f"0 to {MOST:,}", lambda x: 0 <= x <= MOST)
POSITIVE: Rule = (f"above 0, at most {MOST:,}", lambda x: 0 < x <= MOST)
LIMIT: Rule = ("1 to 10^18", lambda n: 1 <= n <= 10**18)
SEED: Rule = ("a whole number of 64 bits", lambda n: -(2**63) <= n < 2**63)
SHARE: Rule = ("between 0 and 1", lambda x: 0 <= x <= 1)
INNER_SHARE: Rule = ("between 0 and 1", lambda x: 0 < x < 1)
DECAY: Rule = ("at least 0 and below 1", lambda x: 0 <= x < 1)
NAMES: Rule = ("names of modules, separated by commas", lambda _: True)
RATIOS: Rule = (
    "ratios in (0, 1], the last of them 1",
    lambda ratios: bool(ratios) and ratios[-1] == 1 and all(0 < ratio <= 1 for ratio in ratios),
)


def one_of(*names: str) -> Rule:
    """One of these names."""
    return f"one of {', '.join(names)}", lambda name: name in names


def setting(default: Any, meaning: str, rule: Rule = ANY) -> Any:
    """A field of SearchConfig with its line of help and what it may be."""
    return field(default=default, metadata={"help": meaning, "allowed": rule[0], "test": rule[1]})


@dataclass(frozen=True)
class SearchConfig:
    """The settings of a search; written to config.json of its run directory. `paper` gives the paper's."""

    stages: str = setting("both", "Remove layers, shrink them, or both.", one_of(*STAGES))
    updates: int = setting(20, "Policy updates in each stage.", COUNT)
    rollouts: int = setting(10, "Students evaluated for each update.", COUNT)
    rollout_steps: int = setting(0, "Training steps of a rollout's student; 0 trains none.", AMOUNT)
    epochs: float | None = setting(None, "Train a rollout's student for these epochs, not rollout_steps.", AMOUNT)
    validation_images: int | None = setting(2000, "Images on which a rollout's student is tried; none: all.", COUNT)
    reuse: bool = setting(True, "Do not evaluate an architecture twice.")
    anchors: int = setting(5, "Students trained fully before a stage, to correct accuracies; 0: none.", AMOUNT)
    anchor_epochs: float = setting(1.0, "Epochs of an anchor's training.", AMOUNT)
    anchor_every: int = setting(10, "Updates after which one more anchor is trained; 0: never.", AMOUNT)
    stage_epochs: float = setting(1.0, "Epochs for the best student of stage 1, from which stage 2 starts.", AMOUNT)
    final_epochs: float = setting(10.0, "Epochs for the best students of the last stage.", AMOUNT)
    epoch_steps: int = setting(
        400,
        "Where images are few, an epoch of these trainings is several passes, up to ten, for so many steps.",
        AMOUNT,
    )
    keep_top: int = setting(2, "Best students trained fully; the best by validation is the result.", COUNT)
    init: str = setting("fitted", "Weights from which students start.", one_of(*INITS))
    importance: str | None = setting(
        None, "Importance by which channels are kept; none: activations where weights are fitted.", one_of(*IMPORTANCES)
    )
    batch_size: int = setting(128, "Images per training step.", COUNT)
    learning_rate: float = setting(0.01, "Peak learning rate of a rollout's student.", POSITIVE)
    final_learning_rate: float = setting(
        0.05, "Peak learning rate of longer trainings, times the root of steps / 400 for fewer.", POSITIVE
    )
    kd_weight: float = setting(0.1, "Weight λ of distillation in L = L_hard + λ L_KD.", AMOUNT)
    round_to: int = setting(1, "Shrink widths to multiples of this many channels.", COUNT)
    leaf: tuple[str, ...] = setting((), "Submodules of the teacher that are each one opaque layer.", NAMES)
    ratios: tuple[float, ...] = setting(
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "Ratios that stage 2 chooses from.", RATIOS
    )
    keep_probability: float | None = setting(
        None,
        "Probability that untrained policies keep a layer; none: imitate the best anchor, 0.8 without anchors.",
        INNER_SHARE,
    )
    imagined_steps: int = setting(
        60, "Steps in which a policy learns from imagined students after an update; 0: REINFORCE alone.", AMOUNT
    )
    hidden: int = setting(30, "Units of each LSTM layer of the policies.", FEW)
    lstm_layers: int = setting(2, "LSTM layers of the policies.", FEW)
    removal_learning_rate: float = setting(0.01, "Adam's learning rate in stage 1; 0: random search.", AMOUNT)
    shrinkage_learning_rate: float = setting(0.01, "Adam's learning rate in stage 2; 0: random search.", AMOUNT)
    normalise: bool = setting(True, "Divide an update's advantages by their root mean square.")
    baseline_decay: float = setting(0.8, "Decay of the moving average of rewards.", DECAY)
    objective: str = setting("params", "What the compression in the reward counts.", one_of(*OBJECTIVES))
    max_params: int | None = setting(None, "The student has no more parameters.", LIMIT)
    max_macs: int | None = setting(None, "The student needs no more MACs for an image.", LIMIT)
    max_latency: float | None = setting(None, "The student takes no longer on this device, in ms.", POSITIVE)
    latency_batch: int = setting(1, "Images in a batch whose latency is measured.", FEW)
    min_accuracy: float | None = setting(None, "The student reaches this validation accuracy.", SHARE)
    max_drop: float | None = setting(None, "The student loses at most this many points of validation accuracy.", AMOUNT)
    penalty: float | None = setting(
        20.0, "Times the share by which a limit is missed: how far the reward falls to -1; none: all the way.", AMOUNT
    )
    calibration_images: int = setting(512, "Unlabelled images for fitted weights and batch norms.", COUNT)
    seed: int = setting(0, "Seed of all that is drawn; on a CPU it repeats a run.", SEED)

    def __post_init__(self) -> None:
        """Raise BadInput for values that no search can use."""
        for one in fields(self):
            value = getattr(self, one.name)
            _check(one, value)
            if isinstance(value, list):
                object.__setattr__(self, one.name, tuple(value))

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


Setting = Field[Any]  # of SearchConfig
SETTINGS: dict[str, Setting] = {one.name: one for one in fields(SearchConfig)}
_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def allowed(setting: Setting) -> str:
    """What a setting may be, in words."""
    kind, _, optional = _type(setting)
    told = setting.metadata["allowed"] or _KINDS[kind]
    return f"{told}, or none" if optional and setting.default is not None else told


def parse(setting: Setting, text: str) -> Any:
    """A setting's value from text, by its type: 3, 0.5, true, none, or a,b for several. Raises BadInput."""
    kind, several, optional = _type(setting)
    read: Callable[[str], Any] = (lambda part: _BOOLS[part.lower()]) if kind is bool else kind
    try:
        if optional and text.lower() == "none":
            return None
        value = tuple(map(read, filter(None, text.split(",")))) if several else read(text)
    except (KeyError, ValueError):
        raise BadInput(f"{setting.name}: {text}; give {allowed(setting)}") from None
    _check(setting, value)
    return value


def _check(setting: Setting, value: Any) -> None:
    """Raise BadInput for a value that the setting may not have."""
    kind, several, optional = _type(setting)
    if value is None:
        may_be = optional
    else:
        is_list = isinstance(value, list | tuple)
        of_kind = is_list == several and all(_is_a(kind, one) for one in (value if is_list else [value]))
        may_be = of_kind and setting.metadata["test"](value)
    if not may_be:
        raise BadInput(f"{setting.name}: {value}; give {setting.metadata['allowed'] or allowed(setting)}")


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value is of the kind; a whole number is a number too, and neither is true or false."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int | float if kind is float else kind)


def _type(setting: Setting) -> tuple[type, bool, bool]:
    """Of a setting's type: what one value is, whether it takes several, whether it may be None."""
    parts = get_args(setting.type) or (setting.type,)
    return parts[0], get_origin(setting.type) is tuple, types.NoneType in parts


PAPER: dict[str, Any] = {
    "rollouts": 5,
    "imagined_steps": 0,
    "epoch_steps": 0,
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
