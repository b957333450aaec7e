"""A ResNet-18 of Fashion-MNIST and students 50 times smaller, each a rollout of a search, in the variants of gpu.py."""

import json
import multiprocessing
import pickle
import random
import statistics
import time
from collections import Counter
from unittest import mock

import numpy as np
import torch

import n2n_fast
from n2n_fast import SearchConfig
from n2n_fast.networks.products import as_products
from n2n_fast.search.evaluation import NOT_FINITE, Recipe
from n2n_fast.training import teacher_files, teachers
from n2n_fast.training.clock import now
from n2n_fast.training.data import accuracy
from n2n_fast.training.distill import Replayed, TrainingStep, seeded, train

PIXELS = 32
SMALLER = 50
PLAIN = "as it is"
VARIANTS = {  # what `rollout` and `train` are told; what a search does comes first
    PLAIN: {"capture": True, "autocast": False},
    "convolutions planned": {"capture": True, "autocast": False, "products": False},
    "not captured": {"autocast": False},
    "not captured, autocast": {},
    "no steps": {"steps": False},
    "no steps, planned": {"steps": False, "products": False},
}
SHARED = (PLAIN, "no steps")  # by several processes too


# The teacher and its data


def spec_of(run):
    """Fashion-MNIST, or where it is not given as many images of ten patterns in noise, as --data takes it."""
    if run.fashion_mnist is not None:
        return f"fashion-mnist:{run.fashion_mnist}"
    file = run.work / "patterns.npz"
    if not file.exists():
        draw = np.random.default_rng(0)
        labels = np.arange(run.size.images) % 10
        patterns = np.kron(draw.uniform(0, 128, (10, 7, 7)), np.ones((4, 4)))
        images = patterns[labels] + draw.uniform(0, 127, (len(labels), 28, 28))
        np.savez(file, x=images.astype(np.uint8), y=labels)
    return f"npz:{file}"


def images_of(run):
    return n2n_fast.load(spec_of(run), image_size=PIXELS, channels=3, device=run.device)


def in_epochs(run, steps):
    """Numbers of training steps as epochs of the images, by name."""
    images = len(images_of(run).train)
    return {name: count * run.size.batch_size / images for name, count in steps.items()}


def teacher_file(run):
    """The teacher's state dict, taught if it is not there."""
    file = run.work / "teacher.pt"
    if not file.exists():
        data = images_of(run)
        model = teachers.create("resnet18", data.classes, 3, PIXELS).to(run.device)
        epochs = in_epochs(run, {"epochs": run.size.teacher_steps})
        teachers.train_teacher(model, data, **epochs, batch_size=run.size.batch_size)
        torch.save({name: value.cpu() for name, value in model.state_dict().items()}, file)
    return file


def params_of(file):
    return sum(p.numel() for p in teacher_files.load_teacher(file).parameters())


def evaluator_of(run):
    """What evaluates students of the teacher's whole space."""
    data = images_of(run)
    model = teacher_files.load_teacher(teacher_file(run)).eval().to(run.device)
    config = SearchConfig(**run.size.search)
    index = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: config.calibration_images]
    return Recipe("shrinkage", model, data, data.train.batch(index.to(run.device))[0], config)()


def teacher_accuracy(evaluator):
    space = evaluator.space
    return accuracy(space.build(space.teacher, "sliced"), evaluator.data.validation)


# Rollouts


