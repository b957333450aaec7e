"""Do the policies learn? python bench/policies.py.

Two teachers of the digits (a ResNet-14 and a ResNet-20), SEEDS seeds, searches for a tenth of the params and free ones:
ROLLOUTS students a stage. "no learning" begins where the default does and never learns, "random search" draws from
untrained policies, "REINFORCE alone" learns from evaluated students only. Figures are rewards, -1 where a limit is
missed, however the policy was told so: the mean of the first and of the last 25 students, and the best. Writes
bench/results/policies.json after every search and leaves out those that are in it.
"""

import itertools
import json
import statistics
import tempfile
from pathlib import Path

import torch

from n2n_fast import SearchConfig, SearchProgress, compress, load
from n2n_fast.search.config import STAGES
from n2n_fast.search.reward import DEGENERATE
from n2n_fast.training import teachers

SEEDS = 3
ROLLOUTS = 150
LAST = 25
OUT = Path(__file__).parent / "results" / "policies.json"
SHORT = {
    "epoch_steps": 0,
    "anchor_epochs": 2.0,
    "stage_epochs": 2.0,
    "final_epochs": 0.0,
    "keep_top": 1,
    "validation_images": None,
    "calibration_images": 256,
}


def rates(rate):
    return {"removal_learning_rate": rate, "shrinkage_learning_rate": rate}


SETTINGS = {
    "default": {},
    "REINFORCE alone": {"imagined_steps": 0, **rates(0.003), "rollouts": 5},
    "no learning": rates(0.0),
    "random search": {**rates(0.0), "keep_probability": 0.8},
}
ASKED = {"a tenth": {"smaller": 10}, "free": {}}


class Rewards(SearchProgress):
    """Collects rewards by stage, of students that miss a limit the least there is."""

    def __init__(self):
        self.found = {stage: [] for stage in STAGES["both"]}

    def rollout(self, rollout, best, compression):
        self.found[rollout.stage].append(round(rollout.reward if rollout.feasible else DEGENERATE, 4))


def config_of(model, seed, setting, smaller=None, **asked):
    """A search's settings; smaller: how many times fewer params are asked for, None: as it comes."""
    most = smaller and sum(p.numel() for p in model.parameters()) // smaller
    updates = ROLLOUTS // setting.get("rollouts", 10)
    return SearchConfig(**{**SHORT, "max_params": most, **asked, **setting, "seed": seed, "updates": updates})


def rewards(model, data, config, place, policies=None):
    """Of all rollouts, by stage; place: of the run directory."""
    told = Rewards()
    compress(model, data, config, place, told, policies=policies)
    return told.found


def figures_of(found):
    """For each stage the mean reward of the first students and of the last, and the best."""
    return {
        stage: [round(statistics.mean(run[:LAST]), 6), round(statistics.mean(run[-LAST:]), 6), max(run)]
        for stage, run in found.items()
    }


def figures(table, asked, name):
    """By teacher and seed the `figures_of` a run, removal's and then shrinkage's; one row a run."""
    rows = {}
    for key, run in table.items():
        of, setting, seed = key.split(" / ")
        arch, _, limited = of.partition(", ")
        if (limited, setting) == (asked, name):
            rows[arch, seed] = [figure for stage in STAGES["both"] for figure in run[stage]]
    return rows


def shown(values, sign=""):
    """Mean and standard error."""
    return f"{statistics.mean(values):{sign}.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def summary(table):
    """A Markdown table for each thing asked: the default's figures, and what others have more, teacher by teacher and
    seed by seed; means over all of these with standard errors.
    """
    for asked in ASKED:
        default = figures(table, asked, "default")
        columns = " | ".join(f"{stage}, first {LAST} | last {LAST} | best" for stage in STAGES["both"])
        print(f"\n| {asked} | runs | {columns} |\n{'|---' * 8}|")
        for name in SETTINGS:
            runs = figures(table, asked, name)
            both = [key for key in runs if key in default]
            if len(both) > 1:
                more = [[x - y for x, y in zip(runs[key], default[key], strict=True)] for key in both]
                rows, sign = ([runs[key] for key in both], "") if name == "default" else (more, "+")
                columns = (shown(column, sign) for column in zip(*rows, strict=True))
                print(f"| {name} | {len(both)} |", " | ".join(columns), "|")


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = load("digits", validation=0.2)
    table = json.loads(OUT.read_text()) if OUT.exists() else {}
    models = {arch: teachers.create(arch, data.classes, 1, seed=0) for arch in ("digits_resnet", "resnet20")}
    for model in models.values():
        teachers.train_teacher(model, data, epochs=30.0, seed=0)
    for seed, (asked, limits), arch in itertools.product(range(SEEDS), ASKED.items(), models):
        for name, setting in SETTINGS.items():
            key = f"{arch}, {asked} / {name} / {seed}"
            if key not in table:
                with tempfile.TemporaryDirectory() as place:
                    config = config_of(models[arch], seed, setting, **limits)
                    table[key] = figures_of(rewards(models[arch], data, config, Path(place) / "run"))
                OUT.write_text(json.dumps(table) + "\n")
    summary(table)
