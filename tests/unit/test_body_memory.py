"""Bodies that are remembered by version."""

from __future__ import annotations

import stat

import pytest

from apollofs.metadata import body_memory
from apollofs.metadata.body_memory import BodyMemory
from apollofs.metadata.records import ROOT_INO, Body, BodyChange, Extent, Inode, InodeFlag
from tests.support.volumes import ME, Pair


def inline(ino: int, version: int, size: int = 4) -> Body:
    flags = InodeFlag.INLINE
    inode = Inode(ino, stat.S_IFREG, 1, 0, 0, size, 0, 0, 0, 0, flags=flags, inline_bytes=size, body_version=version)
    return Body(inode, bytes(size))


def test_a_body_in_the_record_needs_no_memory() -> None:
    extent = Extent(0, 4, 1, 0, 4)
    inode = Inode(5, stat.S_IFREG, 1, 0, 0, 4, 0, 0, 0, 0, extents=(extent,))
    assert BodyMemory().of(inode) == Body(inode)


def test_only_the_version_that_is_asked_for() -> None:
    memory = BodyMemory()
    memory.put(inline(5, 2))
    memory.put(inline(5, 1))
    assert memory.of(inline(5, 2).inode) == inline(5, 2)
    assert memory.of(inline(5, 1).inode) is None
    assert memory.of(inline(5, 3).inode) is None
    memory.forget(5)
    assert memory.of(inline(5, 2).inode) is None


def test_extents_that_are_paged_out() -> None:
    memory = BodyMemory()
    bare = Inode(5, stat.S_IFREG, 1, 0, 0, 8, 0, 0, 0, 0, body_version=3, extent_pages=1, extents_bytes=8)
    extents = (Extent(0, 8, 1, 0, 8),)
    assert memory.of(bare) is None
    memory.put(Body(bare._replace(extents=extents)))
    assert memory.of(bare._replace(mode=stat.S_IFREG | 0o600)) == Body(
        bare._replace(mode=stat.S_IFREG | 0o600, extents=extents)
    )


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_memory, "BYTES_MAX", 10_000)
    memory = BodyMemory()
    for ino in range(10, 20):
        memory.put(inline(ino, 1, 1500))
        assert memory.of(inline(10, 1, 1500).inode) is not None, "what is used stays"
    assert sum(memory.of(inline(ino, 1, 1500).inode) is not None for ino in range(10, 20)) == 5


async def test_a_body_that_another_mount_has_changed_is_read_anew(volumes: Pair) -> None:
    a, b = volumes
    file = await a.mknod(ROOT_INO, b"f", stat.S_IFREG | 0o644, 0, ME)
    for text in (b"one", b"two", b"three"):
        body = await a.read_body(file.ino)
        await a.commit_body(file.ino, BodyChange(body.inode.body_version, len(text), inline=text))
        for _ in range(4):
            await b.lookup(ROOT_INO, b"f")
            assert (await b.read_body(file.ino)).inline == text
            assert (await a.read_body(file.ino)).inline == text
