"""What fitted weights are worth: validation accuracy of students after 0, 20 and 50 steps, against sliced ones.

usage: python bench/calibration.py TEACHER.pt fashion-mnist:DIR [--seeds N] [--trained-seeds N] [--rates R R R R]
The teacher is a state dict as `n2n-fast teach` writes it; see bench/README.md for the commands. Writes a JSON file and
prints a table of the accuracy on the first 2,000 validation images. Figures of 0 steps are means over the seeds, which
draw the calibration images and the batches; those of 20 and 50, for some of the students, over the first seeds. Peak
learning rates: of 20 and 50 steps of a fitted student, and of a sliced one; the best of calibration_study.py's `rate`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import n2n_fast
from n2n_fast.training import teacher_files, teachers
from n2n_fast.training.batches import Batches, TeacherLogits
from n2n_fast.training.data import accuracy
from n2n_fast.training.distill import recalibrate, train

INITS = ("sliced", "fitted")
STEPS = (0, 20, 50)
BATCH = 128
IMAGES = 512
TRAINED = ("widths x0.5", "widths x0.35", "first conv gone in 1/3 of blocks", "1/3 gone and widths x0.5")


def block_firsts(space):
    """For each block the index of its first removable convolution."""
    firsts = {}
    for i, layer in enumerate(space.layers):
        if layer.kind in ("conv", "depthwise") and layer.removable:
            firsts.setdefault(".".join(layer.name.split(".")[:2]), i)
    return list(firsts.values())


def without_firsts(space, share):
    """The teacher without the first convolution, and its norm, in `share` of the blocks, evenly spread."""
    firsts = block_firsts(space)
    count = round(share * len(firsts))
    gone = {firsts[(2 * n + 1) * len(firsts) // (2 * count)] for n in range(count)}
    gone |= {i + 1 for i in gone if space.layers[i + 1].kind == "norm"}
    return space.remove(space.teacher, [i not in gone for i in range(len(space.layers))])


def cases(space):
    """Architectures by name: widths for about 2, 4, 8 and 16 times fewer params, removals, and both."""
    count = len(space.layers)
    third = without_firsts(space, 1 / 3)
    return {
        **{f"widths x{r}": space.shrink(space.teacher, [r] * count) for r in (0.71, 0.5, 0.35, 0.25)},
        "first conv gone in 1/3 of blocks": third,
        "first conv gone in 2/3 of blocks": without_firsts(space, 2 / 3),
        "1/3 gone and widths x0.5": space.shrink(third, [0.5] * count),
    }


def trainings(data, logits, seed):
    """The batches of each number of steps, which all students share."""
    epochs = {steps: steps * BATCH / len(data.train) for steps in STEPS if steps}
    return {steps: list(Batches(data.train, logits, e, BATCH, data.augmentation, seed)) for steps, e in epochs.items()}


def measure(model, data, seed, rates, rows):
    """Add this seed's accuracies to rows[case, init]."""
    index = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    images = data.train.batch(index)[0]
    space = n2n_fast.ArchitectureSpace(model, images[:2], images)
    batches = trainings(data, TeacherLogits(model, data.train), seed) if rates else {}
    for name, arch in cases(space).items():
        for init in INITS:
            row = rows.setdefault((name, init), {"compression": space.teacher.params / arch.params, "seconds": []})
            for steps in STEPS if rates and name in TRAINED else (0,):
                start = time.perf_counter()
                student = space.build(arch, init)
                if init != "fitted":
                    recalibrate(student, images.split(BATCH))
                row["seconds"].append(time.perf_counter() - start)
                if steps:
                    train(student, batches[steps], learning_rate=rates[init == "sliced", steps], kd_weight=0.1)
                row.setdefault(str(steps), []).append(accuracy(student, data.validation.subset(torch.arange(2000))))
            print(seed, name, init, [round(row[s][-1], 4) for s in ("0", "20", "50") if s in row], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs=4, type=float, default=(0.02, 0.02, 0.005, 0.02))
    parser.add_argument("--trained-seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calibration")
    options = parser.parse_args()
    model = teacher_files.load_teacher(options.teacher)
    data = n2n_fast.load(options.data, channels=teachers.input_channels(model))
    keys = [(sliced, steps) for sliced in (False, True) for steps in STEPS if steps]
    rates = dict(zip(keys, options.rates, strict=True))
    rows = {}
    for seed in range(options.seeds):
        measure(model, data, seed, rates if seed < options.trained_seeds else None, rows)
    content = {
        "teacher": accuracy(model, data.validation.subset(torch.arange(2000))),
        "seeds": options.seeds,
        "trained_seeds": options.trained_seeds,
        "rates": list(options.rates),
        "rows": [{"case": case, "init": init, **row} for (case, init), row in rows.items()],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{Path(options.teacher).stem}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nteacher {content['teacher']:.2%}\n")
    print("| student | | init | made in | 0 steps | 20 | 50 |\n|---|---|---|---|---|---|---|")
    for row in content["rows"]:
        figures = " | ".join(f"{statistics.mean(row[s]):.1%}" if s in row else "" for s in map(str, STEPS))
        milliseconds = 1e3 * statistics.median(row["seconds"])
        print(f"| {row['case']} | {row['compression']:.1f}x | {row['init']} | {milliseconds:.0f} ms | {figures} |")


if __name__ == "__main__":
    main()
