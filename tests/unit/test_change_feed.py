"""Feeding one consumer: from where it goes on after it ended well, badly, or was replaced."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest
import trio

from apollofs.fs.change_feed import NOW, FeedRequest, feed
from apollofs.metadata.changes.groups import list_groups
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.errors import InvalidArgument
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.volume import Volume
from tests.support.change_logs import KEYS, World, made_world
from tests.support.volumes import ME, VOLUME, mounted

GROUP = FeedRequest(group="g")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with made_world() as world:
        yield world


class Consumer:
    """Takes records; fails, or stops, when it has a certain path."""

    def __init__(self, *, fails_at: bytes = b"") -> None:
        self.paths: list[bytes | None] = []
        self._fails_at = fails_at

    async def deliver(self, records: Sequence[ChangeRecord]) -> None:
        await trio.lowlevel.checkpoint()
        for record in records:
            if record.path == self._fails_at:
                raise OSError("by the test")
            self.paths.append(record.path)

    async def run(self, world: World, request: FeedRequest) -> list[bytes | None]:
        await feed(world.store, VOLUME, world.log(), request, self.deliver)
        return self.paths


async def make(volume: Volume, *names: bytes) -> None:
    for name in names:
        await volume.mkdir(ROOT_INO, name, 0o755, ME)
    await volume.settle()


async def test_a_group_begins_where_it_is_told_and_goes_on(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, b"before")
        assert await Consumer().run(world, FeedRequest(start=NOW, group="g")) == []
        await make(volume, b"a", b"b")
        # where it begins is only asked of a group without a position
        assert await Consumer().run(world, GROUP) == [b"/a", b"/b"]
        assert await Consumer().run(world, GROUP) == []
        assert await Consumer().run(world, FeedRequest()) == [b"/", b"/before", b"/a", b"/b"]


async def test_what_was_not_dealt_with_comes_again(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, b"a")
        await Consumer().run(world, GROUP)
        await make(volume, b"b", b"c", b"d")
        consumer = Consumer(fails_at=b"/c")
        with pytest.RaisesGroup(pytest.RaisesExc(OSError), flatten_subgroups=True):
            await consumer.run(world, GROUP)
        again = await Consumer().run(world, GROUP)
        assert [*consumer.paths, *again][-3:] == [b"/b", b"/c", b"/d"]
        assert again[-2:] == [b"/c", b"/d"]


async def test_a_group_comes_by_what_it_does_not_select(world: World) -> None:
    """Or it would read everything again, and lose its place to retention."""
    async with mounted(world.store) as volume:
        await make(volume, b"a", b"b")
        assert await Consumer().run(world, FeedRequest(group="g", path=b"/nothing")) == []
        end = (await list_groups(world.store, KEYS))["g"]
        assert end > (await world.read())[-1].position
        assert await Consumer().run(world, FeedRequest(group="g", path=b"/a")) == []


async def test_since(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, b"a", b"b", b"c")
        whole = await world.read()
        for _ in range(2):
            for at, record in enumerate(whole):
                request = FeedRequest(since_ns=record.change.time_ns)
                assert await Consumer().run(world, request) == [each.path for each in whole[at:]]
            await world.archive()


async def test_a_position_as_text(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, b"a", b"b")
        whole = await world.read()
        assert await Consumer().run(world, FeedRequest(str(whole[1].position))) == [b"/a", b"/b"]
        with pytest.raises(InvalidArgument):
            await Consumer().run(world, FeedRequest("tomorrow"))
        assert Position(0) < whole[0].position
