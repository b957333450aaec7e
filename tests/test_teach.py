"""Teaching: what is refused before it trains, what survives an interrupt or a full disk, what the companion says."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from command_line import invoke, output, refusal
from n2n_fast.cli import teach
from n2n_fast.cli.progress import Bar
from n2n_fast.search import checkpoint
from n2n_fast.training import distill
from n2n_fast.training.data import accuracy
from n2n_fast.training.datasets import load
from n2n_fast.training.teacher_files import load_teacher, made_from
from n2n_fast.training.teachers import SmallResNet

QUICK = ("teach", "--arch", "digits_resnet", "--epochs", "2", "--seed", "3", "--device", "cpu", "--quiet")
KEPT, TEACHER, COMPANION = "t.pt.training", "t.pt", "t.pt.json"
OURS = b'{"made_by": "n2n-fast teach"}'


pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a teacher whose training was never cut off: name to content."""
    directory = tmp_path_factory.mktemp("whole")
    output(*QUICK, "--out", directory / TEACHER)
    return contents(directory)


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def stop_after(monkeypatch, steps):
    """Ask for a stop when the progress tells of so many steps."""
    plain = Bar.step

    def step(self, done, *told):
        plain(self, done, *told)
        if done == steps:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bar, "step", step)


@pytest.fixture
def cut_off(monkeypatch, place):
    """The content of a directory in which a training was interrupted after 10 of its 16 steps."""
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        code, _, err = invoke(*QUICK, "--out", TEACHER)
    assert code == 130, err
    return contents(place)


def fill_disk(monkeypatch, at=math.inf):
    """Let the disk be full from the `at`-th fsync on; a list of one that counts them."""
    count, plain = [0], os.fsync

    def fsync(descriptor):
        count[0] += 1
        if count[0] >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return count


# What comes of it


def test_a_teacher_is_written_with_how_it_was_made(whole, place):
    assert set(whole) == {TEACHER, COMPANION}
    for name, content in whole.items():
        (place / name).write_bytes(content)
    model, data = load_teacher(TEACHER), load("digits", validation=0.2)
    made = made_from(TEACHER, model)
    assert made == json.loads(whole[COMPANION])
    assert made["data"] == data.described()
    assert made["validation_accuracy"] == accuracy(model, data.validation)
    assert made["test_accuracy"] == accuracy(model, data.test)
    assert (made["arch"], made["settings"]["epochs"], made["settings"]["seed"]) == ("digits_resnet", 2.0, 3)


def test_a_stale_companion_of_ours_gives_way(whole, place):
    (place / COMPANION).write_bytes(OURS)
    output(*QUICK, "--out", TEACHER)
    assert contents(place) == whole


def test_each_teacher_has_a_companion_of_its_own(whole, place):
    for name in ("t.pth", "t.json"):
        output(*QUICK, "--out", name)
    for name in ("t.pt", "t.pt.json"):
        (place / name).write_bytes(whole[name])
    told = [made_from(name, load_teacher(name)) for name in ("t.pt", "t.pth", "t.json")]
    assert told == [json.loads(whole[COMPANION])] * 3


def test_a_companion_of_the_older_name_is_read(whole, place):
    (place / TEACHER).write_bytes(whole[TEACHER])
    (place / "t.json").write_bytes(whole[COMPANION])
    (place / COMPANION).write_bytes(OURS)  # of other weights
    assert made_from(TEACHER, load_teacher(TEACHER)) == json.loads(whole[COMPANION])


def test_the_second_of_two_at_once_is_refused(whole, place, monkeypatch):
    lines, plain = [], teach.trained

    def trained(*args, **how):
        lines.extend(refusal(*QUICK, "--out", TEACHER, *more) for more in ((), ("--resume",)))
        return plain(*args, **how)

    monkeypatch.setattr(teach, "trained", trained)
    output(*QUICK, "--out", TEACHER)
    assert lines == ["n2n-fast: t.pt: another process works on it; wait for that or give another --out\n"] * 2
    assert contents(place) == whole


# What is refused before it trains

REFUSED = {
    "--epochs nan": "--epochs",
    "--epochs inf": "--epochs",
    "--epochs 0": "--epochs",
    "--epochs -1": "--epochs",
    "--epochs 1e300": "100,000",
    "--learning-rate nan": "--learning-rate",
    "--learning-rate inf": "--learning-rate",
    "--learning-rate -1": "--learning-rate",
    "--learning-rate 0": "--learning-rate",
    "--batch-size 0": "--batch-size",
    "--batch-size 1": "--batch-size",
    "--channels 0": "--channels",
    "--channels 2": "2 are asked for",
    "--image-size 0": "--image-size",
    f"--seed {2**64}": "--seed",
    "--arch resnet19": "'resnet19' is no known architecture",
    "--arch squeezenet1_1 --cifar-stem": "squeezenet1_1 has no CIFAR stem",
    "--device meta": "--device",
    "--mean nan": "mean",
    "--std 0": "std",
    "--out=": "an empty path",
    "--out .": "is a directory",
    "--out none/t.pt": "its directory does not exist",
    "--out /proc/t.pt": "/proc/t.pt: ",
    f"--out {'t' * 300}.pt": "File name too long",
    "--resume": "teacher.pt.training: no training to go on with; leave out --resume",
}


