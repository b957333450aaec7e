"""The run directory: locks, history, files written whole, and searches that are killed."""

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from elsewhere import ELSEWHERE, Fetching, tensors_of
from n2n_fast.files.errors import BadInput
from n2n_fast.search.checkpoint import SECONDS_BETWEEN, Interrupted, RunDirectory, claimed
from quarters import history

SETTINGS = {"updates": 3, "data": {"mean": [0.5]}, "ratios": (0.5, 1.0), "command": {"device": "cpu"}}
LINES = [{"kind": "rollout", "stage": "removal", "update": 0, "index": i} for i in range(4)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def run(path):
    """A run whose checkpoint follows two lines of its history, with all of LINES in it."""
    with RunDirectory(path, SETTINGS) as directory:
        directory.begin()
        for number, line in enumerate(LINES):
            if number == 2:
                directory.save({"step": torch.tensor(2)})
            directory.log(line)
    return path


@contextlib.contextmanager
def resumed(path, settings=SETTINGS):
    with RunDirectory(path, settings, True) as directory:
        directory.begin()
        yield directory


def test_tensors_are_written_from_the_cpu(path):
    state = torch.nn.BatchNorm2d(2, device=ELSEWHERE).state_dict()
    with Fetching(), RunDirectory(path, SETTINGS) as run:
        run.begin()
        run.save({"stages": [{"student": state}], "finals": [["key", 0.5, state]]})
        assert state["weight"].device == ELSEWHERE
    saved = torch.load(path / "checkpoint.pt", weights_only=True)
    assert {tensor.device.type for tensor in tensors_of(saved)} == {"cpu"}
    assert saved["stages"][0]["student"]._metadata == state._metadata
    assert saved["finals"][0][:2] == ["key", 0.5]


def test_a_run_goes_on_with_the_history_that_its_checkpoint_knows(run):
    assert history(run) == LINES
    for _ in range(2):  # killed before it saved anything: the next one begins at the same place
        with resumed(run) as directory:
            assert int(directory.checkpoint["step"]) == 2
            assert history(run) == LINES[:2]
            directory.log(LINES[3])
    with resumed(run) as directory:
        directory.log(LINES[2])
        directory.save({"step": torch.tensor(3)})
        directory.log(LINES[3])
    with resumed(run) as directory:
        assert int(directory.checkpoint["step"]) == 3
        assert history(run) == LINES[:3]


def test_without_a_checkpoint_a_run_begins_again(run):
    (run / "checkpoint.pt").unlink()
    with resumed(run) as directory:
        assert directory.checkpoint is None
        assert history(run) == []


@pytest.mark.parametrize("torn", range(1, 30, 7))
def test_a_torn_line_is_dropped(run, torn):
    file = run / "history.jsonl"
    file.write_bytes(file.read_bytes()[:-torn])
    with resumed(run) as directory:
        directory.log(LINES[3])
    assert history(run) == [*LINES[:2], LINES[3]]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def refused(expected, directory):
    with pytest.raises(BadInput, match=expected), directory:
        pass


def test_directories_that_cannot_be_used_are_refused(run, tmp_path):
    refused("no run to resume", resumed(tmp_path / "none"))
    refused("holds a run already", RunDirectory(run, SETTINGS))
    (tmp_path / "file").touch()
    refused(r"cannot be written \(.*\); give another --out", RunDirectory(tmp_path / "file" / "run", SETTINGS))
    with resumed(run):
        refused("another process works on", resumed(run))
    other = {**SETTINGS, "data": {"mean": [0.5] * 99}}
    refused(r"configuration: data.mean \(\[0.5\] there, \[0.5, [^]]* here\); give", resumed(run, other))
    other = {**SETTINGS, "updates": 4, "seed": 1, "command": {}}
    refused(r"configuration: seed \(None there, 1 here\), updates \(3 there, 4 here\); give", resumed(run, other))
    (run / "history.jsonl").write_bytes(b"")
    refused("shorter than when", resumed(run))
    assert {file.name for file in tmp_path.iterdir()} == {"run", "file"}


@pytest.mark.parametrize("name", ["history.jsonl", ".lock", "student.pt", "checkpoint.pt", "notes/mine.txt"])
def test_a_new_run_takes_an_empty_directory_alone(path, name):
    file = path / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"precious")
    refused(f"is not empty, {name.split('/')[0]} is in it; give another --out", RunDirectory(path, SETTINGS))
    assert [each for each in path.rglob("*") if each.is_file()] == [file]
    assert file.read_bytes() == b"precious"


