"""The run directory: locks, history, files written whole, and searches that are killed."""

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
from n2n_fast.search.checkpoint import SECONDS_BETWEEN, Interrupted, RunDirectory

SETTINGS = {"updates": 3, "data": {"mean": [0.5]}, "ratios": (0.5, 1.0)}
LINES = [{"kind": "rollout", "stage": "removal", "update": 0, "index": i} for i in range(4)]


def begun(path, resume=False, settings=SETTINGS, **how):
    return RunDirectory(path, settings, resume, **how)


def write_run(path, lines=2):
    """A run whose checkpoint follows `lines` lines of its history, with all of LINES in it."""
    with begun(path) as run:
        run.begin()
        for line in LINES[:lines]:
            run.log(line)
        run.save({"step": torch.tensor(lines)})
        for line in LINES[lines:]:
            run.log(line)


def history(path):
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


def test_tensors_are_written_from_the_cpu(tmp_path):
    state = torch.nn.BatchNorm2d(2, device=ELSEWHERE).state_dict()
    with Fetching(), begun(tmp_path / "run") as run:
        run.begin()
        run.save({"finished": [{"student": state}], "finals": [["key", 0.5, state]]})
        assert state["weight"].device == ELSEWHERE
    held = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert {tensor.device.type for tensor in tensors_of(held)} == {"cpu"}
    assert held["finished"][0]["student"]._metadata == state._metadata
    assert held["finals"][0][:2] == ["key", 0.5]


def test_a_run_goes_on_with_the_history_that_its_checkpoint_knows(tmp_path):
    path = tmp_path / "run"
    write_run(path)
    assert history(path) == LINES
    for _ in range(2):  # killed before it saved anything: the next one begins at the same place
        with begun(path, resume=True) as run:
            assert int(run.checkpoint["step"]) == 2
            assert history(path) == LINES[:2]
            run.log(LINES[3])
    with begun(path, resume=True) as run:
        run.log(LINES[2])
        run.save({"step": torch.tensor(3)})
        run.log(LINES[3])
    assert history(path) == LINES
    with begun(path, resume=True) as run:
        assert int(run.checkpoint["step"]) == 3
        assert history(path) == LINES[:3]


def test_without_a_checkpoint_a_run_begins_again(tmp_path):
    path = tmp_path / "run"
    with begun(path) as run:
        run.begin()
        run.log(LINES[0])
    with begun(path, resume=True) as run:
        assert run.checkpoint is None
        assert history(path) == []


@pytest.mark.parametrize("torn", range(1, 30, 7))
def test_a_torn_line_is_dropped(tmp_path, torn):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "history.jsonl"
    path.write_bytes(path.read_bytes()[:-torn])
    with begun(tmp_path / "run", resume=True) as run:
        run.log(LINES[3])
    assert history(tmp_path / "run") == [*LINES[:2], LINES[3]]


def test_a_history_that_was_cut_is_refused(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "history.jsonl").write_bytes(b"")
    with pytest.raises(BadInput, match="shorter than when"), begun(tmp_path / "run", resume=True):
        pass


def test_a_second_process_is_refused(tmp_path):
    with begun(tmp_path / "run") as run:
        run.begin()
        with pytest.raises(BadInput, match="another process works on"), begun(tmp_path / "run", resume=True):
            pass
    with begun(tmp_path / "run", resume=True):
        pass


def test_a_run_is_not_begun_twice_and_nothing_is_resumed(tmp_path):
    with pytest.raises(BadInput, match="no run to resume"), begun(tmp_path / "run", resume=True):
        pass
    write_run(tmp_path / "run")
    with pytest.raises(BadInput, match="holds a run already"), begun(tmp_path / "run"):
        pass


def test_what_did_not_begin_leaves_no_trace(tmp_path):
    with begun(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_named(tmp_path):
    write_run(tmp_path / "run")
    other = {**SETTINGS, "updates": 4, "seed": 1}
    with pytest.raises(BadInput, match=r"seed \(None there, 1 here\), updates \(3 there, 4 here\)"):
        begun(tmp_path / "run", True, other).__enter__()


@pytest.mark.parametrize("fault", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, fault, monkeypatch):
    write_run(tmp_path / "run", lines=4)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with begun(tmp_path / "run", resume=True) as run:
        with monkeypatch.context() as broken:
            if fault == "write":
                broken.setattr(Path, "open", full)
            else:
                broken.setattr(*((os, "fsync") if fault == "fsync" else (Path, "replace")), full)
            with pytest.raises(OSError, match="No space"):
                run.save({"step": torch.tensor(9)})
        assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    with begun(tmp_path / "run", resume=True) as run:
        assert int(run.checkpoint["step"]) == 4


def test_a_training_is_kept_now_and_then_and_when_asked_to_stop(tmp_path, monkeypatch):
    clock, stop = [0.0], [False]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with begun(tmp_path / "run", stopping=lambda: stop[0]) as run:
        run.begin()
        checkpointer = run.training("the best")
        made = []
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
