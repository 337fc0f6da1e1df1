"""How many requests each operation costs: not one more than DESIGN says."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from apollofs.metadata.ahead import LINGER_S, OPS_IN_BATCH
from apollofs.metadata.counting import CountingStore
from apollofs.metadata.errors import EntryExists, NoSuchEntry
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.records import ROOT_INO, BodyChange, Extent, RenameFlag, SetAttr
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, OPTIONS, assert_sound, make_volume, mounted

PLAIN = replace(OPTIONS, delegations=False)


@pytest.fixture
async def counted() -> AsyncIterator[tuple[Volume, CountingStore]]:
    store = CountingStore(MemoryStore())
    await make_volume(store)
    async with mounted(store, PLAIN) as volume:
        yield volume, store
    await assert_sound(store)


@contextlib.contextmanager
def requests(store: CountingStore, expected: int) -> Iterator[None]:
    store.reset()
    yield
    assert store.requests == expected


async def test_names(counted: tuple[Volume, CountingStore]) -> None:
    volume, store = counted
    with requests(store, 1):
        directory = await volume.mkdir(ROOT_INO, b"d", 0o755, ME)
    with requests(store, 1):
        file = await volume.mknod(directory.ino, b"f", stat.S_IFREG | 0o644, 0, ME)
    with requests(store, 1):
        await volume.symlink(directory.ino, b"s", b"target", ME)
    with requests(store, 1):
        await volume.lookup(directory.ino, b"f")
    with requests(store, 1):
        await volume.getattr(file.ino)
    with requests(store, 1):
        await volume.getattr(directory.ino)
    with requests(store, 1):
        await volume.setattr(file.ino, SetAttr(mode=0o600))
    with requests(store, 1):
        await volume.setattr(directory.ino, SetAttr(mode=0o700))
    with requests(store, 1):
        await volume.link(file.ino, ROOT_INO, b"hard")
    with requests(store, 1):
        await volume.rename(directory.ino, b"f", ROOT_INO, b"g")
    with requests(store, 1):
        await volume.unlink(ROOT_INO, b"g")
    with requests(store, 1):
        await volume.unlink(ROOT_INO, b"hard")
    with requests(store, 1):
        await volume.unlink(directory.ino, b"s")
    with requests(store, 1):
        await volume.rmdir(ROOT_INO, b"d")


async def test_renames(counted: tuple[Volume, CountingStore]) -> None:
    volume, store = counted
    a = await volume.mkdir(ROOT_INO, b"a", 0o755, ME)
    b = await volume.mkdir(ROOT_INO, b"b", 0o755, ME)
    await volume.mkdir(a.ino, b"sub", 0o755, ME)
    for name in (b"x", b"y"):
        await volume.mknod(a.ino, name, stat.S_IFREG | 0o644, 0, ME)
    with requests(store, 1):
        await volume.rename(a.ino, b"x", b.ino, b"new")
    with requests(store, 1):
        await volume.rename(a.ino, b"y", b.ino, b"new")
    with requests(store, 1):
        await volume.rename(a.ino, b"sub", a.ino, b"other")
    with requests(store, 1):
        await volume.rename(b.ino, b"new", a.ino, b"other", RenameFlag.EXCHANGE)


async def test_lookup_from_cold(counted: tuple[Volume, CountingStore]) -> None:
    volume, store = counted
    await volume.mkdir(ROOT_INO, b"d", 0o755, ME)
    async with mounted(store, PLAIN) as other:
        with requests(store, 2):
            await other.lookup(ROOT_INO, b"d")
        with requests(store, 1):
            await other.lookup(ROOT_INO, b"d")


async def test_commit(counted: tuple[Volume, CountingStore]) -> None:
    volume, store = counted
    file = await volume.mknod(ROOT_INO, b"f", stat.S_IFREG | 0o644, 0, ME)
    with requests(store, 1):
        file = await volume.commit_body(file.ino, BodyChange(file.body_version, 5, inline=b"hello"))
    extent = Extent(0, 1 << 20, volume.new_blob(), 0, 1 << 20)
    with requests(store, 1):
        await volume.commit_body(file.ino, BodyChange(file.body_version, 1 << 20, extents=(extent,), lifts_inline=True))
    with requests(store, 1):
        assert (await volume.read_body(file.ino)).inode.extents == (extent,)


async def test_readdir(counted: tuple[Volume, CountingStore]) -> None:
    volume, store = counted
    names = [b"%04d" % number for number in range(250)]
    for name in names:
        await volume.mknod(ROOT_INO, name, stat.S_IFREG | 0o644, 0, ME)
    with requests(store, 3):
        page = await volume.readdir(ROOT_INO, b"", 100)
        found = list(page.entries)
        while page.more:
            page = await volume.readdir(ROOT_INO, found[-1].name, 100, page.revision)
            found += page.entries
    assert [entry.name for entry in found] == names
    assert all(entry.inode is not None for entry in found)


async def test_a_listing_of_several_pages_leaves_nothing_to_ask() -> None:
    store = CountingStore(MemoryStore())
    await make_volume(store)
    names = [b"%04d" % number for number in range(250)]
    async with mounted(store) as maker:
        made = await maker.mkdir(ROOT_INO, b"d", 0o755, ME)
        for name in names:
            await maker.mknod(made.ino, name, stat.S_IFREG | 0o644, 0, ME)
    async with mounted(store) as volume:
        await wait_all_tasks_blocked()  # nothing is delegated until recalls reach us
        with requests(store, 3):
            page = await volume.readdir(made.ino, b"", 100)
            while page.more:
                assert all(volume.delegated_revision(made.ino, entry.name) for entry in page.entries)
                page = await volume.readdir(made.ino, page.entries[-1].name, 100, page.revision)
        with requests(store, 0):
            for name in names:
                await volume.lookup(made.ino, name)
            with pytest.raises(NoSuchEntry):
                await volume.lookup(made.ino, b"absent")
            assert [entry.name for entry in (await volume.readdir(made.ino, b"", 100)).entries] == names
    await assert_sound(store)


async def test_what_is_delegated_costs_nothing() -> None:
    store = CountingStore(MemoryStore())
    await make_volume(store)
    async with mounted(store) as volume:
        await wait_all_tasks_blocked()  # nothing is delegated until recalls reach us
        made = await volume.mkdir(ROOT_INO, b"d", 0o755, ME)
        file = await volume.mknod(made.ino, b"f", stat.S_IFREG | 0o644, 0, ME)
        with requests(store, 0):
            assert await volume.lookup(made.ino, b"f") == file
            assert await volume.getattr(file.ino) == file
            assert (await volume.getattr(made.ino)).nlink == 2
            with pytest.raises(NoSuchEntry):
                await volume.lookup(made.ino, b"g")
            assert [entry.name for entry in (await volume.readdir(made.ino, b"", 100)).entries] == [b"f"]
        await volume.settle()
        with requests(store, 1):
            await volume.commit_body(file.ino, BodyChange(0, 5, inline=b"hello"))
        with requests(store, 0):
            assert (await volume.read_body(file.ino)).inline == b"hello"
    await assert_sound(store)


async def test_what_is_held_exclusively_is_changed_at_once() -> None:
    store = CountingStore(MemoryStore())
    await make_volume(store)
    async with mounted(store) as volume:
        await wait_all_tasks_blocked()
        made = await volume.mkdir(ROOT_INO, b"d", 0o755, ME)
        with requests(store, 0):
            for name in (b"f", b"g", b"h"):
                file = await volume.mknod(made.ino, name, stat.S_IFREG | 0o644, 0, ME)
            await volume.setattr(file.ino, SetAttr(mode=0o600))
            await volume.unlink(made.ino, b"g")
            assert (await volume.lookup(made.ino, b"h")).mode & 0o777 == 0o600
            with pytest.raises(NoSuchEntry):
                await volume.lookup(made.ino, b"g")
            with pytest.raises(EntryExists):
                await volume.mknod(made.ino, b"f", stat.S_IFREG | 0o644, 0, ME)
        with requests(store, 1):  # what changes twice is written as it is in the end
            await volume.settle()
        with requests(store, 1):
            await volume.rename(made.ino, b"h", made.ino, b"f")
        with requests(store, 0):
            await volume.unlink(made.ino, b"f")
        with requests(store, 2):  # the root is not held
            await volume.rmdir(ROOT_INO, b"d")
    await assert_sound(store)


async def test_a_small_file_and_its_body_are_one_request(mock_clock: MockClock) -> None:
    store = CountingStore(MemoryStore())
    await make_volume(store)
    async with mounted(store) as volume:
        await wait_all_tasks_blocked()
        made = await volume.mkdir(ROOT_INO, b"d", 0o755, ME)
        await volume.settle()
        with requests(store, 0):  # nobody waits for it
            file = await volume.mknod(made.ino, b"f", stat.S_IFREG | 0o644, 0, ME)
            await wait_all_tasks_blocked()
        with requests(store, 1):
            await volume.commit_body(file.ino, BodyChange(file.body_version, 5, inline=b"hello"))
        with requests(store, 1):
            await volume.mknod(made.ino, b"g", stat.S_IFREG | 0o644, 0, ME)
            await wait_all_tasks_blocked()
            mock_clock.jump(LINGER_S)
            await wait_all_tasks_blocked()
        with requests(store, 1):  # as soon as there is enough of it
            for number in range(OPS_IN_BATCH // 2):
                await volume.mknod(made.ino, b"%d" % number, stat.S_IFREG | 0o644, 0, ME)
            await wait_all_tasks_blocked()
    await assert_sound(store)


async def test_a_clone_is_one_request() -> None:
    store = CountingStore(MemoryStore())
    await make_volume(store)
    async with mounted(store) as volume:
        await wait_all_tasks_blocked()
        source, target = [
            await volume.mknod(ROOT_INO, name, stat.S_IFREG | 0o644, 0, ME) for name in (b"source", b"target")
        ]
        extents = (Extent(0, 9000, volume.new_blob(), 0, 9000),)
        await volume.commit_body(source.ino, BodyChange(0, 9000, extents=extents))
        with requests(store, 1):
            await volume.commit_body(target.ino, BodyChange(0, 9000, extents=extents, cloned_from=source.ino))
    await assert_sound(store)


async def test_a_directory_that_is_removed_is_not_claimed() -> None:
    store = CountingStore(MemoryStore())
    await make_volume(store)
    async with mounted(store) as volume:
        await wait_all_tasks_blocked()
        made = await volume.mkdir(ROOT_INO, b"d", 0o755, ME)
        await volume.settle()
        volume.delegations.exclusives._share(made.ino)
        await wait_all_tasks_blocked()
        await volume.rename(ROOT_INO, b"d", ROOT_INO, b"e")
        await volume.rmdir(ROOT_INO, b"e")
    await assert_sound(store)
