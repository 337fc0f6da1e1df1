"""A copy of a transaction that was given up arrives late: whatever was told or done meanwhile stays true."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio
import trio.testing

from apollofs.metadata import journal
from apollofs.metadata.errors import EntryExists, NoSuchEntry, OutcomeUnknown, SessionLost, StoreFull
from apollofs.metadata.journal import Kind
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Delete, Put
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, OPTIONS, VOLUME, assert_sound, make_volume, mounted

KEYS = Keys(VOLUME)
ALONE = SessionOptions(lease_ttl_s=10, operation_deadline_s=10, slots=8, delegations=False)
FILE = 0o100644


def writes_of(request: Request) -> Sequence[Any]:
    """Of a transaction: what it does if its compares hold; else nothing."""
    return cast(Sequence[Any], request.arguments[1]) if request.method == "txn" else ()


@dataclass
class Wire:
    """Between one mount and the store. What `catches` picks is kept, once, and its sender told that nobody knows."""

    catches: Callable[[Sequence[Any]], bool] = lambda _: False
    meanwhile: Callable[[], Awaitable[None]] | None = None
    """What happens before the sender is told."""
    full: int = 0
    """So many transactions that put something are refused."""
    answers_lost: bool = False
    """The copies are applied at once, and only their answers are lost."""
    caught: list[tuple[Any, ...]] = field(default_factory=list)

    async def hook(self, moment: Moment, request: Request) -> None:
        writes = writes_of(request)
        if self.full and self.caught and moment is Moment.BEFORE and any(isinstance(each, Put) for each in writes):
            self.full -= 1
            raise StoreFull("database space exceeded")
        when = Moment.AFTER if self.answers_lost else Moment.BEFORE
        if moment is when and not self.caught and self.catches(writes):
            self.caught.append(request.arguments)
            if self.meanwhile is not None:
                await self.meanwhile()
            raise OutcomeUnknown("no answer in time")


def puts(end: bytes) -> Callable[[Sequence[Any]], bool]:
    """Transactions that put a key that ends so."""
    return lambda writes: any(isinstance(each, Put) and each.key.endswith(end) for each in writes)


async def until_hearing(volume: Volume) -> None:
    """Return when the mount may hold anything: it hears what is recalled."""
    while not volume.delegations.may_take():
        await trio.testing.wait_all_tasks_blocked(0.001)


async def names(volume: Volume, directory: int = ROOT_INO) -> list[bytes]:
    return [entry.name for entry in (await volume.readdir(directory, b"", 100)).entries]


async def logged(store: MemoryStore, kind: Kind, name: bytes) -> int:
    """How often the change log has it."""
    _, events = store.shared.data.events(KEYS.slots, KEYS.slots[:-1] + b"0", 1, 1 << 20)
    changes = [change for each in events if not each.deleted for change in journal.decode(each.kv.value).changes]
    return sum((change.kind, change.name) == (kind, name) for change in changes)


@pytest.mark.parametrize("options", [ALONE, OPTIONS], ids=["alone", "delegations"])
async def test_what_was_refused_is_not_done_later(options: SessionOptions) -> None:
    """The second copy finds the name taken; then it is free again, and the first copy arrives."""
    base, wire = MemoryStore(), Wire()
    await make_volume(base)
    async with mounted(base.another(wire.hook), options) as here, mounted(base, ALONE) as there:

        async def take_the_name() -> None:
            await there.mkdir(ROOT_INO, b"x", 0o755, ME)

        wire.catches, wire.meanwhile = puts(b"/x"), take_the_name
        with pytest.raises(EntryExists):
            await here.mkdir(ROOT_INO, b"x", 0o755, ME)
        assert not here.session.in_doubt
        await there.rmdir(ROOT_INO, b"x")
        assert not (await base.txn(*wire.caught[0])).succeeded
        assert await names(there) == await names(here) == []
        await here.mkdir(ROOT_INO, b"y", 0o755, ME)
        await here.settle()
    await assert_sound(base)


async def test_what_was_refused_may_have_been_done_just_before() -> None:
    """The first copy arrives after the second one was refused, and before its slot is settled: it counts."""
    base, wire = MemoryStore(), Wire()
    await make_volume(base)

    async def arrive(moment: Moment, request: Request) -> None:
        await wire.hook(moment, request)
        settles = len(writes_of(request)) == 1
        if settles and wire.caught and moment is Moment.BEFORE and len(wire.caught) == 1:
            await there.rmdir(ROOT_INO, b"x")
            assert (await base.txn(*wire.caught[0])).succeeded
            wire.caught.append(())

    async with mounted(base.another(arrive), ALONE) as here, mounted(base, ALONE) as there:

        async def take_the_name() -> None:
            await there.mkdir(ROOT_INO, b"x", 0o755, ME)

        wire.catches, wire.meanwhile = puts(b"/x"), take_the_name
        made = await here.mkdir(ROOT_INO, b"x", 0o755, ME)
        assert len(wire.caught) == 2
        assert (await there.lookup(ROOT_INO, b"x")).ino == made.ino
    await assert_sound(base)


@pytest.mark.parametrize("answers_lost", [True, False])
@pytest.mark.expects_log("can't be committed yet")
async def test_a_batch_whose_outcome_is_unknown_stays_in_its_slot(answers_lost: bool) -> None:
    """A store that becomes full then refuses the next copy: that says nothing about the first one."""
    base, wire = MemoryStore(), Wire(full=2, answers_lost=answers_lost)
    await make_volume(base)
    async with mounted(base.another(wire.hook)) as here:
        await until_hearing(here)
        made = await here.mkdir(ROOT_INO, b"d", 0o755, ME)
        await here.settle()
        wire.catches = puts(b"/f")
        await here.mknod(made.ino, b"f", FILE, 0, ME)
        await here.settle()
        assert await logged(base, Kind.CREATE, b"f") == 1
        await here.unlink(made.ino, b"f")
        await here.settle()
        assert not (await base.txn(*wire.caught[0])).succeeded
        async with mounted(base) as there:
            with pytest.raises(NoSuchEntry):
                await there.lookup(made.ino, b"f")
    await assert_sound(base)


async def test_nothing_is_claimed_while_its_release_may_still_arrive() -> None:
    """Sharing a group is given up in doubt, and done again; the group is not exclusive again before that is settled."""
    base = MemoryStore()
    await make_volume(base)
    late: list[tuple[Any, ...]] = []
    losing = False

    async def lose(moment: Moment, request: Request) -> None:
        if not losing or moment is not Moment.BEFORE:
            return
        if any(isinstance(each, Delete) and b"/E/" in each.key for each in writes_of(request)):
            late.append(request.arguments)
            raise OutcomeUnknown("late")

    short = SessionOptions(lease_ttl_s=60, operation_deadline_s=0.2, slots=8)
    async with mounted(base.another(lose), short) as here, mounted(base, OPTIONS) as there:
        await until_hearing(here)
        made = await here.mkdir(ROOT_INO, b"d", 0o755, ME)
        await here.settle()
        await here.mknod(made.ino, b"f", FILE, 0, ME)
        losing = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(names, there, made.ino)
            while not here.session.in_doubt:
                await trio.testing.wait_all_tasks_blocked(0.001)
            losing = False
        for number in range(4):
            await here.mknod(made.ino, b"g%d" % number, FILE, 0, ME)
        await base.txn(*late[-1])
        await here.mknod(made.ino, b"new", FILE, 0, ME)
        assert b"new" in await names(there, made.ino)
        assert here.session.alive
    await assert_sound(base)


async def test_the_lease_is_renewed_while_a_slot_is_in_doubt(autojump_clock: trio.testing.MockClock) -> None:
    """The store answers keepalives, and nothing else."""
    base, silent = MemoryStore(), False
    await make_volume(base)

    async def answer_late(moment: Moment, request: Request) -> None:
        if silent and moment is Moment.BEFORE and request.method in ("txn", "range"):
            await trio.sleep(2)
            raise OutcomeUnknown("request timed out")

    options = SessionOptions(lease_ttl_s=4, operation_deadline_s=30, slots=8)
    async with mounted(base.another(answer_late), options) as here:
        session, silent = here.session, True
        with trio.move_on_after(0.1):
            await here.setxattr(ROOT_INO, b"user.a", b"1")
        await trio.sleep(20)
        in_doubt, silent = session.in_doubt, False
        await trio.sleep(5)
        assert (session.alive, in_doubt, session.in_doubt) == (True, True, False)
        await here.mkdir(ROOT_INO, b"d", 0o755, ME)


@pytest.mark.expects_log("can't be committed yet")
async def test_a_store_that_is_full_is_told_at_once(autojump_clock: trio.testing.MockClock) -> None:
    base, full = MemoryStore(), False
    await make_volume(base)

    async def refuse(moment: Moment, request: Request) -> None:
        if full and moment is Moment.BEFORE and any(isinstance(each, Put) for each in writes_of(request)):
            raise StoreFull("database space exceeded")

    async with mounted(base.another(refuse)) as here:
        await until_hearing(here)
        made = await here.mkdir(ROOT_INO, b"d", 0o755, ME)
        await here.settle()
        full = True
        await here.mknod(made.ino, b"f", FILE, 0, ME)
        began = trio.current_time()
        with pytest.raises(StoreFull):
            await here.settle()
        with pytest.raises(StoreFull):
            await here.setxattr(made.ino, b"user.a", b"1")
        assert trio.current_time() - began < 1, (
            "by the clock of the test, which stands still while something can be done"
        )
        full = False
        await trio.sleep(1)
        await here.settle()
        async with mounted(base) as there:
            assert await names(there, made.ino) == [b"f"]


@pytest.mark.expects_log("can't ever be committed", "lost with the session", "has lost its lease")
async def test_what_can_not_be_committed_ends_the_session_and_not_the_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    base = MemoryStore()
    await make_volume(base)
    async with mounted(base) as here:
        await until_hearing(here)
        made = await here.mkdir(ROOT_INO, b"d", 0o755, ME)
        await here.settle()
        with monkeypatch.context() as patched:
            patched.setattr(journal, "encode", lambda _: 1 // 0)
            await here.mknod(made.ino, b"f", FILE, 0, ME)
            with pytest.raises(SessionLost):
                await here.settle()
        assert here.losses == 1
        with trio.fail_after(30):
            while not here.proven:
                await trio.testing.wait_all_tasks_blocked(0.001)
        await here.mknod(made.ino, b"g", FILE, 0, ME)
        assert await names(here, made.ino) == [b"g"]
