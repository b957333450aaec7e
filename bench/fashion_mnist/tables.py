"""What the pieces of the study say so far: python bench/fashion_mnist/tables.py. Missing pieces are left out."""

import csv
import functools
import io
import statistics

import numpy as np
from study import ANCHORS, HERE, SEEDS, SMALLER, STUDENTS, TILTS, need

from n2n_fast.search.predictor import AccuracyPredictor, Trained
from n2n_fast.search.reward import reward

STEPS = (0, 20, 50)
SAME_MACS = 0.0  # of all: those searches corrected accuracies by accuracies alone
STAGES = ("removal", "shrinkage")
SEARCHES = ("search", "finer", "longer", "chance", "random", "smaller")
COMPARED = ("search", "chance", "random")
UNTRAINED = ("chance", "random")


def there(piece):
    return need(piece) if (HERE / f"{piece}.json").exists() else None


def held(names):
    return [found for found in map(there, names) if found is not None]


@functools.cache
def history(piece, kind="rollout"):
    """A search's students of one kind, rollout or anchor, with the numbers that `study.KEPT` names; None: no such."""
    path = HERE / f"{piece}.csv"
    with path.open() if path.exists() else io.StringIO() as file:
        return [{key: number(text) for key, text in row.items()} for row in csv.DictReader(file) if row["kind"] == kind]


def number(text):
    try:
        return float(text) if text else None
    except ValueError:
        return text


def spearman(a, b):
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def rewards(rows, accuracies):
    found = zip(rows, accuracies, strict=True)
    return [reward(a, row["params"], row["teacher"], row["teacher_params"]) for row, a in found]


def mapped(accuracies, anchors, steps, epochs):
    """Accuracies after so many steps as a map of the anchors, trained for so many epochs, corrects them."""
    fitted = AccuracyPredictor.learned(
        [Trained(a[f"steps {steps}"], SAME_MACS, a[f"epochs {epochs}"]) for a in anchors]
    )
    return [fitted(accuracy, SAME_MACS)[0] for accuracy in accuracies]


def proxy_table(name):
    """Rank correlation with the reward after 10 epochs, with and without the map."""
    rows = held(f"{name}-proxy-{n}" for n in range(STUDENTS))
    anchors = held(f"{name}-anchor-{n}" for n in range(ANCHORS))
    if len(rows) < 4:
        return
    full = rewards(rows, [row["epochs 10"] for row in rows])
    print(f"\n{name}: Spearman with the reward after 10 epochs, {len(rows)} students, map of {len(anchors)} others")
    for steps in STEPS:
        raw = [row[f"steps {steps}"] for row in rows]
        text = f"  {steps:3} steps: reward uncorrected {spearman(rewards(rows, raw), full):.2f}"
        text += f", accuracy {spearman(raw, [row['epochs 10'] for row in rows]):.2f}"
        for epochs in (1, 10):
            if len(anchors) >= 3:
                corrected = mapped(raw, anchors, steps, epochs)
                off = statistics.mean(abs(c - row["epochs 10"]) for c, row in zip(corrected, rows, strict=True))
                rank = spearman(rewards(rows, corrected), full)
                text += f"; corrected by {epochs} epochs {rank:.2f}, {100 * off:.1f} points off"
        print(text)


def halving_table(name):
    """Successive halving among the five rollouts of an update: the two that are worst before any step get no steps.

    Whether that cuts the best of the search, beside what another calibration with all steps would have cut.
    """
    piece = there(f"{name}-halving-{SEEDS[0]}")
    if piece is None:
        return
    rows = piece["students"]
    of = {kind: np.array([row[kind] for row in rows]) for kind in ("searched", "untrained", "again")}
    updates = np.array([row["update"] for row in rows])
    print(f"\n{name}: {len(rows)} students of a search, again with other calibration images")
    for kind in ("untrained", "again"):
        lost = []
        for update in np.unique(updates):
            among = np.flatnonzero(updates == update)
            worst = among[np.argsort(of[kind][among])[:2]]
            lost.append(among[of["searched"][among].argmax()] in worst)
        seconds = statistics.mean(row[f"seconds {kind}"] for row in rows)
        text = f"  {kind}: Spearman with what the search found {spearman(of[kind], of['searched']):.2f}, the best of"
        print(f"{text} {statistics.mean(lost):.0%} of {len(lost)} updates among the worst two; {seconds:.2f} s each")


