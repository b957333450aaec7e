"""The study of Fashion-MNIST, in pieces: python bench/fashion_mnist/study.py DIR [PIECE ...] [--list].

DIR holds the four files of Fashion-MNIST. Every piece takes under an hour on 2 cores, writes
bench/fashion_mnist/results/PIECE.json and is left out where that is there: the study can be cut off and goes on. A
search also writes PIECE.csv there, the fields of its history that tables read; its whole run directory stays in WORK.
Teachers: A is torchvision's ResNet-18 (3x32x32), B a ResNet-32 in the CIFAR style (1x28x28). Pieces, for T in A and B:

T-teacher            train it; its weights stay in WORK and are trained again (seed 0) where they are missing
T-proxy-N            student N of 30 drawn over the whole range (removals and widths): its accuracy after 0, 20 and 50
                     steps, and after 10 epochs of distillation (A alone, as B's would take longer than all else)
T-anchor-N           the same of 6 more, to which the map of accuracies is fitted, and after 1 epoch
T-search-SEED        the search as it is for a student 50 (A) or 10 (B) times smaller, which is trained fully
T-chance-SEED        the same with policies that begin at the best anchor, as ever, but never learn; its best student
                     is not trained
T-random-SEED        the same with policies that are not trained at all: random search in the same space
B-free-0             an earlier search without a limit, its policies not begun at an anchor; kept, not run again, as its
                     teacher of 8 epochs was not
B-uncapped-0         T-search-0 when more compression than the limit asks for was still rewarded; kept, not run again
B-capped-0           T-search-0 before an anchor was put at the limit; the same
B-removed-0          T-search-0 when students of the first stage were not yet brought to the limit; the same
T-even-0, B-even-smaller-0  T-search-0 and B-smaller-0 when the first anchors at the limit were narrowed evenly and by
                     chance, and policies began further from the best and learned faster; the same
T-longer-SEED        as T-search-SEED, its student trained for 20 epochs (B alone; these went on from T-search-SEED's
                     journal, and their seconds are those of both)
T-smaller-SEED       as T-longer-SEED, divided by 16 (B alone)
T-finer-SEED         as T-search-SEED, evaluations less in error: weights fitted to 2,048 images, all validation images
                     (B alone)
T-paper-SEED         the paper's protocol for as long as T-search-SEED took
T-pruned-SEED        one-shot uniform L1 pruning (Torch-Pruning) to the params of T-search-SEED's student, trained alike
T-halving-SEED       every other update's students of T-search-SEED's last stage, fitted to other images, as they are
                     and after as many steps: whether successive halving, which gives no steps to the worst, would lose
                     the best
T-tilt-HUNDREDTHS    no search: the teacher at the limit of T-search, layers narrowed by this power of what that saves
                     (`ArchitectureSpace.tilted`), fitted and trained alike
T-dense-SEED         the teacher's own net, uniformly narrower, with at least as many params, trained alike from scratch

Tables of what is there: python bench/fashion_mnist/tables.py; a picture: plots.py there.
"""

import argparse
import csv
import functools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import n2n_fast
from n2n_fast import SearchConfig
from n2n_fast.files.errors import DegenerateArchitecture
from n2n_fast.search.config import PAPER
from n2n_fast.search.environment import Evaluator, Transition
from n2n_fast.search.teacher import restored
from n2n_fast.training import teacher_files, teachers
from n2n_fast.training.batches import Batches, TeacherLogits
from n2n_fast.training.data import accuracy
from n2n_fast.training.distill import recalibrate, seeded, train

HERE = Path(__file__).parent / "results"
WORK = Path("build") / "fashion_mnist"  # what is too large to keep
KEPT = ("kind", "stage", "params", "short_accuracy", "full_accuracy", "reward", "seconds")  # of a search's history
PROXIED, STUDENTS, ANCHORS = "A", 30, 6
SEEDS = (0, 1, 2)
TILTS = (0, 25, 50, 75)
CPU = torch.device("cpu")
SMALLER = {"search": {"A": 50, "B": 10}, "smaller": {"B": 16}}  # the fewest times that a search is asked for
TEACHERS = {
    "A": {"arch": "resnet18", "channels": 3, "image_size": 32, "epochs": 8.0},
    "B": {"arch": "resnet32", "channels": 1, "image_size": 28, "epochs": 14.0},
}
# What is searched, by teacher: budgets that the wall-clock of an hour and of half an hour allow.
SHORT = {"anchors": 4, "anchor_epochs": 0.25, "anchor_every": 10, "stage_epochs": 0.5}
BUDGETS = {
    "A": {**SHORT, "updates": 40, "removal_learning_rate": 0.001, "shrinkage_learning_rate": 0.001,
          "final_epochs": 8.0, "keep_top": 2},
    "B": {**SHORT, "updates": 30, "rollout_steps": 10, "final_epochs": 12.0, "keep_top": 1},
}  # fmt: skip


