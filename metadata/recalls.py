"""Asking other mounts to give back their delegations, or to share what they hold exclusively, and waiting for it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import trio

from apollofs.metadata.errors import DeadlineExceeded, MetadataError, SessionLost
from apollofs.metadata.groups import Claim
from apollofs.metadata.keys import Keys
from apollofs.metadata.patience import Patience
from apollofs.metadata.returns import NOTED
from apollofs.metadata.session import Session, retry
from apollofs.metadata.store import NOW, Delete, Op, Put, Range, RangeResult, Store, prefix_end

log = logging.getLogger(__name__)
NOTICES_IN_TRANSACTION = 100
SHARE = b"s"
"""What a notice asks for: to let others read the group. Otherwise to give it back, see `drop`."""
RETRY_S = 0.1
STOP_WAITING_S = 5.0
"""For how long an operation that has ended tries to take back that it waits."""
LEFT_MAX = 20_000
LEFT_RETRY_S = 1.0


def drop(holders: int) -> bytes:
    """What a notice says that asks to give a group back, which goes to so many mounts."""
    return b"%d" % holders


def holders_in(notice: bytes) -> int:
    """How many mounts were asked to give a group back, with those that got this notice."""
    return int(notice) if notice.isdigit() else 1


@dataclass(frozen=True, slots=True)
class _Asked:
    """Who was asked: the keys that were there as of a revision."""

    there: set[bytes]
    revision: int


@dataclass(slots=True)
class _Answer:
    """What the watches wait for."""

    asked: _Asked = field(default_factory=lambda: _Asked(set(), 0))
    there: trio.Event = field(default_factory=trio.Event)


class Recalls:
    """The asking side of a recall; the holder's is in `delegations.py`."""

    def __init__(self, store: Store, keys: Keys, wait_s: float, patience: Patience) -> None:
        self._store = store
        self._keys = keys
        self._wait_s = wait_s
        self._patience = patience
        self.session: Session | None = None
        """In which readers ask."""
        self.sent = 0
        self.waited_s = 0.0
        """How long operations waited for others to give back, altogether."""
        self._left: dict[bytes, Delete] = {}
        """Keys of this session that say that somebody waits who does no more, and may be in the store still."""
        self._leaving = trio.Event()

    def end(self) -> None:
        """The session is gone, and all its keys with it."""
        self.session = None
        self._left.clear()

    async def serve(self, session: Session) -> None:
        """Delete what `leave_line` could not, until cancelled or the session ends: while such a key is there nobody can
        hold its group."""
        while session.alive:
            if not self._left:
                self._leaving = trio.Event()
                await self._leaving.wait()
            keys = dict(islice(self._left.items(), NOTICES_IN_TRANSACTION))
            if await self._delete(session, keys):
                for key in keys:
                    self._left.pop(key, None)
            else:
                await trio.sleep(LEFT_RETRY_S)

    def others(self, session: Session, found: Sequence[RangeResult]) -> list[tuple[int, int]]:
        """(group, session) of each holder that `found` names, but for this session."""
        numbers = [self._keys.parse_numbers(kv.key) for answer in found for kv in answer.kvs]
        return [(group, holder) for group, holder in numbers if holder != session.number]

    async def recall(self, session: Session, found: Sequence[RangeResult], claim: Claim) -> None:
        """Ask every other holder of the groups in `found` to give back, and wait: one round trip and one event of a
        watch, unless there are more holders than `found` names.

        The operation's transaction, or whoever gives it up, deletes `claim.waits`. Raises DeadlineExceeded,
        SessionLost, StoreError.
        """
        known = self.others(session, found)
        prefixes = {self._keys.delegations_on(group) for group, _ in known}

        async def ask() -> _Asked:
            holders, revision = await self._claim(session, known, claim)
            await self._notify(session, sorted(set(holders) - set(known)))
            self.sent += len(holders)
            return _Asked({self._keys.delegation(*holder) for holder in holders}, revision)

        await self._until_gone(session, prefixes, ask)

    async def share(self, holders: Sequence[tuple[int, int]]) -> None:
        """Have those who hold groups exclusively, (group, session), commit what they have answered, and wait until
        they hold them as others may. Returns sooner where this mount has lost its session: ask again.

        Raises DeadlineExceeded, StoreError.
        """
        session = self.session
        if session is None:
            await trio.sleep(RETRY_S)
            return
        puts = [Put(self._keys.recall(holder, group), SHARE, session.lease_id) for group, holder in holders]
        asked = [Range(self._keys.exclusive(*holder), keys_only=True) for holder in holders]

        async def ask() -> _Asked:
            outcome = await session.commit((), (*puts, *asked), NOTED, time_ns=time.time_ns())
            self.sent += len(holders)
            answers = outcome.ranges[len(puts) :] if outcome.ranges is not None else ()
            there = {kv.key for answer in answers if answer is not None for kv in answer.kvs}
            return _Asked(there, outcome.revision)

        with contextlib.suppress(SessionLost):
            await self._until_gone(session, {self._keys.exclusives_on(group) for group, _ in holders}, ask)

    async def stand_in_line(self, session: Session, group: int, claim: Claim) -> None:
        """Wait until those who hold a group have given it back, and those who waited for that before this `claim` have
        gone on: a request, another one for holders that were not known, and one event of a watch for each.

        `claim.waits` stays in the store. Raises DeadlineExceeded, SessionLost, StoreError.
        """
        line = self._keys.writers_on(group)
        prefixes = [self._keys.delegations_on(group), line]
        mine = self._keys.writer(group, session.number, claim.ticket)

        async def ask() -> _Asked:
            puts = [] if claim.since else [Put(mine, b"", session.lease_id)]
            claim.waits[mine] = Delete(mine)
            asked = [Range(prefix, prefix_end(prefix), keys_only=True) for prefix in prefixes]
            outcome = await session.commit((), [*puts, *asked], NOTED, time_ns=time.time_ns())
            claim.since = claim.since or outcome.revision
            if outcome.ranges is not None:
                answers = outcome.ranges[len(puts) :]
            else:
                answers = (await retry(lambda: self._store.txn((), asked), self._wait_s)).ranges
            found = [answer for answer in answers if answer is not None]
            holders = self.others(session, found[:1])
            await self._notify(session, holders)
            self.sent += len(holders)
            before = {kv.key for kv in found[1].kvs if kv.create_revision < claim.since}
            return _Asked({self._keys.delegation(*holder) for holder in holders} | before, outcome.revision)

        await self._until_gone(session, prefixes, ask)

    async def leave_line(self, session: Session, claim: Claim) -> None:
        """The operation ended without its transaction: it wants nobody's delegation any more. No errors; what can't be
        deleted now is by `serve`."""
        with trio.move_on_after(STOP_WAITING_S, shield=True):
            if await self._delete(session, claim.waits):
                return
        if session is not self.session:
            return
        if len(self._left) < LEFT_MAX:
            self._left.update(claim.waits)
            self._leaving.set()
        else:
            log.warning("a waiting writer's keys stay until the session ends: there are too many of them")

    async def _delete(self, session: Session, keys: Mapping[bytes, Delete]) -> bool:
        """Delete keys; whether they are gone for good, as they are when the session is."""
        final = not session.in_doubt  # otherwise a put that was given up may come after this
        try:
            await session.commit((), list(keys.values()), NOTED, time_ns=0)
        except SessionLost:
            return True
        except MetadataError as exc:
            log.info("a waiting writer's key stays for now: %s", exc)
            return False
        return final

    async def _claim(
        self, session: Session, known: Sequence[tuple[int, int]], claim: Claim
    ) -> tuple[list[tuple[int, int]], int]:
        """Say in the store that we wait for groups, with notices to the holders that are known. Nobody takes them any
        more then: who holds them now, as of a revision, are all."""
        wanted = dict.fromkeys(group for group, _ in known)
        waits = [self._keys.writer(group, session.number, claim.ticket) for group in wanted]
        claim.waits.update((key, Delete(key)) for key in waits)
        first = known[: NOTICES_IN_TRANSACTION - 2 * len(waits)]
        puts: list[Op] = [Put(key, b"", session.lease_id) for key in waits]
        puts += self._notices(session, first)
        prefixes = [self._keys.delegations_on(group) for group in wanted]
        asked = [Range(prefix, prefix_end(prefix), keys_only=True) for prefix in prefixes]
        outcome = await session.commit((), [*puts, *asked], NOTED, time_ns=time.time_ns())
        await self._notify(session, known[len(first) :])
        if outcome.ranges is not None:
            answers = outcome.ranges[len(puts) :]
        else:
            answers = (await retry(lambda: self._store.txn((), asked), self._wait_s)).ranges
        return self.others(session, [answer for answer in answers if answer is not None]), outcome.revision

    async def _notify(self, session: Session, holders: Sequence[tuple[int, int]]) -> None:
        for at in range(0, len(holders), NOTICES_IN_TRANSACTION):
            part = holders[at : at + NOTICES_IN_TRANSACTION]
            await session.commit((), self._notices(session, part), NOTED, time_ns=time.time_ns())

    def _notices(self, session: Session, holders: Sequence[tuple[int, int]]) -> list[Put]:
        of = Counter(group for group, _ in holders)
        return [Put(self._keys.recall(holder, group), drop(of[group]), session.lease_id) for group, holder in holders]

    async def _until_gone(
        self, session: Session, prefixes: Collection[bytes], ask: Callable[[], Awaitable[_Asked]]
    ) -> None:
        """Watch the prefixes, `ask` meanwhile, and wait until all keys that were then there have been deleted."""
        began = trio.current_time()
        answer: _Answer = _Answer()
        errors: list[MetadataError] = []

        async def guarded(work: Awaitable[None]) -> None:
            try:
                await work
            except MetadataError as exc:
                errors.append(exc)
                nursery.cancel_scope.cancel()

        async def asking() -> None:
            answer.asked = await ask()
            answer.there.set()

        async def waiting_for(prefix: bytes) -> None:
            with session.bound():  # without it nobody is asked any more: the notices go with its lease
                await self._wait_for(prefix, answer)

        with self._patience.bounded(), trio.move_on_after(self._wait_s) as waiting:
            async with trio.open_nursery() as nursery:
                for prefix in prefixes:
                    nursery.start_soon(guarded, waiting_for(prefix))
                nursery.start_soon(guarded, asking())
        self.waited_s += trio.current_time() - began
        if errors:
            raise errors[0]
        if waiting.cancelled_caught:
            raise DeadlineExceeded("another mount has not given its delegation back (the operation was not applied)")

    async def _wait_for(self, prefix: bytes, answer: _Answer) -> None:
        """Wait until the keys below `prefix` that the answer says are there have been deleted."""
        async with self._store.watch(prefix, prefix_end(prefix), start_revision=NOW) as batches:
            begun = (await anext(batches)).revision
            await answer.there.wait()
            left = {key for key in answer.asked.there if key.startswith(prefix)}
            if begun > answer.asked.revision and left:
                asked = Range(prefix, prefix_end(prefix), keys_only=True)
                found = await retry(lambda: self._store.range(asked), self._wait_s)
                left &= {kv.key for kv in found.kvs}
            while left:
                batch = await anext(batches)
                left -= {event.kv.key for event in batch.events if event.deleted}
