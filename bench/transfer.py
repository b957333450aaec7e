"""What policies trained on one teacher are worth on another: python bench/transfer.py.

From a ResNet-18 to a ResNet-34 of the digits, each asked for a tenth of its params, SEEDS seeds, the searches of
policies.py. Three beginnings: policies that keep a layer with probability 0.8, those that imitate the best anchor (the
default), and those of the ResNet-18's search of the same seed. Writes the rewards of every search to
bench/results/transfer.json and leaves out those that are in it.
"""

import json
import statistics
import tempfile
from pathlib import Path

import torch
from policies import LAST, SEEDS, config_of, rewards, shown

from n2n_fast import load
from n2n_fast.search.config import STAGES
from n2n_fast.training import teachers

OUT = Path(__file__).parent / "results" / "transfer.json"
FIRST = 25
SMALLER = 10
BEGINNINGS = {"keeping 0.8": {"keep_probability": 0.8}, "the best anchor": {}, "the ResNet-18's policies": {}}


def searches(small, large, data, seed, place):
    """The rewards of the larger teacher's searches, by beginning."""
    rewards(small, data, config_of(small, seed, {}, SMALLER), place / "small")
    found = {}
    for number, (beginning, setting) in enumerate(BEGINNINGS.items()):
        policies = place / "small" / "policies.pt" if beginning == "the ResNet-18's policies" else None
        found[beginning] = rewards(large, data, config_of(large, seed, setting, SMALLER), place / f"{number}", policies)
    return found


def summary(table):
    """By stage and beginning, over seeds: the mean reward of the first and of the last students, and the best."""
    for stage in STAGES["both"]:
        for beginning in BEGINNINGS:
            runs = [found[beginning][stage] for found in table.values()]
            first, last = [statistics.mean(r[:FIRST]) for r in runs], [statistics.mean(r[-LAST:]) for r in runs]
            columns = {f"first {FIRST}": first, f"last {LAST}": last, "best": [max(r) for r in runs]}
            text = (f"{name} {shown(values)}" for name, values in columns.items())
            print(f"{stage:<10} {beginning:<26} {'  '.join(text)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = load("digits", validation=0.2)
    small, large = (teachers.create(arch, data.classes, 1, 8, seed=0) for arch in ("resnet18", "resnet34"))
    for model in (small, large):
        teachers.train_teacher(model, data, epochs=10.0, seed=0)
    table = json.loads(OUT.read_text()) if OUT.exists() else {}
    for seed in range(SEEDS):
        if str(seed) not in table:
            with tempfile.TemporaryDirectory() as place:
                table[str(seed)] = searches(small, large, data, seed, Path(place))
            OUT.write_text(json.dumps(table) + "\n")
    if len(table) > 1:
        summary(table)
