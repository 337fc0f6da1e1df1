"""The Filesystem without a kernel: two of them on one volume and one blob store, each reading what the other did."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from apollofs.fs.errno_map import errno_of
from apollofs.fs.errors import BadHandle, NoDataThere
from apollofs.metadata.errors import (
    EntryExists,
    FileTooLarge,
    InvalidArgument,
    NotSupported,
    OperationNotPermitted,
    StaleInode,
)
from apollofs.metadata.records import ROOT_INO, InodeFlag, RenameFlag, SetAttr
from tests.support.filesystems import LARGE, OWNER, ROOT, USER, Pair, close, content, create, save

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


@pytest.mark.parametrize("how", ["not proven", "lost"])
async def test_a_mapping_reads_nothing_older_than_the_lease(pair: Pair, how: str) -> None:
    """The kernel fetches its pages without asking for attributes before."""
    ino = await save(pair.here, b"f", LARGE)
    reader = (await pair.here.open(ino, os.O_RDONLY, USER)).fh
    await pair.there.lookup(ROOT_INO, b"f")
    writer = (await pair.there.open(ino, os.O_WRONLY, USER)).fh
    await pair.there.write(writer, 0, b"ABCD")
    await close(pair.there, writer)
    if how == "lost":
        pair.here.session_lost()
    else:
        pair.volume.session._valid_until = 0.0
    assert await pair.here.read(reader, 0, 5) == b"ABCD4"
    await close(pair.here, reader)


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
    with pytest.raises(StaleInode):
        await pair.here.create(ROOT_INO, b"f", 0o644, os.O_RDWR | os.O_CREAT, USER)
    assert await content(pair.here) == b"theirs"


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
    fh = pair.here.opendir(made.ino).fh
    assert [entry.name for _, entry in await pair.here.readdir(fh, 0, 10)] == [b".", b".."]
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
