"""Files made to harm, through the command line: each ends in one line and exit code 2, and runs no code."""

import contextlib
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

import hostile
import n2n_fast
from n2n_fast.cli import main
from n2n_fast.files.safe_load import read_tensors
from n2n_fast.search.config import SETTINGS
from n2n_fast.training.distill import seeded
from n2n_fast.training.teacher_files import load_teacher
from n2n_fast.training.teachers import create, train_teacher

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc")]
SECONDS, BYTES = 10, 2 << 30
CHEAP = ("--init", "sliced", "--saliency", "l1", "--anchors", "0", "--keep-top", "1", "--validation-images", "50")
SHORT = ("--updates", "1", "--rollouts", "2", "--rollout-steps", "1", "--stage-epochs", "1", "--final-epochs", "0.2")


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


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["n2n-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
    return stop.value.code


@pytest.fixture(scope="module")
def finished(place, teacher):
    """The directory of a finished run."""
    assert run("run", "--teacher", teacher, *CHEAP, *SHORT, "--stages", "shrinkage", "--out", place / "finished") == 0
    return place / "finished"


@pytest.fixture(scope="module")
def cut_off(place, teacher):
    """The directory of a run that was stopped in the training of stage 1's best student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.Bar, "stopping", lambda self: self._name.startswith("training the best") and self._done > 9)
        assert run("run", "--teacher", teacher, *CHEAP, *SHORT, "--out", place / "cut_off") == 130
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
    """One line names the fault, after what was told of the teacher before, if anything."""
    *told, fault = line["stderr"].splitlines() or [""]
    return (
        line["code"] == 2
        and fault.startswith("n2n-fast: ")
        and fault.isprintable()
        and all(text.startswith(("teacher: ", "warning: ")) for text in told)
        and line["seconds"] < SECONDS
        and line["peak"] < BYTES
    )


def written(folder, files):
    """Paths of files with these contents, in an order that no name of theirs disturbs."""
    folder.mkdir()
    paths = {}
    for number, (name, content) in enumerate(files.items()):
        paths[name] = folder / f"{number}.pt"
        paths[name].write_bytes(content)
    return paths


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


def test_teachers(suffer, place, teacher):
    files = hostile.teachers(read_tensors(teacher), place / "marker")
    assert len(files) > 70
    suffer({name: ("run", "--teacher", path) for name, path in written(place / "teachers", files).items()})


def test_legacy_files_and_wrapped_states_are_still_read(tmp_path, teacher):
    state = torch.load(teacher, weights_only=True)
    wrapped = {"epoch": 3, "best": 0.5, "state_dict": state, "classes": ("a", "b"), "optimizer": {"lr": [0.1]}}
    torch.save(wrapped, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(wrapped, tmp_path / "new.pt")
    for name in ("old.pt", "new.pt"):
        assert all(torch.equal(value, state[key]) for key, value in load_teacher(tmp_path / name).state_dict().items())


def test_data_sets(suffer, place, teacher):
    files = hostile.data_sets(place / "marker")
    assert len(files) > 35
    paths = written(place / "sets", files)
    suffer({name: ("run", "--teacher", teacher, "--data", f"npz:{path}") for name, path in paths.items()})


def test_policies(suffer, place, teacher, finished):
    policies = torch.load(finished / "policies.pt", weights_only=True)
    held = policies["shrinkage"]
    files = {
        **hostile.torch_files((finished / "policies.pt").read_bytes(), place / "marker"),
        "NaN": hostile.saved({"shrinkage": {key: value * float("nan") for key, value in held.items()}}),
        "complex": hostile.saved({"shrinkage": {key: value.to(torch.complex64) for key, value in held.items()}}),
        "int": hostile.saved({"shrinkage": {key: value.int() for key, value in held.items()}}),
        "of text": hostile.saved({"shrinkage": "text"}),
        "of lists": hostile.saved({"shrinkage": {key: [1.0] for key in held}}),
        "of another size": hostile.saved({"shrinkage": {key: value[:1] for key, value in held.items()}}),
    }
    paths = written(place / "policies", files)
    command = ("run", "--teacher", teacher, *CHEAP, "--stages", "shrinkage", "--policy")
    suffer({name: (*command, path) for name, path in paths.items()})


def test_students(suffer, place, finished):
    files = hostile.students((finished / "student.pt2").read_bytes(), place / "marker")
    assert len(files) > 80
    runs = {
        name: hostile.copy_run(finished, place / "students" / str(number), {"student.pt2": content})
        for number, (name, content) in enumerate(files.items())
    }
    suffer({name: ("evaluate", path) for name, path in runs.items()})


def test_configurations_of_students(suffer, place, finished):
    config = json.loads((finished / "config.json").read_text())
    cases = {name: {**config, "data": {**config["data"], **part}} for name, part in hostile.configurations(place)}
    files = {name: json.dumps(case).encode() for name, case in cases.items()}
    files |= {"empty": b"", "deep": b"[" * 100_000, "a list": b"[]", "no utf-8": b"\xff", "half": b'{"data": {'}
    runs = {
        name: hostile.copy_run(finished, place / "configurations" / str(number), {"config.json": content})
        for number, (name, content) in enumerate(files.items())
    }
    suffer({name: ("evaluate", path) for name, path in runs.items()})


def resumed(place, run_directory, files):
    """Command lines that resume copies of a run, in each of which some files are replaced."""
    place.mkdir()
    copies = (hostile.copy_run(run_directory, place / str(i), part) for i, part in enumerate(files.values()))
    return {name: ("run", "--resume", path) for name, path in zip(files, copies, strict=True)}


def test_a_run_that_was_cut_off_goes_on(place, cut_off):
    """What the hostile ones below are made of is good."""
    assert run("run", "--resume", hostile.copy_run(cut_off, place / "good", {})) == 0


def test_checkpoints(suffer, place, cut_off):
    content = (cut_off / "checkpoint.pt").read_bytes()
    held = torch.load(cut_off / "checkpoint.pt", weights_only=True)
    files = hostile.torch_files(content, place / "marker")
    files |= {name: hostile.saved(case) for name, case in hostile.checkpoints(held)}
    assert len(files) > 120
    suffer(resumed(place / "checkpoints", cut_off, {n: {"checkpoint.pt": c} for n, c in files.items()}))


def test_trainings(suffer, place, cut_off):
    held = torch.load(cut_off / "training.pt", weights_only=True)
    files = dict(hostile.torch_code(place / "marker"))
    files |= {name: hostile.saved(case) for name, case in hostile.trainings(held)}
    suffer(resumed(place / "trainings", cut_off, {n: {"training.pt": c} for n, c in files.items()}))


def test_commands_of_runs(suffer, place, cut_off):
    config = json.loads((cut_off / "config.json").read_text())
    cases = hostile.commands(config["command"], place / "marker")
    files = {name: {**config, "command": {**config["command"], **part}} for name, part in cases}
    cases = [(name, value) for name in SETTINGS for value in hostile.VALUES if (name, value) != ("seed", -7)]
    files |= {f"{name} of {str(value)[:9]!r}": {**config, name: value} for name, value in cases}
    commands = resumed(
        place / "commands", cut_off, {n: {"config.json": json.dumps(c).encode()} for n, c in files.items()}
    )
    suffer(commands)
