"""Extent arithmetic against plain bytes: each file byte is modelled by which blob byte it is."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from apollofs.metadata import extents
from apollofs.metadata.records import Extent

SPACE = 60
Model = list[tuple[int, int] | None]
Step = tuple[str, int, int]


def at(offset: int, length: int, blob: int = 1, blob_offset: int = 0) -> Extent:
    return Extent(offset, length, blob, blob_offset, 1000)


def model_of(found: extents.Extents, size: int = 3 * SPACE) -> Model:
    """What each byte of the file is; checks order and overlap in passing."""
    bytes_of: Model = [None] * size
    for extent in found:
        assert extent.length > 0
        for index in range(extent.length):
            assert bytes_of[extent.offset + index] is None
            bytes_of[extent.offset + index] = (extent.blob, extent.blob_offset + index)
    assert all(before.end <= after.offset for before, after in pairwise(found))
    return bytes_of


def extent_strategy() -> st.SearchStrategy[Extent]:
    return st.builds(
        at,
        st.integers(0, SPACE),
        st.integers(1, 20),
        st.integers(1, 3),
        st.integers(0, 20),
    )


lists = st.lists(extent_strategy(), max_size=8).map(lambda laid: extents.overlay((), laid))


@given(lists, st.lists(extent_strategy(), max_size=6))
def test_overlay_lays_each_over_what_was_there(newest: extents.Extents, laid: list[Extent]) -> None:
    expected = model_of(newest)
    for extent in laid:
        for index in range(extent.length):
            expected[extent.offset + index] = (extent.blob, extent.blob_offset + index)
    assert model_of(extents.overlay(newest, laid)) == expected


@given(lists, st.integers(0, SPACE), st.integers(0, SPACE))
def test_punch_and_truncate(newest: extents.Extents, offset: int, length: int) -> None:
    expected = model_of(newest)
    expected[offset : offset + length] = [None] * length
    assert model_of(extents.punch(newest, offset, length)) == expected
    cut = model_of(newest)
    cut[offset:] = [None] * (len(cut) - offset)
    assert model_of(extents.truncate(newest, offset)) == cut


@given(lists, st.integers(0, SPACE), st.integers(0, SPACE))
def test_shift_moves_what_lies_at_or_past_the_start(newest: extents.Extents, start: int, distance: int) -> None:
    before = model_of(newest)
    expected: Model = before[:start] + [None] * distance + before[start:]
    assert model_of(extents.shift(newest, start, distance), 3 * SPACE + distance) == expected


@given(lists, st.integers(0, 2 * SPACE), st.integers(0, SPACE))
@example((Extent(0, 2, 1, 0, 1000),), 1, 0)
def test_pieces_cover_the_range_without_gaps(newest: extents.Extents, offset: int, length: int) -> None:
    found = extents.pieces(newest, offset, length)
    assert sum(piece.length for piece in found) == length
    position = offset
    actual: Model = [None] * (3 * SPACE)
    for piece in found:
        assert piece.offset == position
        assert piece.length > 0
        position = piece.end
        if piece.extent is not None:
            assert (piece.extent.offset, piece.extent.length) == (piece.offset, piece.length)
            for index in range(piece.length):
                actual[piece.offset + index] = (piece.extent.blob, piece.extent.blob_offset + index)
    expected = model_of(newest)
    assert actual[offset : offset + length] == expected[offset : offset + length]


@given(lists, st.integers(0, 2 * SPACE))
def test_data_and_holes_are_found(newest: extents.Extents, offset: int) -> None:
    model = model_of(newest)
    data = [index for index in range(offset, len(model)) if model[index] is not None]
    holes = [index for index in range(offset, len(model)) if model[index] is None]
    assert extents.next_data(newest, offset) == (data[0] if data else None)
    assert extents.next_hole(newest, offset) == holes[0]


@given(lists)
def test_merging_changes_no_byte_and_leaves_nothing_to_merge(newest: extents.Extents) -> None:
    merged = extents.merge(newest)
    assert model_of(merged) == model_of(newest)
    assert extents.merge(merged) == merged
    assert extents.stored_bytes(merged) == extents.stored_bytes(newest)


def test_neighbours_of_one_blob_become_one_extent() -> None:
    assert extents.overlay((at(0, 10),), [at(10, 5, blob_offset=10)]) == (at(0, 15),)
    assert extents.overlay((at(0, 10),), [at(10, 5, blob_offset=11)]) == (at(0, 10), at(10, 5, blob_offset=11))
    assert extents.overlay((at(0, 10),), [at(10, 5, blob=2, blob_offset=10)]) == (
        at(0, 10),
        at(10, 5, blob=2, blob_offset=10),
    )


def test_an_extent_in_the_middle_is_kept_in_two_parts() -> None:
    assert extents.overlay((at(0, 100),), [at(40, 20, blob=2)]) == (
        at(0, 40),
        at(40, 20, blob=2),
        at(60, 40, blob_offset=60),
    )


def test_an_extent_across_the_start_of_a_shift_is_cut() -> None:
    assert extents.shift([at(0, 100)], 40, 10) == (at(0, 40), at(50, 60, blob_offset=40))


def test_a_cut_must_lie_within_the_extent() -> None:
    with pytest.raises(AssertionError):
        extents.cut(at(0, 10), 5, 11)
