"""Ray workers: the same result whoever evaluates, and whoever is lost; skipped where Ray is not installed."""

import contextlib
import importlib.util
import os
import sys
import warnings
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch

from n2n_fast import SearchConfig, Workers, compress
from n2n_fast.files.errors import BadInput, DeviceFault
from n2n_fast.search.environment import TRIES, Evaluation, Executor, evaluated
from n2n_fast.search.stage import SearchProgress
from n2n_fast.search.workers import RayExecutor, gpu_share
from quarters import TINY, equal, outcome, quarters, taught

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed")
FAULT = RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
GOOD = Evaluation(0.5, None, {})


class Fails:
    """An evaluator that fails at first."""

    def __init__(self, times, error=None):
        self.left, self.error = times, error or RuntimeError("out of luck")

    def evaluate(self, arch, seed):
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return GOOD


def test_a_student_that_fails_is_tried_again_and_then_told():
    assert evaluated(Fails(TRIES - 1), None, 0) == GOOD
    assert evaluated(Fails(TRIES), None, 0) == Evaluation(None, None, {}, "RuntimeError: out of luck")


def test_a_failing_device_is_no_students_fault():
    evaluator = Fails(1, FAULT)
    with pytest.raises(DeviceFault, match="illegal memory access"):
        evaluated(evaluator, None, 0)
    assert evaluator.left == 0


def test_here_students_are_evaluated_one_by_one_and_on_demand():
    executor, evaluator = Executor(), Fails(0)
    executor.begin(evaluator, None)
    evaluations = executor.evaluate([(None, 0)] * 3)
    next(evaluations)
    assert evaluator.left == -1


USELESS = [{"count": 0}, *({"count": 1, "gpus": gpus} for gpus in (-1.0, 1.5, float("nan"), float("inf")))]


@pytest.mark.parametrize("given", USELESS, ids=str)
def test_useless_workers_are_refused(given):
    with pytest.raises(BadInput, match=r"workers: 0|gpus_per_worker"):
        Workers(**given)


def test_without_ray_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r"pip install 'n2n_fast\[ray\]'"):
        RayExecutor(Workers(2))


