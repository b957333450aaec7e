"""An architecture: equality, its key, its JSON and what is refused of it."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from n2n_fast.files.errors import BadInput
from n2n_fast.networks.architecture import Architecture

ARCH = Architecture(keep=(True, False), widths=(3, 8), kernels=((3, 3), ()), params=7, macs=9)


def test_an_architecture_is_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ARCH.params = 1  # type: ignore[misc]
    changes: list[dict[str, Any]] = [{"keep": (True, True)}, {"widths": (3, 7)}, {"kernels": ((1, 1), ())}]
    others = [dataclasses.replace(ARCH, **change) for change in changes]
    assert len({ARCH, *others}) == len({arch.key for arch in (ARCH, *others)}) == 4
    same = dataclasses.replace(ARCH, params=0)
    assert {ARCH: 1}[same] == 1
    assert ARCH.key == same.key == "2ddf81d4d725"


@given(
    st.lists(st.booleans()),
    st.lists(st.integers(1, 10**6)),
    st.lists(st.lists(st.integers(1, 11), max_size=3)),
    st.integers(0, 10**12),
)
def test_json_round_trip(keep: list[bool], widths: list[int], kernels: list[list[int]], params: int) -> None:
    arch = Architecture(tuple(keep), tuple(widths), tuple(map(tuple, kernels)), params, params + 1)
    text = arch.to_json()
    assert "\n" not in text
    read = Architecture.from_json(text)
    assert dataclasses.astuple(read) == dataclasses.astuple(arch)
    assert (read.key, hash(read)) == (arch.key, hash(arch))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.text() | JSON.map(json.dumps))
def test_garbage_is_no_architecture(text: str) -> None:
    with pytest.raises(BadInput):
        Architecture.from_json(text)


WRONG: list[tuple[str, Any]] = [
    *((field, value) for field in ("keep", "widths", "kernels", "params", "macs") for value in (None, "yes", [["x"]])),
    *(("widths", value) for value in ([3, -8], [3, 1.5], [3, float("inf")], {})),
    *(("params", value) for value in (float("inf"), float("nan"), 1.5, -1)),
    ("kernels", [[0, 3], []]),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=str)
def test_an_architecture_with_an_impossible_field_is_refused(field: str, value: Any) -> None:
    with pytest.raises(BadInput):
        Architecture.from_json(json.dumps({**json.loads(ARCH.to_json()), field: value}))


@pytest.mark.parametrize("field", dataclasses.asdict(ARCH))
def test_an_architecture_without_a_field_is_refused(field: str) -> None:
    with pytest.raises(BadInput):
        Architecture.from_json(json.dumps({k: v for k, v in json.loads(ARCH.to_json()).items() if k != field}))
