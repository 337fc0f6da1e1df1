"""A mount that is cut off from etcd: what needs etcd fails soon after the lease has ended, and what is shorter fails
nothing. Time is the test's own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import DeadlineExceeded
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.patience import AGAIN_S, GRACE_S, Patience
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.volume import Volume
from tests.faults.hooked_store import HookedStore
from tests.faults.operations import FILE, until_reopened
from tests.support.volumes import ME, assert_sound, make_volume, mounted

pytestmark = [
    pytest.mark.faults,
    pytest.mark.expects_log(r"has lost its lease"),
]
LEASE_S = 10
OPTIONS = SessionOptions(lease_ttl_s=LEASE_S, operation_deadline_s=300, slots=4)
SHORT_S = 0.5 * LEASE_S
Clock = trio.testing.MockClock


@dataclass
class Cut:
    """A hook that keeps requests, or their answers, while the way to the store is cut."""

    moment: Moment = Moment.BEFORE
    open: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.heal()

    def heal(self) -> None:
        self.open.set()

    def cut(self, moment: Moment = Moment.BEFORE) -> None:
        self.moment, self.open = moment, trio.Event()

    async def __call__(self, moment: Moment, request: Request) -> None:
        if moment is self.moment:
            await self.open.wait()


@dataclass
class World:
    """`near`: a mount whose way can be cut; `far`: another one."""

    near: Volume
    far: Volume
    way: Cut

    async def heal(self) -> None:
        """The way is there again, and the mount has a session."""
        lost = self.near.session.number
        self.way.heal()
        await until_reopened(self.near, lost)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    store, way = MemoryStore(), Cut()
    await make_volume(store)
    async with mounted(store, OPTIONS) as far, mounted(HookedStore(store, way), OPTIONS) as near:
        with contextlib.ExitStack() as stack:
            stack.callback(way.heal)
            await trio.testing.wait_all_tasks_blocked()  # nothing is held exclusively until recalls reach us
            yield World(near, far, way)
        await near.settle()
    await assert_sound(store)


async def _make(volume: Volume) -> object:
    return await volume.mknod(ROOT_INO, b"new", FILE, 0, ME)


async def _rename(volume: Volume) -> object:
    return await volume.rename(ROOT_INO, b"file", ROOT_INO, b"renamed")


async def _look_up(volume: Volume) -> object:
    return await volume.lookup(ROOT_INO, b"file")


async def _list(volume: Volume) -> object:
    return await volume.readdir(ROOT_INO, b"", 10)


CALLS: dict[str, Callable[[Volume], Awaitable[object]]] = {
    "create": _make,
    "rename": _rename,
    "lookup": _look_up,
    "list": _list,
}
every_call = pytest.mark.parametrize("name", list(CALLS))


@every_call
@pytest.mark.parametrize("moment", list(Moment))
async def test_what_needs_the_store_fails_when_the_lease_has_ended(
    name: str, moment: Moment, world: World, autojump_clock: Clock
) -> None:
    await world.far.mknod(ROOT_INO, b"file", FILE, 0, ME)
    world.way.cut(moment)
    began = autojump_clock.current_time()
    with pytest.raises(DeadlineExceeded):
        await CALLS[name](world.near)
    assert SHORT_S < autojump_clock.current_time() - began <= LEASE_S + GRACE_S
    # and from then on at once, but for the moment in which an answer may come after all
    began = autojump_clock.current_time()
    with pytest.raises(DeadlineExceeded):
        await CALLS[name](world.near)
    assert autojump_clock.current_time() - began <= 2 * AGAIN_S
    await world.heal()
    await world.near.mknod(ROOT_INO, b"after", FILE, 0, ME)


@every_call
async def test_a_short_cut_fails_nothing(name: str, world: World, autojump_clock: Clock) -> None:
    del autojump_clock
    await world.far.mknod(ROOT_INO, b"file", FILE, 0, ME)
    world.way.cut()

    async def heal() -> None:
        await trio.sleep(SHORT_S)
        world.way.heal()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(heal)
        await CALLS[name](world.near)


@pytest.mark.expects_log("1 operations that had been answered are lost")
async def test_who_waits_for_what_was_answered_hears_of_it(world: World, autojump_clock: Clock) -> None:
    del autojump_clock
    directory = await world.near.mkdir(ROOT_INO, b"d", 0o755, ME)
    await world.near.settle()
    world.way.cut()
    await world.near.mknod(directory.ino, b"f", FILE, 0, ME)
    with pytest.raises(DeadlineExceeded, match="lease"):
        await world.near.settle()
    await world.heal()


async def test_patience_follows_the_proof(autojump_clock: Clock) -> None:
    patience = Patience()

    async def wait() -> float:
        began = autojump_clock.current_time()
        with pytest.raises(DeadlineExceeded), patience.bounded():
            await trio.sleep_forever()
        return autojump_clock.current_time() - began

    async def prove(after_s: float, left_s: float) -> None:
        await trio.sleep(after_s)
        patience.prove(left_s)

    with patience.bounded():  # nothing is known of a lease yet
        await trio.sleep(1000)
    patience.prove(5)
    assert await wait() == 5 + GRACE_S
    assert await wait() == AGAIN_S
    patience.prove(5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prove, 4, 5)
        assert await wait() == 9 + GRACE_S, "from a proof on it is as before"
