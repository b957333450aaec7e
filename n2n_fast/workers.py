"""Who evaluates an update's students: this process, or Ray workers on this machine or a cluster.

The result depends neither on the number of workers nor on who finished first: each student has a seed of its own,
results are given in the order in which they were asked for, and every worker computes on one CPU thread.
"""

import functools
import importlib
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from n2n_fast.errors import BadInput, first_line
from n2n_fast.evaluation import Evaluation, Evaluator
from n2n_fast.graph import Architecture

TRIES = 2  # of a student whose evaluation fails by itself
LOSSES = 8  # of workers in a row, without a result in between, until the search gives up

Job = tuple[Architecture, int]  # and the seed


@dataclass(frozen=True)
class Workers:
    """count: of Ray workers. address: of a cluster; None: this machine. gpus: of each worker, may be a fraction."""

    count: int
    address: str | None = None
    gpus: float = 0.0

    def __post_init__(self) -> None:
        """Raise BadInput for what cannot be started."""
        if self.count < 1:
            raise BadInput(f"workers: {self.count}; give at least 1")
        if not 0 <= self.gpus < float("inf"):
            raise BadInput(f"gpus_per_worker: {self.gpus}; give at least 0")


class Engine(Protocol):
    """Evaluates students."""

    one_at_a_time: bool

    def begin(self, evaluator: Evaluator, recipe: Callable[[], Evaluator]) -> None:
        """A stage begins; recipe: makes the same evaluator in another process."""

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[Evaluation]:
        """The evaluations of the jobs, in their order."""

    def close(self) -> None:
        """Let go of whatever was started."""


class Here:
    """Evaluates in this process, one student after the other."""

    one_at_a_time = True
    _evaluator: Evaluator

    def begin(self, evaluator: Evaluator, recipe: Callable[[], Evaluator]) -> None:
        """Take the evaluator that is there."""
        self._evaluator = evaluator

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[Evaluation]:
        """Evaluate on demand."""
        for arch, seed in jobs:
            yield evaluated(self._evaluator, arch, seed)

    def close(self) -> None:
        """Nothing was started."""


def evaluated(evaluator: Evaluator, arch: Architecture, seed: int, tries: int = TRIES) -> Evaluation:
    """An evaluation; where all tries fail by themselves, its `error` says so."""
    try:
        return evaluator.evaluate(arch, seed)
    except Exception as error:  # noqa: BLE001 - whatever a student fails with, the search goes on without it
        if tries > 1:
            return evaluated(evaluator, arch, seed, tries - 1)
        return Evaluation(None, None, {}, f"{type(error).__name__}: {first_line(error)}")


class _Worker:
    """What works in a Ray worker."""

    def __init__(self, recipe: Callable[[], Evaluator]) -> None:
        torch.set_num_threads(1)
        self._evaluator = recipe()

    def evaluate(self, arch: Architecture, seed: int) -> Evaluation:
        return evaluated(self._evaluator, arch, seed)


def _shell() -> type:
    """The class of Ray's actors, which finds modules as this process does before it loads any of this package's.

    Ray puts the working directory first, where a checkout without the native core may lie. A class made in a function
    travels by value and names nothing of this package, so that nothing is imported until its __init__ runs.
    """

    class Shell:
        def __init__(self, path: list[str], worker: bytes) -> None:
            sys.path[:0] = path
            self.worker = pickle.loads(worker)()

        def ready(self) -> None:
            """Return once the worker is made."""

        def evaluate(self, *job: Any) -> Any:
            return self.worker.evaluate(*job)

    return Shell


class RayEngine:
    """Evaluates in Ray workers. A worker that is lost is replaced, and what it had at hand is given to another."""

    one_at_a_time = False

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
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, int | None]] = {}  # what is awaited: the worker, and the job if it has one

    def _connect(self) -> None:
        options: dict[str, Any] = {"address": self._workers.address}
        if self._workers.address is None:
            options = {"address": "local", "num_cpus": self._workers.count, "include_dashboard": False}
            os.environ.setdefault("RAY_worker_niceness", "0")  # this process only waits for them
        try:
            self._ray.init(log_to_driver=False, logging_level="error", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BadInput(f"--ray-address {self._workers.address}: {first_line(error)}") from None

    def begin(self, evaluator: Evaluator, recipe: Callable[[], Evaluator]) -> None:
        """Replace all workers; the recipe, with teacher and data in it, goes to each node once."""
        self._dismiss()
        self._recipe = self._ray.put(self._ray.cloudpickle.dumps(functools.partial(_Worker, recipe)))
        for _ in range(self._workers.count):
            self._hire()

    def _hire(self) -> None:
        path = [entry or str(Path.cwd()) for entry in sys.path]
        worker = self._ray.remote(num_cpus=1, num_gpus=self._workers.gpus)(_shell()).remote(path, self._recipe)
        self._busy[worker.ready.remote()] = worker, None

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[Evaluation]:
        """Evaluate side by side."""
        waiting, found, given, losses = deque(range(len(jobs))), dict[int, Evaluation](), 0, 0
        while given < len(jobs):
            while self._idle and waiting:
                worker, job = self._idle.pop(), waiting.popleft()
                self._busy[worker.evaluate.remote(*jobs[job])] = worker, job
            (done, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
            worker, finished = self._busy.pop(done)
            try:
                result = self._ray.get(done)
            except self._ray.exceptions.RayError as error:
                losses += 1
                if losses > LOSSES:
                    raise BadInput(f"workers: {losses} were lost one after the other ({first_line(error)})") from None
                if finished is not None:
                    waiting.appendleft(finished)
                self._hire()
                continue
            self._idle.append(worker)
            if finished is not None:
                found[finished], losses = result, 0
            while given in found:
                yield found.pop(given)
                given += 1

    def _dismiss(self) -> None:
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)
        self._idle, self._busy = [], {}

    def close(self) -> None:
        """Dismiss the workers, and stop Ray where it was started here."""
        self._dismiss()
        if self._started:
            self._ray.shutdown()


def engine(workers: Workers | None) -> Engine:
    """Who evaluates."""
    return Here() if workers is None else RayEngine(workers)
