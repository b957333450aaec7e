"""Files made to harm, through the command line: each ends in one line and exit code 2, and runs no code."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

import hostile
import n2n_fast
from command_line import invoke, output
from n2n_fast.cli import main
from n2n_fast.search.config import SETTINGS
from n2n_fast.training.distill import seeded
from n2n_fast.training.teacher_files import load_teacher
from n2n_fast.training.teachers import create, train_teacher

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc")]
SECONDS, BYTES = 10, 2 << 30
CHEAP = ("--init", "sliced", "--importance", "l1", "--anchors", "0", "--keep-top", "1", "--validation-images", "50",
         "--epoch-steps", "0", "--imagined-steps", "0")  # fmt: skip
SHORT = ("--updates", "1", "--rollouts", "2", "--rollout-steps", "1", "--stage-epochs", "3", "--final-epochs", "0.2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def teacher(place):
    """The file of a digits teacher."""
    data = n2n_fast.load("digits")
    with seeded(0, torch.device("cpu")):
        model = train_teacher(create("digits_resnet", 10, 1), data, epochs=3, batch_size=64)
    torch.save(model.state_dict(), place / "teacher.pt")
    return place / "teacher.pt"


@pytest.fixture(scope="module")
def finished(place, teacher):
    """The directory of a finished run."""
    output("run", "--teacher", teacher, *CHEAP, *SHORT, "--stages", "shrinkage", "--out", place / "finished")
    return place / "finished"


@pytest.fixture(scope="module")
def cut_off(place, teacher):
    """The directory of a run that was stopped in the training of stage 1's best student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.Bar, "stopping", lambda self: self._name.startswith("training the best") and self._done > 9)
        assert invoke("run", "--teacher", teacher, *CHEAP, *SHORT, "--out", place / "cut_off")[0] == 130
    assert (place / "cut_off" / "training.pt").exists()
    return place / "cut_off"


@pytest.fixture
def suffer(place, tmp_path):
    """Run command lines in one process, in an empty directory; each has to be refused in one line, soon and cheaply."""

    def all_of(cases):
        marker = place / "marker"
        commands = [[str(argument) for argument in command] for command in cases.values()]
        done = subprocess.run(
            [sys.executable, hostile.__file__],
            input=json.dumps(commands),
            capture_output=True,
            check=False,
            text=True,
            timeout=600,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(lines) == len(cases), f"ended after {list(cases)[len(lines)]}: {done.stderr[-2000:]}"
        found = dict(zip(cases, lines, strict=True))
        wrong = {case: line for case, line in found.items() if not ended_well(line)}
        assert not wrong, "\n".join(f"{case}: {line}" for case, line in wrong.items())
        assert not marker.exists(), "code in a file was run"
        assert not list(tmp_path.parent.rglob("above"))

    return all_of


def ended_well(line):
    """One line names the fault, after what was told of data and teacher before, if anything."""
    *told, fault = line["stderr"].splitlines() or [""]
    return (
        line["code"] == 2
        and fault.startswith("n2n-fast: ")
        and fault.isprintable()
        and all(text.startswith(("data: ", "  ", "teacher: ", "warning: ")) for text in told)
        and line["seconds"] < SECONDS
        and line["peak"] < BYTES
    )


def written(folder, files, *command):
    """Commands on files with these contents, whose paths an order settles that no name of theirs disturbs."""
    folder.mkdir()
    commands = {}
    for number, (name, content) in enumerate(files.items()):
        (folder / f"{number}.pt").write_bytes(content)
        commands[name] = (*command[:-1], f"{command[-1]}{folder / f'{number}.pt'}")
    return commands


def in_copies(folder, run, file, files, *command):
    """Commands on copies of a run, in each of which a file has one of these contents."""
    commands = {}
    for number, (name, content) in enumerate(files.items()):
        copy = shutil.copytree(run, folder / str(number))
        (copy / file).write_bytes(content)
        commands[name] = (*command, copy)
    return commands


def test_payloads_are_live(tmp_path, finished):
    """Where nothing is in their way they do run."""
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(hostile.payload(marker)))
    assert marker.exists()
    marker.unlink()
    evil = hostile.students((finished / "student.pt2").read_bytes(), marker)["sample inputs that run code"]
    (tmp_path / "student.pt2").write_bytes(evil)
    with contextlib.suppress(Exception):  # after the harm is done
        torch.export.load(tmp_path / "student.pt2")
    assert marker.exists()


