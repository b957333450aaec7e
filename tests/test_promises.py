"""What a run may meet and must not be ended by: files in the way, dying readers, locales, values that mean nothing."""

import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import n2n_fast
from command_line import invoke, refusal
from n2n_fast.cli import main
from n2n_fast.cli.progress import progress_line
from n2n_fast.networks.tracing import unwrapped
from n2n_fast.search.config import SETTINGS
from n2n_fast.training import teachers
from n2n_fast.training.batches import Batches
from n2n_fast.training.distill import seeded, train
from n2n_fast.training.teachers import SmallResNet
from quarters import TINY, quarters, taught

QUICK = "--updates 1 --rollouts 2 --rollout-steps 1 --anchors 0 --stage-epochs 0 --final-epochs 0.05 --keep-top 1"
QUICK = (*QUICK.split(), "--epoch-steps", "0", "--init", "sliced", "--stages", "shrinkage", "--device", "cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A directory with a teacher and its data, and the options that name them."""
    place, data = tmp_path_factory.mktemp("inputs"), quarters()
    model = teachers.create("digits_resnet", data.classes, 1, seed=0)
    train(model, Batches(data.train, model, 4, 32, None, seed=0), learning_rate=0.1)
    torch.save(model.state_dict(), place / "teacher.pt")
    np.savez(place / "set.npz", x=data.train.images.numpy(), y=data.train.labels.numpy())
    return ("--teacher", place / "teacher.pt", "--data", f"npz:{place / 'set.npz'}", *QUICK)


pytestmark = pytest.mark.usefixtures("place")


def command(*words):
    return [sys.executable, "-m", "n2n_fast", *map(str, words)]


def contents(place):
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


# Only what a run made is touched


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("there", "out", "expected"),
    [
        ("e/student.pt", "e", "e: is not empty, student.pt is in it; give another --out"),
        ("e/history.jsonl", "e", "e: is not empty, history.jsonl is in it"),
        ("e/config.json", "e", "e: holds a run already"),
        ("e", "e", "e: cannot be written (File exists)"),
        ("e", "e/f/g", "e/f/g: cannot be written (Not a directory)"),
        ("e", "", "an empty path"),
    ],
)
def test_what_is_in_the_way_is_refused_before_any_work(place, monkeypatch, there, out, expected, dry):
    monkeypatch.setattr(main, "_teacher_and_data", None)
    (place / there).parent.mkdir(exist_ok=True)
    (place / there).write_bytes(b"precious")
    before = contents(place)
    assert expected in refusal("run", "--out", out, *dry)
    assert contents(place) == before


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs /proc")
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_where_nobody_may_write_is_told_at_once(place, monkeypatch, dry):
    monkeypatch.setattr(main, "_teacher_and_data", None)
    assert "/proc/run: cannot be written (" in refusal("run", "--out", "/proc/run", *dry)


def test_a_run_that_fails_before_it_begins_leaves_nothing(place, inputs):
    assert "no better than chance" in refusal("run", *inputs, "--mean", "1000")
    assert contents(place) == {}


def test_a_run_that_is_stopped_before_it_begins_leaves_nothing(place):
    process = subprocess.Popen(command("run"), stderr=subprocess.PIPE, text=True)
    while not (place / "runs" / "1").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1].endswith("interrupted\n")
    assert process.returncode == 130
    assert list(place.iterdir()) == []


def test_export_replaces_its_own_file_alone(tiny_run, place):
    run = shutil.copytree(tiny_run, place / "run")
    for _ in range(2):
        assert invoke("export", run, "--to", "state-dict")[0] == 0
    (place / "mine.pt").write_bytes(b"precious")
    before = contents(place)
    for name in ("mine.pt", "run/student.pt"):
        assert "exists already" in refusal("export", run, "--to", "state-dict", "--out", name)
    assert contents(place) == before


# A dying reader


def run_with(ends, words):
    """Exit code of a command whose stdout or stderr nobody reads; what came to the other one."""
    read, write = os.pipe()
    os.close(read)
    streams = {name: write if name in ends else subprocess.PIPE for name in ("stdout", "stderr")}
    done = subprocess.run(command(*words), **streams, check=False, text=True)
    os.close(write)
    return done.returncode, (done.stdout or "") + (done.stderr or "")


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "ends", [("stdout", "stderr"), pytest.param(("stdout",), marks=slow), pytest.param(("stderr",), marks=slow)]
)
def test_a_reader_that_dies_ends_no_run(place, inputs, ends):
    code, told = run_with(ends, ("run", *inputs, "--out", "here"))
    assert code == 0, told
    assert "Traceback" not in told
    assert "Broken" not in told
    assert json.loads((place / "here" / "result.json").read_text())["feasible"]