@pytest.mark.parametrize(("options", "expected"), REFUSED.items())
def test_it_is_refused_at_once(options, expected, place, monkeypatch):
    monkeypatch.setattr(distill, "TrainingStep", None)
    assert expected in refusal(*QUICK, *options.split())
    assert contents(place) == {}


@pytest.mark.parametrize("options", ["--epochs nan", "--learning-rate -1", "--arch resnet19", "--out none/t.pt"])
def test_it_is_refused_before_the_data_are_read(options):
    assert "nowhere" not in refusal(*QUICK, "--data", "cifar10:nowhere", *options.split())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (TEACHER, b"precious", "t.pt: exists already; give another --out or remove it"),
        (COMPANION, b"precious", "t.pt.json: would be overwritten, and is not by n2n-fast teach"),
        (COMPANION, b"{}", "t.pt.json: would be overwritten"),
        (KEPT, b"precious", "t.pt.training: a training that was cut off; go on with --resume, remove it"),
    ],
)
def test_existing_files_stay(name, content, expected, place):
    (place / name).write_bytes(content)
    assert expected in refusal(*QUICK, "--out", TEACHER)
    assert contents(place) == {name: content}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_refused(place):
    (place / "fixed").mkdir(mode=0o555)
    assert "fixed/t.pt: cannot be written (Permission denied)" in refusal(*QUICK, "--out", "fixed/t.pt")


def test_a_full_disk_is_refused_before_the_training(place, monkeypatch):
    fill_disk(monkeypatch, 1)
    assert "t.pt: cannot be written (No space left on device)" in refusal(*QUICK, "--out", TEACHER)
    assert contents(place) == {}


def test_too_little_room_is_told_before_the_training(place, monkeypatch):
    weights = sum(tensor.nbytes for tensor in SmallResNet(2, 10, 1).state_dict().values())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=4 * weights - 1))
    assert "t.pt: about 2.8 MB are needed, its disk has 2.8 MB; make room" in refusal(*QUICK, "--out", TEACHER)
    assert contents(place) == {}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=4 * weights))
    output(*QUICK, "--out", TEACHER)


# Cut off, and going on


def test_an_interrupt_is_told_with_the_command_that_goes_on_to_the_same_end(whole, place, monkeypatch):
    command = [*QUICK, "--out", TEACHER]
    for steps in (10, 16):  # the latter is the last one
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            code, out, err = invoke(*command)
        assert (code, out) == (130, "")
        assert set(contents(place)) == {KEPT}
        told, _, again = err.splitlines()[-1].partition(": ")
        assert told == "interrupted; go on with"
        assert again == f"n2n-fast {' '.join(QUICK)} --out t.pt --resume"
        command = again.split()[1:]
    output(*command)
    assert contents(place) == whole


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_another_process_with_130(stop, place):
    command = [sys.executable, "-m", "n2n_fast", *QUICK, "--epochs", "9999", "--out", TEACHER]
    started = "import sys, n2n_fast.cli.progress as p; p.Bar.phase = lambda *_: print('begun', flush=True); "
    command[1:3] = ["-c", started + "import n2n_fast.cli.main as m; m.main()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("interrupted; go on with: n2n-fast ")
    assert set(contents(place)) == {KEPT}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--epochs 3", "epochs (2.0 there, 3.0 here)"),
        ("--batch-size 64 --seed 4", "batch_size (128 there, 64 here), seed (3 there, 4 here)"),
        ("--learning-rate 0.2", "learning_rate (0.1 there, 0.2 here)"),
        ("--arch resnet20", "arch ('digits_resnet' there, 'resnet20' here)"),
        ("--channels 3", "channels (1 there, 3 here)"),
        (
            "--image-size 16",
            "augmentation.crop (1 there, 2 here), image_size ([8, 8] there, [16, 16] here)",
        ),
        ("--std 0.5", "std ("),
    ],
)
def test_going_on_with_other_settings_is_refused(options, expected, cut_off, place):
    err = refusal(*QUICK, "--out", TEACHER, "--resume", *options.split())
    assert err.startswith(f"n2n-fast: t.pt.training: made by another configuration: {expected}")
    assert contents(place) == cut_off


