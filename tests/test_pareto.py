"""The Pareto front, against its definition."""

from hypothesis import given
from hypothesis import strategies as st

from n2n_fast.search.result import Point, front

POINTS = st.lists(
    st.builds(
        Point, st.just("s"), st.text(max_size=2), st.integers(1, 9), st.integers(1, 9),
        st.sampled_from([0.1, 0.5, 0.9]), st.booleans(),
    ),
    max_size=12,
)  # fmt: skip


def beats(a: Point, b: Point, by: str) -> bool:
    better = (getattr(a, by) < getattr(b, by)) or (a.accuracy > b.accuracy)
    return getattr(a, by) <= getattr(b, by) and a.accuracy >= b.accuracy and better


@given(POINTS, st.sampled_from(["params", "macs"]))
def test_the_front_is_what_nobody_beats(points: list[Point], by: str) -> None:
    found = front(points, by)
    unbeaten = [p for p in points if not any(beats(q, p, by) for q in points)]
    assert {(getattr(p, by), p.accuracy) for p in found} == {(getattr(p, by), p.accuracy) for p in unbeaten}
    assert len(found) == len({(getattr(p, by), p.accuracy) for p in found})
    assert all(p in points for p in found)
