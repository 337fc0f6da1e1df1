"""The interval map of staged bytes against a dict of single bytes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from apollofs.fs.segments import Segment, SegmentMap, shifted

Bytes = dict[int, int]


def bytes_of(segments: tuple[Segment, ...]) -> Bytes:
    assert all(before.end <= after.offset for before, after in pairwise(segments))
    return {segment.offset + index: segment.at + index for segment in segments for index in range(segment.length)}


operations = st.lists(
    st.tuples(st.sampled_from(["put", "drop", "drop_all", "shift", "forget"]), st.integers(0, 60), st.integers(1, 30)),
    max_size=20,
)


@given(operations)
def test_every_byte_is_where_it_was_put(plan: list[tuple[str, int, int]]) -> None:
    found = SegmentMap()
    model: Bytes = {}
    tail = 0
    for kind, offset, length in plan:
        version, before = found.version, dict(model)
        if kind == "put":
            gone = found.put(Segment(offset, length, tail))
            assert bytes_of(tuple(gone)) == {at: before[at] for at in range(offset, offset + length) if at in before}
            model |= {offset + index: tail + index for index in range(length)}
            tail += length
        elif kind == "drop":
            gone = found.drop(offset, offset + length)
            assert bytes_of(tuple(gone)) == {at: before[at] for at in range(offset, offset + length) if at in before}
            model = {at: place for at, place in before.items() if not offset <= at < offset + length}
        elif kind == "drop_all":
            found.drop(offset)
            model = {at: place for at, place in before.items() if at < offset}
        elif kind == "shift":
            snapshot = found.segments()
            found.shift(offset, length)
            model = {at + length if at >= offset else at: place for at, place in before.items()}
            assert shifted(snapshot, offset, length) == found.segments()
        else:
            found.forget([Segment(0, length, offset), Segment(0, 5, offset + length + 5)])
            places = {*range(offset, offset + length), *range(offset + length + 5, offset + length + 10)}
            model = {at: place for at, place in before.items() if place not in places}
        assert bytes_of(found.segments()) == model
        assert found.end == max(model, default=-1) + 1
        assert found.end_before(30) == max((at for at in model if at < 30), default=-1) + 1
        assert bool(found) == bool(model)
        assert model == before or found.version > version
        assert bytes_of(tuple(found.within(20, 25))) == {at: place for at, place in model.items() if 20 <= at < 45}


def test_neighbours_in_both_places_become_one() -> None:
    found = SegmentMap()
    found.put(Segment(0, 10, 0))
    found.put(Segment(20, 10, 20))
    found.put(Segment(10, 10, 10))
    assert found.segments() == (Segment(0, 30, 0),)
    found.put(Segment(30, 5, 40))
    assert len(found) == 2


def test_what_moves_back_covers_what_it_meets() -> None:
    found = SegmentMap()
    found.put(Segment(0, 10, 0))
    found.put(Segment(20, 10, 100))
    replaced = found.shift(20, -15)
    assert found.segments() == (Segment(0, 5, 0), Segment(5, 10, 100))
    assert replaced == [Segment(5, 5, 5)]