@functools.cache
def images(directory, name):
    of = TEACHERS[name]
    spec = f"fashion-mnist:{directory}"
    return n2n_fast.load(spec, image_size=of["image_size"], channels=of["channels"])


def teacher_file(name):
    return WORK / f"{name}-teacher.pt"


def trained_teacher(directory, name):
    """The teacher, which its piece must have trained."""
    if not teacher_file(name).exists():
        teach(directory, name)
    return teacher_files.load_teacher(teacher_file(name))


@functools.cache
def teacher_logits(directory, name):
    """The teacher's logits for the training images, which pieces of one process share."""
    return TeacherLogits(trained_teacher(directory, name), images(directory, name).train)


def calibration(directory, name):
    """512 training images, to which weights are fitted."""
    train = images(directory, name).train
    return train.batch(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:512])[0]


def calibrated(directory, name):
    """The teacher's space, whose students are fitted."""
    fitted = calibration(directory, name)
    return n2n_fast.ArchitectureSpace(trained_teacher(directory, name), fitted[:2], fitted)


def teach(directory, name):
    of, found = TEACHERS[name], images(directory, name)
    model = teachers.create(of["arch"], found.classes, of["channels"], of["image_size"], seed=0)
    start = time.perf_counter()
    teachers.train_teacher(model, found, epochs=of["epochs"], seed=0)
    seconds = time.perf_counter() - start
    teacher_file(name).parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), teacher_file(name))
    params = sum(p.numel() for p in model.parameters())
    return {"params": params, "seconds": seconds, **accuracies(model, found)}


def accuracies(model, found):
    return {"validation": accuracy(model, found.validation), "test": accuracy(model, found.test)}


# The proxy: what a few steps say of many


def drawn(space, rng):
    """A random student over the whole range: some layers gone, widths around a common ratio."""
    while True:
        gone, ratio = rng.uniform(0, 0.5), np.exp(rng.uniform(np.log(0.15), 0))
        keep = (rng.random(len(space.layers)) >= gone).tolist()
        channels = np.clip(ratio * np.exp(rng.normal(0, 0.3, len(space.layers))), 0.1, 1).tolist()
        try:
            arch = space.shrink(space.remove(space.teacher, keep), channels)
        except DegenerateArchitecture:
            continue
        if arch.params < 0.95 * space.teacher.params:
            return arch


def proxy(directory, name, number):
    found, space = images(directory, name), calibrated(directory, name)
    arch = drawn(space, np.random.default_rng(number))
    row = {"params": arch.params, "macs": arch.macs, "teacher_params": space.teacher.params,
           "teacher": accuracy(trained_teacher(directory, name), found.validation)}  # fmt: skip
    for steps in (0, 20, 50):
        given = teacher_logits(directory, name), calibration(directory, name), SearchConfig(rollout_steps=steps)
        evaluator = Evaluator("proxy", space, found, *given)
        evaluation = evaluator.evaluate(arch, seed=0)
        row[f"steps {steps}"] = evaluation.short_accuracy
        row[f"seconds {steps}"] = sum(evaluation.seconds.values())
    for epochs in (10.0,) if number < STUDENTS else (1.0, 10.0):
        start = time.perf_counter()
        row[f"epochs {epochs:.0f}"] = accuracy(evaluator.train(arch, epochs, "the whole"), found.validation)
        row[f"seconds of {epochs:.0f} epochs"] = time.perf_counter() - start
    return row


# Searches


