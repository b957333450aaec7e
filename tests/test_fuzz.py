"""Whatever comes in: architectures, histories and command lines that nobody would write."""

import json
import sys
from dataclasses import asdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from n2n_fast.cli import main
from n2n_fast.files.errors import BadInput
from n2n_fast.networks.graph import Architecture
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

NUMBERS = st.none() | st.floats(0, 1)
LINES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["rollout", "anchor", "map", "final"]),
        "stage": st.sampled_from(["removal", "shrinkage"]),
        "update": st.integers(0, 3),
        "index": st.integers(0, 3),
        "architecture": st.none() | st.text(),
        "proxy_accuracy": st.just(0.5),
        "accuracy": NUMBERS,
        "latency": NUMBERS,
        "seconds": st.dictionaries(st.text(), st.floats(0, 9)),
        "final_accuracy": NUMBERS,
        "training_seconds": st.floats(0, 9),
        "error": st.none(),
    }
)


def recovered(path, content):
    """What a run takes from a journal of this content, of which whole lines alone stay."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "history.jsonl").write_bytes(content)
    with RunDirectory(path, {}, resume=True) as directory:
        held = (path / "history.jsonl").read_bytes()
        assert content.startswith(held)
        for line in held.splitlines(keepends=True):
            assert line.endswith(b"\n")
            json.loads(line)
        return directory.recovered


@settings(max_examples=40, deadline=None, suppress_health_check=UNHURRIED)
@given(st.lists(LINES), st.integers(0, 2000), st.binary())
def test_whole_lines_are_recovered_and_torn_ones_dropped(tmp_path, lines, cut, garbage):
    texts = [json.dumps(line).encode() + b"\n" for line in lines]
    torn = json.dumps({"kind": "rollout", "stage": "removal", "update": 9, "index": 9}).encode()[:cut]
    found = recovered(tmp_path / "run", b"".join(texts) + torn)
    taken = {
        (line["kind"], line["stage"], line["update"], line["index"]): line
        for line in lines
        if line["kind"] in ("rollout", "anchor")
    }
    assert found == taken
    assert recovered(tmp_path / "run", b"".join(texts) + garbage.replace(b"{", b"")) == taken


@settings(max_examples=40, deadline=None, suppress_health_check=UNHURRIED)
@given(st.binary() | st.lists(JSON.map(json.dumps), max_size=5).map(lambda lines: "\n".join(lines).encode() + b"\n"))
def test_any_history_is_recovered_cleanly(tmp_path, content):
    for line in recovered(tmp_path / "run", content).values():
        assert line["kind"] in ("rollout", "anchor")


@given(LINES, st.sampled_from(["stage", "update", "index", "proxy_accuracy", "accuracy", "latency", "seconds"]), JSON)
@settings(max_examples=40, deadline=None, suppress_health_check=UNHURRIED)
def test_a_line_of_odd_values_is_done_again(tmp_path, line, name, value):
    found = recovered(tmp_path / "run", json.dumps({**line, "kind": "rollout", name: value}).encode() + b"\n")
    for taken in found.values():
        assert isinstance(taken["seconds"], dict)
        assert isinstance(taken["stage"], str)
        assert all(taken[key] is None or 0 <= taken[key] <= 1 for key in ("proxy_accuracy", "accuracy"))


def test_a_history_nested_deep_is_dropped(tmp_path):
    assert recovered(tmp_path / "run", b"[" * 200_000 + b"\n" + b'{"kind": ' * 100_000 + b"\n") == {}


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
