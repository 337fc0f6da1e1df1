"""Delegations: a mount caches a directory group only while nobody else may change it unasked.

The rules (DESIGN section 4; a holder is who has `G/<dir>/<session>`)
1. Taken: put `G/` in the transaction that reads, if no writer waits (`R/<dir>/` is empty). A new directory is born
   with its maker's delegation, complete and empty.
2. A writer's transaction compares, for each group that it changes, that nobody *else* holds it. If somebody does, it
   puts `R/<dir>/<me>` and a notice in each holder's inbox, waits for their keys to go, and tries again.
3. A holder that is recalled drops what it cached, *then* deletes its key. Until the deletion is through it takes no
   delegation on that group, and for a while after that neither.
4. A recall that overtakes the reply of an acquisition poisons it: the values are used once, and the key goes at once.
5. What is cached is used only while the lease is proven (`Session.proven`). With the session everything goes.
6. While a write of this mount's is in flight, what it changes is not answered from the cache: others may see it
   already. If its outcome stays unknown, nothing is held until its slot is settled (`Session.in_doubt`).
7. A reply is kept only if it is as of a revision since which the group has been held without a break.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import trio

from apollofs.metadata.errors import Compacted, DeadlineExceeded, MetadataError, SessionLost
from apollofs.metadata.groups import Acquisition, Group, groups_written
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import Committed, Session, retry
from apollofs.metadata.store import (
    Compare,
    Delete,
    KeyValue,
    Op,
    Put,
    Range,
    RangeResult,
    Relation,
    Store,
    Target,
    prefix_end,
)

log = logging.getLogger(__name__)
GROUPS_MAX = 8192
KEYS_MAX = 400_000
"""Cached keys over all groups."""
RETURNS_IN_TRANSACTION = 40
NOTICES_IN_TRANSACTION = 100
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 16.0
RECALLS_REMEMBERED_MAX = 4096
NOTED = (Change(Kind.NOTHING),)
Answer = tuple[KeyValue | None]


class Delegations:
    """The delegations of one mount, over all its sessions."""

    def __init__(self, store: Store, keys: Keys, *, enabled: bool, wait_s: float) -> None:
        self._store = store
        self._keys = keys
        self._times = keys.table(b"t")
        self._enabled = enabled
        self._wait_s = wait_s
        self._session: Session | None = None
        self._held: dict[int, Group] = {}
        self._acquiring: dict[int, Acquisition] = {}
        self._returning: dict[int, int] = {}
        """Groups whose keys are to be deleted; a number that tells whether that was asked for again."""
        self._returns = 0
        self._wakeup = trio.Event()
        self._recalled: dict[int, tuple[float, float]] = {}
        """Until when a group is not taken again, and how long that pause was."""
        self._touched: dict[int, None] = {}
        self._pending: Counter[bytes] = Counter()
        self._cached_keys = 0
        self.counts: Counter[str] = Counter()

    # -- life --------------------------------------------------------------------------------------------------------

    def begin(self, session: Session) -> None:
        self.end()
        self._session = session if self._enabled else None

    def end(self) -> None:
        """The session is gone, and with it everything that was cached under it."""
        self._session = None
        self._held.clear()
        self._poison_all()
        self._returning.clear()
        self._touched.clear()
        self._cached_keys = 0

    async def serve(self, session: Session) -> None:
        """Hear recalls and give back, until cancelled. Runs beside the session's keepalive."""
        if not self._enabled:
            await trio.sleep_forever()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_back, session)
            while True:
                try:
                    await self._hear(session)
                except MetadataError as exc:
                    # deaf, we would keep others waiting: hold nothing until the inbox can be read again
                    log.info("the inbox of recalls can't be read: %s", exc)
                    self._drop_all()
                await trio.sleep(0.2)

    async def _hear(self, session: Session) -> None:
        inbox = self._keys.inbox(session.number)
        found = await self._store.range(Range(inbox, prefix_end(inbox)))
        for kv in found.kvs:
            self._recall(self._keys.parse_numbers(kv.key)[1])
        async with self._store.watch(inbox, prefix_end(inbox), start_revision=found.revision + 1) as batches:
            async for batch in batches:
                for event in batch.events:
                    if not event.deleted:
                        self._recall(self._keys.parse_numbers(event.kv.key)[1])

    # -- reading -----------------------------------------------------------------------------------------------------

    def _usable(self, group: int) -> Group | None:
        """A held group, while what is cached of it may be answered."""
        held = self._held.get(group)
        return held if held is not None and self._session is not None and self._session.proven else None

    def peek(self, group: int, key: bytes) -> Answer | None:
        """What is cached of a single key: (its value or None if it is absent,), or None if that is not known."""
        held = self._usable(group)
        if held is None or key in self._pending:
            return None
        found = held.known.get(key)
        if found is not None:
            return (found[0],)
        return (None,) if held.complete and key.startswith(self._keys.dentries_of(group)) else None

    def children(self, group: int) -> int | None:
        """How many subdirectories a held directory has, if known."""
        held = self._usable(group)
        if held is None:
            return None
        return None if self._keys.children_of(group) in self._pending else held.children

    def listing(self, group: int) -> list[KeyValue] | None:
        """All dentries of a completely known directory, in name order."""
        held = self._usable(group)
        if held is None or not held.complete:
            return None
        prefix = self._keys.dentries_of(group)
        if any(key.startswith(prefix) for key in self._pending):
            return None
        return sorted(
            (kv for key, (kv, _) in held.known.items() if kv is not None and key.startswith(prefix)),
            key=lambda kv: kv.key,
        )

    def learn(self, group: int, asked: Iterable[Range], answers: Iterable[RangeResult], revision: int) -> None:
        """Keep the answers to a read as of `revision`, if the group has been held since then."""
        held = self._held.get(group)
        if held is None or revision < held.taken_revision:
            return
        before = len(held.known)
        for question, answer in zip(asked, answers, strict=True):
            if question.count_only:
                if question.key == self._keys.children_of(group):
                    held.count(answer.count, revision)
            elif not question.range_end and self._keys.group_of(question.key) == group:
                held.learn(question.key, answer.kvs[0] if answer.kvs else None, revision)
        self._grown(len(held.known) - before)

    def learn_all(self, group: int, dentries: Iterable[KeyValue], revision: int) -> None:
        """Keep a whole listing, read as of one revision, if the group has been held since then."""
        held = self._held.get(group)
        if held is None or revision < held.taken_revision:
            return
        before = len(held.known)
        for kv in dentries:
            held.learn(kv.key, kv, revision)
        held.complete = True
        self._grown(len(held.known) - before)

    # -- taking ------------------------------------------------------------------------------------------------------

    def wants(self, group: int) -> bool:
        """Whether to take the group now: at its second touch, unless it is hot elsewhere."""
        if not self._may_take():
            return False
        if group in self._held or group in self._acquiring or group in self._returning:
            return False
        if group not in self._touched:
            self._touched[group] = None
            if len(self._touched) > GROUPS_MAX:
                self._touched.pop(next(iter(self._touched)))
            return False
        pause = self._recalled.get(group)
        return pause is None or trio.current_time() > pause[0]

    def _may_take(self) -> bool:
        if self._session is None or not self._session.proven:
            return False
        return not self._session.in_doubt

    async def take(self, group: int, asked: Sequence[Range]) -> list[RangeResult] | None:
        """Read `asked` and take the group with it. One request, a write. None if nothing was read (ask again)."""
        session = self._session
        assert session is not None
        acquisition = self._acquiring[group] = Acquisition()
        waiting = self._keys.writers_on(group)
        free = Compare(waiting, Target.CREATE, Relation.EQUAL, 0, prefix_end(waiting))
        put = Put(self._keys.delegation(group, session.number), b"", session.lease_id)
        taken = False
        try:
            outcome = await session.commit((free,), (put, *asked), NOTED, time_ns=time.time_ns(), orelse=asked)
            taken = isinstance(outcome, Committed)
        finally:
            del self._acquiring[group]
            if self._session is session and (acquisition.poisoned or not taken):
                self._return(group)  # whether or not the key is there
        ranges = outcome.ranges[1:] if isinstance(outcome, Committed) and outcome.ranges else None
        if isinstance(outcome, Committed) and not acquisition.poisoned and self._session is session:
            self._hold(group, outcome.revision)
            if ranges is not None:
                self.learn(group, asked, [found for found in ranges if found is not None], outcome.revision)
            for write, revision in acquisition.writes:
                self._apply(write, revision)
        if not isinstance(outcome, Committed):
            ranges = outcome.ranges
        return [found for found in ranges if found is not None] if ranges is not None else None

    def _hold(self, group: int, revision: int) -> Group:
        held = self._held[group] = Group(group, revision)
        self.counts["taken"] += 1
        while len(self._held) > GROUPS_MAX:
            self._return(next(iter(self._held)))
        return held

    def _grown(self, by: int) -> None:
        self._cached_keys += by
        while self._cached_keys > KEYS_MAX and self._held:
            self._return(next(iter(self._held)))

    # -- writing -----------------------------------------------------------------------------------------------------

    def guards(self, session: Session, writes: Sequence[Put | Delete], born: int) -> tuple[list[Compare], list[Range]]:
        """What a transaction compares so that nobody else holds what it changes, and reads if it fails."""
        compares: list[Compare] = []
        questions: list[Range] = []
        for group in groups_written(self._keys, writes):
            if group == born:
                continue
            prefix = self._keys.delegations_on(group)
            mine = self._keys.delegation(group, session.number)
            compares.append(Compare(prefix, Target.CREATE, Relation.EQUAL, 0, mine))
            compares.append(Compare(mine + b"\0", Target.CREATE, Relation.EQUAL, 0, prefix_end(prefix)))
            questions.append(Range(prefix, prefix_end(prefix), keys_only=True))
        return compares, questions

    def companions(self, session: Session, writes: Sequence[Put | Delete], born: int) -> list[Put | Delete]:
        """What goes along in the transaction: the delegation that a new directory (`born`, or 0) is born with, and the
        end of those on directories that are removed."""
        if self._session is not session:
            return []
        found: list[Put | Delete] = []
        if born and self._may_take():
            self._acquiring[born] = Acquisition()
            found.append(Put(self._keys.delegation(born, session.number), b"", session.lease_id))
        found += [Delete(self._keys.delegation(group, session.number)) for group in self._removed(writes)]
        return found

    def _removed(self, writes: Sequence[Put | Delete]) -> list[int]:
        inodes = self._keys.inodes
        deleted = (w.key for w in writes if isinstance(w, Delete) and w.key.startswith(inodes))
        return [ino for ino in (self._keys.parse_numbers(key)[0] for key in deleted) if ino in self._held]

    def start_write(self, writes: Sequence[Put | Delete]) -> None:
        for key in self._written_keys(writes):
            self._pending[key] += 1

    def end_write(self, writes: Sequence[Put | Delete], revision: int, born: int = 0) -> None:
        """A transaction has been applied at `revision` (0: it was not, as far as is known)."""
        for key in self._written_keys(writes):
            self._pending[key] -= 1
            if not self._pending[key]:
                del self._pending[key]
        if revision:
            for group in self._removed(writes):
                self._cached_keys -= len(self._held.pop(group).known)
            for write in writes:
                self._apply(write, revision)
        birth = self._acquiring.pop(born, None) if born else None
        if birth is not None and not birth.poisoned and revision and self._session is not None:
            held = self._hold(born, revision)
            held.complete = True
            held.count(0, revision)
            for write in writes:
                if self._keys.group_of(write.key) == born:
                    self._apply(write, revision)
        elif birth is not None and revision and self._session is not None:
            self._return(born)

    def _written_keys(self, writes: Sequence[Put | Delete]) -> list[bytes]:
        """What is not answered from the cache while these writes are in flight.

        Not among it: a directory's times. They change with every name, and the kernel asks for them before each call;
        until a call here has returned, this host may still see the times from before it (docs/POSIX.md, exception 1).
        """
        found = []
        for write in writes:
            group = self._keys.group_of(write.key)
            if group is not None and not write.key.startswith(self._times):
                child = write.key.startswith(self._keys.children_of(group))
                found.append(self._keys.children_of(group) if child else write.key)
        return found

    def _apply(self, write: Put | Delete, revision: int) -> None:
        group = self._keys.group_of(write.key)
        if group in self._acquiring:
            self._acquiring[group].writes.append((write, revision))
        held = self._held.get(group) if group is not None else None
        if held is None or revision < held.taken_revision:
            return
        if write.key.startswith(self._keys.children_of(held.ino)):
            held.change_children(1 if isinstance(write, Put) else -1, revision)
            return
        before = len(held.known)
        kv = KeyValue(write.key, write.value, 0, revision, 0) if isinstance(write, Put) else None
        held.learn(write.key, kv, revision)
        self._grown(len(held.known) - before)

    def doubt(self) -> None:
        """A write of ours may still be applied, we don't know when: hold nothing until its slot is settled."""
        log.info("a transaction is in doubt: no delegations until it is settled")
        self._drop_all()

    # -- recalls -----------------------------------------------------------------------------------------------------

    def held_by_others(self, session: Session, found: Sequence[RangeResult]) -> bool:
        """Whether the answers to `guards`' questions name another holder."""
        return bool(self._others(session, found))

    def _others(self, session: Session, found: Sequence[RangeResult]) -> list[tuple[int, int]]:
        """(group, session) of each holder that `found` names, but for this session."""
        numbers = [self._keys.parse_numbers(kv.key) for answer in found for kv in answer.kvs]
        return [(group, holder) for group, holder in numbers if holder != session.number]

    async def recall_others(self, session: Session, found: Sequence[RangeResult]) -> list[Delete]:
        """Ask every other holder of the groups in `found` (answers to `guards`' questions) to give back, and wait.

        Returns what the writer's transaction must delete too. Raises DeadlineExceeded, SessionLost, StoreError.
        """
        groups = dict.fromkeys(group for group, _ in self._others(session, found))
        claims: list[Op] = [Put(self._keys.writer(group, session.number), b"", session.lease_id) for group in groups]
        # with these keys in place nobody takes the groups any more: those who hold them now are all
        prefixes = [self._keys.delegations_on(group) for group in groups]
        asked = [Range(prefix, prefix_end(prefix), keys_only=True) for prefix in prefixes]
        outcome = await session.commit((), [*claims, *asked], NOTED, time_ns=time.time_ns())
        revision = outcome.revision
        if outcome.ranges is not None:
            answers = outcome.ranges[len(claims) :]
        else:
            answers = (await retry(lambda: self._store.txn((), asked), self._wait_s)).ranges
        holders = self._others(session, [answer for answer in answers if answer is not None])
        notices: list[Op] = [Put(self._keys.recall(holder, group), b"", session.lease_id) for group, holder in holders]
        for at in range(0, len(notices), NOTICES_IN_TRANSACTION):
            part = notices[at : at + NOTICES_IN_TRANSACTION]
            await session.commit((), part, NOTED, time_ns=time.time_ns())
        self.counts["recalls_sent"] += len(holders)
        with trio.move_on_after(self._wait_s) as waiting:
            for group in groups:
                await self._wait_for(group, session.number, revision)
        if waiting.cancelled_caught:
            raise DeadlineExceeded("another mount has not given its delegation back (the operation was not applied)")
        return [Delete(self._keys.writer(group, session.number)) for group in groups]

    async def _wait_for(self, group: int, mine: int, revision: int) -> None:
        prefix = self._keys.delegations_on(group)
        while True:
            try:
                async with self._store.watch(prefix, prefix_end(prefix), start_revision=revision + 1) as batches:
                    while not await self._is_free(prefix, mine):
                        await anext(batches)
                    return
            except Compacted:
                revision = (await self._store.range(Range(prefix))).revision

    async def _is_free(self, prefix: bytes, mine: int) -> bool:
        asked = Range(prefix, prefix_end(prefix), keys_only=True)
        found = await retry(lambda: self._store.range(asked), self._wait_s)
        return all(self._keys.parse_numbers(kv.key)[1] == mine for kv in found.kvs)

    def _recall(self, group: int) -> None:
        """Somebody wants to write: drop the cache now, the key after it."""
        self.counts["recalls_heard"] += 1
        until, pause_s = self._recalled.pop(group, (0.0, BACKOFF_FIRST_S / 2))
        again = trio.current_time() < until + 4 * pause_s
        pause_s = min(2 * pause_s, BACKOFF_MAX_S) if again else BACKOFF_FIRST_S
        self._recalled[group] = (trio.current_time() + pause_s, pause_s)
        if len(self._recalled) > RECALLS_REMEMBERED_MAX:
            self._recalled.pop(next(iter(self._recalled)))
        if group in self._acquiring:
            self._acquiring[group].poisoned = True
        self._return(group)

    def _return(self, group: int) -> None:
        held = self._held.pop(group, None)
        if held is not None:
            self._cached_keys -= len(held.known)
        self._returns += 1
        self._returning[group] = self._returns
        self._wakeup.set()

    def _drop_all(self) -> None:
        self._poison_all()
        for group in list(self._held):
            self._return(group)

    def _poison_all(self) -> None:
        for acquisition in self._acquiring.values():
            acquisition.poisoned = True

    async def _give_back(self, session: Session) -> None:
        """Delete the keys of what is no longer held, several in one transaction."""
        while True:
            await self._wakeup.wait()
            self._wakeup = trio.Event()
            while groups := dict(list(self._returning.items())[:RETURNS_IN_TRANSACTION]):
                deletes: list[Op] = []
                for group in groups:
                    deletes.append(Delete(self._keys.delegation(group, session.number)))
                    deletes.append(Delete(self._keys.recall(session.number, group)))
                try:
                    await session.commit((), deletes, NOTED, time_ns=time.time_ns())
                except SessionLost:
                    return
                except MetadataError as exc:
                    log.info("delegations not given back yet: %s", exc)
                    await trio.sleep(0.5)
                    continue
                self.counts["returned"] += len(groups)
                for group, asked in groups.items():
                    # asked for again meanwhile: the key may have come into being after this deletion
                    if self._returning.get(group) == asked:
                        del self._returning[group]
