"""The Filesystem without a kernel: two of them on one volume and one blob store, each reading what the other did."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlockStore
from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.attributes import Attributes, Caller
from apollofs.fs.config import BodyConfig
from apollofs.fs.errno_map import errno_of
from apollofs.fs.errors import BadHandle, BodyLost, NoDataThere
from apollofs.fs.filesystem import Filesystem, open_filesystem
from apollofs.metadata.errors import (
    EntryExists,
    FileTooLarge,
    InvalidArgument,
    LockConflict,
    NoSuchAttribute,
    NotSupported,
    OperationNotPermitted,
    StaleInode,
)
from apollofs.metadata.locks import RANGE_END, LockKind, LockType
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.records import ROOT_INO, InodeFlag, RenameFlag, SetAttr
from apollofs.metadata.volume import Volume
from tests.support.bodies import BrokenBlobs
from tests.support.volumes import ME, assert_sound, make_volume, mounted

ROOT = Caller(0, 0, os.getpid())
USER = Caller(1000, 1000, os.getpid())
OWNER = 7
LARGE = b"0123456789abcdef" * 1000


@dataclass
class Pair:
    here: Filesystem
    there: Filesystem
    volume: Volume
    """That of `here`."""
    store: MemoryStore


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    store = MemoryStore()
    await make_volume(store, inline_bytes_max=64)
    blobs = BrokenBlobs(MemoryBlobs())

    async def open_store(site: int) -> BlockStore:
        await trio.lowlevel.checkpoint()
        return blobs

    async with AsyncExitStack() as stack:
        found = []
        for name in ("here", "there"):
            volume = await stack.enter_async_context(mounted(store))
            config = BodyConfig(tmp_path / name, disk_free_bytes_min=0, commit_interval_s=3600)
            found.append((await stack.enter_async_context(open_filesystem(volume, open_store, config)), volume))
        yield Pair(found[0][0], found[1][0], found[0][1], store)
    await assert_sound(store)


async def create(fs: Filesystem, name: bytes = b"f", flags: int = os.O_RDWR) -> tuple[Attributes, int]:
    attributes, opened = await fs.create(ROOT_INO, name, 0o644, flags | os.O_CREAT, USER)
    return attributes, opened.fh


async def save(fs: Filesystem, name: bytes, data: bytes) -> int:
    """A file with these bytes, closed; its inode number."""
    attributes, fh = await create(fs, name)
    await fs.write(fh, 0, data)
    await close(fs, fh)
    return attributes.ino


async def close(fs: Filesystem, fh: int) -> None:
    await fs.flush(fh, OWNER, os.getpid())
    await fs.release(fh, OWNER, flock=False)


async def content(fs: Filesystem, name: bytes = b"f") -> bytes:
    found = await fs.lookup(ROOT_INO, name)
    fh = (await fs.open(found.ino, os.O_RDONLY, USER)).fh
    data = await fs.read(fh, 0, 1 << 20)
    await close(fs, fh)
    return data


# -- what one writes the other reads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"small", LARGE])
async def test_closed_is_seen(pair: Pair, data: bytes) -> None:
    await save(pair.here, b"f", data)
    found = await pair.there.lookup(ROOT_INO, b"f")
    assert found.size_bytes == len(data)
    assert found.blocks == (len(data) + 511) // 512
    assert await content(pair.there) == data


async def test_an_open_reader_sees_the_next_commit(pair: Pair) -> None:
    ino = await save(pair.here, b"f", LARGE)
    await pair.there.lookup(ROOT_INO, b"f")
    reader = (await pair.there.open(ino, os.O_RDONLY, USER)).fh
    assert await pair.there.read(reader, 0, 4) == b"0123"
    writer = (await pair.here.open(ino, os.O_WRONLY, USER)).fh
    await pair.here.write(writer, 0, b"ABCD")
    await pair.here.fsync(writer, data_only=False)
    await pair.there.getattr(ino)  # as the kernel does before each read(2)
    assert await pair.there.read(reader, 0, 5) == b"ABCD4"
    await close(pair.here, writer)
    await close(pair.there, reader)


async def test_uncommitted_is_seen_here_only(pair: Pair) -> None:
    attributes, fh = await create(pair.here)
    await pair.here.write(fh, 0, LARGE)
    assert (await pair.here.getattr(attributes.ino)).size_bytes == len(LARGE)
    assert (await pair.there.lookup(ROOT_INO, b"f")).size_bytes == 0
    await close(pair.here, fh)
    assert (await pair.there.lookup(ROOT_INO, b"f")).size_bytes == len(LARGE)


async def test_two_mounts_append(pair: Pair) -> None:
    ino = await save(pair.here, b"f", b"")
    await pair.there.lookup(ROOT_INO, b"f")
    handles = [(fs, (await fs.open(ino, os.O_WRONLY | os.O_APPEND, USER)).fh) for fs in (pair.here, pair.there)]
    for number, (fs, fh) in enumerate(handles):
        await fs.write(fh, 0, b"%d" % number * 1000, append=True)
    for fs, fh in handles:
        await close(fs, fh)
    assert sorted(await content(pair.here)) == sorted(b"0" * 1000 + b"1" * 1000)


async def test_synchronous_writes_are_seen_at_once(pair: Pair) -> None:
    _, fh = await create(pair.here, flags=os.O_WRONLY | os.O_SYNC)
    await pair.here.write(fh, 0, b"now")
    assert await content(pair.there) == b"now"
    await close(pair.here, fh)


async def test_a_childs_close_commits_nothing(pair: Pair) -> None:
    _, fh = await create(pair.here)
    await pair.here.write(fh, 0, b"half")
    await pair.here.flush(fh, OWNER, 1)
    assert (await pair.there.lookup(ROOT_INO, b"f")).size_bytes == 0
    await close(pair.here, fh)
    assert await content(pair.there) == b"half"


async def test_sync_commits_everything(pair: Pair) -> None:
    handles = []
    for name in (b"1", b"2", b"3"):
        _, fh = await create(pair.here, name)
        await pair.here.write(fh, 0, LARGE)
        handles.append(fh)
    await pair.here.sync()
    for name in (b"1", b"2", b"3"):
        assert await content(pair.there, name) == LARGE
    for fh in handles:
        await close(pair.here, fh)


# -- open -------------------------------------------------------------------------------------------------------------


async def test_create_races(pair: Pair) -> None:
    await save(pair.there, b"f", b"theirs")
    with pytest.raises(EntryExists):
        await pair.here.create(ROOT_INO, b"f", 0o644, os.O_RDWR | os.O_CREAT | os.O_EXCL, USER)
    attributes, opened = await pair.here.create(ROOT_INO, b"f", 0o644, os.O_RDWR | os.O_CREAT, USER)
    assert attributes.size_bytes == 6
    assert await pair.here.read(opened.fh, 0, 10) == b"theirs"
    await close(pair.here, opened.fh)


async def test_truncating_open(pair: Pair) -> None:
    ino = await save(pair.here, b"f", LARGE)
    fh = (await pair.here.open(ino, os.O_WRONLY | os.O_TRUNC, USER)).fh
    assert await content(pair.there) == b""
    await close(pair.here, fh)


async def test_flags_guard_opens(pair: Pair) -> None:
    ino = await save(pair.here, b"f", b"x")
    await pair.here.set_flags(ino, int(InodeFlag.IMMUTABLE), ROOT)
    with pytest.raises(OperationNotPermitted):
        await pair.there.open((await pair.there.lookup(ROOT_INO, b"f")).ino, os.O_WRONLY, USER)
    await pair.there.set_flags(ino, int(InodeFlag.APPEND_ONLY), ROOT)
    for flags in (os.O_WRONLY, os.O_WRONLY | os.O_APPEND | os.O_TRUNC):
        with pytest.raises(OperationNotPermitted):
            await pair.here.open(ino, flags, USER)
    fh = (await pair.here.open(ino, os.O_WRONLY | os.O_APPEND, USER)).fh
    await close(pair.here, fh)
    assert await pair.here.get_flags(ino) == int(InodeFlag.APPEND_ONLY)
    with pytest.raises(OperationNotPermitted):
        await pair.here.set_flags(ino, 0, USER)
    with pytest.raises(NotSupported):
        await pair.here.set_flags(ino, 0x80, ROOT)


async def test_closed_handles_are_refused(pair: Pair) -> None:
    _, fh = await create(pair.here)
    await close(pair.here, fh)
    with pytest.raises(BadHandle):
        await pair.here.read(fh, 0, 1)


# -- files without a name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_whom", ["here", "there"])
@pytest.mark.parametrize("how", ["unlink", "rename"])
async def test_an_open_file_lives_on_without_a_name(pair: Pair, by_whom: str, how: str) -> None:
    ino = await save(pair.here, b"f", LARGE)
    fh = (await pair.here.open(ino, os.O_RDWR, USER)).fh
    await pair.here.write(fh, 0, b"mine")
    remover = pair.here if by_whom == "here" else pair.there
    if how == "unlink":
        await remover.unlink(ROOT_INO, b"f")
    else:
        await save(remover, b"new", b"new")
        await remover.rename(ROOT_INO, b"new", ROOT_INO, b"f", RenameFlag(0))
    assert (await pair.here.getattr(ino)).nlink == 0
    assert await pair.here.read(fh, 0, 6) == b"mine45"
    await pair.here.write(fh, 20_000, b"end")
    assert (await pair.here.setattr(ino, SetAttr(mode=0o600), fh)).mode == stat.S_IFREG | 0o600
    assert (await pair.here.setattr(ino, SetAttr(size_bytes=5), fh)).size_bytes == 5
    await pair.here.fsync(fh, data_only=False)
    await close(pair.here, fh)
    with pytest.raises(StaleInode):
        await pair.here.getattr(ino)
    if how == "rename":
        assert await content(pair.there) == b"new"


async def test_whoever_is_in_a_removed_directory_still_sees_it(pair: Pair) -> None:
    made = await pair.here.mkdir(ROOT_INO, b"d", 0o755, USER)
    await pair.there.rmdir(ROOT_INO, b"d")
    gone = await pair.here.getattr(made.ino)
    assert (gone.nlink, gone.mode) == (0, made.mode)
    fh = await pair.here.opendir(made.ino)
    assert [entry.name for _, entry, _ in await pair.here.readdir(fh, 0, 10)] == [b".", b".."]
    pair.here.forget(made.ino)
    with pytest.raises(StaleInode):
        await pair.here.getattr(made.ino)


# -- sizes and ranges -------------------------------------------------------------------------------------------------


async def test_fallocate(pair: Pair) -> None:
    attributes, fh = await create(pair.here)
    await pair.here.write(fh, 0, LARGE)
    await pair.here.fallocate(fh, 1, 0, 1 << 20)
    assert (await pair.here.getattr(attributes.ino)).size_bytes == len(LARGE)
    await pair.here.fallocate(fh, 0, 0, 20_000)
    await pair.here.fallocate(fh, 3, 1000, 1000)
    await pair.here.fallocate(fh, 0x10, 19_000, 2000)
    expected = bytearray(LARGE.ljust(21_000, b"\0"))
    expected[1000:2000] = bytes(1000)
    assert await content(pair.there) == bytes(expected)
    found = await pair.there.lookup(ROOT_INO, b"f")
    assert found.blocks == (len(LARGE) - 1000 + 511) // 512
    for mode, offset, length, error in (
        (0, 0, 0, InvalidArgument),
        (0, -1, 5, InvalidArgument),
        (0, 1 << 62, 1 << 62, FileTooLarge),
        (2, 0, 5, NotSupported),
        (8, 0, 5, NotSupported),
    ):
        with pytest.raises(error):
            await pair.here.fallocate(fh, mode, offset, length)
    await close(pair.here, fh)


async def test_data_and_holes(pair: Pair) -> None:
    _, fh = await create(pair.here)
    await pair.here.write(fh, 10_000, LARGE)
    assert await pair.here.lseek(fh, 0, os.SEEK_DATA) == 10_000
    assert await pair.here.lseek(fh, 0, os.SEEK_HOLE) == 0
    assert await pair.here.lseek(fh, 10_000, os.SEEK_HOLE) == 10_000 + len(LARGE)
    with pytest.raises(NoDataThere) as caught:
        await pair.here.lseek(fh, 1 << 20, os.SEEK_DATA)
    assert errno_of(caught.value) == errno.ENXIO
    with pytest.raises(InvalidArgument):
        await pair.here.lseek(fh, 0, os.SEEK_END)
    await close(pair.here, fh)


async def test_copy_file_range(pair: Pair) -> None:
    source = await save(pair.there, b"source", LARGE)
    await pair.here.lookup(ROOT_INO, b"source")
    reader = (await pair.here.open(source, os.O_RDONLY, USER)).fh
    _, writer = await create(pair.here)
    assert await pair.here.copy_file_range(reader, 100, writer, 50, 1 << 30, 0) == len(LARGE) - 100
    await close(pair.here, writer)
    assert await content(pair.there) == bytes(50) + LARGE[100:]
    with pytest.raises(InvalidArgument):
        await pair.here.copy_file_range(reader, 0, reader, 10, 100, 0)
    with pytest.raises(InvalidArgument):
        await pair.here.copy_file_range(reader, 0, reader, 10_000, 100, 1)
    await close(pair.here, reader)


async def test_offsets_past_the_largest_size(pair: Pair) -> None:
    _, fh = await create(pair.here)
    with pytest.raises(FileTooLarge):
        await pair.here.write(fh, (1 << 63) - 1, b"x")
    await close(pair.here, fh)


async def test_a_write_can_clear_suid(pair: Pair) -> None:
    attributes, fh = await create(pair.here)
    await pair.here.setattr(attributes.ino, SetAttr(mode=0o6755))
    await pair.here.write(fh, 0, b"x", kill_suid=True)
    assert stat.S_IMODE((await pair.there.lookup(ROOT_INO, b"f")).mode) == 0o755
    await close(pair.here, fh)


async def test_a_time_set_after_a_write_stays(pair: Pair) -> None:
    attributes, fh = await create(pair.here)
    await pair.here.write(fh, 0, LARGE)
    await pair.here.setattr(attributes.ino, SetAttr(mtime_ns=5), fh)
    await close(pair.here, fh)
    assert (await pair.there.lookup(ROOT_INO, b"f")).mtime_ns == 5


# -- directories and attributes ---------------------------------------------------------------------------------------


async def listing(fs: Filesystem, fh: int, limit: int = 1000) -> list[bytes]:
    names: list[bytes] = []
    position = 0
    while found := await fs.readdir(fh, position, limit):
        names += [entry.name for _, entry, _ in found]
        position = found[-1][0]
    return names


async def test_a_listing_is_one_snapshot(pair: Pair) -> None:
    stable = [b"s%05d" % number for number in range(2500)]
    for name in stable:
        await pair.volume.mknod(ROOT_INO, name, stat.S_IFREG | 0o644, 0, ME)
    fh = await pair.there.opendir(ROOT_INO)
    names: list[bytes] = []
    position = 0
    while found := await pair.there.readdir(fh, position, 700):
        names += [entry.name for _, entry, _ in found]
        position = found[-1][0]
        await pair.here.unlink(ROOT_INO, stable[position % 2000])
        await pair.here.mkdir(ROOT_INO, b"new%d" % position, 0o755, USER)
    assert names == [b".", b"..", *stable]
    fifth = await pair.there.readdir(fh, 5, 1)
    assert fifth[0][1].name == stable[3]
    assert await pair.there.readdir(fh, len(stable) + 2, 1) == []
    again = await listing(pair.there, fh)
    assert any(name.startswith(b"new") for name in again)
    await pair.there.releasedir(fh)


async def test_listed_files_have_their_attributes(pair: Pair) -> None:
    await save(pair.here, b"f", LARGE)
    await pair.here.mkdir(ROOT_INO, b"d", 0o755, USER)
    fh = await pair.there.opendir(ROOT_INO)
    found = {entry.name: attributes for _, entry, attributes in await pair.there.readdir(fh, 0, 10)}
    assert found[b"d"] is None
    file = found[b"f"]
    assert file is not None
    assert file.size_bytes == len(LARGE)
    pair.there.listed(file.ino, ROOT_INO, b"f")
    assert (await pair.there.getattr(file.ino)).size_bytes == len(LARGE)


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
