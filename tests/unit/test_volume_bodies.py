"""Commits, truncation and usage of bodies on a volume, seen from a second mount."""

from __future__ import annotations

import stat

import pytest

from apollofs.metadata import errors
from apollofs.metadata.records import (
    ROOT_INO,
    BodyChange,
    Extent,
    SetAttr,
)
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, Pair

FILE = stat.S_IFREG | 0o644


# -- bodies -----------------------------------------------------------------------------------------------------------


def extent(volume: Volume, offset: int, length: int) -> Extent:
    return Extent(offset, length, volume.new_blob(), 0, length)


async def test_two_mounts_keep_each_others_ranges(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    await b.lookup(ROOT_INO, b"f")
    left, right = extent(a, 0, 100), extent(b, 200, 100)
    await a.commit_body(file.ino, BodyChange(0, 100, extents=(left,)))
    await b.commit_body(file.ino, BodyChange(0, 300, extents=(right,)))
    body = await a.read_body(file.ino)
    assert body.inode.extents == (left, right)
    assert body.inode.size_bytes == 300
    assert body.inode.allocated_bytes == 200


async def test_appends_move_behind_each_other(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    await b.lookup(ROOT_INO, b"f")
    await a.commit_body(file.ino, BodyChange(0, 100, extents=(extent(a, 0, 100),), append_from=0))
    done = await b.commit_body(file.ino, BodyChange(0, 50, extents=(extent(b, 0, 50),), append_from=0))
    assert [(e.offset, e.length) for e in done.extents] == [(0, 100), (100, 50)]
    assert done.size_bytes == 150


async def test_inline_bodies_do_not_merge(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    await b.lookup(ROOT_INO, b"f")
    await a.commit_body(file.ino, BodyChange(0, 5, inline=b"hello"))
    with pytest.raises(errors.BodyConflict):
        await b.commit_body(file.ino, BodyChange(0, 5, inline=b"HELLO"))
    with pytest.raises(errors.BodyConflict):
        await b.commit_body(file.ino, BodyChange(0, 9, extents=(extent(b, 5, 4),)))
    body = await b.read_body(file.ino)
    assert body.inline == b"hello"
    lifted = extent(b, 0, 9)
    await b.commit_body(file.ino, BodyChange(body.inode.body_version, 9, extents=(lifted,), lifts_inline=True))
    assert (await a.read_body(file.ino)).inode.extents == (lifted,)


async def test_truncate(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    await a.commit_body(file.ino, BodyChange(0, 5, inline=b"hello"))
    await b.lookup(ROOT_INO, b"f")
    await b.setattr(file.ino, SetAttr(size_bytes=2))
    await b.setattr(file.ino, SetAttr(size_bytes=10))
    body = await a.read_body(file.ino)
    assert (body.inline, body.inode.size_bytes) == (b"he", 10)
    await a.setattr(file.ino, SetAttr(size_bytes=0))
    assert not (await b.getattr(file.ino)).is_inline
    with pytest.raises(errors.FileTooLarge):
        await a.setattr(file.ino, SetAttr(size_bytes=(1 << 63) - 1))
    with pytest.raises(errors.IsADirectory):
        await a.setattr(ROOT_INO, SetAttr(size_bytes=0))


async def test_many_extents_go_to_pages_and_back(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    spread = tuple(extent(a, 1000 * number, 10) for number in range(1500))
    await a.commit_body(file.ino, BodyChange(0, 1_500_000, extents=spread))
    await b.lookup(ROOT_INO, b"f")
    body = await b.read_body(file.ino)
    assert body.inode.extents == spread
    assert body.inode.allocated_bytes == 15_000
    await b.setattr(file.ino, SetAttr(size_bytes=600_000))
    assert (await a.read_body(file.ino)).inode.extents == spread[:600]
    await b.setattr(file.ino, SetAttr(size_bytes=10_000))
    assert (await a.read_body(file.ino)).inode.extent_pages == 0
    too_many = tuple(extent(a, 100_000 + 20 * number, 10) for number in range(8193))
    with pytest.raises(errors.TooManyExtents):
        await a.commit_body(file.ino, BodyChange(0, 1, extents=too_many))


async def test_usage(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", FILE, 0, ME)
    await a.commit_body(file.ino, BodyChange(0, 100, extents=(extent(a, 0, 100),)))
    usage = await a.usage()
    assert (usage.bytes, usage.inodes) == (100, 1)
    await b.unlink(ROOT_INO, b"f")
    assert (await b.usage()).inodes <= 1
