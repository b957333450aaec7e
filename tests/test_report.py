"""Reading a run back, its picture, page and scalars."""

import builtins
import json
import re
import shutil
import sys
from dataclasses import asdict

import pytest

from n2n_fast.cli import main, report
from n2n_fast.cli.record import StageRecord, read_record
from n2n_fast.files.errors import BadInput
from n2n_fast.search.pareto import front
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


def test_the_points_of_the_history_give_the_front_that_the_search_wrote(tiny_run):
    points = read_record(tiny_run).points()
    assert any(point.trained for point in points)
    assert not all(point.trained for point in points)
    held = json.loads((tiny_run / "front.json").read_text())
    assert held == {by: [asdict(point) for point in front(points, by)] for by in ("params", "macs")}


def test_predictors_stand_where_they_learned(tiny_run):
    for stage in read_record(tiny_run).stages:
        by_anchors, by_finals = stage.predictors[:3], stage.predictors[3:]
        assert [done for done, _ in by_anchors] == [0, 0, 3]  # after anchors 3 and 4, and the one of update 1
        assert [fitted.count for _, fitted in by_anchors] == [3, 4, 5]
        assert all(fitted.remaining == 1 for _, fitted in by_anchors)
        assert all(done == 6 for done, _ in by_finals)
        assert stage.name == "shrinkage" or not by_finals
        assert stage.predictor.error is not None


def test_the_best_so_far_prefers_the_feasible():
    rewards = [(None, -1.0, False), (0.9, 0.8, False), (0.5, 0.3, True), (0.9, 0.7, False), (0.9, 0.6, True)]
    rollouts = [dict(zip(("predicted_accuracy", "reward", "feasible"), line, strict=True)) for line in rewards]
    assert StageRecord("removal", rollouts).best() == [None, 0.8, 0.3, 0.3, 0.6]


def test_layers_stand_as_they_are_in_the_student(tiny_run):
    layers = read_record(tiny_run).layers
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
        read_record(tmp_path)
    (run / "history.jsonl").write_text('{"kind": "rollout"}\n')
    with pytest.raises(BadInput, match=r"history\.jsonl: not written"):
        read_record(run)
    (run / "history.jsonl").write_text("")
    with pytest.raises(BadInput, match="nothing was evaluated"):
        read_record(run)


def test_without_matplotlib(run, without, monkeypatch, capsys):
    without("matplotlib")
    monkeypatch.setattr(sys, "argv", ["n2n-fast", "report", str(run)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1)
    assert "pip install 'n2n_fast[plot]'" in err
    told = []
    report.draw_if_possible(run, False, told.append)
    assert told == []
    assert not (run / "report.png").exists()


def test_a_report_that_fails_does_not_fail_the_run(tmp_path):
    pytest.importorskip("matplotlib")
    told = []
    report.draw_if_possible(tmp_path, False, told.append)
    assert len(told) == 1
    assert "history.jsonl" in told[0]


def test_tensorboard_holds_the_history(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = report.write_tensorboard(run)
    assert report.write_tensorboard(run) == directory  # in place of the first
    events = EventAccumulator(str(directory))
    events.Reload()
    rewards = [line["reward"] for line in lines(run) if line["kind"] == "rollout" and line["stage"] == "removal"]
    held = events.Scalars("removal/reward")
    assert [event.step for event in held] == list(range(1, len(rewards) + 1))
    assert [event.value for event in held] == pytest.approx(rewards)
    assert "shrinkage/leave_one_out_error" in events.Tags()["scalars"]


def test_without_tensorboard(run, without):
    without("tensorboard")
    with pytest.raises(BadInput, match="pip install tensorboard"):
        report.write_tensorboard(run)
    assert not (run / "tensorboard").exists()
