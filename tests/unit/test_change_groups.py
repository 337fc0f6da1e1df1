"""Consumer groups: one reader at a time, who goes on where the last one stopped, and can't be undone by one before."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from apollofs.metadata.changes.groups import forget_group, list_groups, open_group
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.role import held_role
from apollofs.metadata.errors import InvalidArgument, OutcomeUnknown, RoleLost, RoleTaken
from apollofs.metadata.memory import Moment, Request
from apollofs.metadata.store import Range
from tests.faults.hooked_store import HookedStore
from tests.support.change_logs import KEYS, World, made_world


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with made_world() as world:
        yield world


async def end_lease(world: World, name: str) -> None:
    """As etcd does with a reader that is not heard of."""
    (holder,) = (await world.store.range(Range(KEYS.group_reader(name)))).kvs
    await world.store.lease_revoke(holder.lease)


async def test_the_next_reader_goes_on(world: World) -> None:
    async with open_group(world.store, KEYS, "g") as group:
        assert await group.position() is None
        await group.commit(Position(5, 1))
    async with open_group(world.store, KEYS, "g") as group:
        assert await group.position() == Position(5, 1)
        await group.commit(Position(9))
    async with open_group(world.store, KEYS, "other") as group:
        assert await group.position() is None
    assert await list_groups(world.store, KEYS) == {"g": Position(9)}
    await forget_group(world.store, KEYS, "g")
    assert await list_groups(world.store, KEYS) == {}


async def test_readers_take_turns(world: World) -> None:
    order: list[int] = []
    active = 0

    async def read(number: int) -> None:
        nonlocal active
        async with open_group(world.store, KEYS, "g") as group:
            active += 1
            assert active == 1
            found = await group.position()
            await group.commit(Position(found.revision + 1 if found else 1))
            order.append(number)
            active -= 1

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(read, number)
    assert sorted(order) == list(range(5))
    assert await list_groups(world.store, KEYS) == {"g": Position(5)}


async def test_a_waiting_reader_takes_over_when_the_lease_ends(world: World) -> None:
    taken = trio.Event()

    async def wait() -> None:
        async with open_group(world.store, KEYS, "g") as group:
            assert await group.position() == Position(1)
            await group.commit(Position(2))
            taken.set()

    async def be_replaced(nursery: trio.Nursery) -> None:
        async with open_group(world.store, KEYS, "g") as group:
            await group.commit(Position(1))
            with pytest.raises(RoleTaken):
                await forget_group(world.store, KEYS, "g")
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert not taken.is_set()
            await end_lease(world, "g")
            await taken.wait()
            await group.commit(Position(1, 5))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            with pytest.raises(RoleLost):
                await be_replaced(nursery)
    assert await list_groups(world.store, KEYS) == {"g": Position(2)}


async def test_a_reader_whose_lease_has_ended_is_told_while_it_waits(
    world: World, autojump_clock: trio.abc.Clock
) -> None:
    """It hears it by its keepalive, whatever else it does."""

    async def read() -> None:
        async with open_group(world.store, KEYS, "g"):
            await end_lease(world, "g")
            await trio.sleep_forever()

    with pytest.raises(RoleLost):
        await read()


async def test_who_waited_in_vain_is_told(world: World) -> None:
    """Its host was frozen, and its lease has ended, when its turn comes."""
    data = world.store.shared.data

    async def wait() -> None:
        with pytest.raises(RoleLost, match="has ended"):
            async with held_role(world.store.another(), KEYS.archiver, "archives", 600, wait=True):
                pytest.fail("it has the role without a lease")

    async with trio.open_nursery() as nursery, held_role(world.store, KEYS.archiver, "archives", 600, wait=False):
        before = set(data._leases)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        (its,) = set(data._leases) - before
        data.revoke(its)


@pytest.mark.parametrize("when", [Moment.BEFORE, Moment.AFTER])
async def test_lost_replies(world: World, when: Moment) -> None:
    """Each transaction's first copy is in doubt."""
    seen: set[Request] = set()

    async def hook(moment: Moment, request: Request) -> None:
        if moment is when and request.method == "txn" and request not in seen:
            seen.add(request)
            raise OutcomeUnknown("by the test")

    store = HookedStore(world.store, hook)
    for number in range(3):
        async with open_group(store, KEYS, "g") as group:
            await group.commit(Position(number))
            await group.commit(Position(number, 1))
    assert await list_groups(world.store, KEYS) == {"g": Position(2, 1)}
    assert len((await world.store.range(Range(KEYS.group_reader("g")))).kvs) == 0


async def test_archiving_with_lost_replies(world: World) -> None:
    seen: set[Request] = set()

    async def hook(moment: Moment, request: Request) -> None:
        if moment is Moment.AFTER and request.method == "txn" and request not in seen:
            seen.add(request)
            raise OutcomeUnknown("by the test")

    report = await world.archive(store=HookedStore(world.store, hook))
    assert report.segments == 1
    assert len(await world.read()) == 1


@pytest.mark.parametrize("name", ["", "a/b", ".a", "x" * 65, "ä"])
async def test_bad_names(world: World, name: str) -> None:
    with pytest.raises(InvalidArgument):
        async with open_group(world.store, KEYS, name):
            pass
