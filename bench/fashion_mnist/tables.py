"""What the pieces of the study say so far: python bench/fashion_mnist/tables.py. Missing pieces are left out."""

import json
import statistics

import numpy as np
from study import ANCHORS, HERE, SEEDS, STUDENTS, need

from n2n_fast.proxy import Anchor, ProxyMap
from n2n_fast.reward import reward

STEPS = (0, 20, 50)


def there(piece):
    return need(piece) if (HERE / f"{piece}.json").exists() else None


def held(names):
    return [found for found in map(there, names) if found is not None]


def history(piece, kind="rollout"):
    path = HERE / piece / "history.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["kind"] == kind]


def spearman(a, b):
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def rewards(rows, accuracies):
    found = zip(rows, accuracies, strict=True)
    return [reward(a, row["params"], row["teacher"], row["teacher_params"]) for row, a in found]


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
                key = f"steps {steps}"
                fitted = ProxyMap.fit([Anchor("", a[key], a[f"epochs {epochs}"]) for a in anchors])
                corrected = [fitted(value)[0] for value in raw]
                off = statistics.mean(abs(c - row[f"epochs {epochs}"]) for c, row in zip(corrected, rows, strict=True))
                rank = spearman(rewards(rows, corrected), full)
                text += f"; corrected to {epochs} epochs {rank:.2f}, {100 * off:.1f} points off"
        print(text)


def search_table(name):
    """The result of every search and of the controls of its size."""
    found = there(f"{name}-teacher")
    if found is None:
        return
    print(f"\n{name}: teacher {found['params']:,} params, test {found['test']:.2%}")
    for kind in ("free", "search", "chance", "pruned", "dense", "paper", "smaller"):
        for seed in SEEDS:
            piece = there(f"{name}-{kind}-{seed}")
            if piece is None:
                continue
            text = f"  {kind} {seed}: {piece['seconds'] / 60:.0f} min"
            student = piece["table"]["student"] if piece.get("table") else piece
            if "params" in student:
                test = student.get("test_accuracy", student.get("test"))
                text += f", {student['params']:,} params ({found['params'] / student['params']:.1f}x), test {test:.2%}"
            for stage in ("removal", "shrinkage"):
                rollouts = [line for line in history(f"{name}-{kind}-{seed}") if line["stage"] == stage]
                if rollouts:
                    best = max(line["reward"] for line in rollouts)
                    late = statistics.mean(line["reward"] for line in rollouts[-20:])
                    text += f"; {stage}: best {best:.4f}, last 20 {late:.3f} of {len(rollouts)}"
            print(text)


if __name__ == "__main__":
    for of in ("A", "B"):
        search_table(of)
        proxy_table(of)
