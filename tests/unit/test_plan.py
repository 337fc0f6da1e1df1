"""What a commit stores: inline or blob, which parts, in how many extents."""

from __future__ import annotations

from apollofs.fs import plan
from apollofs.fs.plan import Dirty, Part, Place, Plan, make_plan, without_holes
from apollofs.fs.segments import Segment
from apollofs.metadata.records import Body, Extent, Inode, InodeFlag


def body_of(size: int, *extents: Extent, inline: bytes = b"") -> Body:
    flags = InodeFlag.INLINE if inline else InodeFlag(0)
    inode = Inode(
        9, 0o100644, 1, 0, 0, size, 0, 0, 0, 0, flags=flags, extents=extents, inline_bytes=len(inline), body_version=7
    )
    return Body(inode, inline)


def dirty(*segments: Segment, append_from: int | None = None) -> Dirty:
    return Dirty(segments, (), max((segment.end for segment in segments), default=0), append_from, 5)


def alone(found: Plan) -> Place:
    """A blob of its own."""
    return Place(77, 0, found.length)


def test_small_is_inline_with_gaps_as_zeros() -> None:
    found = make_plan(body_of(0), dirty(Segment(10, 5, 0)), 64)
    assert found.inline
    assert found.parts == (Part(0, 10, None), Part(10, 5, Segment(10, 5, 0)))
    change = found.inline_change(b"x" * 15)
    assert (change.inline, change.base_version, change.size_at_least) == (b"x" * 15, 7, 15)


def test_growing_past_the_limit_takes_the_inline_bytes_along() -> None:
    found = make_plan(body_of(50, inline=b"i" * 50), dirty(Segment(40, 100, 0)), 64)
    assert not found.inline
    change = found.blob_change(alone(found))
    assert change.lifts_inline
    assert change.extents == (Extent(0, 140, 77, 0, 140),)


def test_what_is_written_is_one_blob_and_one_extent_a_run() -> None:
    base = body_of(1000, Extent(0, 1000, 3, 0, 1000))
    found = make_plan(base, dirty(Segment(0, 10, 90), Segment(10, 10, 0), Segment(500, 20, 10)), 64)
    assert found.blob_change(alone(found)).extents == (Extent(0, 20, 77, 0, 40), Extent(500, 20, 77, 20, 40))


def test_what_is_packed_lies_within_a_blob_and_says_so() -> None:
    found = make_plan(body_of(0), dirty(Segment(0, 100, 0)), 64)
    change = found.blob_change(Place(77, 40, 200, is_packed=True))
    assert change.extents == (Extent(0, 100, 77, 40, 200),)
    assert change.is_packed


def test_what_was_appended_has_extents_of_its_own() -> None:
    base = body_of(1000, Extent(0, 1000, 3, 0, 1000))
    found = make_plan(base, dirty(Segment(990, 100, 0), append_from=1000), 64)
    change = found.blob_change(alone(found))
    assert change.extents == (Extent(990, 10, 77, 0, 100), Extent(1000, 90, 77, 10, 100))
    assert change.append_from == 1000


def test_plans_share_a_blob_if_the_same_bytes_go_elsewhere() -> None:
    base = body_of(1000, Extent(0, 1000, 3, 0, 1000))
    here = make_plan(base, dirty(Segment(1000, 90, 5)), 64)
    there = make_plan(base, dirty(Segment(1200, 90, 5)), 64)
    other = make_plan(base, dirty(Segment(1000, 90, 6)), 64)
    assert here.content == there.content != other.content


def test_a_rewrite_stores_all_data_and_no_hole() -> None:
    base = body_of(1000, Extent(0, 100, 3, 0, 100), Extent(600, 400, 4, 0, 400))
    found = make_plan(base, dirty(Segment(50, 100, 0)), 64, rewrite=True)
    change = found.blob_change(alone(found))
    assert change.rewrites_all
    assert change.append_from is None
    assert change.extents == (Extent(0, 150, 77, 0, 550), Extent(600, 400, 77, 150, 550))


def test_a_rewrite_of_a_very_sparse_file_fills_small_holes() -> None:
    count = plan.RUNS_MAX + 10
    base = body_of(count * 100, *(Extent(index * 100, 50, 3, index * 50, count * 50) for index in range(count)))
    found = make_plan(base, dirty(), 64, rewrite=True)
    change = found.blob_change(alone(found))
    assert len(change.extents) <= plan.RUNS_MAX
    assert sum(extent.length for extent in change.extents) == count * 100 - 50


def test_holes_of_the_base_read_as_zeros() -> None:
    inline = without_holes(body_of(20, inline=b"i" * 10), [(2, 3), (8, 100)])
    assert inline.inline == b"ii\0\0\0iii\0\0"
    stored = without_holes(body_of(100, Extent(0, 100, 3, 0, 100)), [(10, 80)])
    assert stored.inode.extents == (Extent(0, 10, 3, 0, 100), Extent(90, 10, 3, 90, 100))


def test_a_hole_at_the_end_of_inline_bytes_shortens_them() -> None:
    base = without_holes(body_of(20, inline=b"i" * 10), [(5, 5)])
    found = make_plan(base, Dirty(holes=((5, 5),), mtime_ns=1), 64)
    assert found.length == 5
