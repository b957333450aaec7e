"""The study in one picture, results/study.png: python bench/fashion_mnist/plots.py. Told apart in grey as well."""

import numpy as np
from matplotlib.figure import Figure
from study import ANCHORS, HERE, PROXIED, SEEDS, STUDENTS, need
from tables import COMPARED, held, mapped, rejudged, rewards, spearman, student_of

NAMES = {"A": "ResNet-18", "B": "ResNet-32"}
KINDS = {"search": "n2n_fast", "longer": "n2n_fast, 20 epochs", "smaller": "n2n_fast, 16x, 20 epochs",
         "pruned": "Torch-Pruning", "dense": "narrower, from scratch"}  # fmt: skip
MARKERS = {"search": "o", "longer": "D", "smaller": "v", "pruned": "s", "dense": "x"}
POLICIES = {"search": ("policies that learn", "-"), "chance": ("begun alike, never learning", "--"),
            "random": ("random search", ":")}  # fmt: skip
SMOOTHED = 20  # students, of a running mean


def proxies(axes, steps=20):
    """What a few steps say of a student, with and without the map, against ten epochs."""
    rows = held(f"{PROXIED}-proxy-{n}" for n in range(STUDENTS))
    anchors = held(f"{PROXIED}-anchor-{n}" for n in range(ANCHORS))
    raw = [row[f"steps {steps}"] for row in rows]
    full = rewards(rows, [row["epochs 10"] for row in rows])
    for label, marker, found in (("as it is", "x", raw), ("corrected", "o", mapped(raw, anchors, steps, 1))):
        given = rewards(rows, found)
        axes.plot(given, full, marker, label=f"{label}, Spearman {spearman(given, full):.2f}")
    axes.set(title=f"{NAMES[PROXIED]}: {len(rows)} students drawn at random", xlabel=f"reward after {steps} steps")
    axes.set_ylabel("reward after ten epochs")


def again(axes):
    """Students of the ResNet-32 of one size, evaluated twice."""
    rows = need("B-halving-0")["students"]
    first, second = ([100 * row[kind] for row in rows] for kind in ("searched", "again"))
    axes.plot(first, second, "o", label=f"Spearman {spearman(first, second):.2f}")
    axes.set(title=f"{NAMES['B']}: {len(rows)} students of one size", xlabel="accuracy in the search, %")
    axes.set_ylabel("with other calibration images, %")


def accuracies(axes, name):
    """Test accuracies of what was trained fully."""
    teacher = need(f"{name}-teacher")
    axes.axhline(100 * teacher["test"], color="black", linewidth=1, label="teacher")
    for kind, label in KINDS.items():
        found = [student_of(piece) for piece in held(f"{name}-{kind}-{seed}" for seed in SEEDS)]
        if found:
            params, tests = np.transpose(found)
            axes.plot(teacher["params"] / params, 100 * tests, MARKERS[kind], label=label)
    axes.set(title=f"{NAMES[name]}: three seeds each", xlabel="times fewer params", ylabel="test accuracy, %")


def learning(axes, name, stage="shrinkage"):
    """Rewards over a search, all by one map: a running mean, over the seeds that there are."""
    for kind in COMPARED:
        runs = rejudged(name, kind, stage)
        length = min(map(len, runs))
        mean = np.mean([run[:length] for run in runs], axis=0)
        smooth = np.convolve(mean, np.ones(SMOOTHED) / SMOOTHED, "valid")
        label, line = POLICIES[kind]
        axes.plot(range(SMOOTHED, length + 1), smooth, line, label=f"{label}, seeds: {len(runs)}")
    axes.set(title=f"{NAMES[name]}: {stage}", xlabel="student", ylabel=f"reward, mean of {SMOOTHED}")


if __name__ == "__main__":
    figure = Figure(figsize=(16, 9), dpi=80, layout="constrained")
    panels = figure.subplots(2, 3)
    proxies(panels[0, 0])
    again(panels[1, 0])
    for row, name in zip(panels, NAMES, strict=True):
        accuracies(row[1], name)
        learning(row[2], name)
    for axes in panels.flat:
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "study.png")