@slow
def test_an_interrupt_after_the_reader_died_keeps_what_is_done(place, inputs):
    read, write = os.pipe()
    os.close(read)
    words = command("run", *inputs, "--updates", "500", "--out", "here")
    process = subprocess.Popen(words, stdout=write, stderr=write)
    os.close(write)
    while not (place / "here" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert not (place / "here" / "result.json").exists()
    assert contents(place / "here")["history.jsonl"].count(b"rollout") > 1


@pytest.mark.parametrize("closed", ["2>&-", pytest.param(">&-", marks=slow), pytest.param(">&- 2>&- <&-", marks=slow)])
def test_closed_streams_end_no_run_and_none_of_its_files_takes_their_place(place, inputs, closed):
    words = " ".join(command("run", *inputs, "--out", "here", "--max-params", "5"))
    assert subprocess.run(f"{words} {closed}", shell=True, stdin=subprocess.DEVNULL, check=False).returncode == 3
    for line in (place / "here" / "history.jsonl").read_text().splitlines():
        json.loads(line)


def test_what_only_prints_ends_quietly():
    words = ("inspect", "--arch", "digits_resnet", "--image-size", "8")
    assert run_with(("stdout",), words) == (0, "")
    assert run_with(("stderr",), ("inspect",)) == (2, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_what_is_printed_is_told():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command("run", "--help"), stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    assert (done.returncode, done.stderr) == (2, "n2n-fast: stdout: No space left on device\n")


# Any locale


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_characters_that_cannot_be_written_are_replaced(encoding):
    done = subprocess.run(
        command("run", "--help-all"), env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    shown = "λ" if encoding == "utf-8" else "?"
    assert f"Weight {shown} of distillation" in " ".join(done.stdout.decode(encoding).split())


def test_a_name_that_no_locale_knows_is_refused_in_one_line():
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [*command("run", "--teacher"), b"caf\xc3\xa9\xff.pt"], env=env, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert done.stderr.startswith(b"n2n-fast: caf")


# Wrong values

WRONG = ("", "nan", "inf", "-inf", "-1e9", "1e999", "9" * 30, "9" * 5000, "many", "\ud800", "a\nb", "None,1")


@pytest.fixture
def begun(monkeypatch):
    """Nothing is computed; a run that would begin raises."""
    monkeypatch.setattr(main, "_teacher_and_data", lambda *_: 1 / 0)


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "leaf"])  # which may be any name
def test_a_wrong_value_of_a_setting_is_one_line(name, place):
    for value in WRONG:
        for words in ((f"--{name.replace('_', '-')}={value}",), ("--set", f"{name}={value}")):
            assert refusal("run", *words).startswith(f"n2n-fast: {name}: ")
    for text in ("nan", "inf", "-inf", "[[1]]", "[true]", "1979-05-27", "12:00:00"):
        (place / "a.toml").write_text(f"{name} = {text}")
        refusal("run", "--config", "a.toml")


VALUES_OF_ONE = {
    "run": {
        **dict.fromkeys(("--teacher", "--out", "--resume", "--policy", "--config"), ("", "a\0b")),
        "--device": ("", "meta", "abacus", "cuda:99", "cpu:-1", "xpu", "mps", "hpu", "lazy", "3"),
        "--workers": ("", "0", "-1", "nan", "1.5", "1000000000", "9" * 30),
        "--ray-address": ("",),
        "--gpus-per-worker": ("", "nan", "inf", "-inf", "-1", "1e999", "1e300", "1.5"),
        "--protocol": ("", "slow"),
        "--mean": ("", "nan", "inf", "0,-inf", "1e999", ","),
        "--std": ("", "nan", "inf", "0,-inf", "1e999", ","),
        "--image-size": ("", "0", "-1", "nan", "1.5", "9" * 30),
        "--validation": ("",),
        "--test": ("",),
        "--set": ("", "=", "updates", "updates=", "=3"),
    },
    "inspect": {
        **dict.fromkeys(("--teacher", "--config"), ("", "a\0b")),
        "--arch": ("", "resnet0", "a:b", ":", "nn.Module"),
        "--data": ("", ":", "npz:", "imagefolder:", "digits:x"),
        "--image-size": ("0", "-1", "nan", "9" * 30),
        "--round-to": ("0", "-1", "nan", "9" * 30),
    },
    "teach": {
        "--out": ("", "a\0b"),
        "--epochs": ("", "0", "-1", "nan", "inf", "1e300"),
        "--learning-rate": ("", "0", "-1", "nan", "inf", "1e300"),
        "--batch-size": ("", "0", "-1", "1.5", "9" * 30),
        "--seed": ("", "1.5", "nan", "9" * 30),
        "--channels": ("", "0", "-1", "9" * 30),
        "--image-size": ("", "0", "-1", "8x", "x8", "8x8x8", "9" * 30, "9" * 5000),
        "--validation": ("", "nan", "inf", "-1", "0", "1e9", "9" * 30, "nowhere"),
        "--test": ("", "nan", "inf", "-1", "1e9", "9" * 30, "nowhere"),
        "--class-order": ("", "a", ","),
        "--mean": ("", "nan", "inf"),
        "--std": ("", "nan", "inf", "0", "-1"),
        "--device": ("", "meta"),
        "--arch": ("", "resnet0"),
        "--data": ("", ":", "npz:", "digits:x"),
    },
    "evaluate": {"": ("", "a\0b"), "--device": ("", "meta"), "--config": ("",)},
    "report": {"": ("", "a\0b")},
    "export": {
        "": ("", "a\0b"),
        "--to": ("", "coreml"),
        "--out": ("", "a\0b"),
        "--opset": ("0", "-1", "nan", "9" * 30),
        "--static-batch": ("0", "-1", "nan", "9" * 30),
    },
}
CASES = [(command, name) for command, of_command in VALUES_OF_ONE.items() for name in of_command]


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_wrong_value_of_an_option_is_one_line(command, name, tiny_run, place):
    extra = {"evaluate": [tiny_run], "export": [tiny_run, "--to=pt2"], "teach": ["--arch=digits_resnet", "--quiet"]}
    extra |= {"inspect": ["--arch=digits_resnet", "--image-size=8"]}
    extra |= {"--gpus-per-worker": ["--workers=2"], "--ray-address": ["--workers=2"]}
    for value in VALUES_OF_ONE[command][name]:
        before = [] if name == "" else [*extra.get(command, []), *extra.get(name, [])]
        refusal(command, *before, f"{name}={value}" if name else value)
    assert list(place.iterdir()) == []


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize("option", ["out", "teacher", "policy", "data", "arch", "device", "ray-address", "workers"])
def test_a_value_of_the_wrong_type_in_a_file_is_one_line(option, place):
    for text in ("true", "false", '["a"]', "[]", "{ a = 1 }", "1979-05-27", *(["3"] if option == "out" else [])):
        (place / "a.toml").write_text(f"{option} = {text}")
        assert f"a.toml: {option}: " in refusal("run", "--config", "a.toml")


def test_settings_from_python_are_checked_by_type_too():
    wrong = {"updates": 2.5, "anchors": True, "epochs": "1", "reuse": 1, "leaf": "a", "seed": [1], "ratios": 1.0}
    wrong |= {"init": None, "kd_weight": float("nan"), "rollouts": 10**7}
    for name, value in wrong.items():
        with pytest.raises(n2n_fast.BadInput, match=f"^{name}: "):
            n2n_fast.SearchConfig(**{name: value})
    assert n2n_fast.SearchConfig(ratios=[0.5, 1.0], final_epochs=1) == n2n_fast.SearchConfig(
        ratios=(0.5, 1.0), final_epochs=1.0
    )


# The progress line


@pytest.mark.parametrize("width", [19, 39, 79, 119, 300])
def test_the_progress_line_fits(width):
    text = "reward 0.871, best 0.902 at 12.1x, 120.3 rollouts/min"
    for name in ("removal", "training the best 2 of shrinkage"):
        line = progress_line(name, 0.5, "12 s left", text, width)
        assert len(line) <= width
        assert line.startswith(name[:width])
        assert ("[##########----------]" in line) == (width > 79 and len(name) < width - 100)
        assert (text in line) == (len(name) < width - 70)
        assert " 50%" in line or len(name) > width - 6


def on_a_terminal(columns, steps=3, **environment):
    """What a bar writes to a terminal so wide."""
    code = "import time; from n2n_fast.cli.progress import Bar\nwith Bar(False) as bar:\n bar.phase('removal', 3)\n"
    code += f" for n in range({steps}): time.sleep(0.15); bar.step(n + 1, 0.5, 0.25)\n bar.message('done')"
    leader, follower = pty.openpty()
    size = struct.pack("HHHH", 24, columns, 0, 0)
    __import__("fcntl").ioctl(follower, __import__("termios").TIOCSWINSZ, size)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=follower, env={**os.environ, **environment}
    )
    process.wait()
    os.close(follower)
    written = b""
    try:
        while part := os.read(leader, 1 << 16):
            written += part
    except OSError:  # so ends a terminal
        pass
    os.close(leader)
    return written.decode()