def test_legacy_files_and_wrapped_states_are_still_read(tmp_path, teacher):
    state = torch.load(teacher, weights_only=True)
    wrapped = {"epoch": 3, "best": 0.5, "state_dict": state, "classes": ("a", "b"), "optimizer": {"lr": [0.1]}}
    torch.save(wrapped, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(wrapped, tmp_path / "new.pt")
    for name in ("old.pt", "new.pt"):
        assert all(torch.equal(value, state[key]) for key, value in load_teacher(tmp_path / name).state_dict().items())


def test_teachers(suffer, place, teacher):
    files = hostile.teachers(torch.load(teacher, weights_only=True), place / "marker")
    assert len(files) > 55
    suffer(written(place / "teachers", files, "run", "--teacher", ""))


def test_data_sets(suffer, place, teacher):
    files = hostile.data_sets(place / "marker")
    assert len(files) > 25
    suffer(written(place / "sets", files, "run", "--teacher", teacher, "--data", "npz:"))


def test_policies(suffer, place, teacher, finished):
    policy = torch.load(finished / "policies.pt", weights_only=True)["shrinkage"]
    changes = {"NaN": lambda v: v * float("nan"), "complex": lambda v: v.to(torch.complex64), "int": lambda v: v.int()}
    changes |= {"of lists": lambda _: [1.0], "of another size": lambda v: v[:1]}
    files = {
        **hostile.torch_files((finished / "policies.pt").read_bytes(), place / "marker"),
        **{n: hostile.saved({"shrinkage": {k: f(v) for k, v in policy.items()}}) for n, f in changes.items()},
        "of text": hostile.saved({"shrinkage": "text"}),
    }
    command = ("run", "--teacher", teacher, *CHEAP, "--stages", "shrinkage", "--policy", "")
    suffer(written(place / "policies", files, *command))


def test_students(suffer, place, finished):
    files = hostile.students((finished / "student.pt2").read_bytes(), place / "marker")
    assert len(files) > 80
    suffer(in_copies(place / "students", finished, "student.pt2", files, "evaluate"))


def test_configurations_of_students(suffer, place, finished):
    config = json.loads((finished / "config.json").read_text())
    files = {name: json.dumps(case).encode() for name, case in hostile.configurations(config)}
    files |= {"empty": b"", "deep": b"[" * 100_000, "a list": b"[]", "no utf-8": b"\xff", "half": b'{"data": {'}
    suffer(in_copies(place / "configurations", finished, "config.json", files, "evaluate"))


def test_a_run_that_was_cut_off_goes_on(place, cut_off):
    """What the hostile ones below are made of is good."""
    output("run", "--resume", shutil.copytree(cut_off, place / "good"))


def test_checkpoints(suffer, place, cut_off):
    good = torch.load(cut_off / "checkpoint.pt", weights_only=True)
    files = hostile.torch_files((cut_off / "checkpoint.pt").read_bytes(), place / "marker")
    files |= {name: hostile.saved(case) for name, case in hostile.checkpoints(good)}
    assert len(files) > 120
    suffer(in_copies(place / "checkpoints", cut_off, "checkpoint.pt", files, "run", "--resume"))


def test_trainings(suffer, place, cut_off):
    good = torch.load(cut_off / "training.pt", weights_only=True)
    files = hostile.torch_code(place / "marker")
    files |= {name: hostile.saved(case) for name, case in hostile.trainings(good)}
    suffer(in_copies(place / "trainings", cut_off, "training.pt", files, "run", "--resume"))


def test_commands_of_runs(suffer, place, cut_off):
    config = json.loads((cut_off / "config.json").read_text())
    cases = hostile.commands(config["command"], place / "marker")
    cases = {name: {**config, "command": {**config["command"], **part}} for name, part in cases}
    settings = [(name, value) for name in SETTINGS for value in hostile.VALUES if (name, value) != ("seed", -7)]
    cases |= {f"{name} of {str(value)[:9]!r}": {**config, name: value} for name, value in settings}
    files = {name: json.dumps(case).encode() for name, case in cases.items()}
    suffer(in_copies(place / "commands", cut_off, "config.json", files, "run", "--resume"))
