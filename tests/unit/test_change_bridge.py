"""Bridging the change log: each record once, whatever fails, and where a bridge begins and goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from apollofs.fs.change_bridge import BridgeReport, bridge
from apollofs.fs.change_feed import NOW, FeedRequest
from apollofs.metadata.changes.groups import forget_group, list_groups
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.errors import ChangesLost
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.volume import Volume
from tests.support.change_logs import KEYS, World, made_world
from tests.support.volumes import ME, VOLUME, mounted

GROUP = FeedRequest(group="g")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with made_world() as world:
        yield world


class OtherLog:
    """A log with transactions, in memory. `fails`: how the next transaction ends, before or after it is there."""

    def __init__(self) -> None:
        self.paths: list[bytes | None] = []
        self.position: Position | None = None
        self.transactions = 0
        self.fails = ""

    async def send(self, records: Sequence[ChangeRecord], after: Position) -> None:
        await trio.lowlevel.checkpoint()
        fails, self.fails = self.fails, ""
        if fails == "before":
            raise OSError("by the test")
        self.paths += [record.path for record in records]
        self.position = after
        self.transactions += 1
        if fails == "after":
            raise OSError("by the test")

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[OtherLog]:
        await trio.lowlevel.checkpoint()
        yield self

    async def run(self, world: World, request: FeedRequest = GROUP) -> BridgeReport:
        return await bridge(world.store, VOLUME, world.log(), request, self.opened)


async def make(volume: Volume, *names: bytes) -> None:
    for name in names:
        await volume.mkdir(ROOT_INO, name, 0o755, ME)
    await volume.settle()


async def test_everything_once_and_then_what_is_new(world: World) -> None:
    other = OtherLog()
    async with mounted(world.store) as volume:
        await make(volume, b"a", b"b")
        report = await other.run(world)
        assert (report.records, other.paths) == (3, [b"/", b"/a", b"/b"])
        assert (await list_groups(world.store, KEYS))["g"] == report.position
        await make(volume, b"c")
        await world.archive()
        assert (await other.run(world)).records == 1
        assert other.paths[3:] == [b"/c"]


@pytest.mark.parametrize("fails", ["before", "after"])
async def test_a_transaction_that_fails_or_is_not_known_to_be_there(world: World, fails: str) -> None:
    other = OtherLog()
    async with mounted(world.store) as volume:
        await make(volume, b"a")
        await other.run(world)
        await make(volume, b"b", b"c")
        other.fails = fails
        with pytest.RaisesGroup(OSError, flatten_subgroups=True):
            await other.run(world)
        await make(volume, b"d")
        await other.run(world)
    assert other.paths == [b"/", b"/a", b"/b", b"/c", b"/d"]


async def test_the_other_log_has_forgotten_its_position(world: World) -> None:
    other = OtherLog()
    async with mounted(world.store) as volume:
        await make(volume, b"a")
        await other.run(world)
        other.position = None
        await make(volume, b"b")
        await other.run(world)
    assert other.paths == [b"/", b"/a", b"/b"]


async def test_the_other_log_has_a_position_of_another_history(world: World) -> None:
    """etcd was restored from a backup: what the other log has got since is not what will happen now."""
    other = OtherLog()
    async with mounted(world.store) as volume:
        await make(volume, b"a")
        await other.run(world)
        sent = other.transactions
        other.position = Position(10**6)
        with pytest.raises(ExceptionGroup) as caught:
            await other.run(world)
        assert caught.group_contains(ChangesLost, match="behind the end")
        assert other.transactions == sent
        await forget_group(world.store, KEYS, "g")
        assert (await other.run(world)).records == 2


async def test_a_group_that_was_forgotten_begins_anew(world: World) -> None:
    """Even if it dies before it has sent anything: what the other log had is of another time."""
    other = OtherLog()
    async with mounted(world.store) as volume:
        await make(volume, b"a")
        await other.run(world)
        await forget_group(world.store, KEYS, "g")
        other.fails = "after"
        with pytest.raises(OSError, match="by the test"):
            await other.run(world)
        await other.run(world)
    assert other.paths == [b"/", b"/a", b"/", b"/a"]


async def test_what_is_not_selected_needs_no_transaction(world: World) -> None:
    other = OtherLog()
    async with mounted(world.store) as volume:
        await make(volume, b"a", b"b")
        report = await other.run(world, FeedRequest(group="g", path=b"/a"))
        assert (other.paths, other.transactions) == ([b"/a"], 2)
        await make(volume, b"c")
        report = await other.run(world, FeedRequest(group="g", path=b"/a"))
        assert (report.records, other.transactions) == (0, 2)
        # and is not read again
        assert report.position is not None
        assert other.position is not None
        assert report.position > other.position
        assert (await other.run(world)).records == 0


async def test_a_bridge_may_begin_now(world: World) -> None:
    other = OtherLog()
    async with mounted(world.store) as volume:
        await make(volume, b"a")
        await other.run(world, FeedRequest(start=NOW, group="g"))
        await make(volume, b"b")
        await other.run(world)
    assert other.paths == [b"/b"]


async def test_followed_until_cancelled(world: World) -> None:
    other = OtherLog()
    async with mounted(world.store) as volume:
        await make(volume, b"a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.run, world, FeedRequest(follow=True, group="g"))
            with trio.fail_after(30):
                while b"/a" not in other.paths:
                    await trio.lowlevel.checkpoint()
                await make(volume, b"b")
                while b"/b" not in other.paths:
                    await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert (await list_groups(world.store, KEYS))["g"] == other.position
        assert (await other.run(world)).records == 0