@pytest.mark.parametrize("there", [(), ("runs",), ("runs", "runs/1"), ("runs", "runs/1", "runs/1/.lock")])
def test_what_did_not_begin_leaves_no_trace(tmp_path, there):
    for name in there:
        (tmp_path / name).touch() if name.endswith("lock") else (tmp_path / name).mkdir()
    with RunDirectory(tmp_path / "runs" / "1", SETTINGS):
        assert (tmp_path / "runs" / "1").exists()
    refused("no run to resume", resumed(tmp_path / "runs" / "1"))
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == set(there) - {"runs/1/.lock"}


def test_a_way_round_leads_to_no_directory_that_is_in_use(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "history.jsonl").write_bytes(b"precious")
    refused("is not empty", RunDirectory(tmp_path / "runs" / ".." / "mine", SETTINGS))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "history.jsonl"]


def test_each_run_that_names_no_directory_gets_another(tmp_path):
    (tmp_path / "runs" / "2").mkdir(parents=True)
    with claimed(tmp_path / "runs") as first, claimed(tmp_path / "runs") as third:
        assert (first.name, third.name) == ("1", "3")
        with RunDirectory(first, SETTINGS) as run:
            run.begin()
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"1", "2"}
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "a" / "b") as path:
        raise ZeroDivisionError(path)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"cannot be written \(.*\); give another --out"), claimed(tmp_path / "file"):
        pass


def test_what_cannot_be_written_is_told_at_once_and_leaves_no_trace(tmp_path, monkeypatch):
    path = tmp_path / "runs" / "1"
    monkeypatch.setattr(os, "fsync", full)
    refused(r"cannot be written \(No space left on device\); give another --out", RunDirectory(path, SETTINGS))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_write_its_settings_leaves_no_trace(path, monkeypatch):
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"), RunDirectory(path, SETTINGS) as run:
        run.begin()
    assert not path.exists()


@pytest.mark.parametrize(("owner", "fault"), [(Path, "open"), (os, "fsync"), (Path, "replace")])
def test_a_full_disk_leaves_the_last_checkpoint(run, owner, fault, monkeypatch):
    before = (run / "checkpoint.pt").read_bytes()
    with resumed(run) as directory:
        with monkeypatch.context() as broken:
            broken.setattr(owner, fault, full)
            with pytest.raises(OSError, match="No space"):
                directory.save({"step": torch.tensor(9)})
        assert (run / "checkpoint.pt").read_bytes() == before


def test_a_training_is_kept_now_and_then_and_when_asked_to_stop(path, monkeypatch):
    clock, stop, made = [0.0], [False], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with RunDirectory(path, SETTINGS, stopping=lambda: stop[0]) as run:
        run.begin()
        checkpointer = run.training("the best")
        for step in range(5):
            clock[0] += 0.4 * SECONDS_BETWEEN
            checkpointer.offer(lambda step=step: made.append(step) or {"step": step})
        assert made == [2]
        assert run.training("the best").load() == {"step": 2}
        assert run.training("another").load() is None
        stop[0] = True
        with pytest.raises(Interrupted):
            checkpointer.offer(lambda: {"step": 5})
        assert checkpointer.load() == {"step": 5}
        with pytest.raises(Interrupted):
            run.save({})  # what came of the training is in the checkpoint
        assert checkpointer.load() is None


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_search_killed_at_any_moment_goes_on_to_the_same_end():
    """bench/crash.py kills it 200 times."""
    command = [sys.executable, str(Path(__file__).with_name("crash.py")), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 20
    assert found["failed"] == []
