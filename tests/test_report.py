"""Reading a run back, its picture, page and scalars."""

import builtins
import json
import re
import shutil
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest

from n2n_fast.cli import main, report
from n2n_fast.cli.progress import Bar, Curves
from n2n_fast.cli.report import Stage, read_run
from n2n_fast.files.errors import BadInput
from n2n_fast.search.reinforce import Rollout
from n2n_fast.search.result import load_student


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def without(monkeypatch):
    """Make a package look as if it were not installed."""

    def hide(name):
        for module in [m for m in sys.modules if m.split(".")[0] == name or m.startswith(f"torch.utils.{name}")]:
            monkeypatch.delitem(sys.modules, module)
        original = builtins.__import__

        def refuse(module, *args, **kwargs):
            if module.split(".")[0] == name or module.startswith(f"torch.utils.{name}"):
                raise ImportError(name)
            return original(module, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)

    return hide


def lines(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def keep(run, *names):
    """Leave only these files in a run directory."""
    for path in run.iterdir():
        if path.name not in names:
            path.unlink()


def test_predictors_stand_where_they_learned(tiny_run):
    for stage in read_run(tiny_run).stages:
        by_anchors, by_finals = stage.predictors[:3], stage.predictors[3:]
        assert [done for done, _ in by_anchors] == [0, 0, 3]  # after anchors 3 and 4, and the one of update 1
        assert [line["count"] for _, line in by_anchors] == [3, 4, 5]
        assert all(done == 6 for done, _ in by_finals)
        assert stage.name == "shrinkage" or not by_finals
        assert stage.predictors[-1][1]["error"] is not None


def test_the_front_is_the_one_that_the_search_wrote(run):
    pytest.importorskip("matplotlib")
    front = {"params": [{**point, "architecture": f"a{n}"} for n, point in enumerate(read_run(run).front["params"])]}
    assert front["params"]
    (run / "front.json").write_text(json.dumps({**front, "macs": front["params"]}))
    page = report.write_report(run)[1].read_text()
    for point in front["params"]:
        row = (point["stage"], point["architecture"], f"{point['params']:,}", f"{point['macs']:,}")
        assert page.count("".join(f"<td>{cell}</td>" for cell in (*row, f"{point['accuracy']:.2%}"))) == 2


def test_the_best_so_far_prefers_the_feasible():
    rewards = [(None, -1.0, False), (0.9, 0.8, False), (0.5, 0.3, True), (0.9, 0.7, False), (0.9, 0.6, True)]
    rollouts = [dict(zip(("predicted_accuracy", "reward", "feasible"), line, strict=True)) for line in rewards]
    assert Stage("removal", rollouts).best() == [None, 0.8, 0.3, 0.3, 0.6]


def test_layers_stand_as_they_are_in_the_student(tiny_run):
    layers = read_run(tiny_run).layers
    state = load_student(tiny_run).state_dict()
    weights = {name[: -len(".weight")]: weight for name, weight in state.items() if name.endswith(".weight")}
    assert weights
    for layer in layers:
        if layer.name in weights:
            assert layer.kept
            assert layer.channels == len(weights[layer.name])
            assert layer.channels <= layer.teacher_channels
            assert layer.kernel == tuple(weights[layer.name].shape[2:])
        elif layer.kind in ("conv", "linear"):
            assert not layer.kept
    assert {layer.name for layer in layers} >= set(weights)


def test_report(run):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    png, page = report.write_report(run)
    assert (png, page) == (run / "report.png", run / "report.html")
    with image.open(png) as drawn:
        assert drawn.size == (1600, 1700)
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)  # one page, no other file
    table = json.loads((run / "result.json").read_text())
    for shown in (f"{table['student']['params']:,}", f"{table['student']['test_accuracy']:.2%}", "removed", "conv1"):
        assert shown in text
    assert text.count("trained fully") > 2


@pytest.mark.parametrize("count", [1, 9, 14])
def test_report_of_an_unfinished_run(run, count):
    pytest.importorskip("matplotlib")
    keep(run, "history.jsonl", "config.json")
    whole = (run / "history.jsonl").read_bytes().splitlines(keepends=True)
    (run / "history.jsonl").write_bytes(b"".join(whole[:count]) + whole[count][:20])
    png, page = report.write_report(run)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "not finished" in page.read_text()


def test_report_of_students_that_all_failed(run):
    pytest.importorskip("matplotlib")
    keep(run, "history.jsonl")
    rollout = next(line for line in lines(run) if line["kind"] == "rollout")
    none = dict.fromkeys(("architecture", "params", "macs", "short_accuracy", "predicted_accuracy", "accuracy_error"))
    failed = {**rollout, **none, "reward": -1.0, "feasible": False, "error": "cannot meet"}
    (run / "history.jsonl").write_text(f"{json.dumps(failed)}\n" * 3)
    assert report.write_report(run)[0].read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(BadInput, match=r"no history\.jsonl"):
        read_run(tmp_path)
    (run / "history.jsonl").write_text('{"kind": "rollout"}\n')
    with pytest.raises(BadInput, match=r"history\.jsonl: not written"):
        read_run(run)
    (run / "history.jsonl").write_text("")
    with pytest.raises(BadInput, match="nothing was evaluated"):
        read_run(run)


def test_without_matplotlib(run, without, monkeypatch, capsys):
    without("matplotlib")
    monkeypatch.setattr(sys, "argv", ["n2n-fast", "report", str(run)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1)
    assert "pip install 'n2n_fast[plot]'" in err
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
    rollouts = [line for line in lines(run) if line["kind"] == "rollout"]
    known = {field.name for field in fields(Rollout)}
    (tmp_path / "new").mkdir()
    with Bar(True, Curves(tmp_path / "new", 3)) as bar:
        assert not (tmp_path / "new" / "tensorboard").exists()  # a directory that turns out to be no run's stays clean
        for line in rollouts:
            bar.phase(line["stage"], 6)
            bar.rollout(Rollout(**{name: value for name, value in line.items() if name in known}), None, None)
    held = json.loads((tmp_path / "new" / "tensorboard" / "scalars.json").read_text())
    for stage in ("removal", "shrinkage"):
        rewards = [line["reward"] for line in rollouts if line["stage"] == stage]
        assert held[f"{stage}/reward"] == [[step, reward] for step, reward in enumerate(rewards, 1)]
        assert {"params", "macs"} <= {tag.split("/")[1] for tag in held if tag.startswith(stage)}


def test_tensorboard_can_be_read(tmp_path, run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = next(line for line in lines(run) if line["kind"] == "rollout")
    curves = Curves(tmp_path, 3)
    curves.add(Rollout(**{field.name: line[field.name] for field in fields(Rollout)}))
    curves.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("removal/reward")] == pytest.approx([line["reward"]])


def test_without_tensorboard(tmp_path, without, monkeypatch, capsys):
    without("tensorboard")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["n2n-fast", "run", "--tensorboard", "--out", "here"])
    with pytest.raises(SystemExit) as stop:
        main.main()
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1)
    assert "pip install tensorboard" in err
    assert not (tmp_path / "here").exists()
