"""The Filesystem without a kernel: files without a name at odd moments, and who hears of errors."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from apollofs.fs.errors import BodyLost
from apollofs.fs.filesystem import Filesystem
from apollofs.metadata.errors import (
    InvalidArgument,
    LockConflict,
    OutcomeUnknown,
    SessionLost,
    StaleInode,
    StoreUnavailable,
)
from apollofs.metadata.locks import RANGE_END, LockKind, LockType
from apollofs.metadata.memory import Moment, Request
from apollofs.metadata.records import NOW, ROOT_INO, Inode, RenameFlag, SetAttr
from apollofs.metadata.store import Range
from tests.support.filesystems import LARGE, OWNER, USER, Pair, close, content, create, save
from tests.support.volumes import ME

OTHER = 8
INIT = 1
"""A process that is never the test's."""


async def lose_session(pair: Pair) -> None:
    """End the session of `pair.here`, and wait for the next."""
    lost = pair.volume.session
    await pair.store.lease_revoke(lost.lease_id)
    with pytest.raises(Exception, match="session"):
        await pair.here.mkdir(ROOT_INO, b"d", 0o755, USER)
    await lost.lost.wait()
    await trio.testing.wait_all_tasks_blocked(0.05)


# -- files that are replaced between lookup and open -------------------------------------------------------------------


async def replace(pair: Pair, data: bytes) -> None:
    """By another mount, while the kernel of this one is between two requests."""
    await save(pair.there, b"new", data)
    await pair.there.rename(ROOT_INO, b"new", ROOT_INO, b"f", RenameFlag(0))


@pytest.mark.parametrize("data", [b"small", LARGE], ids=["small", "large"])
async def test_a_name_that_is_replaced_again_and_again_can_be_opened(pair: Pair, data: bytes) -> None:
    """The kernel asks again once; what it then looks up must be there when it opens it."""
    await replace(pair, data + b"0")
    first = await pair.here.lookup(ROOT_INO, b"f")
    await replace(pair, data + b"1")
    with pytest.raises(StaleInode):
        await pair.here.open(first.ino, os.O_RDONLY, USER)
    for number in range(2, 5):
        second = await pair.here.lookup(ROOT_INO, b"f")
        await replace(pair, data + b"%d" % number)
        assert (await pair.here.getattr(second.ino)).nlink == 0
        fh = (await pair.here.open(second.ino, os.O_RDONLY, USER)).fh
        assert bytes(await pair.here.read(fh, 0, 100_000)) == data + b"%d" % (number - 1)
        await close(pair.here, fh)
    assert await content(pair.here) == data + b"4"


