"""Ray workers: the same result whoever evaluates, and whoever is lost; skipped where Ray is not installed."""

import importlib.util
import json
import os
import warnings

import pytest
import torch

from n2n_fast import SearchConfig, Workers, compress, from_tensors
from n2n_fast.batches import Batches
from n2n_fast.distill import fit, seeded
from n2n_fast.errors import BadInput
from n2n_fast.evaluation import Evaluation
from n2n_fast.search import SearchProgress
from n2n_fast.teacher import SmallResNet
from n2n_fast.workers import TRIES, Here, RayEngine, evaluated

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

    def __init__(self, times):
        self.left = times

    def evaluate(self, arch, seed):
        self.left -= 1
        if self.left >= 0:
            raise RuntimeError("out of luck")
        return Evaluation(0.5, None, {})


def test_a_student_that_fails_once_is_tried_again():
    assert evaluated(Fails(TRIES - 1), None, 0) == Evaluation(0.5, None, {})


def test_a_student_that_fails_twice_is_logged_with_its_error():
    assert evaluated(Fails(TRIES), None, 0) == Evaluation(None, None, {}, "RuntimeError: out of luck")


def test_here_students_are_evaluated_one_by_one_and_on_demand():
    engine, evaluator = Here(), Fails(0)
    engine.begin(evaluator, None)
    found = engine.evaluate([(None, 0)] * 3)
    next(found)
    assert evaluator.left == -1


@pytest.mark.parametrize("given", [{"count": 0}, {"count": 1, "gpus": -1.0}, {"count": 1, "gpus": float("nan")}])
def test_useless_workers_are_refused(given):
    with pytest.raises(BadInput, match=r"workers: 0|gpus_per_worker"):
        Workers(**given)


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_it_is_said_what_to_install():
    with pytest.raises(BadInput, match=r"pip install 'n2n_fast\[ray\]'"):
        RayEngine(Workers(2))


@pytest.fixture(scope="module")
def data():
    """Two classes, told apart by brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    images = torch.randn(200, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    return from_tensors("bright", (images, labels), seed=0)


@pytest.fixture(scope="module")
def teacher(data):
    with seeded(0, torch.device("cpu")):
        model = SmallResNet(1, data.classes, 1)
    return fit(model, Batches(data.train, model, 4, 32, None, seed=0), learning_rate=0.1)


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
