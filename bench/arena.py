"""Does a search learn, and does what it finds beat what needs no search? python bench/arena.py DIR OUT [--device cuda].

DIR holds Fashion-MNIST, OUT gets a JSON file for each piece; pieces that are there are left out, so that the arena can
be cut off and goes on, here or elsewhere. `--table` prints what is there. Every student is within a share of its
teacher's params *and* MACs, a tenth or a fortieth, so that architectures differ by their worth and not by their cost.

Searches, of EVALUATIONS students each, by the seed, which also draws their calibration and validation images:
learned      the search as it is
never        policies that begin at the best anchor, as ever, but never learn
random       policies that are not trained at all
reinforce    plain REINFORCE, one step for each five students, from where "learned" begins
predictor    the best proposals of the search on the predictor, without policies
removal      the first stage of both, alone: does its policy learn?

The best student of a search is the one of highest expected reward after its last evaluation. It is judged, fitted and
not trained, on calibration and validation images that the search did not see. Then students are trained alike:
found        the best of "learned"
tilted       no search: layers narrowed by the square root of what that saves, at the limit
longer       the same, trained for as much longer as the search took
uniform      Torch-Pruning, all layers by one ratio, to the same limits
"""

import argparse
import copy
import fnmatch
import functools
import json
import math
import multiprocessing
import signal
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

import n2n_fast
from n2n_fast import SearchConfig, SearchProgress
from n2n_fast.cli.report import rank_correlation
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.products import as_products
from n2n_fast.search import reinforce
from n2n_fast.search.checkpoint import RunDirectory
from n2n_fast.search.environment import Executor
from n2n_fast.search.imagination import Imagination, proposed
from n2n_fast.search.stage import Search, Stage
from n2n_fast.search.teacher import Reference, space_of
from n2n_fast.training import teacher_files, teachers
from n2n_fast.training.batches import Batches, TeacherLogits
from n2n_fast.training.data import accuracy, logits_of_batches
from n2n_fast.training.distill import recalibrate, seeded, train
from n2n_fast.training.seeds import derived

SEEDS = (0, 1, 2)
SHARES = {"10": 10, "40": 40}  # times fewer params and MACs
TEACHERS = {"resnet32": 14.0, "mobilenet_v2": 10.0, "resnet56": 7.0}  # epochs
SEARCHES = ("learned", "never", "random", "reinforce", "predictor", "removal")
TRAINED = ("found", "tilted", "uniform", "longer")
TRAINED_TEACHERS = ("resnet32",)
UPDATES, ROLLOUTS = 15, 10  # EVALUATIONS: their product, and the anchors
EPOCHS = 3.0  # two cores train nine such students in half an hour
POLICY_DRAWN = reinforce.drawn
TILT = 0.5
ANCHOR_EPOCHS = 0.25
COMMON = {"updates": UPDATES, "rollouts": ROLLOUTS, "anchors": 5, "anchor_every": 0, "epoch_steps": 0}
UNLEARNED = {"removal_learning_rate": 0.0, "shrinkage_learning_rate": 0.0}
SETTINGS = {
    "never": UNLEARNED,
    "random": {**UNLEARNED, "keep_probability": 0.8},
    "predictor": UNLEARNED,
    "reinforce": {"imagined_steps": 0, "shrinkage_learning_rate": 0.003, "updates": 2 * UPDATES, "rollouts": 5},
    "removal": {"stages": "both"},
}


@dataclass(frozen=True)
class Given:
    """What pieces are told. scale: of all epochs; threads: of each worker."""

    directory: Path
    out: Path
    device: str
    workers: int
    threads: int
    seconds: float
    teachers: tuple
    pieces: str
    scale: float
    table: bool


@functools.cache
def images(directory, device):
    return n2n_fast.load(f"fashion-mnist:{directory}", image_size=28, channels=1, device=device)


@functools.cache
def teacher(given, name):
    return teacher_files.load_teacher(given.out / f"{name}.pt", name).to(given.device).eval()