def architecture(space, seed):
    """Widths drawn at random, as wide as 50 times fewer params allow."""
    draw = random.Random(seed)
    ratios = [draw.uniform(0.1, 1.0) for _ in space.layers]
    return space.shrink_within(space.teacher, ratios, params=space.teacher.params // SMALLER, grow=True)


def rollout(evaluator, seed, steps=True, products=True, **how):
    """Accuracy of the student of a seed, as `Evaluator.evaluate` finds it, or in a variant; None where it diverges."""
    with mock.patch.object(n2n_fast.networks.products, "LARGEST", n2n_fast.networks.products.LARGEST * products):
        return _rollout(evaluator, seed, steps, how)


def _rollout(evaluator, seed, steps, how):
    config = evaluator.config
    try:
        with seeded(seed, evaluator.device):
            student = evaluator.space.build(architecture(evaluator.space, seed), config.init)
            if steps:
                rates = {"learning_rate": config.learning_rate, "kd_weight": config.kd_weight}
                train(student, evaluator._rollout_batches, **rates, **how)
        with as_products(student, evaluator.device):
            return accuracy(student, evaluator._images, strict=True)
    except NOT_FINITE:
        return None


def full_width_seconds(evaluator):
    """Seconds of a rollout's steps at the teacher's own widths, recorded before: what students that are the teacher
    with channels masked, all served by one recorded step, would take at least."""
    config = evaluator.config
    student = evaluator.space.build(evaluator.space.teacher, "sliced").train()
    step = TrainingStep(student, config.learning_rate, config.kd_weight, 5e-4, None)
    run = Replayed(step) if evaluator.device.type == "cuda" else step
    for _ in range(2):  # the first time it is recorded
        start = now(evaluator.device)
        for batch in evaluator._rollout_batches:
            run(*batch)
        seconds = now(evaluator.device) - start
    return seconds


def evaluated(evaluator, seed):
    """The search's own evaluation of the student of a seed, its parts timed to their end on the device."""
    return evaluator.evaluate(architecture(evaluator.space, seed), seed)


def medians(evaluations):
    """Median seconds of each part that all have."""
    parts = set.intersection(*(set(one.seconds) for one in evaluations))
    return {part: statistics.median(one.seconds[part] for one in evaluations) for part in evaluations[0].seconds
            if part in parts}  # fmt: skip


def profiled(call, trace):
    """Launches, waits and busy milliseconds of the device in a call, and the share of a call without profiler."""
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    with torch.profiler.profile() as profiler:
        call()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    calls = Counter(event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver"))
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in events
             if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]  # fmt: skip
    busy = covered(spans) / 1e6
    return {
        "launches": sum(count for name, count in calls.items() if "Launch" in name),
        "waits": sum(count for name, count in calls.items() if "Synchronize" in name),
        "calls": dict(calls.most_common(12)),
        "operators": sum(event.get("cat") == "cpu_op" for event in events),
        "busy_ms": 1e3 * busy,
        "ms": 1e3 * seconds,
        "busy_share": busy / seconds,
    }


def covered(spans):
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# Several processes


class Workers:
    """Processes that share the device, each with an evaluator of its own.

    make: makes the evaluator; travels to them. They stay from one measurement to the next, so that starting them does
    not count.
    """

    def __init__(self, make):
        self.make = pickle.dumps(make)  # whole: torch would pass its tensors as shared memory
        self.processes, self.pipes = [], []

    def grow(self, count):
        """Have so many at least."""
        context = multiprocessing.get_context("spawn")
        started = range(len(self.pipes), count)
        for _ in started:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(self.make, there), daemon=True)
            process.start()
            there.close()  # so that one that dies is noticed
            self.processes.append(process)
            self.pipes.append(here)
        for k in started:
            assert self.pipes[k].recv() == "ready"

    def rollouts(self, seeds, count, how):
        """Accuracies of the students of these seeds, by the first `count` processes, or what failed; and seconds."""
        start = time.perf_counter()
        for k in range(count):
            self.pipes[k].send((seeds[k::count], how))
        parts = [self.pipes[k].recv() for k in range(count)]
        seconds = time.perf_counter() - start
        failed = [part for part in parts if isinstance(part, str)]
        return failed[0] if failed else [parts[n % count][n // count] for n in range(len(seeds))], seconds

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def _work(make, pipe):
    """What such a process does; its first rollout makes the batches that all share."""
    torch.set_num_threads(1)
    evaluator = pickle.loads(make)()
    rollout(evaluator, -1)
    pipe.send("ready")
    for job in iter(pipe.recv, None):
        pipe.send(_answer(evaluator, *job))


def _answer(evaluator, seeds, how):
    try:
        return [rollout(evaluator, seed, **how) for seed in seeds]
    except Exception as error:  # noqa: BLE001 - a variant that fails is a finding
        return f"{type(error).__name__}: {error}"
