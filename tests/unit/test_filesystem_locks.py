"""The Filesystem without a kernel: what was written under a lock is there for whoever gets the lock next."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import StoreUnavailable
from apollofs.metadata.locks import RANGE_END, LockKind, LockType
from apollofs.metadata.records import ROOT_INO, BodyChange, Inode
from apollofs.metadata.session import Session
from tests.support.filesystems import OWNER, USER, Pair, content, save

NEXT = 8


async def close(pair: Pair, fh: int, kind: LockKind) -> None:
    """As the kernel closes: the flush of a child, which commits nothing, stands in for that of a mapping's pages."""
    await pair.here.flush(fh, OWNER, os.getpid() if kind is LockKind.POSIX else 1)
    await pair.here.release(fh, OWNER, flock=kind is LockKind.FLOCK)


@pytest.mark.parametrize("kind", [LockKind.POSIX, LockKind.FLOCK])
async def test_close_commits_before_the_lock_goes_on(
    pair: Pair, kind: LockKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = await save(pair.here, b"f", b"1")
    await pair.there.lookup(ROOT_INO, b"f")
    fh = (await pair.here.open(ino, os.O_RDWR, USER)).fh
    await pair.here.setlk(ino, kind, OWNER, 0, RANGE_END, LockType.EXCLUSIVE, 1, wait=False)
    await pair.here.write(fh, 0, b"2")
    commit_body, may_commit = pair.volume.commit_body, trio.Event()

    async def slow(ino: int, change: BodyChange, session: Session | None = None) -> Inode:
        await may_commit.wait()
        return await commit_body(ino, change, session)

    monkeypatch.setattr(pair.volume, "commit_body", slow)
    seen = b""

    async def next_in_line() -> None:
        nonlocal seen
        await pair.there.setlk(ino, kind, NEXT, 0, RANGE_END, LockType.EXCLUSIVE, 1, wait=True)
        seen = await content(pair.there)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(next_in_line)
        await trio.testing.wait_all_tasks_blocked(0.02)
        nursery.start_soon(close, pair, fh, kind)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert seen == b""
        may_commit.set()
    assert seen == b"2"


@pytest.mark.parametrize("kind", [LockKind.POSIX, LockKind.FLOCK])
@pytest.mark.parametrize("after", [None, LockType.SHARED])
async def test_what_was_written_under_a_lock_is_committed_before_it_ends(
    pair: Pair, kind: LockKind, after: LockType | None
) -> None:
    ino = await save(pair.here, b"f", b"1")
    fh = (await pair.here.open(ino, os.O_RDWR, USER)).fh
    await pair.here.setlk(ino, kind, OWNER, 0, RANGE_END, LockType.EXCLUSIVE, 1, wait=False)
    await pair.here.write(fh, 0, b"2")
    assert await content(pair.there) == b"1"
    await pair.here.setlk(ino, kind, OWNER, 0, RANGE_END, after, 1, wait=False)
    assert await content(pair.there) == b"2"
    await pair.here.release(fh, OWNER, flock=True)


async def test_an_unlock_that_cannot_commit_says_so_and_ends_the_lock(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = await save(pair.here, b"f", b"1")
    await pair.there.lookup(ROOT_INO, b"f")
    fh = (await pair.here.open(ino, os.O_RDWR, USER)).fh
    await pair.here.setlk(ino, LockKind.POSIX, OWNER, 0, RANGE_END, LockType.EXCLUSIVE, 1, wait=False)
    await pair.here.write(fh, 0, b"2")

    async def refuse(ino: int, change: BodyChange, session: Session | None = None) -> Inode:
        raise StoreUnavailable("by the test")

    with monkeypatch.context() as patch:
        patch.setattr(pair.volume, "commit_body", refuse)
        with pytest.raises(StoreUnavailable):
            await pair.here.setlk(ino, LockKind.POSIX, OWNER, 0, RANGE_END, None, 1, wait=False)
    await pair.there.setlk(ino, LockKind.POSIX, NEXT, 0, RANGE_END, LockType.EXCLUSIVE, 1, wait=False)
    await close(pair, fh, LockKind.POSIX)
    assert await content(pair.there) == b"2"


async def test_a_close_that_cannot_commit_gives_the_lock_back(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ino = await save(pair.here, b"f", b"1")
    await pair.there.lookup(ROOT_INO, b"f")
    fh = (await pair.here.open(ino, os.O_RDWR, USER)).fh
    await pair.here.setlk(ino, LockKind.POSIX, OWNER, 0, RANGE_END, LockType.EXCLUSIVE, 1, wait=False)
    await pair.here.write(fh, 0, b"2")

    async def refuse(ino: int, change: BodyChange, session: Session | None = None) -> Inode:
        raise StoreUnavailable("by the test")

    with monkeypatch.context() as patch:
        patch.setattr(pair.volume, "commit_body", refuse)
        with pytest.raises(StoreUnavailable):
            await pair.here.flush(fh, OWNER, os.getpid())
    await pair.there.setlk(ino, LockKind.POSIX, NEXT, 0, RANGE_END, LockType.EXCLUSIVE, 1, wait=False)
    await pair.here.release(fh, OWNER, flock=False)