def of_seeds(values):
    """Mean and deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def student_of(piece):
    """(params, test accuracy) of what a search or a control ended with; None for what it does not tell."""
    student = piece["table"]["student"] if piece.get("table") else piece
    return student.get("params"), student.get("test_accuracy", student.get("test"))


def search_table(name):
    """The result of every search and of the controls of its size."""
    teacher = there(f"{name}-teacher")
    if teacher is None:
        return
    print(f"\n{name}: teacher {teacher['params']:,} params, test {teacher['test']:.2%}")
    for kind in ("free", "uncapped", "capped", "removed", "even", "even-smaller", *SEARCHES, "pruned", "dense", "tilt"):
        numbers = TILTS if kind == "tilt" else SEEDS
        found = {number: piece for number in numbers if (piece := there(f"{name}-{kind}-{number}"))}
        tests = []
        for number, piece in found.items():
            text = f"  {kind} {number}: {piece['seconds'] / 60:.0f} min"
            params, test = student_of(piece)
            if test is not None and kind not in UNTRAINED:
                tests.append(100 * test)
                times = teacher["params"] / params
                text += f", {params:,} params ({times:.1f}x), test {test:.2%}"
            for stage in STAGES:
                rollouts = rewards_of(f"{name}-{kind}-{number}", stage)
                if rollouts:
                    late = statistics.mean(rollouts[-20:])
                    text += f"; {stage}: best {max(rollouts):.4f}, last 20 {late:.3f} of {len(rollouts)}"
            print(text)
        if kind != "tilt" and len(tests) > 1:
            below = of_seeds([100 * teacher["test"] - test for test in tests])
            print(f"  {kind}, all seeds: {of_seeds(tests)}%, {below} below the teacher")
    reward_table(name)
    paper_table(name, teacher)


def rewards_of(piece, stage):
    return [line["reward"] for line in history(piece) if line["stage"] == stage]


def reward_table(name):
    """The best reward of as many rollouts: policies that learn, that only imitate the best anchor, that do neither.

    Rewards as given, each by the map of its moment; and as one map of the anchors of all these runs gives them, so that
    the maps' own errors do not count.
    """
    for stage in STAGES:
        for kind in COMPARED:
            given = [run for seed in SEEDS if (run := rewards_of(f"{name}-{kind}-{seed}", stage))]
            again = rejudged(name, kind, stage)
            if given:
                text = f"  {stage}, {kind}: best reward {best_of(given)}, by one map {best_of(again)}; means"
                print(text, ", ".join(f"{statistics.mean(run):.4f}" for run in again))


def best_of(runs):
    """Mean and standard error of the best of each run."""
    best = [max(run) for run in runs]
    error = f" ± {statistics.stdev(best) / len(best) ** 0.5:.4f}" if len(best) > 1 else ""
    return f"{statistics.mean(best):.4f}{error}"


@functools.cache
def one_map(name, stage):
    """Fitted to the anchors of all searches that are compared."""
    pieces = [f"{name}-{kind}-{seed}" for kind in COMPARED for seed in SEEDS]
    anchors = [line for piece in pieces for line in history(piece, "anchor") if line["stage"] == stage]
    return AccuracyPredictor.learned(
        [Trained(a["short_accuracy"], SAME_MACS, a["full_accuracy"]) for a in anchors if a["full_accuracy"]]
    )


def rejudged(name, kind, stage):
    """The rewards of a stage's students, had that been the map: a list for each seed."""
    teacher, fitted = need(f"{name}-teacher"), one_map(name, stage)
    whole = teacher["params"]
    most = whole // SMALLER["search"][name]
    return [
        [
            reward(
                fitted(line["short_accuracy"], SAME_MACS)[0], max(line["params"], most), teacher["validation"], whole
            )
            for line in rollouts
            if line["stage"] == stage and line["short_accuracy"] is not None
        ]
        for seed in SEEDS
        if (rollouts := history(f"{name}-{kind}-{seed}"))
    ]


def paper_table(name, teacher):
    """Reward of what a search delivered, the best of the paper's protocol after as much time, and rollouts an hour."""
    for seed in SEEDS:
        ours, paper = there(f"{name}-search-{seed}"), there(f"{name}-paper-{seed}")
        if ours is None or paper is None:
            continue
        student = ours["table"]["student"]
        reached = reward(student["validation_accuracy"], student["params"], teacher["validation"], teacher["params"])
        theirs = history(f"{name}-paper-{seed}")
        fast = history(f"{name}-search-{seed}")
        hourly = [3600 / statistics.mean(line["seconds"] for line in run if line["seconds"]) for run in (fast, theirs)]
        print(
            f"  paper {seed}: best reward {max(line['reward'] for line in theirs):.4f} of {len(theirs)}, "
            f"the search's student {reached:.4f}; {hourly[1]:.0f} and {hourly[0]:.0f} rollouts an hour"
        )


if __name__ == "__main__":
    for of in ("A", "B"):
        search_table(of)
        proxy_table(of)
        halving_table(of)
