"""Kills a small search again and again, and compares what it ends with: python tests/crash.py KILLS [SEED].

One process makes a teacher and runs the search whole; then it forks a search that it kills with SIGKILL at a random
moment, or at a random write of its run directory, and another one that resumes it, which may be killed as well, until
one ends. Prints a line of JSON: kills, how many histories, policies and students differed from the whole search's.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from n2n_fast import SearchConfig, compress, from_tensors
from n2n_fast.training.batches import Batches
from n2n_fast.training.distill import seeded, train
from n2n_fast.training.teachers import SmallResNet

SMALL = SearchConfig(
    updates=3,
    rollouts=3,
    rollout_steps=2,
    anchors=3,
    anchor_epochs=0.5,
    anchor_every=2,
    stage_epochs=0.5,
    final_epochs=1.0,
    batch_size=32,
    calibration_images=32,
)
CLOCKS = {"seconds", "training_seconds"}
WRITES = ("fsync", "replace")


def small_problem():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    images = torch.randn(200, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    data = from_tensors("bright", (images, labels))
    with seeded(0, torch.device("cpu")):
        teacher = SmallResNet(1, data.classes, 1)
    return train(teacher, Batches(data.train, teacher, 4, 32, None, seed=0), learning_rate=0.1), data


def outcome(out):
    """History without clocks, policies and student: what must not depend on how often the search was killed."""
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return (
        [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines],
        torch.load(out / "policies.pt", weights_only=True),
        torch.load(out / "student.pt", weights_only=True),
    )


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def dies_at(count):
    """Let this process be killed in its count-th fsync or rename, before or after it is done."""
    left = [count]

    def around(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and count % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync, Path.replace = around(os.fsync), around(Path.replace)


def search(teacher, data, out, deadly_write=None):
    """Fork a search that begins in `out` or goes on there; its process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if deadly_write is not None:
            dies_at(deadly_write)
        compress(teacher, data, SMALL, out, resume=(out / "config.json").exists())
        status = 0
    finally:
        os._exit(status)


def killed_search(teacher, data, out, rng, whole_seconds):
    """Search in `out` until it ends; how often it was killed, and how its last process ended."""
    kills = 0
    while True:
        at_write = kills < 2 and rng.random() < 0.5
        child = search(teacher, data, out, rng.randrange(1, 40) if at_write else None)
        if not at_write and kills < 2:
            time.sleep(rng.uniform(0, whole_seconds))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            return kills, status
        kills += 1


def main():
    wanted, rng = int(sys.argv[1]), random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    torch.set_num_threads(1)
    teacher, data = small_problem()
    kills, failed = 0, []
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        os.waitpid(search(teacher, data, Path(place) / "whole"), 0)
        seconds = time.perf_counter() - start
        whole = outcome(Path(place) / "whole")
        while kills < wanted:
            out = Path(place) / "killed"
            died, status = killed_search(teacher, data, out, rng, seconds)
            kills += died
            names = ("history", "policies", "student")
            differs = [name for name, a, b in zip(names, whole, outcome(out), strict=True) if not same(a, b)]
            if status or differs:
                failed.append({"kills": kills, "status": status, "differs": differs})
            shutil.rmtree(out)
    print(
        json.dumps({"kills": kills, "rollouts": sum(line["kind"] == "rollout" for line in whole[0]), "failed": failed})
    )


if __name__ == "__main__":
    main()
