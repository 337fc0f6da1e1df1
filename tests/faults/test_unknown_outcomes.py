"""Lost replies, refused requests and cancellation at every request of every operation: done once, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest
import trio

from apollofs.metadata.errors import BodyConflict, DeadlineExceeded, NamespaceError, OutcomeUnknown, StoreUnavailable
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.records import SetAttr
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Put, Store
from apollofs.metadata.volume import Volume
from tests.faults.hooked_store import HookedStore, no_hook
from tests.faults.operations import (
    KEYS,
    Mutation,
    Places,
    assert_sound_after_a_crash,
    changes,
    counted,
    furnish,
    mutations,
)
from tests.support.volumes import assert_sound, make_volume, mounted

pytestmark = pytest.mark.faults
OPTIONS = SessionOptions(lease_ttl_s=60, operation_deadline_s=5, slots=4, write_back=False)
AHEAD = replace(OPTIONS, write_back=True)
REQUESTS_MAX = 20
STEPS_MAX = 400
MUTATIONS = mutations()
every_mutation = pytest.mark.parametrize("name", list(MUTATIONS))
FAULTS = {
    "lost request": (Moment.BEFORE, OutcomeUnknown("the request was lost by the test")),
    "lost reply": (Moment.AFTER, OutcomeUnknown("the reply was lost by the test")),
    "refused": (Moment.BEFORE, StoreUnavailable("refused by the test")),
}


@dataclass
class World:
    """One mount on a furnished volume, and the store beneath it for the test itself."""

    raw: MemoryStore
    store: HookedStore
    volume: Volume
    places: Places
    since: int

    async def count(self, kind: Kind) -> int:
        """How often the journal has it since the namespace was furnished."""
        return counted(await changes(self.raw, self.since))[kind]


@contextlib.asynccontextmanager
async def world(sound: Callable[[Store], Awaitable[None]], options: SessionOptions = OPTIONS) -> AsyncIterator[World]:
    """`sound` says at the end whether the namespace is."""
    raw = MemoryStore()
    await make_volume(raw)
    store = HookedStore(raw)
    async with mounted(store, options) as volume:
        places = await furnish(volume)
        yield World(raw, store, volume, places, raw.shared.data.revision + 1)
        store.hook = no_hook
    await sound(raw)


@dataclass
class Strike:
    """A hook that spoils requests of files' operations, from number `first` on, `times` of them."""

    first: int
    moment: Moment
    error: Exception
    times: int = 1
    seen: int = 0
    struck: int = 0
    spoilt: list[Request] = field(default_factory=list)

    async def __call__(self, moment: Moment, request: Request) -> None:
        if request.method not in ("txn", "range") or moment is not self.moment or _is_of_usage(request):
            return
        self.seen += 1
        if self.seen > self.first and self.struck < self.times:
            self.struck += 1
            self.spoilt.append(request)
            raise self.error


def _is_of_usage(request: Request) -> bool:
    """The mount's own bookkeeping, which comes at times of its own."""
    return any(
        isinstance(op, Put) and op.key.startswith(KEYS.usages)
        for part in request.arguments
        for op in (part if isinstance(part, tuple) else ())
    )


@every_mutation
@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("options", [OPTIONS, AHEAD], ids=["through", "ahead"])
async def test_one_fault_at_each_request_is_not_noticed(
    name: str, fault: str, options: SessionOptions, autojump_clock: trio.testing.MockClock
) -> None:
    kind, mutate = MUTATIONS[name]
    moment, error = FAULTS[fault]
    for first in range(REQUESTS_MAX):
        async with world(assert_sound, options) as it:
            strike = Strike(first, moment, error)
            it.store.hook = strike
            await mutate(it.volume, it.places)
            await it.volume.settle()
            it.store.hook = no_hook
            assert await it.count(kind) == 1
            assert not it.volume.session.in_doubt
        if not strike.struck:
            return
    pytest.fail(f"{name} takes more than {REQUESTS_MAX} requests")


@every_mutation
@pytest.mark.parametrize("fault", list(FAULTS))
async def test_given_up_is_done_once_or_not_at_all(
    name: str, fault: str, autojump_clock: trio.testing.MockClock
) -> None:
    """The store is lost from some request on, for good: what the error says is true, and nothing happens later."""
    kind, mutate = MUTATIONS[name]
    moment, error = FAULTS[fault]
    async with world(assert_sound_after_a_crash) as it:
        it.store.hook = strike = Strike(0, moment, error, times=1_000_000)
        with pytest.raises(DeadlineExceeded) as caught:
            await mutate(it.volume, it.places)
        it.store.hook = no_hook
        done = await it.count(kind)
        if "was not applied" in str(caught.value):
            assert done == 0
        else:
            assert done <= 1
        await _use_all_slots(it.volume)
        assert not it.volume.session.in_doubt
        if isinstance(error, OutcomeUnknown):
            await _arrive_late(it.raw, strike.spoilt)
        assert await it.count(kind) == done


