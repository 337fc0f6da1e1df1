"""What the daemon and its guard share, and what open files put there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from apollofs.fs.page_table import PageTable, PageTableView
from tests.support.filesystems import USER, Pair, close, create, save


@pytest.fixture
def table() -> Iterator[PageTable]:
    table = PageTable(inodes_max=3)
    yield table
    table.close()


def seen(table: PageTable) -> list[int]:
    return sorted(PageTableView(table.fd).inodes())


def test_an_inode_is_there_until_its_last_handle_is_closed(table: PageTable) -> None:
    assert table.add(5)
    assert table.add(5)
    assert table.add(7)
    assert seen(table) == [5, 7]
    table.remove(5)
    assert seen(table) == [5, 7]
    table.remove(5)
    assert seen(table) == [7]


def test_places_are_used_again(table: PageTable) -> None:
    for ino in range(1, 100):
        assert table.add(ino)
        table.remove(ino)
    assert seen(table) == []
    assert len(table) == 0


def test_a_full_table_takes_only_what_it_has(table: PageTable) -> None:
    assert [table.add(ino) for ino in (1, 2, 3, 4, 3)] == [True, True, True, False, True]
    table.remove(1)
    assert table.add(4)
    assert seen(table) == [2, 3, 4]


def test_the_guard_knows_until_when_the_lease_is_proven(table: PageTable) -> None:
    view = PageTableView(table.fd)
    assert view.proven_until_s == 0
    table.prove(12.5)
    assert view.proven_until_s == 12.5
    view.note_drop()
    assert table.drops == 1


async def test_open_files_are_in_the_table(pair: Pair, table: PageTable) -> None:
    pair.here.page_watch = table
    made, fh = await create(pair.here, b"new")
    ino = await save(pair.here, b"f", b"")
    assert seen(table) == [made.ino]
    reader = (await pair.here.open(ino, os.O_RDONLY | os.O_DIRECT, USER)).fh
    assert seen(table) == sorted([made.ino, ino])  # a private mapping of it has pages all the same
    await close(pair.here, reader)
    await close(pair.here, fh)
    assert seen(table) == []


async def test_what_does_not_fit_is_read_directly(pair: Pair, table: PageTable) -> None:
    inos = [await save(pair.here, b"%d" % number, b"text") for number in range(4)]
    pair.here.page_watch = table
    opened = [await pair.here.open(ino, os.O_RDONLY, USER) for ino in inos]
    assert [one.direct_io for one in opened] == [False, False, False, True]
    assert await pair.here.read(opened[3].fh, 0, 4) == b"text"
    await close(pair.here, opened[3].fh)
    assert seen(table) == sorted(inos[:3])
    for one in opened[:3]:
        await close(pair.here, one.fh)


async def test_the_table_hears_of_each_renewal(pair: Pair, table: PageTable) -> None:
    pair.volume.watch_lease(table.prove)
    first = PageTableView(table.fd).proven_until_s
    assert first == pytest.approx(pair.volume.session.proven_until)
    pair.volume.session.proven_hook(first + 10)
    assert PageTableView(table.fd).proven_until_s == pytest.approx(first + 10)
