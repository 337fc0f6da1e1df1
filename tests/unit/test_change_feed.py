"""Feeding one consumer: from where it goes on after it ended well, badly, or was replaced."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
import trio

from apollofs.fs.change_feed import NOW, FeedRequest, feed
from apollofs.metadata.changes.groups import list_groups, open_group
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.errors import ChangesLost, InvalidArgument
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


@pytest.mark.parametrize("follow", [False, True])
async def test_a_position_behind_the_end(world: World, follow: bool) -> None:
    """As a restored etcd leaves readers with: they must not wait for it to come, nor pass for having read all."""
    async with mounted(world.store) as volume:
        await make(volume, b"a")
        end = await world.log().now()
        behind = Position(end.revision, 1)
        with pytest.raises(ChangesLost, match="behind the end") as caught:
            await Consumer().run(world, FeedRequest(str(behind), follow=follow))
        assert caught.value.first == str(end)
        assert await Consumer().run(world, FeedRequest(str(end))) == []
        async with open_group(world.store, KEYS, "g") as group:
            await group.commit(behind._replace(revision=10**6))
        with pytest.raises(ExceptionGroup) as wrapped:
            await Consumer().run(world, replace(GROUP, follow=follow))
        assert wrapped.group_contains(ChangesLost, match="behind the end")


async def test_a_path_that_means_nothing_moves_no_group(world: World) -> None:
    with pytest.raises(InvalidArgument):
        await Consumer().run(world, FeedRequest(path=b"/a/../b", group="g"))
    assert await list_groups(world.store, KEYS) == {}


@pytest.mark.parametrize("path", [b"a", b"//a", b"/./a/"])
async def test_a_path_in_any_spelling(world: World, path: bytes) -> None:
    async with mounted(world.store) as volume:
        await make(volume, b"a", b"b")
        assert await Consumer().run(world, FeedRequest(path=path, group="g")) == [b"/a"]


async def test_a_position_as_text(world: World) -> None:
    async with mounted(world.store) as volume:
        await make(volume, b"a", b"b")
        whole = await world.read()
        assert await Consumer().run(world, FeedRequest(str(whole[1].position))) == [b"/a", b"/b"]
        with pytest.raises(InvalidArgument):
            await Consumer().run(world, FeedRequest("tomorrow"))
        assert Position(0) < whole[0].position