def searched(directory, name, seed, piece, progress=None, asked="search", **settings):
    """Run a search in WORK, going on with one that was cut off, and keep its result and what tables read."""
    found, model = images(directory, name), trained_teacher(directory, name)
    out = WORK / piece
    most = sum(p.numel() for p in model.parameters()) // SMALLER[asked][name]
    config = SearchConfig(**{**BUDGETS[name], "max_params": most, **settings, "seed": seed})
    start = time.perf_counter()
    try:
        result = n2n_fast.compress(model, found, config, out, progress, resume=(out / "config.json").exists())
        table = result.table
    except n2n_fast.Interrupted:
        table = None
    keep(lines(out / "history.jsonl"), HERE / f"{piece}.csv")
    return {"seconds": time.perf_counter() - start, "table": table}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def keep(history, path):
    """Write KEPT of all rollouts and anchors; a student met before took no seconds."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, KEPT, lineterminator="\n")
        writer.writeheader()
        for line in history:
            if line["kind"] in ("rollout", "anchor"):
                seconds = round(sum(line["seconds"].values()), 4) or None
                reward = round(line["reward"], 8) if "reward" in line else None
                writer.writerow({key: line.get(key) for key in KEPT} | {"seconds": seconds, "reward": reward})


class UntilLate(n2n_fast.SearchProgress):
    """Stops after so many seconds."""

    def __init__(self, seconds):
        self.end = time.perf_counter() + seconds

    def stopping(self):
        return time.perf_counter() > self.end


def search(directory, name, seed):
    return searched(directory, name, seed, f"{name}-search-{seed}")


def smaller(directory, name, seed):
    return searched(directory, name, seed, f"{name}-smaller-{seed}", asked="smaller", final_epochs=20.0)


def finer(directory, name, seed):
    better = {"calibration_images": 2048, "validation_images": None}
    return searched(directory, name, seed, f"{name}-finer-{seed}", **better)


def longer(directory, name, seed):
    return searched(directory, name, seed, f"{name}-longer-{seed}", final_epochs=20.0)


# Policies that never learn, whose best student is not trained: rewards are all that is compared.
NEVER = {"removal_learning_rate": 0.0, "shrinkage_learning_rate": 0.0, "final_epochs": 0.0}


def chance(directory, name, seed):
    return searched(directory, name, seed, f"{name}-chance-{seed}", **NEVER)


def random(directory, name, seed):
    return searched(directory, name, seed, f"{name}-random-{seed}", **NEVER, keep_probability=0.8)


def paper(directory, name, seed):
    seconds = need(f"{name}-search-{seed}")["seconds"]
    plain = {**PAPER, "updates": 10**6, "stages": "shrinkage", "max_params": None}
    return searched(directory, name, seed, f"{name}-paper-{seed}", UntilLate(seconds), **plain)


def halving(directory, name, seed):
    file = WORK / f"{name}-search-{seed}" / "checkpoint.pt"
    if not file.exists():
        raise SystemExit(f"{name}-search-{seed} comes first, its directory in {WORK} is needed")
    ((_, _, state),) = torch.load(file)["stages"][0]["finals"]
    keep = json.loads(file.with_name("architecture.json").read_text())[0]["keep"]
    found, fitted, whole = images(directory, name), calibration(directory, name), calibrated(directory, name)
    student = restored(whole, whole.remove(whole.teacher, keep), state)
    space = n2n_fast.ArchitectureSpace(student, fitted[:2], fitted)
    plain = SearchConfig(**{**BUDGETS[name], "seed": seed})
    most = whole.teacher.params // SMALLER["search"][name]
    transition = Transition(space, False, plain.ratios, params=most, grows=True)
    evaluators = {}
    for kind, steps in {"untrained": 0, "again": plain.rollout_steps}.items():
        given = teacher_logits(directory, name), fitted, replace(plain, rollout_steps=steps)
        evaluators[kind] = Evaluator("shrinkage", space, found, *given)
    rows = []
    for line in lines(file.with_name("history.jsonl")):
        if line["kind"] == "rollout" and line["stage"] == "shrinkage" and line["update"] % 2 and not line["cached"]:
            (arch,) = transition(torch.tensor([line["actions"]]))
            assert arch.key == line["architecture"]
            row = {"update": line["update"], "searched": line["short_accuracy"]}
            for kind, evaluator in evaluators.items():
                evaluation = evaluator.evaluate(arch, seed=1)
                row |= {kind: evaluation.short_accuracy, f"seconds {kind}": sum(evaluation.seconds.values())}
            rows.append(row)
    return {"students": rows}


# Controls of the same size


def trained_alike(directory, name, seed, model):
    """A net trained as a search trains its best student, from the weights that it has."""
    found, logits = images(directory, name), teacher_logits(directory, name)
    config = SearchConfig(**BUDGETS[name])
    views = found.augmentation.views if found.augmentation else None
    given = config.final_epochs, config.batch_size, found.augmentation, seed
    batches = Batches(found.train, logits, *given, views=views)
    start = time.perf_counter()
    with seeded(seed, CPU):
        train(model, batches, learning_rate=config.final_learning_rate, kd_weight=config.kd_weight)
    params = sum(p.numel() for p in model.parameters())
    return {"params": params, "seconds": time.perf_counter() - start, **accuracies(model, found)}


def tilt(directory, name, hundredths):
    found, space = images(directory, name), calibrated(directory, name)
    ratios = space.tilted(hundredths / 100)
    most = space.teacher.params // SMALLER["search"][name]
    arch = space.shrink_within(space.teacher, ratios, params=most, grow=True)
    model = space.build(arch, "fitted")
    before = accuracy(model, found.validation)
    return {"macs": arch.macs, "validation_before_training": before, **trained_alike(directory, name, 0, model)}


def pruned(directory, name, seed):
    import torch_pruning

    most = need(f"{name}-search-{seed}")["table"]["student"]["params"]
    found = images(directory, name)
    example = found.train.batch(torch.arange(2))[0]
    mild, severe = 0.0, 0.99
    for _ in range(12):  # until the mildest ratio that gives no more params than the search's student is found
        ratio = (mild + severe) / 2
        model = trained_teacher(directory, name)
        ignored = [m for m in model.modules() if isinstance(m, nn.Linear)]
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=1)
        torch_pruning.pruner.MagnitudePruner(
            model, example, importance=importance, pruning_ratio=ratio, ignored_layers=ignored
        ).step()
        if sum(p.numel() for p in model.parameters()) <= most:
            severe, best = ratio, model
        else:
            mild = ratio
    calibration = found.train.batch(torch.arange(512))[0]
    recalibrate(best, calibration.split(128))
    before = accuracy(best, found.validation)
    return {"validation_before_training": before, **trained_alike(directory, name, seed, best)}


def dense(directory, name, seed):
    """Uniformly narrower than the teacher, weights drawn at random: the least with the search's student's params."""
    least = need(f"{name}-search-{seed}")["table"]["student"]["params"]
    found = images(directory, name)
    space = n2n_fast.ArchitectureSpace(trained_teacher(directory, name), found.train.batch(torch.arange(2))[0])
    ratios = np.linspace(0.05, 1, 400)
    archs = (space.shrink(space.teacher, [float(ratio)] * len(space.layers)) for ratio in ratios)
    with seeded(seed, CPU):
        model = space.build(next(arch for arch in archs if arch.params >= least), "random")
    return trained_alike(directory, name, seed, model)


def need(piece):
    path = HERE / f"{piece}.json"
    if not path.exists():
        raise SystemExit(f"{piece} comes first")
    return json.loads(path.read_text())


def pieces():
    """Every piece in the order of its worth."""
    for name in ("B", "A"):
        yield f"{name}-teacher", teach, (name,)
    kinds = {"search": search, "chance": chance, "random": random, "pruned": pruned, "dense": dense, "paper": paper}
    for seed in SEEDS:
        for name in ("B", "A"):
            for kind, make in kinds.items():
                yield f"{name}-{kind}-{seed}", make, (name, seed)
            if name in SMALLER["smaller"]:
                yield f"{name}-smaller-{seed}", smaller, (name, seed)
                yield f"{name}-longer-{seed}", longer, (name, seed)
                yield f"{name}-finer-{seed}", finer, (name, seed)
        for name in ("B", "A"):
            for hundredths in TILTS if seed == SEEDS[0] else ():
                yield f"{name}-tilt-{hundredths}", tilt, (name, hundredths)
            if seed == SEEDS[0]:
                yield f"{name}-halving-{seed}", halving, (name, seed)
        for number in range(ANCHORS if seed == SEEDS[0] else 0):
            yield f"{PROXIED}-anchor-{number}", proxy, (PROXIED, STUDENTS + number)
        for number in range(STUDENTS * seed // len(SEEDS), STUDENTS * (seed + 1) // len(SEEDS)):
            yield f"{PROXIED}-proxy-{number}", proxy, (PROXIED, number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("pieces", nargs="*")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    for piece, make, given in pieces():
        path = HERE / f"{piece}.json"
        if asked.pieces and piece not in asked.pieces:
            continue
        if asked.list or path.exists():
            print(f"{piece}: {'done' if path.exists() else 'to do'}")
            continue
        begun = time.perf_counter()
        content = make(asked.directory, *given)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**content, "threads": torch.get_num_threads()}, indent=1) + "\n")
        print(f"{piece}: {time.perf_counter() - begun:.0f} s", flush=True)
