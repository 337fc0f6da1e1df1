"""Where directories are while the change log is read: paths of what several changes of one transaction have moved."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator

import pytest

from apollofs.metadata import journal
from apollofs.metadata.journal import Change, Kind, SlotRecord
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.store import Put
from tests.support.change_logs import KEYS, World, made_world
from tests.support.volumes import ME, mounted

DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with made_world() as world:
        yield world


async def record(world: World, *changes: Change) -> None:
    """What the log has of a transaction with these changes; the namespace stays as it is."""
    slot = journal.encode(SlotRecord(1, 1, 10**18, tuple(each._replace(time_ns=10**18) for each in changes)))
    await world.store.txn((), [Put(KEYS.log_mark, slot)])


@pytest.mark.parametrize("mode", [DIRECTORY, FILE])
async def test_what_is_below_the_other_one_of_an_exchange_has_its_new_path(world: World, mode: int) -> None:
    """The transaction that exchanges them changes something below it, too, which nobody has named before."""
    async with mounted(world.store) as volume:
        top = (await volume.mkdir(ROOT_INO, b"top", 0o755, ME)).ino
        one = (await volume.mkdir(top, b"one", 0o755, ME)).ino
        other = (await volume.mkdir(top, b"other", 0o755, ME)).ino
        await volume.settle()
        start = await world.log().now()
        exchange = Change(
            Kind.EXCHANGE, one, top, b"other", mode=mode, old_parent=top, old_name=b"one", ino2=other, nlink2=2
        )
        below = Change(Kind.CREATE, 100, other, b"file", mode=FILE)
        await record(world, exchange, below)
        await record(world, below._replace(ino=101, name=b"later"))
        expected = [b"/top/other", b"/top/one/file", b"/top/one/later"]
        assert [each.path for each in await world.read(start)] == expected
        await world.store.compact((await world.archive()).through)
        assert [each.path for each in await world.read(start)] == expected
