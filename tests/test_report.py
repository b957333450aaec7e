"""Reading a run back, its picture, page and scalars."""

import json
import re
import shutil
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest

from command_line import refusal
from n2n_fast.cli import report
from n2n_fast.cli.progress import Bar, Curves
from n2n_fast.cli.report import best_so_far, read_run
from n2n_fast.files.errors import BadInput
from n2n_fast.search.reinforce import Rollout
from n2n_fast.search.result import load_student


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def rollouts(run):
    lines = map(json.loads, (run / "history.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "rollout"]


def as_rollout(line):
    return Rollout(**{field.name: line[field.name] for field in fields(Rollout)})


def unfinished(run, history):
    """Leave only a history in a run directory, this one."""
    for path in run.iterdir():
        path.unlink()
    (run / "history.jsonl").write_bytes(history)


# What is read


def test_the_predictor_learns_between_rollouts(tiny_run):
    removal, shrinkage = read_run(tiny_run).stages
    for stage in (removal, shrinkage):
        assert [line["count"] for line in stage.of("predictor")][:3] == [3, 4, 5]
        assert stage.correction().startswith("corrected by ")
    assert removal.learned() == [0, 3]  # after the anchors, and after the one of update 1
    assert set(shrinkage.learned()) >= {0, 3}


def test_the_best_so_far_prefers_the_feasible():
    rewards = [(0.8, False), (0.3, True), (0.7, False), (0.6, True)]
    assert best_so_far({"reward": reward, "feasible": ok} for reward, ok in rewards) == [0.8, 0.3, 0.3, 0.6]


def test_layers_stand_as_they_are_in_the_student(tiny_run):
    layers = {layer["name"]: layer for layer in read_run(tiny_run).layers}
    state = load_student(tiny_run).state_dict()
    weights = {name.removesuffix(".weight"): weight for name, weight in state.items() if name.endswith(".weight")}
    assert weights
    for name, weight in weights.items():
        assert layers[name]["kept"]
        assert layers[name]["channels"][1] == len(weight) <= layers[name]["channels"][0]
        assert tuple(layers[name]["kernel"][1]) == tuple(weight.shape[2:])
    gone = [layer for name, layer in layers.items() if name not in weights and layer["kind"] in ("conv", "linear")]
    assert not any(layer["kept"] for layer in gone)


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(BadInput, match=r"no history\.jsonl"):
        read_run(tmp_path)
    for history, text in ((b'{"kind": "rollout"}\n', r"history\.jsonl: not written"), (b"", "nothing was evaluated")):
        unfinished(run, history)
        with pytest.raises(BadInput, match=text):
            read_run(run)


# What is drawn


def test_report(run):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    front = {"params": [{**point, "architecture": f"a{n}"} for n, point in enumerate(read_run(run).front["params"])]}
    assert front["params"]
    (run / "front.json").write_text(json.dumps({**front, "macs": front["params"]}))
    png, page = report.write_report(run)
    assert (png, page) == (run / "report.png", run / "report.html")
    with image.open(png) as drawn:
        assert drawn.size == (1600, 2100)
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)  # one page, no other file
    table = json.loads((run / "result.json").read_text())
    for shown in (f"{table['student']['params']:,}", f"{table['student']['test_accuracy']:.2%}", "removed", "conv1"):
        assert shown in text
    assert text.count("trained fully") > 2
    for point in front["params"]:
        row = (point["stage"], point["architecture"], f"{point['params']:,}", f"{point['macs']:,}")
        assert text.count("".join(f"<td>{cell}</td>" for cell in (*row, f"{point['accuracy']:.2%}"))) == 2


def drawn_unfinished(run):
    pytest.importorskip("matplotlib")
    png, page = report.write_report(run)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "not finished" in page.read_text()


@pytest.mark.parametrize("count", [1, 9, 14])
def test_report_of_an_unfinished_run(run, count):
    lines = (run / "history.jsonl").read_bytes().splitlines(keepends=True)
    unfinished(run, b"".join(lines[:count]) + lines[count][:20])
    drawn_unfinished(run)


def test_report_of_students_that_all_failed(run):
    none = dict.fromkeys(("architecture", "params", "macs", "short_accuracy", "predicted_accuracy", "accuracy_error"))
    failed = {**rollouts(run)[0], **none, "reward": -1.0, "feasible": False, "error": "cannot meet"}
    unfinished(run, f"{json.dumps(failed)}\n".encode() * 3)
    drawn_unfinished(run)


def test_without_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'n2n_fast[plot]'" in refusal("report", run)
    told = []
    report.draw_if_possible(run, told.append)
    assert told == []
    assert not (run / "report.png").exists()


def test_a_report_that_fails_does_not_fail_the_run(tmp_path):
    pytest.importorskip("matplotlib")
    told = []
    report.draw_if_possible(tmp_path, told.append)
    assert len(told) == 1
    assert "history.jsonl" in told[0]


# TensorBoard


class Events:
    """What torch's SummaryWriter is asked to write; stands in where the package tensorboard is not installed."""

    def __init__(self, directory):
        self.directory, self.scalars = Path(directory), {}
        self.directory.mkdir()

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, value))

    def close(self):
        (self.directory / "scalars.json").write_text(json.dumps(self.scalars))


def test_tensorboard_gets_each_rollout_as_it_comes(run, tmp_path, monkeypatch):
    writer = types.ModuleType("torch.utils.tensorboard")
    writer.SummaryWriter = Events
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    with Bar(True, Curves(tmp_path, 3)) as bar:
        assert not (tmp_path / "tensorboard").exists()  # a directory that turns out to be no run's stays clean
        for line in rollouts(run):
            bar.phase(line["stage"], 6)
            bar.rollout(as_rollout(line), None, None)
    scalars = json.loads((tmp_path / "tensorboard" / "scalars.json").read_text())
    for stage in ("removal", "shrinkage"):
        rewards = [line["reward"] for line in rollouts(run) if line["stage"] == stage]
        assert scalars[f"{stage}/reward"] == [[step, reward] for step, reward in enumerate(rewards, 1)]
        assert {"params", "macs"} <= {tag.split("/")[1] for tag in scalars if tag.startswith(stage)}


def test_tensorboard_can_be_read(tmp_path, run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves, line = Curves(tmp_path, 3), rollouts(run)[0]
    curves.add(as_rollout(line))
    curves.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("removal/reward")] == pytest.approx([line["reward"]])


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.chdir(tmp_path)
    assert "pip install tensorboard" in refusal("run", "--tensorboard", "--out", "here")
    assert not (tmp_path / "here").exists()


def test_rank_correlation_is_that_of_ranks_and_unknown_where_nothing_varies():
    assert report.rank_correlation([(0.1, 1.0), (0.2, 5.0), (0.9, 6.0)]) == pytest.approx(1)
    assert report.rank_correlation([(0.1, 3.0), (0.2, 2.0), (0.9, -6.0)]) == pytest.approx(-1)
    assert report.rank_correlation([(0.1, 1.0), (0.1, 5.0), (0.1, 6.0)]) is None
    assert report.rank_correlation([(0.1, 1.0), (0.2, 5.0)]) is None
