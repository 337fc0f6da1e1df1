"""The Filesystem without a kernel: directories, attributes, locks, lost sessions."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import trio
import trio.testing

from apollofs.fs.errno_map import errno_of
from apollofs.fs.errors import BodyLost
from apollofs.fs.filesystem import Filesystem
from apollofs.metadata.errors import (
    InvalidArgument,
    LockConflict,
    NoSuchAttribute,
    NotSupported,
)
from apollofs.metadata.locks import RANGE_END, LockKind, LockType
from apollofs.metadata.records import ROOT_INO, RenameFlag, SetAttr
from tests.support.filesystems import LARGE, OWNER, USER, Pair, close, content, create, save
from tests.support.kernels import Kernel, attach
from tests.support.volumes import ME

# -- directories and attributes ---------------------------------------------------------------------------------------


async def listing(fs: Filesystem, fh: int, limit: int = 1000) -> list[bytes]:
    names: list[bytes] = []
    position = 0
    while found := await fs.readdir(fh, position, limit):
        names += [entry.name for _, entry in found]
        position = found[-1][0]
    return names


async def test_a_listing_is_one_snapshot(pair: Pair) -> None:
    stable = [b"s%05d" % number for number in range(2500)]
    for name in stable:
        await pair.volume.mknod(ROOT_INO, name, stat.S_IFREG | 0o644, 0, ME)
    fh = pair.there.opendir(ROOT_INO).fh
    names: list[bytes] = []
    position = 0
    while found := await pair.there.readdir(fh, position, 700):
        names += [entry.name for _, entry in found]
        position = found[-1][0]
        await pair.here.unlink(ROOT_INO, stable[position % 2000])
        await pair.here.mkdir(ROOT_INO, b"new%d" % position, 0o755, USER)
    assert names == [b".", b"..", *stable]
    fifth = await pair.there.readdir(fh, 5, 1)
    assert fifth[0][1].name == stable[3]
    assert await pair.there.readdir(fh, len(stable) + 2, 1) == []
    again = await listing(pair.there, fh)
    assert any(name.startswith(b"new") for name in again)
    pair.there.releasedir(fh)


async def test_listed_files_have_their_attributes(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)
    await pair.here.mkdir(ROOT_INO, b"d", 0o755, USER)
    fh = pair.there.opendir(ROOT_INO).fh
    entries = {entry.name: entry for _, entry in await pair.there.readdir(fh, 0, 10)}
    found = {name: pair.there.listed(ROOT_INO, entry) for name, entry in entries.items()}
    assert found[b"d"] is None
    file = found[b"f"]
    assert file is not None
    assert file.size_bytes == len(LARGE)
    pair.there.remember(ROOT_INO, entries[b"f"])
    assert (await pair.there.getattr(file.ino)).size_bytes == len(LARGE)


async def test_a_listing_says_nothing_of_an_open_file_that_others_have_changed(pair: Pair) -> None:
    """Its size here is that of the older body, which the kernel must not keep."""
    attributes, opened = await create(pair.here)
    await close(pair.here, opened)
    opened = (await pair.here.open(attributes.ino, os.O_RDONLY, USER)).fh
    await pair.there.lookup(ROOT_INO, b"f")
    await pair.there.setattr(attributes.ino, SetAttr(size_bytes=len(LARGE)))
    fh = pair.here.opendir(ROOT_INO).fh
    (entry,) = [entry for _, entry in await pair.here.readdir(fh, 0, 10) if entry.name == b"f"]
    assert pair.here.listed(ROOT_INO, entry) is None
    assert (await pair.here.lookup(ROOT_INO, b"f")).size_bytes == len(LARGE)
    await close(pair.here, opened)


async def test_the_kernel_keeps_no_older_size_with_a_new_name(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request has just read that the body has changed elsewhere, and is still taking it over."""
    monkeypatch.setattr(pair.here.kernel, "attributes", lambda group, ino: 1.0)
    attributes, opened = await create(pair.here)
    await pair.here.link(attributes.ino, ROOT_INO, b"g")
    await pair.there.lookup(ROOT_INO, b"f")
    await pair.there.setattr(attributes.ino, SetAttr(size_bytes=len(LARGE)))
    while pair.volume.cached_lookup(ROOT_INO, b"g") is None:
        newest = await pair.volume.lookup(ROOT_INO, b"g")
        await trio.testing.wait_all_tasks_blocked()
    made = pair.here._made(ROOT_INO, b"g", newest)
    assert (made.size_bytes, made.attr_timeout_s) == (0, 0.0)
    await pair.here.lookup(ROOT_INO, b"g")
    made = pair.here._made(ROOT_INO, b"g", newest)
    assert (made.size_bytes, made.attr_timeout_s) == (len(LARGE), 1.0)
    await close(pair.here, opened)


