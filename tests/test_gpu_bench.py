"""bench/gpu.py on a CPU: its stages stand alone, and the variants that it compares come to the same accuracies."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from n2n_fast import SearchConfig
from n2n_fast.search.environment import Recipe
from quarters import quarters, taught

BENCH = Path(__file__).resolve().parent.parent / "bench"
SEEDS = [0, 1, 2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BENCH.exists(), reason="benchmarks are not in this source distribution"),
]


def run(tmp_path, *options, **environment):
    """The exit code of bench/gpu.py and what it found, by stage."""
    command = [sys.executable, str(BENCH / "gpu.py"), "--device", "cpu", "--work", str(tmp_path / "work")]
    done = subprocess.run([*command, "--out", str(tmp_path / "out"), *options], env=os.environ | environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    return done.returncode, json.loads((tmp_path / "out" / "gpu.json").read_text())


def test_a_stage_alone(tmp_path):
    code, found = run(tmp_path, "--only", "ceilings")
    assert code == 0
    assert list(found) == ["ceilings"]
    assert found["ceilings"]["outcome"] == "passed"
    assert found["ceilings"]["copy_gb_per_s"] > 0


def test_a_stage_that_fails_is_noted_and_the_next_begins(tmp_path):
    code, found = run(tmp_path, "--only", "sanitize", "--only", "ceilings", CXX="no-such-compiler")
    assert code == 1
    assert found["sanitize"]["outcome"] == "failed"
    assert "no-such-compiler" in found["sanitize"]["error"]
    assert found["ceilings"]["outcome"] == "passed"


def test_a_stage_that_takes_too_long_is_stopped(tmp_path):
    code, found = run(tmp_path, "--only", "ceilings", "--only", "sanitize", "--seconds", "0.2")
    assert code == 1
    assert [found[name]["outcome"] for name in ("ceilings", "sanitize")] == ["out of time", "left out"]


@pytest.fixture
def students(monkeypatch):
    """The module of rollouts and their variants, upon one thread, as its workers are."""
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield __import__("gpu_students")
    torch.set_num_threads(threads)


@functools.cache
def recipe():
    """What makes an evaluator of students of a small teacher."""
    data = quarters()
    config = SearchConfig(rollout_steps=5, batch_size=32, calibration_images=64)
    return Recipe("shrinkage", taught(data), data, data.train.batch(torch.arange(64))[0], config)


def test_variants_come_to_the_accuracy_of_a_search(students):
    evaluator = recipe()()
    wanted = [evaluator.evaluate(students.architecture(evaluator.space, seed), seed).short_accuracy for seed in SEEDS]
    assert None not in wanted
    for name, how in students.VARIANTS.items():
        if not name.startswith("no steps"):
            assert [students.rollout(evaluator, seed, **how) for seed in SEEDS] == wanted, name


def test_students_come_to_the_same_accuracy_in_any_number_of_processes(students):
    evaluator = recipe()()
    workers = students.Workers(recipe())
    for count in (1, 2):
        workers.grow(count)
        for name, how in students.VARIANTS.items():
            wanted = [students.rollout(evaluator, seed, **how) for seed in SEEDS]
            found, seconds = workers.rollouts(SEEDS, count, how)
            assert found == wanted, (name, count)
            assert seconds > 0
    found, _ = workers.rollouts(SEEDS, 1, {"no_such": True})
    assert found.startswith("TypeError")
    assert workers.rollouts(SEEDS, 2, how)[0] == wanted
    workers.close()
    assert not any(process.is_alive() for process in workers.processes)


def test_the_device_is_busy_where_spans_cover(students):
    assert students.covered([(5, 6), (0, 2), (1, 3)]) == 4
    assert students.covered([]) == 0
