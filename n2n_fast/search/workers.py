"""Who evaluates an update's students: this process, or Ray workers on this machine or a cluster.

On CPUs the result depends neither on the number of workers nor on who finished first: each student has a seed of its
own, results are given in the order in which they were asked for, and every worker computes on one CPU thread.
"""

import functools
import importlib
import math
import os
import pickle
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from n2n_fast.files.errors import BadInput, DeviceFault, device_fault, first_line, raise_device_fault
from n2n_fast.networks.architecture import Architecture
from n2n_fast.search.evaluation import Evaluation, Evaluator, Recipe

TRIES = 2  # of a student whose evaluation fails by itself
LOSSES = 8  # of workers in a row, without a result in between, until the search gives up

Job = tuple[Architecture, int]  # and the seed


@dataclass(frozen=True)
class Workers:
    """count: of Ray workers. address: of a cluster; None: this machine. gpus: of each worker, may be a fraction; None:
    all GPUs shared evenly where the run is on one, else none. Without any, workers compute on the CPU.
    """

    count: int
    address: str | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        """Raise BadInput for what cannot be started."""
        if self.count < 1:
            raise BadInput(f"workers: {self.count}; give at least 1")
        if self.gpus is not None and not (0 <= self.gpus <= 1 or (self.gpus > 1 and float(self.gpus).is_integer())):
            raise BadInput(f"gpus_per_worker: {self.gpus}; give a fraction of at least 0, or a whole number")


class Executor:
    """Evaluates students in this process, one after the other."""

    _evaluator: Evaluator

    def begin(self, evaluator: Evaluator, recipe: Recipe) -> None:
        """A stage begins. recipe: makes the same evaluator in another process."""
        self._evaluator = evaluator

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[Evaluation]:
        """The evaluations of the jobs, in their order, each made when it is asked for."""
        for arch, seed in jobs:
            yield evaluated(self._evaluator, arch, seed)

    def close(self) -> None:
        """Let go of whatever was started."""


def evaluated(evaluator: Evaluator, arch: Architecture, seed: int, tries: int = TRIES) -> Evaluation:
    """An evaluation; where all tries fail by themselves, its `error` says so. Raises DeviceFault."""
    try:
        return evaluator.evaluate(arch, seed)
    except Exception as error:  # noqa: BLE001 - whatever a student fails with, the search goes on without it
        raise_device_fault(error)
        if tries > 1:
            return evaluated(evaluator, arch, seed, tries - 1)
        return Evaluation(None, None, {}, f"{type(error).__name__}: {first_line(error)}")


class _Worker:
    """What works in a Ray worker."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        torch.set_num_threads(1)
        self._evaluator = recipe(device)

    def evaluate(self, arch: Architecture, seed: int) -> Evaluation:
        return evaluated(self._evaluator, arch, seed)


def _shell() -> type:
    """The class of Ray's actors, which finds modules as this process does before it loads any of this package's.

    Ray puts the working directory first, where a checkout without the native core may lie. A class made in a function
    travels by value and names nothing of this package, so that nothing is imported until `ready` runs. What that
    raises arrives as it is; of an error in __init__ Ray says no more than that the actor died.
    """

    class Shell:
        def __init__(self, path: list[str], worker: bytes) -> None:
            sys.path[:0] = path
            self.worker: Any = worker  # pickled

        def ready(self) -> None:
            """Make the worker."""
            self.worker = pickle.loads(self.worker)()

        def evaluate(self, *job: Any) -> Any:
            return self.worker.evaluate(*job)

    return Shell


def gpu_share(gpus: int, workers: int) -> float:
    """GPUs of each worker, at most 1, so that all have a place: none lies on two, and Ray counts ten-thousandths."""
    return math.floor(10_000 / math.ceil(workers / gpus)) / 10_000


def _told_by_worker(error: Any) -> BadInput | None:
    """What a worker raised to end the run; None where it was lost, or failed in a way that another one may not."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BadInput):
        return cause
    fault = device_fault(cause) if isinstance(cause, Exception) else None
    return None if fault is None else DeviceFault(fault)


def _reason(error: Any) -> str:
    """Why a worker was lost: what it raised itself, where it did."""
    cause = getattr(error, "cause", None)
    return first_line(cause if isinstance(cause, Exception) else error)