@functools.cache
def teacher_logits(given, name):
    return TeacherLogits(teacher(given, name), images(given.directory, given.device).train)


def calibration(data, seed):
    index = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:512]
    return data.train.batch(index.to(data.train.labels.device))[0]


def read(given, piece):
    return json.loads((given.out / f"{piece}.json").read_text())


# Pieces


def teach(given, name):
    data, start = images(given.directory, given.device), time.perf_counter()
    model = teachers.create(name, data.classes, 1, 28, seed=0).to(given.device)
    batches = Batches(data.train, None, TEACHERS[name] * given.scale, 128, data.augmentation, 0, views=4)
    with seeded(0, torch.device(given.device)):
        train(model, batches, learning_rate=0.1 if name in teachers.SMALL_RESNETS else 0.05, capture=True)
    seconds = time.perf_counter() - start
    torch.save({key: value.cpu() for key, value in model.state_dict().items()}, given.out / f"{name}.pt")
    return {"seconds": seconds, **measured(model, data)}


def search(given, name, share, control, seed):
    data, start = images(given.directory, given.device), time.perf_counter()
    model = teacher(given, name)
    whole = n2n_fast.ArchitectureSpace(model, calibration(data, seed)[:2]).teacher
    limits = {"max_params": whole.params // SHARES[share], "max_macs": whole.macs // SHARES[share]}
    own = {"stages": "shrinkage", "seed": seed, "anchor_epochs": ANCHOR_EPOCHS * given.scale}
    config = SearchConfig(**{**own, **COMMON, **limits, **SETTINGS.get(control, {})})
    with TemporaryDirectory() as out, RunDirectory(Path(out) / "run", {}, False, lambda: False) as run:
        reference = replace(Reference.of(model, data, config), logits=teacher_logits(given, name))
        run.begin()
        shared = config, data, reference, reference.limits(config), run, SearchProgress(), Executor()
        name_of = "removal" if control == "removal" else "shrinkage"
        stage = Stage(name_of, reference.space, Search(*shared, {}, None, None))
        stage.begin()
        with mock.patch.object(reinforce, "drawn", best_proposals if control == "predictor" else POLICY_DRAWN):
            reinforce._reinforce(stage)
        found = [json.loads(line) for line in (run.path / "history.jsonl").read_text().splitlines()]
    seconds = time.perf_counter() - start
    archs = [arch for arch, _ in stage.evaluated.values()]
    rewards = Imagination(stage).rewards(archs)
    best = archs[max(range(len(archs)), key=rewards.__getitem__)]
    rollouts = [line for line in found if line["kind"] == "rollout"]
    columns = ("reward", "expected_accuracy", "short_accuracy", "cached")
    return {
        "seconds": seconds,
        "evaluations": len(archs),
        "teacher": [whole.params, whole.macs],
        **{column: [line[column] for line in rollouts] for column in columns},
        "architecture": json.loads(best.to_json()),
        "judged": judged(given, name, best, seed),
    }


def best_proposals(stage):
    """Instead of what the policy draws, the best proposals that were not evaluated yet."""
    actions = POLICY_DRAWN(stage)
    if imagination := Imagination.of(stage):
        wanted = proposed(stage, imagination)
        new = [i for i, arch in enumerate(stage.architectures(wanted)) if arch.key not in stage.evaluated]
        actions = torch.cat([wanted[new], actions])
    return actions[:ROLLOUTS]


def judged(given, name, arch, seed):
    """Accuracy and cross entropy, not trained, on images that the search of this seed did not see."""
    data = images(given.directory, given.device)
    config = SearchConfig()
    generator = torch.Generator().manual_seed(derived(seed, "validation"))  # as Evaluator draws those that it sees
    unseen = torch.randperm(len(data.validation), generator=generator)[config.validation_images :]
    space = space_of(teacher(given, name), calibration(data, 1000 + seed), config)
    split = data.validation.subset(unseen.sort().values.to(given.device))
    student = space.build(space.member(arch))
    with as_products(student, torch.device(given.device)):
        return figures(student, split)


def trained(given, name, share, which, seed):
    """A student trained by distillation: its test accuracy and cross entropy."""
    data, model = images(given.directory, given.device), teacher(given, name)
    searched, epochs = read(given, f"{name}-{share}-learned-{seed}"), EPOCHS * given.scale
    most = [amount // SHARES[share] for amount in searched["teacher"]]
    if which == "longer":
        short = read(given, f"{name}-{share}-tilted-{seed}")["seconds"]
        epochs *= (short + searched["seconds"]) / short
    if which == "uniform":
        student = uniform(model, data, most)
    else:
        space = space_of(model, calibration(data, seed), SearchConfig())
        arch = space.shrink_within(space.teacher, space.tilted(TILT), params=most[0], macs=most[1], grow=True)
        if which == "found":
            arch = space.member(Architecture.from_json(json.dumps(searched["architecture"])))
        student = space.build(arch)
    params, before = sum(p.numel() for p in student.parameters()), accuracy(student, data.validation)
    start = time.perf_counter()
    batches = Batches(data.train, teacher_logits(given, name), epochs, 128, data.augmentation, seed, views=2)
    with seeded(seed, torch.device(given.device)):
        train(student, batches, learning_rate=0.05, kd_weight=SearchConfig().kd_weight, capture=True)
    seconds = time.perf_counter() - start
    return {"params": params, "macs": macs(student, data), "epochs": epochs, "before": before, "seconds": seconds,
            **measured(student, data)}  # fmt: skip


def uniform(model, data, most):
    """The mildest uniform pruning that meets both limits."""
    import torch_pruning

    example, mild, severe, best = data.train.batch(torch.arange(2, device=data.train.labels.device))[0], 0.0, 0.99, None
    for _ in range(12):
        ratio, student = (mild + severe) / 2, copy.deepcopy(model)
        ignored = [m for m in student.modules() if isinstance(m, nn.Linear)]
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=1)
        torch_pruning.pruner.MagnitudePruner(
            student, example, importance=importance, pruning_ratio=ratio, ignored_layers=ignored
        ).step()
        if sum(p.numel() for p in student.parameters()) <= most[0] and macs(student, data) <= most[1]:
            severe, best = ratio, student
        else:
            mild = ratio
    return recalibrate(best, calibration(data, 0).split(128))


def macs(model, data):
    index = torch.arange(2, device=data.train.labels.device)
    return n2n_fast.ArchitectureSpace(model, data.train.batch(index)[0]).teacher.macs


def measured(model, data):
    return {**{f"validation_{k}": v for k, v in figures(model, data.validation).items()},
            **{f"test_{k}": v for k, v in figures(model, data.test).items()}}  # fmt: skip


@torch.no_grad()
def figures(model, split):
    pairs = list(logits_of_batches(model, split, 512))
    logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    return {"accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "cross_entropy": functional.cross_entropy(logits.float(), labels).item()}  # fmt: skip


# Running them


def pieces(names):
    """Every piece with what it needs, by name; what matters most first."""
    for name in names:
        yield name, (teach, name), ()
    for name in names:
        for control in SEARCHES:
            for share in SHARES:
                for seed in SEEDS:
                    yield f"{name}-{share}-{control}-{seed}", (search, name, share, control, seed), (name,)
        for which in TRAINED if name in TRAINED_TEACHERS else ():
            for share in SHARES:
                for seed in SEEDS:
                    needed = [f"{name}-{share}-learned-{seed}"]
                    needed += [f"{name}-{share}-tilted-{seed}"] if which == "longer" else []
                    yield f"{name}-{share}-{which}-{seed}", (trained, name, share, which, seed), needed


def perform(given, piece, work):
    torch.set_num_threads(given.threads)
    function, *arguments = work
    found = function(given, *arguments)
    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    path = given.out / f"{piece}.json"
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps({**found, "device": device}) + "\n")
    aside.replace(path)
    return found["seconds"]


def run(given):
    """Perform what is not there yet, several side by side, until the time is over."""
    end, begun = time.perf_counter() + given.seconds, {}
    wanted = (piece for piece in pieces(given.teachers) if fnmatch.fnmatch(piece[0], given.pieces))
    waiting = {piece: rest for piece, *rest in wanted if not (given.out / f"{piece}.json").exists()}
    with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as pool:
        while (waiting or begun) and time.perf_counter() < end:
            for piece, (work, needed) in list(waiting.items()):
                if len(begun) < given.workers and all((given.out / f"{n}.json").exists() for n in needed):
                    begun[pool.submit(perform, given, piece, work)] = piece
                    del waiting[piece]
            if not begun:
                break
            for done in wait(begun, max(0.1, end - time.perf_counter()), FIRST_COMPLETED).done:
                piece, error = begun.pop(done), done.exception()
                print(f"{piece}: {error or f'{done.result():.0f} s'}"[:500], flush=True)
        for process in list(pool._processes.values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)


def mean_and_deviation(values):
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


def table(given):
    """What is there: rewards that rise, students judged, students trained."""
    there = {path.stem: json.loads(path.read_text()) for path in sorted(given.out.glob("*-*.json"))}
    for name in TEACHERS:
        for share in SHARES:
            for control in SEARCHES:
                found = [there[key] for seed in SEEDS if (key := f"{name}-{share}-{control}-{seed}") in there]
                if found:
                    print(f"{name:<13}1/{share} {control:<10}", *searched_row(found), sep="  ")
            for which in TRAINED:
                found = [there[key] for seed in SEEDS if (key := f"{name}-{share}-{which}-{seed}") in there]
                if found:
                    row = [f"{figure} {mean_and_deviation([one[figure] for one in found])}"
                           for figure in ("test_accuracy", "test_cross_entropy")]  # fmt: skip
                    of = [round(statistics.mean(one[k] for one in found)) for k in ("params", "macs", "epochs")]
                    print(f"{name:<13}1/{share} {which:<10}", *row, of, sep="  ")


def searched_row(found):
    first, last, ranks = [], [], []
    for one in found:
        quarter = len(one["reward"]) // 4
        first += one["reward"][:quarter]
        last += one["reward"][-quarter:]
        pairs = [pair for pair in zip(one["expected_accuracy"], one["short_accuracy"], strict=True) if None not in pair]
        ranks.append(rank_correlation(pairs[len(pairs) // 2 :]) or math.nan)
    error = (statistics.variance(first) / len(first) + statistics.variance(last) / len(last)) ** 0.5
    rise = (statistics.mean(last) - statistics.mean(first)) / max(error, 1e-12)
    judged = [one["judged"] for one in found]
    return (f"reward {statistics.mean(first):.4f} -> {statistics.mean(last):.4f} ({rise:+.1f} errors)",
            f"judged {mean_and_deviation([one['accuracy'] for one in judged])}",
            f"ce {mean_and_deviation([one['cross_entropy'] for one in judged])}",
            f"rank {statistics.mean(ranks):.2f}", f"{statistics.mean(one['seconds'] for one in found):.0f} s",
            f"{statistics.mean(one['evaluations'] for one in found):.0f} students")  # fmt: skip


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of Fashion-MNIST's four files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which nothing goes on")
    parser.add_argument("--teachers", nargs="*", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--pieces", default="*", metavar="PATTERN", help="such as 'resnet32-10-*'")
    parser.add_argument("--scale", type=float, default=1.0, help="of all epochs, to try the arena itself")
    parser.add_argument("--table", action="store_true")
    asked = vars(parser.parse_args())
    return Given(**asked | {"teachers": tuple(asked["teachers"])})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: exit(143))
    asked = options()
    asked.out.mkdir(parents=True, exist_ok=True)
    if not asked.table:
        run(asked)
    table(asked)