async def test_nothing_is_held_while_a_slot_is_settled(autojump_clock: trio.testing.MockClock) -> None:
    """A copy that was on its way may arrive until then: what was read before it would be stale for ever."""
    settling, go_on = trio.Event(), trio.Event()

    async def hold(moment: Moment, request: Request) -> None:
        if moment is Moment.BEFORE and request.method == "txn" and request.arguments[0] == fence:
            settling.set()
            await go_on.wait()

    async with world(assert_sound_after_a_crash) as it:
        volume, directory = it.volume, it.places.directory
        it.store.hook = strike = Strike(0, Moment.BEFORE, OutcomeUnknown("lost by the test"), times=1_000_000)
        with pytest.raises(DeadlineExceeded):
            await volume.setattr(directory, SetAttr(mode=0o700))
        late = next(request for request in strike.spoilt if request.method == "txn")
        fence = late.arguments[0][:1]  # type: ignore[index]
        it.store.hook = hold
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volume.session.settle)
            await settling.wait()
            assert volume.session.in_doubt
            for _ in range(4):
                assert (await volume.getattr(directory)).mode & 0o777 == 0o755
            assert volume.delegations.cache.usable(directory) is None
            assert (await it.raw.txn(*late.arguments)).succeeded  # type: ignore[arg-type]
            go_on.set()
        assert not it.volume.session.in_doubt
        assert (await volume.getattr(directory)).mode & 0o777 == 0o700


async def _use_all_slots(volume: Volume) -> None:
    """As many transactions at once as the session has slots: whatever is in doubt must be settled first."""
    async with trio.open_nursery() as nursery:
        for _ in range(OPTIONS.slots):
            nursery.start_soon(_do_nothing, volume)


async def _do_nothing(volume: Volume) -> None:
    await volume.session.commit((), (), (Change(Kind.NOTHING),), time_ns=0)


async def _arrive_late(store: Store, spoilt: list[Request]) -> None:
    """Copies that were still on their way reach the store now."""
    for request in spoilt:
        if request.method == "txn":
            compares, then, orelse = request.arguments
            if any(isinstance(op, Put) and op.key.startswith(KEYS.slots) for op in then):  # type: ignore[attr-defined]
                result = await store.txn(compares, then, orelse)  # type: ignore[arg-type]
                assert not result.succeeded


class _CancelAt(trio.abc.Instrument):
    """Cancels a scope before the given step of one task."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, step: int) -> None:
        self._task, self._scope, self._left = task, scope, step
        if step == 0:
            scope.cancel()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


async def _cancelled_at(step: int, call: Callable[[], Awaitable[object]]) -> bool:
    """Run it and cancel it after that many of its steps; whether that ended it."""
    with trio.CancelScope() as scope:
        instrument = _CancelAt(trio.lowlevel.current_task(), scope, step)
        trio.lowlevel.add_instrument(instrument)
        try:
            await call()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return scope.cancelled_caught


async def _lose_first_reply(it: World) -> None:
    it.store.hook = Strike(0, Moment.AFTER, OutcomeUnknown("the reply was lost by the test"))


async def _nothing(it: World) -> None:
    it.store.hook = no_hook


@every_mutation
@pytest.mark.parametrize("prepare", [_nothing, _lose_first_reply])
async def test_cancelled_at_every_step(
    name: str, prepare: Callable[[World], Awaitable[None]], autojump_clock: trio.testing.MockClock
) -> None:
    kind, mutate = MUTATIONS[name]
    for step in range(STEPS_MAX):
        async with world(assert_sound_after_a_crash) as it:
            await prepare(it)
            was_cancelled = await _cancelled_at(step, lambda it=it: mutate(it.volume, it.places))  # type: ignore[misc]
            it.store.hook = no_hook
            done = await it.count(kind)
            assert done <= 1
            await _again(it, mutate, done)
            assert not it.volume.session.in_doubt or await _settles(it)
        if not was_cancelled:
            assert done == 1
            assert step, "it was never cancelled"
            return
    pytest.fail(f"{name} takes more than {STEPS_MAX} steps")


async def _again(it: World, mutate: Mutation, done: int) -> None:
    """What was cancelled can be done by whoever sees that it was not; and the mount sees what was."""
    try:
        await mutate(it.volume, it.places)
    except (NamespaceError, BodyConflict):
        assert done, "it was not done, and can't be done"


async def _settles(it: World) -> bool:
    await _use_all_slots(it.volume)
    return not it.volume.session.in_doubt
