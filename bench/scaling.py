"""What more workers bring: python bench/scaling.py [HISTORY].

Measured here: rollouts per second of 1 and of 2 Ray workers, one thread each; what the head node spends on a rollout,
and the bytes that a stage and a rollout move. Simulated with the rollout times of a real search (HISTORY, a
run's history.jsonl; default: the study's): how long 8, 64 and 512 workers idle for stragglers at several numbers of
rollouts per update. Writes bench/results/scaling.json.
"""

import csv
import heapq
import json
import random
import statistics
import sys
import time
from pathlib import Path

import ray.cloudpickle
import torch

import n2n_fast
from n2n_fast import SearchConfig
from n2n_fast.search.environment import Recipe
from n2n_fast.search.workers import RayExecutor, Workers
from n2n_fast.training import teachers

HERE = Path(__file__).parent
OUT = HERE / "results" / "scaling.json"
HISTORY = HERE / "fashion_mnist" / "results" / "B-free-0.csv"
ROLLOUTS = 40
WORKERS = (8, 64, 512)
PER_UPDATE = (5, 16, 64, 256, 1024)


def measured():
    """Rollouts per second by number of workers, CPU seconds of this process for each, bytes moved."""
    torch.set_num_threads(1)
    data = n2n_fast.load("digits", validation=0.2)
    model = teachers.create("resnet20", data.classes, 1, seed=0)
    teachers.train_teacher(model, data, epochs=4.0, seed=0)
    calibration = data.train.batch(torch.arange(256))[0]
    recipe = Recipe("shrinkage", model, data, calibration, SearchConfig(rollout_steps=20, batch_size=64, anchors=0))
    evaluator = recipe()
    draw = random.Random(0)
    space, count = evaluator.space, len(evaluator.space.layers)
    archs = [space.shrink(space.teacher, [draw.uniform(0.1, 0.9) for _ in range(count)]) for _ in range(ROLLOUTS)]
    rates, results, spent = {}, [], 0.0
    for workers in (1, 2):
        executor = RayExecutor(Workers(workers))
        executor.begin(evaluator, recipe)
        list(executor.evaluate([(arch, 0) for arch in archs[: 2 * workers]]))  # all are there, and warm
        before, cpu = time.perf_counter(), time.process_time()
        results.append([found.short_accuracy for found in executor.evaluate([(arch, 0) for arch in archs])])
        rates[workers] = ROLLOUTS / (time.perf_counter() - before)
        spent = (time.process_time() - cpu) / ROLLOUTS
        executor.close()
    assert results[0] == results[1]
    return {
        "rollouts_per_second": rates,
        "efficiency": rates[2] / (2 * rates[1]),
        "head_cpu_ms_per_rollout": 1e3 * spent,
        "bytes_of_a_stage_per_node": len(ray.cloudpickle.dumps(recipe)),
        "bytes_of_a_rollout": len(ray.cloudpickle.dumps((archs[0], 0))) + 500,
    }


def idle_share(seconds, workers, per_update, draw):
    """Share of the workers' time spent waiting for the last rollout of an update; who is free takes the next."""
    updates = max(20, 2000 // per_update)
    busy = total = 0.0
    for _ in range(updates):
        times = draw.choices(seconds, k=per_update)
        free = [0.0] * workers
        for one in times:
            heapq.heappush(free, heapq.heappop(free) + one)
        busy += sum(times)
        total += workers * max(free)
    return 1 - busy / total


def rollout_seconds(path):
    """Of every student that was evaluated, from a run's history.jsonl or from the .csv that the study keeps of it."""
    with path.open() as file:
        if path.suffix == ".csv":
            rows = [row["seconds"] for row in csv.DictReader(file) if row["kind"] == "rollout"]
            return [float(seconds) for seconds in rows if seconds]
        lines = [json.loads(line) for line in file]
    return [sum(line["seconds"].values()) for line in lines if line["kind"] == "rollout" and line["seconds"]]


def simulated(path):
    seconds = rollout_seconds(path)
    draw = random.Random(0)
    table = {w: {n: idle_share(seconds, w, n, draw) for n in PER_UPDATE} for w in WORKERS}
    return {"rollouts": len(seconds), "median_s": statistics.median(seconds), "longest_s": max(seconds), "idle": table}


if __name__ == "__main__":
    found = measured()
    print(found)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HISTORY
    found["simulation"] = simulated(path)
    print(found["simulation"])
    OUT.write_text(json.dumps(found, indent=1) + "\n")