async def test_names_that_are_gone_are_not_kept(pair: Pair) -> None:
    """However many names come and go in a directory that is held: the kernel drops those by itself."""
    attach(pair.here.kernel, Kernel())
    await trio.testing.wait_all_tasks_blocked()
    directory = (await pair.here.mkdir(ROOT_INO, b"d", 0o755, USER)).ino
    before = pair.here.kernel.statistics()["names"]
    for number in range(20):
        name, renamed = b"%d" % number, b"%d.r" % number
        await pair.here.mknod(directory, name, stat.S_IFREG | 0o644, 0, USER)
        await pair.here.rename(directory, name, directory, renamed, RenameFlag(0))
        await pair.here.unlink(directory, renamed)
        await pair.here.mkdir(directory, name, 0o755, USER)
        await pair.here.rmdir(directory, name)
    assert pair.here.kernel.statistics()["names"] == before
    for name in (b"a", b"b"):
        await pair.here.mknod(directory, name, stat.S_IFREG | 0o644, 0, USER)
    await pair.here.rename(directory, b"a", directory, b"b", RenameFlag.EXCHANGE)
    await pair.here.rename(directory, b"a", directory, b"a", RenameFlag(0))
    assert pair.here.kernel.statistics()["names"] == before + 2


async def test_xattr_rules(pair: Pair) -> None:
    ino = await save(pair.here, b"f", b"")
    await pair.here.setxattr(ino, b"user.a", b"1", os.XATTR_CREATE)
    with pytest.raises(NoSuchAttribute):
        await pair.here.getxattr(ino, b"security.capability")
    for name in (b"security.capability", b"system.posix_acl_access", b"odd.name"):
        with pytest.raises(NotSupported):
            await pair.here.setxattr(ino, name, b"", 0)
    with pytest.raises(InvalidArgument):
        await pair.here.setxattr(ino, b"user.b", b"", 8)
    await pair.there.lookup(ROOT_INO, b"f")
    assert await pair.there.listxattr(ino) == (b"user.a",)
    await pair.there.removexattr(ino, b"user.a")
    assert await pair.here.listxattr(ino) == ()


async def test_symlinks_and_statfs(pair: Pair) -> None:
    link = await pair.here.symlink(ROOT_INO, b"l", b"target", USER)
    assert await pair.there.readlink((await pair.there.lookup(ROOT_INO, b"l")).ino) == b"target"
    with pytest.raises(InvalidArgument):
        await pair.here.readlink(ROOT_INO)
    found = await pair.here.statfs()
    assert found.total_inodes - found.free_inodes == 1
    assert link.size_bytes == 6


# -- locks and sessions -----------------------------------------------------------------------------------------------


async def test_close_ends_the_owners_locks(pair: Pair) -> None:
    attributes, fh = await create(pair.here)
    await pair.there.lookup(ROOT_INO, b"f")
    await pair.here.setlk(attributes.ino, LockKind.POSIX, OWNER, 0, 9, LockType.EXCLUSIVE, 1, wait=False)
    with pytest.raises(LockConflict):
        await pair.there.setlk(attributes.ino, LockKind.POSIX, 8, 5, 5, LockType.SHARED, 1, wait=False)
    held = await pair.there.getlk(attributes.ino, LockKind.POSIX, 8, 0, RANGE_END, LockType.SHARED)
    assert held is not None
    assert (held.start, held.end, held.type) == (0, 9, LockType.EXCLUSIVE)
    await close(pair.here, fh)
    await pair.there.setlk(attributes.ino, LockKind.POSIX, 8, 5, 5, LockType.SHARED, 1, wait=False)
    await pair.there.setlk(attributes.ino, LockKind.POSIX, 8, 0, RANGE_END, None, 1, wait=False)


@pytest.mark.expects_log("has lost its lease")
async def test_a_lost_session_is_reported_once_by_each_handle(pair: Pair) -> None:
    attributes, fh = await create(pair.here)
    clean = await save(pair.here, b"clean", LARGE)
    locked = (await pair.here.open(clean, os.O_RDWR, USER)).fh
    await pair.here.setlk(clean, LockKind.FLOCK, OWNER, 0, RANGE_END, LockType.EXCLUSIVE, 1, wait=False)
    await pair.here.write(fh, 0, LARGE)
    lost = pair.volume.session
    await pair.store.lease_revoke(lost.lease_id)
    with pytest.raises(Exception, match="session") as caught:
        await pair.here.fsync(fh, data_only=False)
    assert errno_of(caught.value) == errno.EIO
    await lost.lost.wait()
    await trio.testing.wait_all_tasks_blocked(0.05)  # until the next session has begun
    assert pair.volume.session is not lost
    with pytest.raises(BodyLost):
        await pair.here.write(locked, 0, b"x")
    await pair.here.write(locked, 0, b"x")
    await close(pair.here, locked)
    await pair.here.release(fh, OWNER, flock=False)
    assert (await pair.there.lookup(ROOT_INO, b"f")).size_bytes == 0
    assert (await content(pair.there, b"clean"))[:1] == b"x"
    assert attributes.ino != clean


# -- what is remembered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known_again", [False, True])
async def test_the_place_of_a_file_is_forgotten_when_nobody_has_use_for_it(pair: Pair, known_again: bool) -> None:
    kernel = Kernel()
    attach(pair.here.kernel, kernel)
    attributes, fh = await create(pair.here)
    await pair.here.write(fh, 0, LARGE)
    pair.here.forget(attributes.ino)
    assert pair.volume.place_of(attributes.ino) is not None, "its bytes are to be committed"
    if known_again:
        kernel.referenced.add(attributes.ino)
    await close(pair.here, fh)
    assert (pair.volume.place_of(attributes.ino) is not None) == known_again
    pair.here.forget(attributes.ino)
    assert pair.volume.place_of(attributes.ino) is None
