"""What a search leaves: the Pareto front, and files that can be read where there is no such device as it ran on."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elsewhere import ELSEWHERE, Fetching, tensors_of
from n2n_fast import SearchConfig
from n2n_fast.files.errors import DeviceFault
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search import result
from n2n_fast.search.checkpoint import RunDirectory
from n2n_fast.search.reward import Constraints
from n2n_fast.search.stage import Search, SearchProgress
from n2n_fast.training.data import ImageData
from n2n_fast.training.teachers import SmallResNet
from quarters import quarters

CONFIG = SearchConfig()
MEASURED = {"params": 2, "macs": 2, "validation_accuracy": 0.5}


@pytest.fixture
def finish(monkeypatch, tmp_path):
    """Write what a search on another device found."""
    monkeypatch.setattr(result, "_measured", lambda *_: dict(MEASURED))
    data, teacher = quarters(), SmallResNet(1, 4, 1).eval()
    described = data.described()
    monkeypatch.setattr(ImageData, "described", lambda _: described)  # which reads from the device
    space = ArchitectureSpace(teacher, data.train.batch(torch.arange(2))[0])
    arch = space.shrink(space.teacher, [0.5] * len(space.layers))
    student = space.build(arch).to(ELSEWHERE)

    def run():
        with Fetching(), RunDirectory(tmp_path / "run", {}) as directory:
            directory.begin()
            reference = SimpleNamespace(module=teacher, space=space, doubts=())
            search = Search(
                CONFIG, data.to(ELSEWHERE), reference, Constraints(), directory, SearchProgress(), *[None] * 4
            )
            stage = SimpleNamespace(
                name="shrinkage", space=space, result=arch, policy=teacher, anchors=[], finals=[], evaluated={}
            )
            search.stages.append(stage)
            return result.finish(search, student)

    return run


def test_students_are_written_from_the_cpu(finish):
    found = finish()
    assert {tensor.device for tensor in tensors_of(found.student)} == {ELSEWHERE}
    state = torch.load(found.out / "student.pt", weights_only=True)
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    loaded = result.load_student(found.out).eval()
    assert {tensor.device.type for tensor in tensors_of(loaded)} == {"cpu"}
    assert loaded(torch.zeros(3, 1, 8, 8)).shape == (3, 4)
    assert loaded.to(ELSEWHERE)(torch.zeros(3, 1, 8, 8, device=ELSEWHERE)).device == ELSEWHERE


def test_a_lack_of_memory_is_not_taken_for_a_student_that_cannot_be_exported(finish, monkeypatch):
    def export(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch.export, "export", export)
    with pytest.raises(DeviceFault, match="out of memory"):
        finish()


POINTS = st.lists(
    st.builds(
        result.Point, st.just("s"), st.text(max_size=2), st.integers(1, 9), st.integers(1, 9),
        st.sampled_from([0.1, 0.5, 0.9]), st.booleans(),
    ),
    max_size=12,
)  # fmt: skip


def beats(a, b, by):
    better = (getattr(a, by) < getattr(b, by)) or (a.accuracy > b.accuracy)
    return getattr(a, by) <= getattr(b, by) and a.accuracy >= b.accuracy and better


@given(POINTS, st.sampled_from(["params", "macs"]))
def test_the_front_is_what_nobody_beats(points, by):
    front = result.front(points, by)
    unbeaten = [p for p in points if not any(beats(q, p, by) for q in points)]
    assert {(getattr(p, by), p.accuracy) for p in front} == {(getattr(p, by), p.accuracy) for p in unbeaten}
    assert len(front) == len({(getattr(p, by), p.accuracy) for p in front})
    assert all(p in points for p in front)
