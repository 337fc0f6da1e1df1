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
8. What is held exclusively is changed ahead of the store (`ahead.py`): who reads a group that he does not hold sees
   whether somebody holds it so, and has that shared first.
9. While an operation waits for somebody else's delegations, the kernel has locked what it changes: that is dropped
   without a lock if it is recalled. Else two mounts that change one directory would wait for each other for ever.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import trio

from apollofs.metadata.ahead import Ahead
from apollofs.metadata.exclusives import Exclusives
from apollofs.metadata.group_cache import GroupCache
from apollofs.metadata.groups import Acquisition, Claim, Group, groups_written, guards
from apollofs.metadata.inbox import Inbox
from apollofs.metadata.interest import Interest
from apollofs.metadata.keys import Keys
from apollofs.metadata.patience import Patience
from apollofs.metadata.recalls import SHARE, Recalls, holders_in
from apollofs.metadata.returns import NOTED, CacheAbove, Returns
from apollofs.metadata.seals import Seals
from apollofs.metadata.session import Committed, Session
from apollofs.metadata.store import (
    Compare,
    Delete,
    Put,
    Range,
    RangeResult,
    Store,
)
from apollofs.metadata.turns import Turns

log = logging.getLogger(__name__)


class Delegations:
    """The delegations of one mount, over all its sessions."""

    def __init__(self, store: Store, keys: Keys, *, enabled: bool, write_back: bool, wait_s: float) -> None:
        self._keys = keys
        self._enabled = enabled
        self.patience = Patience()
        """With which everything of this mount waits for the store."""
        self.recalls = Recalls(store, keys, wait_s, self.patience)
        self._session: Session | None = None
        self.seals = Seals(store, keys, lambda group: self._returns.above.drop(group), self.give_back, enabled)
        self.cache = self.seals.cache = GroupCache(keys, lambda: self.is_proven, self.seals.trusts)
        self._acquiring: dict[int, Acquisition] = {}
        self.ahead = Ahead(keys, self.cache, enabled=enabled and write_back, wait_s=wait_s, patience=self.patience)
        self._returns = Returns(keys, self.ahead)
        self.exclusives = Exclusives(
            keys,
            self.cache,
            self._returns,
            self.recalls,
            acquiring=self._acquiring,
            enabled=enabled and write_back,
        )
        self.interest = Interest(keys)
        self._claimed: Counter[int] = Counter()
        """Groups on which operations of this mount wait for others."""
        self._tickets = 0
        self.turns = Turns(keys, self, self.recalls, self._returns, acquiring=self._acquiring, claimed=self._claimed)
        self.inbox = Inbox(store, keys)
        self.inbox.add(self)
        self.inbox.add(self.seals)
        self.counts: Counter[str] = Counter()

    # -- life --------------------------------------------------------------------------------------------------------

    def put_above(self, cache: CacheAbove) -> None:
        """`cache` is filled from what is held here, and drops it before a key goes."""
        self._returns.above = cache

    def begin(self, session: Session) -> None:
        self.end()
        session.hand_over(self.patience)
        self.recalls.session = session
        self._session = session if self._enabled else None
        self.ahead.begin(session)

    def end(self) -> None:
        """The session is gone, and with it everything that was cached under it."""
        self._session = None
        self.recalls.end()
        self.inbox.hearing = False
        self.ahead.end()
        self.turns.end()
        self.cache.clear()
        self._poison_all()
        self._returns.clear()
        self.interest.clear()

    async def drop_above(self) -> None:
        """After `end`, before the next session begins: what the cache above has goes too, but for what seals cover."""
        await self._returns.above.drop_all(self.cache.groups.keys() | self.seals.dropping)

    def validity_s(self, group: int) -> float:
        """For how many seconds from now what is held of a group is proven; 0 where it is held only for a turn."""
        sealed_s = self.seals.left_s(group)
        if sealed_s is not None:
            return sealed_s
        return self._session.proven_s if self._session is not None and not self.turns.is_passing(group) else 0.0

    @property
    def is_proven(self) -> bool:
        """Whether the lease, and with it what is held by delegations, is proven."""
        return self._session is not None and self._session.proven

    async def serve(self, session: Session) -> None:
        """Give back what is asked for, and commit what is answered ahead, until cancelled. Runs beside the session's
        keepalive, and beside the inbox."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._returns.serve, session)
            nursery.start_soon(self.ahead.serve, session)
            nursery.start_soon(self.exclusives.share_idle)
            nursery.start_soon(self.seals.serve, session)
            if self.exclusives.enabled:
                nursery.start_soon(self.turns.serve, session)

    def recalled(self, wanted: tuple[int, ...], what: bytes) -> None:
        """See `inbox.Listener`."""
        if len(wanted) == 1:
            if what == SHARE:
                self._share(wanted[0])
            else:
                self._recall(wanted[0], holders_in(what))

    def deaf(self) -> None:
        """See `inbox.Listener`."""
        self._drop_all()

    def statistics(self) -> dict[str, float]:
        """Counters for `status`."""
        return {
            "held": len(self.cache.groups),
            "shared": self.exclusives.shared,
            "turns": self.turns.taken,
            "turns_missed": self.turns.missed,
            "cached_keys": self.cache.keys,
            "taken": self.counts["taken"],
            "returned": self._returns.returned,
            "returning": len(self._returns),
            "return_s": round(self._returns.spent_s, 3),
            "recalls_heard": self.counts["recalls_heard"],
            "recalls_sent": self.recalls.sent,
            "recall_wait_s": round(self.recalls.waited_s, 3),
        }

    # -- keeping -----------------------------------------------------------------------------------------------------

    def learn(self, group: int, asked: Sequence[Range], answers: Sequence[RangeResult], revision: int) -> None:
        """Keep the answers to a read as of `revision`, if the group has been held since then, or a seal covers it."""
        self.seals.see(group, asked, answers, revision, busy=self._is_busy(group))
        self.cache.learn(group, asked, answers, revision)
        self.trim()

    def learn_page(self, group: int, start: bytes, page: RangeResult, revision: int) -> None:
        """Keep a page of a listing, read as of `revision`, if the group has been held since then."""
        self.cache.learn_page(group, start, page, revision)
        self.trim()

    def trim(self) -> None:
        """Give back what is too much. Not between `write_ahead` and the queueing of what it applied."""
        while self.cache.is_full:
            self.give_back(self.cache.least_used())

    def make_room(self) -> None:
        """The cache above is full: give back what was taken first, unless something is being given back already."""
        if self.cache.groups and not len(self._returns) and not self.seals.dropping:
            self.give_back(self.cache.least_used())

    # -- taking ------------------------------------------------------------------------------------------------------

    def wants(self, group: int) -> bool:
        """Whether to take the group now: at its second touch, unless it is hot elsewhere."""
        return self.can_take(group) and self.interest.touch(group)

    def can_take(self, group: int) -> bool:
        """Whether the group may be taken now: not if it is held, given back, or hot elsewhere."""
        if not self.may_take():
            return False
        if group in self.cache.groups or self._is_busy(group) or self.seals.keeps_from(group):
            return False
        return self.interest.is_cool(group)

    def _is_busy(self, group: int) -> bool:
        return group in self._acquiring or group in self._returns or self.turns.is_taking(group)

    def may_take(self) -> bool:
        """Whether anything may be taken now."""
        if self._session is None or not self.inbox.hearing or not self._session.proven:
            return False
        return not self._session.in_doubt

    def held_or_free(self, group: int) -> bool:
        """Whether `take` may be asked for the group."""
        return self.cache.usable(group) is not None or self.can_take(group)

    async def take(self, wanted: Mapping[int, Sequence[Range]]) -> dict[int, list[RangeResult]] | None:
        """Read what is asked of each group, and take those that are not held. One request, a write.

        For all of them or none; None if nothing was read either (ask again). Each must be held, or `can_take`, and
        nothing of what is asked be queued.
        """
        session = self._session
        assert session is not None
        acquisitions = {group: Acquisition() for group in wanted if group not in self.cache.groups}
        self._acquiring.update(acquisitions)
        asked = [question for questions in wanted.values() for question in questions]
        free = [compare for group in acquisitions for compare in self.exclusives.free(group)]
        groups = dict.fromkeys((*wanted, *self.exclusives.groups_of(asked)))
        checked = [self.exclusives.holder_of(group) for group in groups]
        held = [self.exclusives.holder_of(group) for group in groups if group not in acquisitions]
        puts = [Put(self._keys.delegation(group, session.number), b"", session.lease_id) for group in acquisitions]
        taken = False
        try:
            outcome = await session.commit(
                free, (*puts, *held, *asked), NOTED, time_ns=time.time_ns(), orelse=(*checked, *asked)
            )
            taken = isinstance(outcome, Committed)
            self.ahead.observe(outcome.revision)
        finally:
            for group, acquisition in acquisitions.items():
                del self._acquiring[group]
                if self._session is session and (acquisition.poisoned or not taken):
                    self.give_back(group)  # whether or not the key is there
        if outcome.ranges is None:
            found = None
        else:
            told = [_present(each) for each in outcome.ranges[len(puts) if taken else 0 :]]
            found = self._answers(wanted, told, len(held) if taken else len(checked))
        if taken and self._session is session:
            for group, acquisition in acquisitions.items():
                if not acquisition.poisoned:
                    self._hold(group, outcome.revision)
            for group, ranges in (found or {}).items():
                self.learn(group, wanted[group], ranges, outcome.revision)
            for acquisition in acquisitions.values():
                for write, revision in acquisition.writes:
                    self._apply(write, revision)
            self.trim()
        return found

    def _answers(
        self, wanted: Mapping[int, Sequence[Range]], told: Sequence[RangeResult], holders: int
    ) -> dict[int, list[RangeResult]] | None:
        """The answers to what is wanted of each group, which come after `holders` answers to who holds one exclusively.
        None if another mount does: what was read may be behind what that has answered."""
        if self.exclusives.others(told[:holders]):
            return None
        answers = iter(told[holders:])
        return {group: [next(answers) for _ in questions] for group, questions in wanted.items()}

    def _hold(self, group: int, revision: int) -> Group:
        self.counts["taken"] += 1
        return self.cache.hold(group, revision)

    # -- writing -----------------------------------------------------------------------------------------------------

    def guards(self, session: Session, writes: Sequence[Put | Delete], born: int) -> tuple[list[Compare], list[Range]]:
        """See `groups.guards`."""
        return guards(self._keys, session.number, writes, born)

    def companions(self, session: Session, writes: Sequence[Put | Delete], born: int) -> list[Put | Delete]:
        """What goes along in the transaction: the delegation that a new directory (`born`, or 0) is born with, and the
        end of those on directories that are removed."""
        if self._session is not session:
            return []
        found: list[Put | Delete] = []
        if born and self.may_take():
            self._acquiring[born] = Acquisition()
            found += self._born(session, born)
        found += self._gone(session, self._removed(writes))
        return found

    def _born(self, session: Session, group: int) -> list[Put]:
        delegation = Put(self._keys.delegation(group, session.number), b"", session.lease_id)
        return [delegation, *self.exclusives.born(session, group)]

    def _gone(self, session: Session, groups: Iterable[int]) -> list[Delete]:
        number = session.number
        return [Delete(key(group, number)) for group in groups for key in (self._keys.delegation, self._keys.exclusive)]

    def _removed(self, writes: Sequence[Put | Delete]) -> list[int]:
        inodes = self._keys.inodes
        deleted = (w.key for w in writes if isinstance(w, Delete) and w.key.startswith(inodes))
        return [ino for ino in (self._keys.parse_numbers(key)[0] for key in deleted) if ino in self.cache.groups]

    def start_write(self, writes: Sequence[Put | Delete]) -> list[bytes]:
        """From now on what they change is not answered from the cache; what it returns is for `end_write`."""
        return self.cache.start_write(writes)

    def end_write(self, pending: Sequence[bytes], writes: Sequence[Put | Delete], revision: int, born: int = 0) -> None:
        """A transaction has been applied at `revision` (0: it was not, as far as is known)."""
        self.cache.end_write(pending)
        if revision:
            for group in self._removed(writes):
                self.cache.drop(group)
                self._returns.above.discard(group)
            for write in writes:
                self._apply(write, revision)
        birth = self._acquiring.pop(born, None) if born else None
        if birth is not None and not birth.poisoned and revision and self._session is not None:
            self._hold_born(born, writes, revision, exclusive=not birth.shared)
        elif birth is not None and revision and self._session is not None:
            self.give_back(born)
        self.trim()

    def _hold_born(
        self, born: int, writes: Sequence[Put | Delete], revision: int, *, exclusive: bool = True, queued: bool = False
    ) -> None:
        held = self._hold(born, revision)
        held.complete = True
        held.exclusive = self.exclusives.enabled and exclusive
        held.count(0, revision)
        for write in writes:
            if self._keys.group_of(write.key) == born:
                self.cache.apply(born, write, revision, queued=queued)

    def write_ahead(self, session: Session, writes: Sequence[Put | Delete], born: int) -> list[Put | Delete]:
        """Apply what `Ahead.covers` here, before the store has it; what goes along in its transaction. No checkpoint.

        To be queued at once, and then `trim`.
        """
        revision = self.ahead.revision
        removed = self._removed(writes)
        companions: list[Put | Delete] = [*self._gone(session, removed)]
        for group in removed:
            self.cache.drop(group)
            self._returns.above.discard(group)
        for write in writes:
            self._apply(write, revision, queued=True)
        self.cache.note_change(writes)
        if born:
            companions += self._born(session, born)
            self._hold_born(born, writes, revision, queued=True)
        return companions

    def _apply(self, write: Put | Delete, revision: int, *, queued: bool = False) -> None:
        group = self._keys.group_of(write.key)
        if group is None:
            return
        if group in self._acquiring:
            self._acquiring[group].writes.append((write, revision))
        self.cache.apply(group, write, revision, queued=queued)

    def doubt(self) -> None:
        """A write of ours may still be applied, we don't know when: hold nothing until its slot is settled."""
        log.info("a transaction is in doubt: no delegations until it is settled")
        self._drop_all()

    # -- recalls -----------------------------------------------------------------------------------------------------

    def new_claim(self) -> Claim:
        """For an operation that may have to wait; end it with `release`."""
        self._tickets += 1
        return Claim(self._tickets)

    def release(self, claim: Claim) -> None:
        """The operation has ended: the kernel's locks of what it changes are let go."""
        self.unclaim(claim.groups)
        claim.groups.clear()

    def unclaim(self, groups: Collection[int]) -> None:
        """An operation that had `_claimed` groups waits no more."""
        self._claimed -= Counter(dict.fromkeys(groups, 1))
        for group in groups:
            if group not in self._claimed:
                self._returns.above.calm(group)

    async def recall_others(
        self, session: Session, found: Sequence[RangeResult], writes: Sequence[Put | Delete], claim: Claim
    ) -> None:
        """Ask the holders of the groups in `found` (answers to `guards`' questions) to give them back, and wait. What
        this mount holds stays, unless it is asked for meanwhile. Errors as `recalls.recall`."""
        for group in groups_written(self._keys, writes):
            if group not in claim.groups:
                claim.groups[group] = None
                self._claimed[group] += 1
            self._returns.above.hurry(group)
        self.exclusives.still_read(group for group, _ in self.recalls.others(session, found[::2]))
        for group, _ in self.exclusives.others(found[1::2]):
            self.turns.rivals.recalled(group)
        await self.recalls.recall(session, found[::2], claim)

    def _recall(self, group: int, holders: int) -> None:
        """Somebody wants to write what so many hold: drop the cache now, the key after it."""
        self.counts["recalls_heard"] += 1
        if self.turns.recalled(group):
            return
        self.turns.rivals.recalled(group)
        self.interest.recalled(group, self.cache.groups.get(group), holders)
        if group in self._acquiring:
            self._acquiring[group].poisoned = True
        self.give_back(group)

    def _share(self, group: int) -> None:
        """Somebody wants to read what this mount holds exclusively."""
        self.turns.rivals.read_elsewhere(group)
        self.exclusives.share(group)

    def give_back(self, group: int) -> None:
        """Drop what is cached of a group, and end its delegation, whether or not its key is there. No checkpoint."""
        if self.seals.let_go(group):
            return
        self.cache.drop(group)
        self._returns.ask(group)
        if group in self._claimed:
            self._returns.above.hurry(group)

    def _drop_all(self) -> None:
        self._poison_all()
        for group in [group for group, held in self.cache.groups.items() if not held.seal]:
            self.give_back(group)

    def _poison_all(self) -> None:
        for acquisition in self._acquiring.values():
            acquisition.poisoned = True


def _present(found: RangeResult | None) -> RangeResult:
    assert found is not None, "the answer to a question"
    return found
