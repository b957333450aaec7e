"""What policies trained on one teacher are worth on another: python bench/transfer.py.

From a ResNet-18 to a ResNet-34 of the digits, both stages, SEEDS seeds, ROLLOUTS students each, tried as their fitted
weights are, their accuracies corrected by anchors. Three beginnings: policies that keep a layer with probability 0.8,
those that imitate the best anchor (the default), and those of the ResNet-18's search of the same seed. Writes the
rewards of every search to bench/results/transfer.json and leaves out those that are in it.
"""

import json
import statistics
import tempfile
from pathlib import Path

import torch
from policies import LAST, SEEDS, config_of, rewards

from n2n_fast import compress, load
from n2n_fast import teacher as teachers

OUT = Path(__file__).parent / "results" / "transfer.json"
FIRST = 25
BEGINNINGS = ("keeping 0.8", "the best anchor", "the ResNet-18's policies")


ANCHORED = {"anchors": 5, "anchor_epochs": 2.0}


def trained_policies(model, data, stage, seed, place):
    """The file that a whole search leaves; its students are not trained."""
    untrained = {"stage_epochs": 0.0, "final_epochs": 0.0, "keep_top": 1}
    compress(model, data, config_of(stage, seed, {**ANCHORED, **untrained}), place)
    return place / "policies.pt"


def searches(small, large, data, stage, seed):
    """The rewards of the larger teacher's searches, in the order of BEGINNINGS."""
    with tempfile.TemporaryDirectory() as place:
        policies = trained_policies(small, data, stage, seed, Path(place) / "small")
        anchored = config_of(stage, seed, ANCHORED)
        yield rewards(large, data, config_of(stage, seed, {**ANCHORED, "keep_probability": 0.8}))
        yield rewards(large, data, anchored)
        yield rewards(large, data, anchored, policies)


def summary(table):
    """By stage and beginning, over seeds: the mean reward of the first and of the last students, and the best."""
    for stage in ("removal", "shrinkage"):
        for beginning in BEGINNINGS:
            runs = [found for key, found in table.items() if key.startswith(f"{stage} / {beginning} / ")]
            if len(runs) < 2:
                continue
            first, last = [statistics.mean(r[:FIRST]) for r in runs], [statistics.mean(r[-LAST:]) for r in runs]
            columns = {f"first {FIRST}": first, f"last {LAST}": last, "best": [max(r) for r in runs]}
            text = (f"{name} {statistics.mean(v):.3f} ± {statistics.stdev(v) / len(v) ** 0.5:.3f}"
                    for name, v in columns.items())  # fmt: skip
            print(f"{stage:<10} {beginning:<26} {'  '.join(text)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = load("digits", validation=0.2)
    small, large = (teachers.create(arch, data.classes, 1, 8, seed=0) for arch in ("resnet18", "resnet34"))
    for model in (small, large):
        teachers.train_teacher(model, data, epochs=10.0, seed=0)
    table = json.loads(OUT.read_text()) if OUT.exists() else {}
    for seed in range(SEEDS):
        for stage in ("removal", "shrinkage"):
            if f"{stage} / {BEGINNINGS[-1]} / {seed}" not in table:
                for beginning, found in zip(BEGINNINGS, searches(small, large, data, stage, seed), strict=True):
                    table[f"{stage} / {beginning} / {seed}"] = [round(reward, 4) for reward in found]
                    OUT.write_text(json.dumps(table) + "\n")
        summary(table)
