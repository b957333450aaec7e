"""Ray workers, on this machine or a cluster, that evaluate an update's students.

On CPUs the result depends neither on the number of workers nor on who finished first: each student has a seed of its
own, results come in the order in which they were asked for, and every worker computes on one CPU thread.
"""

import functools
import importlib
import math
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from n2n_fast.files.errors import BadInput, first_line, telling_device_faults
from n2n_fast.networks.architecture import Architecture
from n2n_fast.search.environment import Evaluation, Evaluator, Executor, Job, Recipe, evaluated

MOST = 1000  # workers
LOSSES = 8  # of workers in a row, without a result in between, until the search gives up


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
        if not 1 <= self.count <= MOST:
            raise BadInput(f"workers: {self.count}; give 1 to {MOST:,}")
        if self.address == "":
            raise BadInput("ray_address: empty; give the address of a cluster, or leave it out")
        if self.gpus is not None and not (0 <= self.gpus <= 1 or (self.gpus > 1 and float(self.gpus).is_integer())):
            raise BadInput(f"gpus_per_worker: {self.gpus}; give a fraction of at least 0, or a whole number")


def _worker(recipe: Recipe, device: str) -> Callable[[Architecture, int], Evaluation]:
    """What evaluates in a Ray worker."""
    torch.set_num_threads(1)
    with telling_device_faults():
        return functools.partial(evaluated, recipe(device))


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
            return self.worker(*job)

    return Shell


def ray_module() -> Any:
    """Ray; BadInput where it is missing."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise BadInput("workers need Ray; pip install 'n2n_fast[ray]'") from None


def gpu_share(gpus: int, workers: int) -> float:
    """GPUs of each worker, at most 1, so that all have a place: none lies on two, and Ray counts ten-thousandths."""
    return math.floor(10_000 / math.ceil(workers / gpus)) / 10_000


class RayExecutor(Executor):
    """Evaluates in Ray workers. A worker that is lost is replaced, and another one does its work.

    Ray's own restarts would not do: a restarted actor keeps its calls, and waits with them for a node with room, which
    there may never be again, while other workers are idle.
    """

    def __init__(self, workers: Workers) -> None:
        """Connect, or start Ray on this machine. Raises BadInput where Ray is missing or cannot be reached."""
        self._ray = ray_module()
        self._workers = workers
        self._started = not self._ray.is_initialized()
        if self._started:
            self._connect()
        self._hire: Any = None  # starts an actor
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, int | None]] = {}  # what is awaited: the worker, and the job's index if any
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
        super().begin(evaluator, recipe)
        self._dismiss()
        kind = evaluator.device.type
        gpus = self._gpus_of_each(kind)
        device = "cpu" if kind == "cuda" and not gpus else kind
        if device != kind and evaluator.config.times:
            raise BadInput("gpus_per_worker: 0, but latency counts, which is the GPU's; give workers a share of it")
        worker = self._ray.put(self._ray.cloudpickle.dumps(functools.partial(_worker, recipe, device)))
        path = [entry or str(Path.cwd()) for entry in sys.path]
        actor = self._ray.remote(num_cpus=1, num_gpus=gpus)(_shell())
        self._hire = functools.partial(actor.remote, path, worker)
        for _ in range(self._workers.count):
            self._add_worker()

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

    def _add_worker(self) -> None:
        worker = self._hire()
        self._busy[worker.ready.remote()] = worker, None

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[Evaluation]:
        """Evaluate side by side. Raises BadInput, which DeviceFault is, after the evaluations before it."""
        waiting, results = deque(range(len(jobs))), dict[int, Evaluation | BadInput]()
        self._losses = 0
        for index in range(len(jobs)):
            while True:
                while self._idle and waiting:
                    worker, number = self._idle.pop(), waiting.popleft()
                    self._busy[worker.evaluate.remote(*jobs[number])] = worker, number
                if index in results:
                    break
                self._await_one(waiting, results)
            result = results.pop(index)
            if isinstance(result, BadInput):
                raise result
            yield result

    def _await_one(self, waiting: deque[int], results: dict[int, Evaluation | BadInput]) -> None:
        """Wait until a worker is ready, has evaluated a student, or is lost."""
        (done, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
        worker, index = self._busy.pop(done)
        try:
            result = self._ray.get(done)
        except self._ray.exceptions.RayError as error:
            result = getattr(error, "cause", None)  # what the worker raised itself
            if not isinstance(result, BadInput):  # it was lost, or failed in a way that another one may not
                self._replace(worker, first_line(result if isinstance(result, Exception) else error))
                if index is not None:
                    waiting.appendleft(index)
                return
            if index is None:  # it could not be made
                raise result from None
        self._idle.append(worker)
        if index is not None:
            results[index], self._losses = result, 0

    def _replace(self, worker: Any, reason: str) -> None:
        self._losses += 1
        if self._losses > LOSSES:
            raise BadInput(f"workers: {self._losses} were lost one after the other ({reason})") from None
        self._ray.kill(worker)
        self._add_worker()

    def _dismiss(self) -> None:
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)
        self._idle, self._busy = [], {}

    def close(self) -> None:
        """Dismiss the workers, and stop Ray where it was started here."""
        self._dismiss()
        if self._started:
            self._ray.shutdown()
