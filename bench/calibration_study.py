"""What fitted weights need: images, their balance, ridge, positions, learning rate.

usage: python bench/calibration_study.py TEACHER.pt fashion-mnist:DIR [STUDY ...] [--seeds 2] [--out DIR]
Each study varies one setting and leaves the others as the package has them. Figures are accuracies on the first 2,000
validation images, means over the seeds, which draw the calibration images and the batches; nothing is trained except
in `rate`. Writes a JSON file for each study and prints its table.
"""

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path

import torch
from calibration import BATCH, IMAGES, trainings, without_firsts

import n2n_fast
from n2n_fast.networks import fitting
from n2n_fast.training import teacher_files, teachers
from n2n_fast.training.batches import TeacherLogits
from n2n_fast.training.data import accuracy
from n2n_fast.training.distill import Diverged, recalibrate, train


class Bench:
    """One teacher, its data, and the students that every study looks at."""

    def __init__(self, path, spec, seeds):
        self.model = teacher_files.load_teacher(path)
        self.data = n2n_fast.load(spec, channels=teachers.input_channels(self.model))
        self.validation = self.data.validation.subset(torch.arange(2000))
        self.seeds = range(seeds)
        self.accuracy = accuracy(self.model, self.validation)

    def images(self, count, seed, balanced=False):
        train = self.data.train
        index = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        if balanced:
            labels = train.labels[index]
            classes = int(labels.max()) + 1
            index = torch.cat([index[labels == c][: -(-count // classes)] for c in range(classes)])
            index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]
        return train.batch(index[:count])[0]

    def space(self, images, **options):
        return n2n_fast.ArchitectureSpace(self.model, images[:2], images, **options)

    def cases(self, space):
        count = len(space.layers)
        third = without_firsts(space, 1 / 3)
        return {
            "x0.5": space.shrink(space.teacher, [0.5] * count),
            "x0.35": space.shrink(space.teacher, [0.35] * count),
            "1/3 gone": third,
            "1/3 gone, x0.5": space.shrink(third, [0.5] * count),
        }

    def students(self, space, images, inits=("fitted",), cases=None):
        """Accuracy and seconds of every case and init."""
        for case, arch in self.cases(space).items():
            if cases is not None and case not in cases:
                continue
            for init in inits:
                start = time.perf_counter()
                student = space.build(arch, init)
                if init != "fitted":
                    recalibrate(student, images.split(BATCH))
                seconds = time.perf_counter() - start
                yield case, init, accuracy(student, self.validation), seconds


@contextlib.contextmanager
def constants(**values):
    """The calibration module with other constants for a while."""
    before = {name: getattr(fitting, name) for name in values}
    try:
        for name, value in values.items():
            setattr(fitting, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(fitting, name, value)


def images_study(bench):
    """Number of calibration images, drawn at random or the same number of each class."""
    for seed in bench.seeds:
        for count in (64, 128, 256, 512, 1024, 2048):
            for balanced in (False, True):
                images = bench.images(count, seed, balanced)
                for row in bench.students(bench.space(images), images, cases=["x0.5", "x0.35"]):
                    yield f"{count} {'balanced' if balanced else 'random'}", row


def ridge_study(bench):
    """RIDGE of the teacher's moments, and of reconstructions after a removal."""
    for seed in bench.seeds:
        images = bench.images(IMAGES, seed)
        for ridge in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            with constants(RIDGE=ridge):
                for row in bench.students(bench.space(images), images):
                    yield f"{ridge:g}", row


def prior_study(bench):
    """PRIOR: how strongly a reconstruction is drawn to the teacher's own bridge."""
    for seed in bench.seeds:
        images = bench.images(IMAGES, seed)
        space = bench.space(images)
        for prior in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
            with constants(PRIOR=prior):
                for row in bench.students(space, images):
                    yield f"{prior:g}", row


def positions_study(bench):
    """Sampled positions for each channel of a layer's input."""
    for seed in bench.seeds:
        images = bench.images(IMAGES, seed)
        for count in (1, 4, 16, 64, 256, 1024):
            with constants(SAMPLES_PER_CHANNEL=count, MIN_SAMPLES=1):
                for row in bench.students(bench.space(images), images, cases=["x0.5", "x0.35"]):
                    yield str(count), row


def saliency_study(bench):
    """Which channels are kept."""
    for seed in bench.seeds:
        images = bench.images(IMAGES, seed)
        for saliency in ("l1", "activations"):
            space = bench.space(images, saliency=saliency)
            for row in bench.students(space, images, ["sliced", "fitted"]):
                yield saliency, row


def rate_study(bench):
    """Peak learning rate of 20 and 50 steps of distillation."""
    logits = TeacherLogits(bench.model, bench.data.train)
    for seed in bench.seeds:
        images = bench.images(IMAGES, seed)
        space = bench.space(images)
        arch = bench.cases(space)["x0.35"]
        for steps, batches in trainings(bench.data, logits, seed).items():
            for rate in (0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1):
                for init in ("sliced", "fitted"):
                    student = space.build(arch, init)
                    if init != "fitted":
                        recalibrate(student, images.split(BATCH))
                    start = time.perf_counter()
                    try:
                        found = accuracy(train(student, batches, learning_rate=rate, kd_weight=0.1), bench.validation)
                    except Diverged:
                        found = 0.0
                    yield f"{steps} steps, {rate:g}", ("x0.35", init, found, time.perf_counter() - start)


STUDIES = {name: globals()[f"{name}_study"] for name in ("images", "ridge", "prior", "positions", "saliency", "rate")}


def table(rows):
    """Markdown: a line for each setting, a column for each student."""
    columns = list(dict.fromkeys((case, init) for _, case, init, _, _ in rows))
    lines = ["| | " + " | ".join(f"{case} {init}" for case, init in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for setting in dict.fromkeys(row[0] for row in rows):
        cells = []
        for column in columns:
            found = [(a, s) for name, case, init, a, s in rows if (name, (case, init)) == (setting, column)]
            mean, seconds = (statistics.mean(values) for values in zip(*found, strict=True))
            cells.append(f"{mean:.1%} ({seconds:.2f} s)")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("data")
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)}; default: all")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calibration")
    options = parser.parse_args()
    bench = Bench(options.teacher, options.data, options.seeds)
    print(f"teacher {bench.accuracy:.2%}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.studies or STUDIES:
        study = STUDIES[name]
        rows = [(setting, *row) for setting, row in study(bench)]
        content = {"teacher": bench.accuracy, "study": study.__doc__, "seeds": options.seeds, "rows": rows}
        (options.out / f"{Path(options.teacher).stem}-{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"\n{name}: {study.__doc__}\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