@pytest.mark.parametrize(("gpus", "workers"), [(1, 1), (1, 3), (2, 3), (3, 7), (8, 3), (8, 8), (8, 9), (4, 1000)])
def test_with_an_even_share_every_worker_finds_a_gpu(gpus, workers):
    share = gpu_share(gpus, workers)
    assert 0 < share <= 1
    assert round(share * 10_000) == pytest.approx(share * 10_000)  # which is how Ray counts
    assert gpus * (10_000 // round(share * 10_000)) >= workers


@pytest.fixture
def begun(monkeypatch):
    """Begin a stage with four workers of a Ray that is not there, on so many GPUs; gives that Ray."""

    def begin(device, there, gpus, **settings):
        ray = MagicMock()
        ray.cluster_resources.return_value = {"CPU": 4.0, "GPU": float(there)}
        ray.cloudpickle.dumps = lambda worker: worker
        monkeypatch.setitem(sys.modules, "ray", ray)
        evaluator = MagicMock(device=torch.device(device), config=SearchConfig(**settings))
        RayExecutor(Workers(4, gpus=gpus)).begin(evaluator, None)
        return ray

    return begin


@pytest.mark.parametrize(
    ("device", "gpus", "share", "sent"),
    [("cuda:1", None, 0.5, "cuda"), ("cuda", 0.25, 0.25, "cuda"), ("cuda", 0.0, 0.0, "cpu"), ("cpu", None, 0.0, "cpu")],
)
def test_workers_get_a_share_of_the_gpus_where_the_run_is_on_one(device, gpus, share, sent, begun):
    ray = begun(device, 2, gpus)
    ray.remote.assert_called_once_with(num_cpus=1, num_gpus=share)
    assert ray.remote()().remote.call_count == 4
    assert ray.put.call_args.args[0].args[1] == sent


@pytest.mark.parametrize(
    ("there", "gpus", "settings", "expected"),
    [(0, None, {}, "--gpus-per-worker 0"), (2, 0.0, {"objective": "latency"}, "latency counts")],
)
def test_workers_that_cannot_do_as_the_run_does_are_refused(there, gpus, settings, expected, begun):
    with pytest.raises(BadInput, match=expected):
        begun("cuda", there, gpus, **settings)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray on two nodes of one worker each, both on this machine; the second may be taken away.

    Started where another package of this one's name lies, as a checkout does.
    """
    import ray
    from ray.cluster_utils import Cluster

    place = tmp_path_factory.mktemp("checkout")
    (place / "n2n_fast").mkdir()
    (place / "n2n_fast" / "__init__.py").write_text("raise ImportError('not built')")
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        started.second = started.add_node(num_cpus=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            ray.init(address=started.address, log_to_driver=False, logging_level="error")
    yield started
    ray.shutdown()
    started.shutdown()


class TakesANodeAway(SearchProgress):
    """Kills the second node once a student of the second update is there."""

    def __init__(self, cluster):
        self.cluster, self.killed = cluster, False

    def rollout(self, rollout, best, compression):
        if rollout.update == 1 and not self.killed:
            self.killed = True
            self.cluster.remove_node(self.cluster.second, allow_graceful=False)


class Scripted:
    """A recipe and the evaluator that it makes, which fail as they are told: in making it, or by seed."""

    device, config = torch.device("cpu"), SearchConfig()

    def __init__(self, making=None, **by_seed):
        self.making, self.by_seed = making, by_seed

    def __call__(self, device):
        if self.making is not None:
            raise self.making
        return self

    def evaluate(self, arch, seed):
        if seed == "dies":
            os._exit(1)
        if seed in self.by_seed:
            raise self.by_seed[seed]
        return GOOD


@contextlib.contextmanager
def evaluations(script, *seeds):
    """What one worker gives that acts by a script."""
    with contextlib.closing(RayExecutor(Workers(1))) as executor:
        executor.begin(script, script)
        yield executor.evaluate([(None, seed) for seed in seeds])


@pytest.mark.slow
@needs_ray
@pytest.mark.timeout(120)
def test_a_workers_failing_device_ends_the_run_once_what_came_before_is_given(cluster):
    script = Scripted(bad=FAULT, luckless=RuntimeError("out of luck"))
    with evaluations(script, "good", "luckless", "bad", "late") as found:
        assert next(found) == GOOD
        assert next(found).error == "RuntimeError: out of luck"
        with pytest.raises(DeviceFault, match=r"^the device failed \(CUDA error: an illegal memory access"):
            next(found)


@pytest.mark.slow
@needs_ray
@pytest.mark.timeout(300)
def test_a_student_that_kills_every_worker_ends_the_run(cluster):
    with evaluations(Scripted(), "good", "dies") as found:
        assert next(found) == GOOD
        with pytest.raises(BadInput, match=r"^workers: 9 were lost one after the other"):
            next(found)


@needs_ray
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceFault, "^out of memory .*batch-size"),
        (BadInput("the teacher is of no use"), BadInput, "^the teacher is of no use$"),
    ],
    ids=["memory", "input"],
)
def test_a_worker_that_cannot_be_made_tells_why_at_once(error, kind, expected, cluster):
    with evaluations(Scripted(error), "good") as found, pytest.raises(kind, match=expected):
        next(found)


@pytest.mark.slow
@needs_ray
@pytest.mark.timeout(600)
def test_neither_the_number_of_workers_nor_a_lost_node_changes_the_result(cluster, tmp_path):
    data, config = quarters(), replace(TINY, rollouts=4)
    teacher = taught(data)
    one, two, lost = (
        outcome(compress(teacher, data, config, tmp_path / name, progress, workers=Workers(count)).out)
        for name, count, progress in (("one", 1, None), ("two", 2, None), ("lost", 2, TakesANodeAway(cluster)))
    )
    assert sum(line["kind"] == "rollout" for line in one["history"]) == 16
    assert equal(one, two)
    assert equal(one, lost)
    assert cluster.second not in cluster.list_all_nodes()