@pytest.mark.parametrize("columns", [20, 40, 80, 200, 0])
def test_a_terminal_shows_one_line_for_all_steps(columns):
    *shown, done, last = on_a_terminal(columns, TERM="xterm", NO_COLOR="1").split("\r\n")
    assert (len(shown), done, last) == (1, "done", "")
    drawn = shown[0].split("\r")[1:]
    assert len(drawn) == 4
    assert {len(line) for line in drawn} == {(columns or 80) - 1}
    assert drawn[-1].startswith("removal")
    assert "100%" in drawn[-1]
    assert "\x1b" not in shown[0]


def test_a_dumb_terminal_gets_lines():
    assert on_a_terminal(80, TERM="dumb") == "removal: 3/3, loss 0.500, accuracy 25.0%, 0 s left\r\ndone\r\n"


# Python


ARGUMENTS = {
    "teacher": ("teacher.pt", {"fc.weight": torch.zeros(1)}, SmallResNet, None),
    "data": ("digits", (torch.zeros(1), torch.zeros(1)), [1], torch.utils.data.DataLoader([1]), None),
    "config": ({"updates": 3}, "fast", n2n_fast.SearchConfig),
    "out": (3, None, b"runs", ["runs"]),
    "progress": (print, True),
    "policies": (3, {}),
    "workers": (4, "4"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_compress_names_the_argument_of_a_wrong_type(name, place):
    right = {"teacher": SmallResNet(1, 4, 1), "data": quarters(), "config": TINY, "out": "here"}
    for value in ARGUMENTS[name]:
        expected = rf"^{name}: expected .+, got {type(value).__name__}$"
        with pytest.raises(TypeError, match=expected):
            n2n_fast.compress(**{**right, name: value})
    with pytest.raises(n2n_fast.BadInput, match=r"^out: an empty path"):
        n2n_fast.compress(**{**right, "out": ""})
    assert list(place.iterdir()) == []


def test_other_functions_name_the_argument_too():
    model, images = SmallResNet(1, 4, 1), torch.zeros(1, 1, 8, 8)
    for name, arguments in {
        "teacher": ("resnet18", images),
        "example_input": (model, (1, 1, 8, 8)),
        "calibration": (model, images, [images]),
    }.items():
        with pytest.raises(TypeError, match=f"^{name}: expected .+, got "):
            n2n_fast.ArchitectureSpace(*arguments)
    for name, value in (("leaf", "layer1"), ("round_to", "8")):
        with pytest.raises(TypeError, match=f"^{name}: expected .+, got "):
            n2n_fast.ArchitectureSpace(model, images, **{name: value})
    with pytest.raises(TypeError, match=r"^run: expected .+, got int"):
        n2n_fast.load_student(3)


WRAPPERS = {
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled": torch.compile,
    "all": lambda model: torch.compile(nn.DataParallel(torch.optim.swa_utils.AveragedModel(model))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off(name):
    with seeded(0, torch.device("cpu")):
        model = SmallResNet(1, 4, 1).eval()
    images = torch.randn(2, 1, 8, 8)
    plain, wrapped = (n2n_fast.ArchitectureSpace(one, images) for one in (model, WRAPPERS[name](model)))
    assert wrapped.layers == plain.layers
    assert type(unwrapped(WRAPPERS[name](model))) is SmallResNet
    ratios = [0.5] * len(plain.layers)
    students = [space.build(space.shrink(space.teacher, ratios)) for space in (plain, wrapped)]
    torch.testing.assert_close(students[0](images), students[1](images))


def test_compress_takes_wrappers_off(place):
    data = quarters()
    config = n2n_fast.SearchConfig(stages="shrinkage", updates=1, rollouts=1, rollout_steps=1, anchors=0, keep_top=1,
                                   final_epochs=0.05, init="sliced")  # fmt: skip
    for name, teacher in {"plain": taught(data), "wrapped": nn.DataParallel(taught(data))}.items():
        n2n_fast.compress(teacher, data, config, name)
    for file in ("architecture.json", "config.json"):
        assert (place / "plain" / file).read_text() == (place / "wrapped" / file).read_text()
