"""Ray workers: the same result whoever evaluates, and whoever is lost; skipped where Ray is not installed."""

import contextlib
import importlib.util
import json
import os
import sys
import warnings
from unittest.mock import MagicMock

import pytest
import torch

from n2n_fast import SearchConfig, Workers, compress, from_tensors
from n2n_fast.files.errors import BadInput, DeviceFault
from n2n_fast.search.evaluation import Evaluation
from n2n_fast.search.reinforce import SearchProgress
from n2n_fast.search.workers import TRIES, Executor, RayExecutor, evaluated, gpu_share
from n2n_fast.training.batches import Batches
from n2n_fast.training.distill import seeded, train
from n2n_fast.training.teachers import SmallResNet

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed")
SMALL = SearchConfig(
    updates=2,
    rollouts=4,
    rollout_steps=4,
    anchors=3,
    anchor_epochs=0.5,
    stage_epochs=0.5,
    final_epochs=0.5,
    batch_size=32,
    calibration_images=64,
)


class Fails:
    """An evaluator that fails at first."""

    def __init__(self, times, error=None):
        self.left, self.error = times, error or RuntimeError("out of luck")

    def evaluate(self, arch, seed):
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return Evaluation(0.5, None, {})


def test_a_student_that_fails_once_is_tried_again():
    assert evaluated(Fails(TRIES - 1), None, 0) == Evaluation(0.5, None, {})


def test_a_student_that_fails_twice_is_logged_with_its_error():
    assert evaluated(Fails(TRIES), None, 0) == Evaluation(None, None, {}, "RuntimeError: out of luck")


