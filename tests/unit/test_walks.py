"""A walk from a cold mount: no more than one request for each directory, and then none."""

from __future__ import annotations

import stat
from dataclasses import replace

import pytest
from trio.testing import wait_all_tasks_blocked

from apollofs.metadata import walks
from apollofs.metadata.counting import CountingStore
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.volume import Volume
from apollofs.metadata.walks import Walks
from tests.support.volumes import ME, OPTIONS, assert_sound, make_volume, mounted

DIRECTORIES = 40
FILES = 5
PAGE = 1000
THROUGH = replace(OPTIONS, write_back=False)


async def walk(volume: Volume, directory: int) -> list[bytes]:
    """All names below a directory, as os.walk asks for them."""
    page = await volume.readdir(directory, b"", PAGE)
    assert not page.more
    found = [entry.name for entry in page.entries]
    for entry in page.entries:
        if entry.file_type == stat.S_IFDIR:
            below = await volume.lookup(directory, entry.name)
            assert below.nlink == 2
            found += await walk(volume, below.ino)
    return found


async def test_a_walk_reads_ahead() -> None:
    store = CountingStore(MemoryStore())
    await make_volume(store)
    async with mounted(store, THROUGH) as maker, mounted(store) as walker:
        await wait_all_tasks_blocked()
        top = await maker.mkdir(ROOT_INO, b"top", 0o755, ME)
        for at in range(DIRECTORIES):
            made = await maker.mkdir(top.ino, b"d%02d" % at, 0o755, ME)
            for number in range(FILES):
                await maker.mknod(made.ino, b"f%d" % number, stat.S_IFREG | 0o644, 0, ME)
        await walker.lookup(ROOT_INO, b"top")
        store.reset()
        found = await walk(walker, top.ino)
        assert len(found) == DIRECTORIES * (1 + FILES)
        assert store.requests <= 1 + 2 + 2 + -(-DIRECTORIES // 9)
        store.reset()
        assert await walk(walker, top.ino) == found
        assert store.requests == 0
        # what was read ahead is given back like everything else
        third = await walker.lookup(top.ino, b"d03")
        await maker.mknod(third.ino, b"new", stat.S_IFREG | 0o644, 0, ME)
        assert b"new" in await walk(walker, top.ino)
    await assert_sound(store)


async def test_a_long_listing_of_subdirectories_asks_for_them_together() -> None:
    store = CountingStore(MemoryStore())
    await make_volume(store)
    async with mounted(store, THROUGH) as maker, mounted(store) as lister:
        await wait_all_tasks_blocked()
        for at in range(60):
            await maker.mkdir(ROOT_INO, b"d%02d" % at, 0o755, ME)
        store.reset()
        page = await lister.readdir(ROOT_INO, b"", PAGE)
        for entry in page.entries:
            await lister.lookup(ROOT_INO, entry.name)
        assert store.requests <= 1 + 60 // 30 + 1


def test_only_what_was_listed_is_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walks, "WALKS_MAX", 2)
    walk = Walks()
    walk.listed(1, [11, 12, 13])
    assert list(walk.after(1, 11, 5)) == [12, 13]
    assert list(walk.after(1, 99, 5)) == []
    assert not walk.goes_on(1, 11)
    assert walk.goes_on(1, 12)
    walk.listed(2, [21, 22])
    walk.listed(3, [31, 32])
    assert list(walk.after(1, 11, 5)) == []
    walk.listed(2, [])
    assert list(walk.after(2, 21, 5)) == []


def test_a_listing_that_has_not_changed_goes_on() -> None:
    walk = Walks()
    walk.listed(1, [11, 12])
    assert not walk.goes_on(1, 11)
    walk.listed(1, [11, 12])
    assert walk.goes_on(1, 12)
