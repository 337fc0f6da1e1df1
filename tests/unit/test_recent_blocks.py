"""Blocks that stay in memory for a moment after they were fetched."""

from __future__ import annotations

from apollofs.fs.images.recent import RecentBlocks


def block(fill: int, size: int = 10) -> memoryview:
    return memoryview(bytes([fill]) * size)


def test_parts_of_a_block_that_is_there() -> None:
    recent = RecentBlocks()
    recent.add("image", 3, memoryview(b"0123456789"))
    assert bytes(recent.read("image", 3, 2, 4) or b"") == b"2345"
    assert bytes(recent.read("image", 3, 5, 5) or b"") == b"56789"
    assert recent.read("image", 4, 0, 1) is None
    assert recent.read("other", 3, 0, 1) is None


def test_what_was_used_least_leaves_first() -> None:
    recent = RecentBlocks(30)
    for at in range(3):
        recent.add("image", at, block(at))
    assert recent.get("image", 0) is not None
    recent.add("image", 3, block(3))
    assert [at for at in range(4) if recent.get("image", at) is not None] == [0, 2, 3]


def test_what_was_read_to_its_end_leaves_before_what_waits() -> None:
    recent = RecentBlocks(30)
    for at in range(3):
        recent.add("image", at, block(at))
    assert recent.read("image", 2, 0, 10) is not None
    recent.add("image", 3, block(3))
    assert [at for at in range(4) if recent.get("image", at) is not None] == [0, 1, 3]


def test_the_bound_counts_bytes_and_a_block_once() -> None:
    recent = RecentBlocks(30)
    for _ in range(5):
        recent.add("image", 0, block(0))
    recent.add("image", 1, block(1, 20))
    assert recent.get("image", 0) is not None
    recent.add("image", 2, block(2, 40))
    assert all(recent.get("image", at) is None for at in range(3))


def test_an_image_that_nobody_has_open_leaves_nothing() -> None:
    recent = RecentBlocks()
    recent.add("image", 0, block(0))
    recent.add("other", 0, block(1))
    recent.forget("image")
    assert recent.get("image", 0) is None
    assert recent.get("other", 0) is not None
