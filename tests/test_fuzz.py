"""Whatever comes in: architectures, histories and command lines that nobody would write."""

import json
import shutil
import sys
from dataclasses import asdict

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from n2n_fast.cli import main
from n2n_fast.files.errors import BadInput
from n2n_fast.networks.architecture import Architecture
from n2n_fast.search.checkpoint import RunDirectory

UNHURRIED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # a busy machine is no fault

COUNTS = st.integers(1, 2**70)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
ARCHITECTURES = st.builds(
    Architecture,
    keep=st.lists(st.booleans()).map(tuple),
    widths=st.lists(COUNTS).map(tuple),
    kernels=st.lists(st.lists(COUNTS, max_size=3).map(tuple)).map(tuple),
    params=st.integers(0, 2**70),
    macs=st.integers(0, 2**70),
)
FIELDS = ("keep", "widths", "kernels", "params", "macs")


@given(ARCHITECTURES)
def test_architectures_survive_json(arch):
    again = Architecture.from_json(arch.to_json())
    assert asdict(again) == asdict(arch)
    assert again.key == arch.key


@given(JSON.map(json.dumps) | st.text() | st.fixed_dictionaries(dict.fromkeys(FIELDS, JSON)).map(json.dumps))
def test_other_json_is_no_architecture(text):
    try:
        arch = Architecture.from_json(text)
    except BadInput:
        return
    assert json.loads(arch.to_json()) == json.loads(text)


# Histories


@settings(max_examples=40, deadline=None, suppress_health_check=UNHURRIED)
@given(st.lists(JSON.map(json.dumps), max_size=5), st.binary())
@example([], b"[" * 200_000 + b"\n")
def test_whatever_lies_behind_the_checkpoint_is_cut_off_unread(tmp_path, lines, garbage):
    path = tmp_path / "run"
    shutil.rmtree(path, ignore_errors=True)
    with RunDirectory(path, {}) as directory:
        directory.begin()
        for line in lines:
            directory.log({"line": line})
        directory.save({})
    history = path / "history.jsonl"
    known = history.read_bytes()
    history.write_bytes(known + garbage)
    with RunDirectory(path, {}, resume=True) as directory:
        assert history.read_bytes() == known + garbage  # as long as nothing begins
        directory.begin()
        assert history.read_bytes() == known
        directory.log({"line": "another"})
    *before, last = map(json.loads, history.read_text().splitlines())
    assert [line["line"] for line in before] == lines
    assert last == {"line": "another"}


# Command lines

OPTIONS = {
    name: sorted({option for parameter in main.cli.commands[name].params for option in parameter.opts if "-" in option})
    for name in ("run", "inspect", "evaluate", "teach")
}
VALUES = st.sampled_from(
    ["", "0", "-1", "1", "nan", "inf", "1e400", "9" * 30, "x", "digits", "npz:", "npz:no", "cpu", "resnet18", "both",
     ",", "0.5,0.5", "\u202e", "a:b", ".", "no/where", "--"]
)  # fmt: skip
# Each of them ends a command before it trains, whatever the others are.
ENDING = {
    "run": ["--teacher", "missing.pt"],
    "inspect": ["--teacher", "missing.pt"],
    "evaluate": ["missing"],
    "teach": ["--out", "missing/teacher.pt"],
}


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from(sorted(OPTIONS)))
    options = draw(st.lists(st.tuples(st.sampled_from(OPTIONS[command]), VALUES), max_size=5))
    words = [word for option in options for word in option]
    drop = draw(st.lists(st.integers(0, max(0, len(words) - 1)), max_size=2))
    return [command, *(word for place, word in enumerate(words) if place not in drop), *ENDING[command]]


@settings(max_examples=200, deadline=None, suppress_health_check=UNHURRIED)
@given(command_lines())
def test_command_lines_never_end_in_a_traceback(monkeypatch, tmp_path, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["n2n-fast", *words])
    with pytest.raises(SystemExit) as stop:
        main.main()
    errors = capsys.readouterr().err
    assert stop.value.code in (0, 2, 3), errors
    assert stop.value.code == 0 or (errors.startswith("n2n-fast: ") and errors.count("\n") == 1), errors