async def test_what_is_held_for_an_open_is_let_go(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    await replace(pair, b"0")
    first = await pair.here.lookup(ROOT_INO, b"f")
    await replace(pair, b"1")
    with pytest.raises(StaleInode):
        await pair.here.open(first.ino, os.O_RDONLY, USER)
    second = await pair.here.lookup(ROOT_INO, b"f")
    assert pair.here._bodies.inodes == [second.ino]
    await trio.sleep(2)
    assert pair.here._bodies.inodes == []


# -- files without a name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_whom", ["here", "there"])
async def test_a_write_clears_suid_of_a_file_without_a_name(pair: Pair, by_whom: str) -> None:
    ino = await save(pair.here, b"f", LARGE)
    await pair.here.setattr(ino, SetAttr(mode=0o4755))
    fh = (await pair.here.open(ino, os.O_RDWR, USER)).fh
    remover = pair.here if by_whom == "here" else pair.there
    await remover.unlink(ROOT_INO, b"f")
    await pair.here.write(fh, 0, b"x", kill_suid=True)
    assert stat.S_IMODE((await pair.here.getattr(ino)).mode) == 0o755
    await close(pair.here, fh)


async def test_a_file_removed_elsewhere_can_be_opened_again_while_it_is_open(pair: Pair) -> None:
    ino = await save(pair.here, b"f", LARGE)
    fh = (await pair.here.open(ino, os.O_RDWR, USER)).fh
    await pair.there.unlink(ROOT_INO, b"f")
    again = (await pair.here.open(ino, os.O_RDONLY, USER)).fh
    assert await pair.here.read(again, 0, 4) == LARGE[:4]
    await close(pair.here, again)
    await close(pair.here, fh)


async def test_attributes_of_a_file_without_a_name_change_here(pair: Pair) -> None:
    ino = await save(pair.here, b"f", LARGE)
    await pair.here.setattr(ino, SetAttr(mode=0o4755, mtime_ns=5))
    fh = (await pair.here.open(ino, os.O_RDWR, USER)).fh
    await pair.here.unlink(ROOT_INO, b"f")
    owned = await pair.here.setattr(ino, SetAttr(uid=7, clear_suid=True), fh)
    assert (owned.uid, stat.S_IMODE(owned.mode)) == (7, 0o755)
    cut = await pair.here.setattr(ino, SetAttr(size_bytes=9, mode=0o600), fh)
    assert (cut.size_bytes, stat.S_IMODE(cut.mode)) == (9, 0o600)
    assert cut.mtime_ns > 5
    await pair.here.write(fh, 0, b"x")
    assert (await pair.here.setattr(ino, SetAttr(mtime_ns=77), fh)).mtime_ns == 77
    await close(pair.here, fh)


# -- attributes and sizes ---------------------------------------------------------------------------------------------


async def test_touch_after_a_write_stays(pair: Pair) -> None:
    attributes, fh = await create(pair.here)
    await pair.here.write(fh, 0, LARGE)
    written = (await pair.here.getattr(attributes.ino)).mtime_ns
    touched = (await pair.here.setattr(attributes.ino, SetAttr(mtime_ns=NOW), fh)).mtime_ns
    assert touched > written
    await close(pair.here, fh)
    assert (await pair.there.lookup(ROOT_INO, b"f")).mtime_ns >= touched


async def test_a_bit_that_stays_costs_no_request(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """setgid without group execution is no privilege, and writes do not clear it."""
    attributes, fh = await create(pair.here)
    await pair.here.setattr(attributes.ino, SetAttr(mode=0o2644))

    async def refuse(ino: int, change: SetAttr) -> Inode:
        raise AssertionError("asked for nothing")

    with monkeypatch.context() as patch:
        patch.setattr(pair.volume, "setattr", refuse)
        await pair.here.write(fh, 0, b"x", kill_suid=True)
    assert stat.S_IMODE((await pair.here.getattr(attributes.ino)).mode) == 0o2644
    await close(pair.here, fh)


async def test_fallocate_knows_what_was_cut_elsewhere(pair: Pair) -> None:
    ino = await save(pair.here, b"f", LARGE)
    fh = (await pair.here.open(ino, os.O_RDWR, USER)).fh
    await pair.there.lookup(ROOT_INO, b"f")
    await pair.there.setattr(ino, SetAttr(size_bytes=0))
    await pair.here.fallocate(fh, 0, 0, 1000)
    await close(pair.here, fh)
    assert (await pair.there.lookup(ROOT_INO, b"f")).size_bytes == 1000


async def test_a_synchronous_copy_is_seen_at_once(pair: Pair) -> None:
    source = await save(pair.here, b"source", LARGE)
    reader = (await pair.here.open(source, os.O_RDONLY, USER)).fh
    _, writer = await create(pair.here, flags=os.O_RDWR | os.O_SYNC)
    assert await pair.here.copy_file_range(reader, 0, writer, 0, len(LARGE), 0) == len(LARGE)
    assert await content(pair.there) == LARGE
    await close(pair.here, writer)
    await close(pair.here, reader)


async def test_only_files_are_opened(pair: Pair) -> None:
    made = await pair.here.mkdir(ROOT_INO, b"d", 0o755, USER)
    with pytest.raises(InvalidArgument):
        await pair.here.open(made.ino, os.O_RDONLY, USER)


# -- listings ---------------------------------------------------------------------------------------------------------


async def rest_of(fs: Filesystem, fh: int, position: int) -> list[bytes]:
    names: list[bytes] = []
    while found := await fs.readdir(fh, position, 300):
        names += [entry.name for _, entry in found]
        position = found[-1][0]
    return names


async def test_a_listing_asks_for_nothing_but_its_pages(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await pair.there.mkdir(ROOT_INO, b"d", 0o755, USER)
    await pair.there.mkdir(made.ino, b"inner", 0o755, USER)
    await pair.here.lookup(ROOT_INO, b"d")

    async def refuse(ino: int) -> Inode:
        raise AssertionError("asked for attributes")

    fh = pair.here.opendir(made.ino).fh
    with monkeypatch.context() as patch:
        patch.setattr(pair.volume, "getattr", refuse)
        found = await pair.here.readdir(fh, 0, 10)
    assert [(entry.name, entry.ino) for _, entry in found][:2] == [(b".", made.ino), (b"..", ROOT_INO)]
    assert found[2][1].name == b"inner"
    pair.here.releasedir(fh)


async def test_a_listing_goes_back_after_its_snapshot_is_gone(pair: Pair) -> None:
    names = [b"%05d" % number for number in range(2500)]
    for name in names:
        await pair.volume.mknod(ROOT_INO, name, stat.S_IFREG | 0o644, 0, ME)
    fh = pair.there.opendir(ROOT_INO).fh
    assert await rest_of(pair.there, fh, 2) == names
    for name in names[100:300]:
        await pair.here.unlink(ROOT_INO, name)
    await pair.store.compact((await pair.store.range(Range(b"none"))).revision)
    assert await rest_of(pair.there, fh, 2) == names[:100] + names[300:]
    pair.there.releasedir(fh)


# -- who hears of an error --------------------------------------------------------------------------------------------


@pytest.mark.expects_log("has lost its lease")
async def test_a_childs_close_leaves_the_error_to_the_opener(pair: Pair) -> None:
    _, fh = await create(pair.here)
    await pair.here.write(fh, 0, LARGE)
    await lose_session(pair)
    await pair.here.flush(fh, OTHER, INIT)
    with pytest.raises(BodyLost):
        await pair.here.flush(fh, OWNER, os.getpid())
    await pair.here.release(fh, OWNER, flock=False)


@pytest.mark.expects_log("has lost its lease")
async def test_who_was_refused_a_lock_has_lost_none(pair: Pair) -> None:
    ino = await save(pair.here, b"f", LARGE)
    await pair.there.lookup(ROOT_INO, b"f")
    await pair.there.setlk(ino, LockKind.POSIX, OTHER, 0, 9, LockType.EXCLUSIVE, 1, wait=False)
    fh = (await pair.here.open(ino, os.O_RDWR, USER)).fh
    with pytest.raises(LockConflict):
        await pair.here.setlk(ino, LockKind.POSIX, OWNER, 0, 9, LockType.EXCLUSIVE, 1, wait=False)
    await lose_session(pair)
    await pair.here.write(fh, 0, b"x")
    await close(pair.here, fh)


@pytest.mark.parametrize("kind", [LockKind.POSIX, LockKind.FLOCK])
async def test_an_unlock_that_fails_keeps_no_bytes_back(
    pair: Pair, kind: LockKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes, fh = await create(pair.here)
    await pair.here.setlk(attributes.ino, kind, OWNER, 0, RANGE_END, LockType.EXCLUSIVE, 1, wait=False)
    await pair.here.write(fh, 0, LARGE)
    with monkeypatch.context() as patch:
        patch.setattr(pair.volume.locks, "release", _failing(pair.volume.locks.release))
        with pytest.raises(StoreUnavailable):
            await (
                pair.here.flush(fh, OWNER, os.getpid())
                if kind is LockKind.POSIX
                else pair.here.release(fh, OWNER, flock=True)
            )
    assert (await pair.there.lookup(ROOT_INO, b"f")).size_bytes == len(LARGE)
    if kind is LockKind.POSIX:
        await pair.here.release(fh, OWNER, flock=False)


def _failing(release: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def failing(*arguments: object) -> None:
        await release(*arguments)
        raise StoreUnavailable("by the test")

    return failing


@pytest.mark.expects_log("lost")
async def test_a_loss_during_fsync_is_told_once(pair: Pair) -> None:
    """The session is lost while fsync waits for names that were answered: that call says so, and no later one."""
    while not pair.volume.delegations.may_take():
        await trio.testing.wait_all_tasks_blocked(0.001)
    made = await pair.here.mkdir(ROOT_INO, b"d", 0o755, USER)
    await pair.volume.settle()
    _, opened = await pair.here.create(made.ino, b"f", 0o644, os.O_RDWR | os.O_CREAT, USER)
    await pair.volume.settle()
    directory = pair.here.opendir(made.ino)

    async def lose(moment: Moment, request: Request) -> None:
        if request.method == "txn" and moment is Moment.BEFORE:
            await trio.sleep(0.001)
            raise OutcomeUnknown("cut off")

    async def fails(call: Callable[[], Awaitable[None]]) -> None:
        with pytest.raises(SessionLost):
            await call()

    async def sync_file() -> None:
        await pair.here.fsync(opened.fh, data_only=False)

    async def sync_directory() -> None:
        await pair.here.fsyncdir(directory.fh)

    pair.store.hook = lose
    await pair.here.mkdir(made.ino, b"sub", 0o755, USER)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails, sync_file)
        nursery.start_soon(fails, sync_directory)
        await trio.testing.wait_all_tasks_blocked(0.01)
        pair.volume.session.give_up()
        pair.store.hook = None
    while not pair.volume.proven:
        await trio.testing.wait_all_tasks_blocked(0.001)
    await sync_file()
    await sync_directory()
    pair.here.releasedir(directory.fh)
    await close(pair.here, opened.fh)
