"""Delegations: a mount caches a directory group only while nobody else may change it unasked.

The rules (DESIGN section 4; a holder is who has `G/<dir>/<session>`)
1. Taken: put `G/` in the transaction that reads, if no writer waits (`R/<dir>/` is empty). A new directory is born
   with its maker's delegation, complete and empty.
2. A writer's transaction compares, for each group that it changes, that nobody *else* holds it. If somebody does, it
   puts `R/<dir>/<me>` and a notice in each holder's inbox, waits for their keys to go, and tries again.
3. A holder that is recalled drops what it cached, the kernel's cache too (`returns.py`), *then* deletes its key. Until
   the deletion is through it takes no delegation on that group, and for a while after that neither.
4. A recall that overtakes the reply of an acquisition poisons it: the values are used once, and the key goes at once.
5. What is cached is used only while the lease is proven (`Session.proven`). With the session everything goes.
6. While a write of this mount's is in flight, what it changes is not answered from the cache: others may see it
   already. If its outcome stays unknown, nothing is held until its slot is settled (`Session.in_doubt`).
7. A reply is kept only if it is as of a revision since which the group has been held without a break.
8. An operation that must wait for somebody else's delegation first gives up its own on what it changes, and has the
   kernel drop it without a lock: else two mounts that change one directory would wait for each other for ever.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import trio

from apollofs.metadata.errors import MetadataError
from apollofs.metadata.groups import Acquisition, Claim, Group, groups_written
from apollofs.metadata.keys import Keys
from apollofs.metadata.pauses import Pauses
from apollofs.metadata.recalls import Recalls
from apollofs.metadata.returns import NOTED, CacheAbove, Returns
from apollofs.metadata.session import Committed, Session
from apollofs.metadata.store import (
    Compare,
    Delete,
    KeyValue,
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
Answer = tuple[KeyValue | None]


class Delegations:
    """The delegations of one mount, over all its sessions."""

    def __init__(self, store: Store, keys: Keys, *, enabled: bool, wait_s: float) -> None:
        self._store = store
        self._keys = keys
        self._times = keys.table(b"t")
        self._children = keys.table(b"c")
        self._enabled = enabled
        self._recalls = Recalls(store, keys, wait_s)
        self._session: Session | None = None
        self._held: dict[int, Group] = {}
        self._acquiring: dict[int, Acquisition] = {}
        self._returns = Returns(keys)
        self._pauses = Pauses()
        self._touched: dict[int, None] = {}
        self._pending: Counter[bytes] = Counter()
        self._claimed: Counter[int] = Counter()
        """Groups on which operations of this mount wait for others."""
        self._tickets = 0
        self._hearing = False
        """Whether recalls reach us."""
        self._cached_keys = 0
        self.counts: Counter[str] = Counter()

    # -- life --------------------------------------------------------------------------------------------------------

    def put_above(self, cache: CacheAbove) -> None:
        """`cache` is filled from what is held here, and drops it before a key goes."""
        self._returns.above = cache

    def begin(self, session: Session) -> None:
        self.end()
        self._session = session if self._enabled else None

    def end(self) -> None:
        """The session is gone, and with it everything that was cached under it."""
        self._session = None
        self._hearing = False
        self._held.clear()
        self._poison_all()
        self._returns.clear()
        self._touched.clear()
        self._cached_keys = 0

    async def drop_above(self) -> None:
        """After `end`, before the next session begins: what the cache above has goes too."""
        await self._returns.above.drop_all()

    def validity_s(self) -> float:
        """For how many seconds from now the lease, and with it what is held, is proven."""
        return self._session.proven_s if self._session is not None else 0.0

    async def serve(self, session: Session) -> None:
        """Hear recalls and give back, until cancelled. Runs beside the session's keepalive."""
        if not self._enabled:
            await trio.sleep_forever()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._returns.serve, session)
            while True:
                try:
                    await self._hear(session)
                except MetadataError as exc:
                    # deaf, we would keep others waiting: hold nothing until the inbox can be read again
                    log.info("the inbox of recalls can't be read: %s", exc)
                    self._hearing = False
                    self._drop_all()
                await trio.sleep(0.2)

    async def _hear(self, session: Session) -> None:
        inbox = self._keys.inbox(session.number)
        found = await self._store.range(Range(inbox, prefix_end(inbox)))
        for kv in found.kvs:
            self._recall(self._keys.parse_numbers(kv.key)[1])
        async with self._store.watch(inbox, prefix_end(inbox), start_revision=found.revision + 1) as batches:
            # a notice is one key for all writers, and goes with the last one's lease: only the watch sees every one
            self._hearing = True
            async for batch in batches:
                for event in batch.events:
                    if not event.deleted:
                        self._recall(self._keys.parse_numbers(event.kv.key)[1])

    # -- reading -----------------------------------------------------------------------------------------------------

    def usable(self, group: int) -> Group | None:
        """A held group, while what is cached of it may be answered; but ask for its keys here."""
        held = self._held.get(group)
        return held if held is not None and self._session is not None and self._session.proven else None

    def peek(self, group: int, key: bytes) -> Answer | None:
        """What is cached of a single key: (its value or None if it is absent,), or None if that is not known."""
        held = self.usable(group)
        if held is None or key in self._pending:
            return None
        found = held.known.get(key)
        if found is not None:
            return (found[0],)
        return (None,) if held.complete and key.startswith(self._keys.dentries_of(group)) else None

    def children(self, group: int) -> int | None:
        """How many subdirectories a held directory has, if known."""
        held = self.usable(group)
        if held is None:
            return None
        return None if self._keys.children_of(group) in self._pending else held.children

    def listing(self, group: int) -> list[KeyValue] | None:
        """All dentries of a completely known directory, in name order."""
        held = self.usable(group)
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
        if not self.can_take(group):
            return False
        if group not in self._touched:
            self._touched[group] = None
            if len(self._touched) > GROUPS_MAX:
                self._touched.pop(next(iter(self._touched)))
            return False
        return True

    def can_take(self, group: int) -> bool:
        """Whether the group may be taken now: not if it is held, given back, waited for here, or hot elsewhere."""
        if not self._may_take():
            return False
        if group in self._held or group in self._acquiring or group in self._returns or group in self._claimed:
            return False
        return self._pauses.is_over(group)

    def _may_take(self) -> bool:
        if self._session is None or not self._hearing or not self._session.proven:
            return False
        return not self._session.in_doubt

    def held_or_free(self, group: int) -> bool:
        """Whether `take` may be asked for the group."""
        return self.usable(group) is not None or self.can_take(group)

    async def take(self, wanted: Mapping[int, Sequence[Range]]) -> dict[int, list[RangeResult]] | None:
        """Read what is asked of each group, and take those that are not held. One request, a write.

        For all of them or none; None if nothing was read either (ask again). Each must be held, or `can_take`.
        """
        session = self._session
        assert session is not None
        acquisitions = {group: Acquisition() for group in wanted if group not in self._held}
        self._acquiring.update(acquisitions)
        asked = [question for questions in wanted.values() for question in questions]
        free = [self._nobody_waits_for(group) for group in acquisitions]
        puts = [Put(self._keys.delegation(group, session.number), b"", session.lease_id) for group in acquisitions]
        taken = False
        try:
            outcome = await session.commit(free, (*puts, *asked), NOTED, time_ns=time.time_ns(), orelse=asked)
            taken = isinstance(outcome, Committed)
        finally:
            for group, acquisition in acquisitions.items():
                del self._acquiring[group]
                if self._session is session and (acquisition.poisoned or not taken):
                    self._return(group)  # whether or not the key is there
        if outcome.ranges is None:
            found = None
        else:
            answers = iter(outcome.ranges[len(puts) :] if taken else outcome.ranges)
            found = {group: [_present(next(answers)) for _ in questions] for group, questions in wanted.items()}
        if taken and self._session is session:
            for group, acquisition in acquisitions.items():
                if not acquisition.poisoned:
                    self._hold(group, outcome.revision)
            for group, ranges in (found or {}).items():
                self.learn(group, wanted[group], ranges, outcome.revision)
            for acquisition in acquisitions.values():
                for write, revision in acquisition.writes:
                    self._apply(write, revision)
        return found

    def _nobody_waits_for(self, group: int) -> Compare:
        waiting = self._keys.writers_on(group)
        return Compare(waiting, Target.CREATE, Relation.EQUAL, 0, prefix_end(waiting))

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

    def start_write(self, writes: Sequence[Put | Delete]) -> list[bytes]:
        """From now on what they change is not answered from the cache; what it returns is for `end_write`."""
        pending = self._written_keys(writes)
        for key in pending:
            self._pending[key] += 1
        return pending

    def end_write(self, pending: Sequence[bytes], writes: Sequence[Put | Delete], revision: int, born: int = 0) -> None:
        """A transaction has been applied at `revision` (0: it was not, as far as is known)."""
        for key in pending:
            self._pending[key] -= 1
            if not self._pending[key]:
                del self._pending[key]
        if revision:
            for group in self._removed(writes):
                self._cached_keys -= len(self._held.pop(group).known)
                self._returns.above.discard(group)
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
                child = write.key.startswith(self._children)
                found.append(self._keys.children_of(group) if child else write.key)
        return found

    def _apply(self, write: Put | Delete, revision: int) -> None:
        group = self._keys.group_of(write.key)
        if group in self._acquiring:
            self._acquiring[group].writes.append((write, revision))
        held = self._held.get(group) if group is not None else None
        if held is None or revision < held.taken_revision:
            return
        if write.key.startswith(self._children):
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
        return bool(self._recalls.others(session, found))

    def new_claim(self) -> Claim:
        """For an operation that may have to wait; end it with `release`."""
        self._tickets += 1
        return Claim(self._tickets)

    def release(self, claim: Claim) -> None:
        """The operation has ended: what it changes may be taken here again."""
        self._claimed -= Counter(claim.groups.keys())
        claim.groups.clear()

    async def recall_others(
        self, session: Session, found: Sequence[RangeResult], writes: Sequence[Put | Delete], claim: Claim
    ) -> None:
        """Give up our own, ask the holders of the groups in `found` (answers to `guards`' questions) to do so too,
        and wait. Errors as `recalls.recall`."""
        self._give_up(writes, claim)
        self.counts["recalls_sent"] += await self._recalls.recall(session, found, claim)

    def _give_up(self, writes: Sequence[Put | Delete], claim: Claim) -> None:
        """An operation that has locked directories above must wait: hold none of them, nor take it again before the
        operation has ended."""
        for group in groups_written(self._keys, writes):
            if group not in claim.groups:
                claim.groups[group] = None
                self._claimed[group] += 1
            if group in self._acquiring:
                self._acquiring[group].poisoned = True
            if group in self._held:
                self._return(group)
            self._returns.above.hurry(group)

    def _recall(self, group: int) -> None:
        """Somebody wants to write: drop the cache now, the key after it."""
        self.counts["recalls_heard"] += 1
        self._pauses.begin(group)
        if group in self._acquiring:
            self._acquiring[group].poisoned = True
        self._return(group)

    def _return(self, group: int) -> None:
        held = self._held.pop(group, None)
        if held is not None:
            self._cached_keys -= len(held.known)
        self._returns.ask(group)

    def _drop_all(self) -> None:
        self._poison_all()
        for group in list(self._held):
            self._return(group)

    def _poison_all(self) -> None:
        for acquisition in self._acquiring.values():
            acquisition.poisoned = True


def _present(found: RangeResult | None) -> RangeResult:
    assert found is not None, "the answer to a question"
    return found
