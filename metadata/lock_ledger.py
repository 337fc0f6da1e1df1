"""What the store says of one session's locks on one inode, and the transactions that change it.

Rules
1. Transactions of one ledger go one after the other (its user sees to that), and each compares the mod_revision of the
   session's own key. Nobody else writes that key.
2. A transaction that was given up may still be applied: the ledger is then *doubtful*. Before anything else is decided
   the own key is put anew (`mend`): a copy that was applied before is overwritten, one that comes later fails on the
   compare. So that its revision never is 0 again, such a key is emptied from then on, not deleted; the session's end
   deletes it.
3. Requests of this session that are in the store and mean nothing any more are *strays*. Others may have passed over
   who stands behind one, so after one has been removed the picture is as new as that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from apollofs.metadata.errors import SessionLost
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.lock_picture import Picture, Places
from apollofs.metadata.lock_records import Lock, encode_held, encode_sole
from apollofs.metadata.session import Committed, Conflict, Session, retry
from apollofs.metadata.store import Compare, Delete, Op, Put, Range, RangeResult, Relation, Store, Target

STRAYS_MAX = 32
"""Keys that one transaction clears away."""
BY_PLACE_MAX = 32


class Ledger:
    """See the module. All calls raise SessionLost, StoreError, DeadlineExceeded, CorruptRecord."""

    def __init__(self, store: Store, session: Session, places: Places, deadline_s: float) -> None:
        self.store = store
        self.session = session
        self.places = places
        self.picture = Picture(places)
        self.deadline_s = deadline_s
        self.ino = places.ino
        self.known = 0
        """The own key's mod_revision; 0: it is not there."""
        self.placed: set[bytes] = set()
        """Requests that are in the store and mean something: they wait, or have their lock by their position."""
        self.strays: set[bytes] = set()
        self.doubtful = False
        self.ended = False
        self._stored: tuple[Lock, ...] = ()
        self._by_place: set[bytes] = set()
        """Those of `placed` whose locks `_stored` does not say."""
        self._keep_key = False

    @property
    def settled(self) -> bool:
        return not self.doubtful and not self.strays

    def says(self, held: tuple[Lock, ...]) -> bool:
        """Whether the own key says exactly this, and no request does so by its position."""
        return self._stored == held and not self._by_place

    def hold_by_place(self, key: bytes) -> bool:
        """The request has its lock by its position: its key goes when the own key says so too. False: there are too
        many of them; write."""
        if len(self._by_place) >= BY_PLACE_MAX:
            return False
        self._by_place.add(key)
        return True

    async def write(
        self, held: tuple[Lock, ...], writes: Sequence[Op] = (), compares: Sequence[Compare] = ()
    ) -> Committed | Conflict:
        """Make the own key say `held`, and more. Raises TooManyLocks. A Conflict has been looked at."""
        keep = bool(held) or self._keep_key
        own: tuple[Op, ...] = ()
        if keep:
            own = (self._put(encode_held(self.session.number, held)),)
        elif self.known:
            own = (Delete(self.places.held),)
        spoken_for = tuple(self._by_place)
        outcome = await self.commit(compares, (*own, *map(Delete, spoken_for), *writes))
        if isinstance(outcome, Committed):
            self.known = outcome.revision if keep else 0
            self._stored = held
            self._by_place.difference_update(spoken_for)
            self.placed.difference_update(spoken_for)
        return outcome

    async def write_sole(self, compares: Sequence[Compare]) -> Committed | Conflict:
        """Make the own key say that this session decides alone, and take its requests out of the store."""
        requests = Delete(self.places.first_ticket, self.places.past_tickets)
        own = self._put(encode_sole(self.session.number))
        outcome = await self.commit(compares, (own, requests))
        if isinstance(outcome, Committed):
            self.known = outcome.revision
            self._stored = ()
            self._by_place.clear()
            self.placed.clear()
            self.strays.clear()
        return outcome

    def _put(self, record: bytes) -> Put:
        return Put(self.places.held, record, self.session.lease_id)

    async def mend(self, held: tuple[Lock, ...], writes: Sequence[Op] = (), *, tell: bool = False) -> bool:
        """One step towards `settled`: remove strays, and say what is held if that is in doubt or to be told. Whether
        it was applied; if so, the picture is as of then."""
        strays = tuple(self.strays)[:STRAYS_MAX]
        writes = (*map(Delete, strays), *writes, self.question)
        self._keep_key = self._keep_key or self.doubtful
        if self.doubtful or tell:
            outcome = await self.write(held, writes)
        else:
            outcome = await self.commit((), writes)
        if isinstance(outcome, Conflict):
            return False
        self.doubtful = False
        self.strays.difference_update(strays)
        await self.see(outcome)
        return True

    async def commit(self, compares: Sequence[Compare], writes: Sequence[Op]) -> Committed | Conflict:
        own = Compare(self.places.held, Target.MOD, Relation.EQUAL, self.known)
        change = Change(Kind.LOCK, ino=self.ino)
        try:
            outcome = await self.session.commit(
                (own, *compares), writes, (change,), time_ns=time.time_ns(), orelse=(self.question,)
            )
        except BaseException:
            self.doubtful = True  # it may have been applied, or may be yet
            raise
        self.check_session()
        if isinstance(outcome, Conflict):
            found = outcome.ranges[0]
            assert found is not None
            self.picture.replace(outcome.revision, found.kvs)
            self._see_own(found)
        return outcome

    async def see(self, outcome: Committed) -> None:
        """Take in the answer to `question`, the last of a transaction's operations."""
        found = outcome.ranges[-1] if outcome.ranges else None
        if found is None:
            await self.read()
        else:
            self.picture.replace(outcome.revision, found.kvs)

    @property
    def question(self) -> Range:
        return Range(self.places.all, self.places.end)

    def _see_own(self, found: RangeResult) -> None:
        """What is in the store of this session's though it should not be: left by transactions that were given up."""
        known = 0
        for kv in found.kvs:
            if kv.key == self.places.held:
                known = kv.mod_revision
            elif self.places.is_own_waiter(kv.key) and kv.key not in self.placed:
                self.strays.add(kv.key)
        if known != self.known:
            self.known = known
            self.doubtful = True

    async def read(self) -> None:
        """How things stand now, as far as the others are concerned. One request."""
        found = await retry(lambda: self.store.range(self.question), self.deadline_s)
        self.picture.replace(found.revision, found.kvs)
        self.check_session()

    def check_session(self) -> None:
        if self.ended or not self.session.alive:
            raise SessionLost("the session has ended, and its locks with it")