def test_going_on_with_other_data_is_refused(cut_off, place, monkeypatch):
    def other(spec, **how):
        return replace(load(spec, **how), digest="another")

    monkeypatch.setattr("n2n_fast.cli.data.load", other)
    assert "data ('" in refusal(*QUICK, "--out", TEACHER, "--resume")
    assert contents(place) == cut_off


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_damaged_training_is_refused(size, cut_off, place):
    (place / KEPT).write_bytes(cut_off[KEPT][:size])
    assert KEPT in refusal(*QUICK, "--out", TEACHER, "--resume")
    torch.save({"name": 3, "state": torch.zeros(2)}, KEPT)
    assert KEPT in refusal(*QUICK, "--out", TEACHER, "--resume")


# A full disk, a failing device, a training that diverges


@pytest.fixture
def keeps_each_step(monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN", -1.0)


def test_a_full_disk_at_any_moment_leaves_what_was_kept(whole, cut_off, place, monkeypatch, keeps_each_step):
    """Each write takes two of fsync, of the file and of its directory."""
    command = (*QUICK, "--out", TEACHER)
    with monkeypatch.context() as patch:
        count = fill_disk(patch)
        output(*command, "--resume")
        (place / TEACHER).unlink()
        writes = count[0]
    for at in (3, 6, *range(writes - 3, writes + 1)):
        for name in (TEACHER, COMPANION, KEPT):
            (place / name).unlink(missing_ok=True)
        (place / KEPT).write_bytes(cut_off[KEPT])
        with monkeypatch.context() as patch:
            fill_disk(patch, at)
            err = refusal(*command, "--resume")
        assert err.endswith(f": No space left on device; what is done is kept, go on with: n2n-fast"
                            f" {' '.join(command)} --resume\n")  # fmt: skip
        left = contents(place)
        assert KEPT in left
        assert not {name for name in left if name.endswith((".new", ".probe"))}
        assert left.get(TEACHER, whole[TEACHER]) == whole[TEACHER]
        if TEACHER not in left:
            output(*command, "--resume")
            assert contents(place) == whole


def test_a_failing_device_leaves_what_was_kept(place, monkeypatch, keeps_each_step):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(teach, "accuracy", fails)
    err = refusal(*QUICK, "--out", TEACHER)
    assert err.startswith("n2n-fast: out of memory (CUDA out of memory.)")
    assert err.endswith("; what is done is kept, go on with: n2n-fast " + " ".join(QUICK) + " --out t.pt --resume\n")
    assert set(contents(place)) == {KEPT}


def test_a_training_that_diverges_leaves_nothing_in_the_way(place, keeps_each_step):
    assert "lower the learning rate" in refusal(*QUICK, "--out", TEACHER, "--learning-rate", "99999")
    assert contents(place) == {}


# The companion


@pytest.mark.parametrize(
    "change",
    [
        {"made_by": "somebody"},
        {"weights": "0" * 16},
        {"weights": None},
        {"data": None},
        {"data": [1]},
        {"data": {"name": "digits"}},
    ],
)
def test_a_foreign_companion_tells_nothing(change, whole, place):
    (place / TEACHER).write_bytes(whole[TEACHER])
    (place / COMPANION).write_text(json.dumps({**json.loads(whole[COMPANION]), **change}))
    assert made_from(place / TEACHER, load_teacher(TEACHER)) is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_companion_tells_nothing_or_what_can_be_relied_on(data, whole, place):
    made = json.loads(whole[COMPANION])
    key = data.draw(st.sampled_from(sorted(made["data"])))
    value = data.draw(st.none() | st.integers() | st.text() | st.floats() | st.lists(st.integers() | st.text()))
    damaged = json.dumps({**made, "data": {**made["data"], key: value}}).encode()
    (place / TEACHER).write_bytes(whole[TEACHER])
    (place / COMPANION).write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    told = made_from(TEACHER, load_teacher(TEACHER))
    assert told is None or all(type(n) in (int, float) for n in (*told["data"]["mean"], *told["data"]["image_size"]))


def test_without_a_companion_nothing_is_known(whole, place):
    (place / TEACHER).write_bytes(whole[TEACHER])
    model = load_teacher(TEACHER)
    assert made_from(TEACHER, model) is None
    for content in (b"", b"\xff\xfe", b"[" * 100_000, b"[1]", b"NaN"):
        (place / COMPANION).write_bytes(content)
        assert made_from(TEACHER, model) is None
    (place / COMPANION).unlink()
    (place / COMPANION).mkdir()
    assert made_from(TEACHER, model) is None