def test_a_failing_device_is_no_students_fault():
    evaluator = Fails(1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(DeviceFault, match="illegal memory access"):
        evaluated(evaluator, None, 0)
    assert evaluator.left == 0


def test_here_students_are_evaluated_one_by_one_and_on_demand():
    executor, evaluator = Executor(), Fails(0)
    executor.begin(evaluator, None)
    found = executor.evaluate([(None, 0)] * 3)
    next(found)
    assert evaluator.left == -1


USELESS = [{"count": 0}, *({"count": 1, "gpus": gpus} for gpus in (-1.0, 1.5, float("nan"), float("inf")))]


@pytest.mark.parametrize("given", USELESS, ids=str)
def test_useless_workers_are_refused(given):
    with pytest.raises(BadInput, match=r"workers: 0|gpus_per_worker"):
        Workers(**given)


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_it_is_said_what_to_install():
    with pytest.raises(BadInput, match=r"pip install 'n2n_fast\[ray\]'"):
        RayExecutor(Workers(2))


@pytest.mark.parametrize(("gpus", "workers"), [(1, 1), (1, 3), (2, 3), (3, 7), (8, 3), (8, 8), (8, 9), (4, 1000)])
def test_with_an_even_share_every_worker_finds_a_gpu(gpus, workers):
    share = gpu_share(gpus, workers)
    assert 0 < share <= 1
    assert round(share * 10_000) == pytest.approx(share * 10_000)  # which is how Ray counts
    assert gpus * (10_000 // round(share * 10_000)) >= workers


class Recorder:
    """Stands for Ray with two GPUs; notes what it is asked for."""

    def __init__(self, gpus=2):
        self.gpus, self.asked, self.sent = gpus, [], []
        self.cloudpickle = self

    is_initialized = lambda self: True  # noqa: E731
    cluster_resources = lambda self: {"CPU": 4.0, "GPU": float(self.gpus)}  # noqa: E731
    dumps = lambda self, worker: worker  # noqa: E731

    def put(self, worker):
        self.sent.append(worker)

    def remote(self, **resources):
        self.asked.append(resources["num_gpus"])
        return lambda shell: MagicMock()


@pytest.mark.parametrize(
    ("device", "gpus", "share", "sent"),
    [("cuda:1", None, 0.5, "cuda"), ("cuda", 0.25, 0.25, "cuda"), ("cuda", 0.0, 0.0, "cpu"), ("cpu", None, 0.0, "cpu")],
)
def test_workers_get_a_share_of_the_gpus_where_the_run_is_on_one(device, gpus, share, sent, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", ray := Recorder())
    executor = RayExecutor(Workers(4, gpus=gpus))
    executor.begin(MagicMock(device=torch.device(device), config=SearchConfig()), None)
    assert ray.asked == [share] * 4
    assert ray.sent[0].args[1] == sent


@pytest.mark.parametrize(
    ("there", "gpus", "settings", "expected"),
    [(0, None, {}, "--gpus-per-worker 0"), (2, 0.0, {"objective": "latency"}, "latency counts")],
)
def test_workers_that_cannot_do_as_the_run_does_are_refused(there, gpus, settings, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", Recorder(there))
    with pytest.raises(BadInput, match=expected):
        RayExecutor(Workers(4, gpus=gpus)).begin(
            MagicMock(device=torch.device("cuda"), config=SearchConfig(**settings)), None
        )


@pytest.fixture(scope="module")
def data():
    """Two classes, told apart by brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    images = torch.randn(200, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    return from_tensors("bright", (images, labels))


@pytest.fixture(scope="module")
def teacher(data):
    with seeded(0, torch.device("cpu")):
        model = SmallResNet(1, data.classes, 1)
    return train(model, Batches(data.train, model, 4, 32, None, seed=0), learning_rate=0.1)


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


def history(result):
    clocks = {"seconds", "training_seconds"}
    lines = (json.loads(line) for line in (result.out / "history.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


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
        if seed in self.by_seed:
            raise self.by_seed[seed]
        return Evaluation(0.5, None, {})


@pytest.mark.slow
@needs_ray
@pytest.mark.timeout(120)
def test_a_workers_failing_device_ends_the_run_once_what_came_before_is_given(cluster):
    fault = RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
    executor, script = RayExecutor(Workers(1)), Scripted(bad=fault, luckless=RuntimeError("out of luck"))
    with contextlib.closing(executor):
        executor.begin(script, script)
        found = executor.evaluate([(None, seed) for seed in ("good", "luckless", "bad", "late")])
        assert next(found).short_accuracy == 0.5
        assert next(found).error == "RuntimeError: out of luck"
        with pytest.raises(DeviceFault, match=r"^the device failed \(CUDA error: an illegal memory access"):
            next(found)


@needs_ray
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            DeviceFault,
            "^out of memory .*batch-size",
        ),
        (BadInput("the teacher is of no use"), BadInput, "^the teacher is of no use$"),
    ],
    ids=["memory", "input"],
)
def test_a_worker_that_cannot_be_made_tells_why_at_once(error, kind, expected, cluster):
    executor, script = RayExecutor(Workers(1)), Scripted(error)
    with contextlib.closing(executor):
        executor.begin(script, script)
        with pytest.raises(kind, match=expected):
            next(executor.evaluate([(None, "good")]))


@pytest.mark.slow
@needs_ray
@pytest.mark.timeout(600)
def test_neither_the_number_of_workers_nor_a_lost_node_changes_the_result(cluster, teacher, data, tmp_path):
    one, two, lost = (
        compress(teacher, data, SMALL, tmp_path / name, progress, workers=Workers(count))
        for name, count, progress in (
            ("one", 1, None),
            ("two", 2, None),
            ("lost", 2, TakesANodeAway(cluster)),
        )
    )
    assert sum(line["kind"] == "rollout" for line in history(one)) == 16
    assert history(one) == history(two) == history(lost)
    for name, value in one.student.state_dict().items():
        assert torch.equal(value, two.student.state_dict()[name])
        assert torch.equal(value, lost.student.state_dict()[name])
    assert cluster.second not in cluster.list_all_nodes()
