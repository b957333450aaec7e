"""How the policies learn best: python bench/policies.py.

Two teachers of the digits (a ResNet-14 and a ResNet-20), both stages, SEEDS seeds: ROLLOUTS students each, tried as
their fitted weights are, so that a search takes seconds. Each setting changes one thing of the first, the default;
"chance" never learns. Figures are rewards: the mean of the last 25 rollouts, and the best. Writes
bench/results/policies.json after every search and leaves out those that are in it.
"""

import json
import statistics
import tempfile
from pathlib import Path

import torch

from n2n_fast import Interrupted, SearchConfig, SearchProgress, compress, load
from n2n_fast import teacher as teachers

SEEDS = 3
ROLLOUTS = 150
LAST = 25
OUT = Path(__file__).parent / "results" / "policies.json"
PLAIN = {"rollout_steps": 0, "anchors": 0, "validation_images": None, "calibration_images": 256}


def rates(rate):
    return {"removal_learning_rate": rate, "shrinkage_learning_rate": rate}


SETTINGS = {
    "default": {},
    "chance": rates(0.0),
    "the paper's rates, plain advantages": {
        "removal_learning_rate": 0.003,
        "shrinkage_learning_rate": 0.01,
        "normalise": False,
    },
    "plain advantages": {"normalise": False},
    "rate 0.005": rates(0.005),
    "rate 0.01": rates(0.01),
    "rate 0.05": rates(0.05),
    "entropy 0.01": {"entropy": 0.01},
    "entropy 0.03": {"entropy": 0.03},
    "entropy 0.1": {"entropy": 0.1},
    "baseline 0.95": {"baseline_decay": 0.95},
    "baseline 0.5": {"baseline_decay": 0.5},
    "keep 0.9": {"keep_probability": 0.9},
    "keep 0.6": {"keep_probability": 0.6},
    "anchors": {"anchors": 5, "anchor_epochs": 2.0, "keep_probability": 0.8},
    "anchors, begun at the best": {"anchors": 5, "anchor_epochs": 2.0},
    "anchors, begun at the best, chance": {"anchors": 5, "anchor_epochs": 2.0, **rates(0.0)},
    "10 rollouts": {"rollouts": 10},
    "10 rollouts, rate 0.01": {"rollouts": 10, **rates(0.01)},
    "10 rollouts, entropy 0.03": {"rollouts": 10, "entropy": 0.03},
}


class Rewards(SearchProgress):
    """Collects rewards, and stops after enough of them."""

    def __init__(self):
        self.found = []

    def rollout(self, rollout, best, compression):
        self.found.append(rollout.reward)

    def stopping(self):
        return len(self.found) >= ROLLOUTS


def config_of(stage, seed, setting):
    per_update = setting.get("rollouts", 5)
    return SearchConfig(**{**PLAIN, **setting, "stages": stage, "seed": seed, "updates": ROLLOUTS // per_update})


def rewards(model, data, config, policies=None):
    told = Rewards()
    with tempfile.TemporaryDirectory() as place:
        try:
            compress(model, data, config, Path(place) / "run", told, policies=policies)
        except Interrupted:
            return told.found
    raise RuntimeError("the search ended by itself")


def summary(table):
    """Per teacher and stage, for each setting: mean over seeds and its standard error, of the late and the best."""
    for group in dict.fromkeys(key.rsplit(" / ", 2)[0] for key in table):
        print(group)
        for name in SETTINGS:
            runs = [found for key, found in table.items() if key.startswith(f"{group} / {name} / ")]
            if len(runs) < 2:
                continue
            late, best = [statistics.mean(r[-LAST:]) for r in runs], [max(r) for r in runs]
            late_error, best_error = (statistics.stdev(v) / len(v) ** 0.5 for v in (late, best))
            print(f"  {name:<40} last {statistics.mean(late):.3f} ± {late_error:.3f}"
                  f"  best {statistics.mean(best):.3f} ± {best_error:.3f}")  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = load("digits", validation=0.2)
    table = json.loads(OUT.read_text()) if OUT.exists() else {}
    for arch in ("digits_resnet", "resnet20"):
        model = teachers.create(arch, data.classes, 1, seed=0)
        teachers.train_teacher(model, data, epochs=30.0, seed=0)
        for seed in range(SEEDS):
            for name, setting in SETTINGS.items():
                for stage in ("removal", "shrinkage"):
                    key = f"{arch} {stage} / {name} / {seed}"
                    if key not in table:
                        table[key] = [round(r, 4) for r in rewards(model, data, config_of(stage, seed, setting))]
                        OUT.write_text(json.dumps(table) + "\n")
        summary(table)