class RayExecutor(Executor):
    """Evaluates in Ray workers. A worker that is lost is replaced, and what it had at hand is given to another."""

    def __init__(self, workers: Workers) -> None:
        """Connect, or start Ray on this machine. Raises BadInput where Ray is missing or cannot be reached."""
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise BadInput("workers need Ray; pip install 'n2n_fast[ray]'") from None
        self._workers = workers
        self._started = not self._ray.is_initialized()
        if self._started:
            self._connect()
        self._recipe: Any = None
        self._gpus = 0.0  # of each worker
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, int | None]] = {}  # what is awaited: the worker, and the job's index if any
        self._waiting: deque[int] = deque()
        self._results: dict[int, Evaluation | BadInput] = {}
        self._losses = 0  # in a row

    def _connect(self) -> None:
        options: dict[str, Any] = {"address": self._workers.address}
        if self._workers.address is None:
            options = {"address": "local", "num_cpus": self._workers.count, "include_dashboard": False}
            os.environ.setdefault("RAY_worker_niceness", "0")  # this process only waits for them
        try:
            self._ray.init(log_to_driver=False, logging_level="error", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BadInput(f"--ray-address {self._workers.address}: {first_line(error)}") from None

    def begin(self, evaluator: Evaluator, recipe: Recipe) -> None:
        """Replace all workers; the recipe, with teacher and data in it, goes to each node once. Raises BadInput."""
        self._dismiss()
        kind = evaluator.device.type
        self._gpus = self._gpus_of_each(kind)
        device = "cpu" if kind == "cuda" and not self._gpus else kind
        if device != kind and evaluator.config.times:
            raise BadInput("gpus_per_worker: 0, but latency counts, which is the GPU's; give workers a share of it")
        self._recipe = self._ray.put(self._ray.cloudpickle.dumps(functools.partial(_Worker, recipe, device)))
        for _ in range(self._workers.count):
            self._hire()

    def _gpus_of_each(self, kind: str) -> float:
        """GPUs of each worker. kind: of the run's device."""
        if self._workers.gpus is not None:
            return self._workers.gpus
        if kind != "cuda":
            return 0.0
        there = int(self._ray.cluster_resources().get("GPU", 0))
        if there == 0:
            raise BadInput("workers: the run is on a GPU but Ray has none; give --gpus-per-worker 0 to take its CPUs")
        return gpu_share(there, self._workers.count)

    def _hire(self) -> None:
        path = [entry or str(Path.cwd()) for entry in sys.path]
        worker = self._ray.remote(num_cpus=1, num_gpus=self._gpus)(_shell()).remote(path, self._recipe)
        self._busy[worker.ready.remote()] = worker, None

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[Evaluation]:
        """Evaluate side by side. Raises BadInput, which DeviceFault is, after the evaluations before it."""
        self._waiting, self._results, self._losses = deque(range(len(jobs))), {}, 0
        for index in range(len(jobs)):
            self._start(jobs)
            while index not in self._results:
                self._await_one()
                self._start(jobs)
            result = self._results.pop(index)
            if isinstance(result, BadInput):
                raise result
            yield result

    def _start(self, jobs: Sequence[Job]) -> None:
        """Give waiting jobs to idle workers."""
        while self._idle and self._waiting:
            worker, index = self._idle.pop(), self._waiting.popleft()
            self._busy[worker.evaluate.remote(*jobs[index])] = worker, index

    def _await_one(self) -> None:
        """Wait until a worker is ready, has evaluated a student, or is lost."""
        (done, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
        worker, index = self._busy.pop(done)
        try:
            result = self._ray.get(done)
        except self._ray.exceptions.RayError as error:
            result = _told_by_worker(error)
            if result is None:
                self._replace(worker, index, error)
                return
            if index is None:  # it could not be made
                raise result from None
        self._idle.append(worker)
        if index is not None:
            self._results[index], self._losses = result, 0

    def _replace(self, worker: Any, index: int | None, error: Any) -> None:
        """Hire another worker for one that is lost, and put its job first."""
        self._losses += 1
        if self._losses > LOSSES:
            raise BadInput(f"workers: {self._losses} were lost one after the other ({_reason(error)})") from None
        if index is not None:
            self._waiting.appendleft(index)
        self._ray.kill(worker)
        self._hire()

    def _dismiss(self) -> None:
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)
        self._idle, self._busy = [], {}

    def close(self) -> None:
        """Dismiss the workers, and stop Ray where it was started here."""
        self._dismiss()
        if self._started:
            self._ray.shutdown()


def make_executor(workers: Workers | None) -> Executor:
    """Who evaluates."""
    return Executor() if workers is None else RayExecutor(workers)
