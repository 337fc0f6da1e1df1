"""Turns: mounts that change one directory at the same time have it one after the other, each for a slice of time.

If each of them did its operations in etcd, a process that creates a file would wait for three requests, behind the
kernel's lock of the directory; if they recalled the directory for each operation, for more. So who competes
(`rivals.py`) takes the directory exclusively and complete, in one transaction that lists it, does in it what comes for
some milliseconds without asking (`ahead.py`), and hands it on.

Rules
1. A turn is a delegation that is exclusive from the start. The transaction that takes it proves that nobody else holds
   the group, and reads all of it.
2. Nobody overtakes: the same transaction proves that nobody waits (`R/`) who came earlier. So who has had his turn
   comes after all who waited for it to end.
3. A recall ends a turn when its slice is over, or sooner: when this mount has not changed the directory for a moment.
   Whoever wants only to read need not wait for that: then it is shared as ever. Who passes a lock on to another mount
   has done what he wanted for the moment, and ends his turns with it (`end_all`).
4. Nothing of the group is given to the cache above during a turn, so that handing on waits for nothing but the queue.
5. An operation that waits for a turn may have locked the directory above: what is given back of it meanwhile is
   dropped without a lock (rule 9 of `delegations.py`). It waits for a bounded time, then goes on without a turn.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from apollofs.metadata.ahead import Ahead
from apollofs.metadata.errors import DeadlineExceeded, MetadataError, StaleInode
from apollofs.metadata.group_cache import GroupCache
from apollofs.metadata.groups import Acquisition, Claim, Group
from apollofs.metadata.keys import Keys
from apollofs.metadata.recalls import Recalls
from apollofs.metadata.returns import NOTED, Returns
from apollofs.metadata.rivals import Rivals
from apollofs.metadata.session import Committed, Session
from apollofs.metadata.store import Compare, Op, Put, Range, RangeResult, Relation, Target, prefix_end

log = logging.getLogger(__name__)
SLICE_S = 0.05
"""How long a turn lasts at least if somebody else waits, unless nothing is done."""
LISTINGS_IN_SLICE = 5
"""A turn lasts at least so many times as long as it took to take it,"""
SLICE_S_MAX = 0.2
"""but not longer than this."""
QUIET_S = 0.01
"""A turn that somebody waits for ends when nothing was changed for so long."""
ENTRIES_MAX = 4096
"""Directories with more have no turns: they would take too long to list."""
BEGUN_MAX = 64
WAIT_S = 2.0
"""For so long an operation waits for its turn; then it goes on without."""


@dataclass(slots=True)
class _Taking:
    """A turn that is being waited for. `recalled`: others wait for its end already."""

    done: trio.Event = field(default_factory=trio.Event)
    acquisition: Acquisition = field(default_factory=Acquisition)
    recalled: bool = False


class Holder(Protocol):
    """What a mount holds; `delegations.Delegations`."""

    cache: GroupCache
    ahead: Ahead

    def may_take(self) -> bool:
        """Whether anything may be taken now."""

    def unclaim(self, groups: Collection[int]) -> None:
        """An operation that had claimed groups waits no more."""

    def new_claim(self) -> Claim:
        """For an operation that may have to wait."""

    def give_back(self, group: int) -> None:
        """Drop what is cached of a group, and end its delegation, whether or not its key is there. No checkpoint."""

    def trim(self) -> None:
        """Give back what is too much."""


class Turns:
    """One mount's."""

    def __init__(
        self,
        keys: Keys,
        holder: Holder,
        recalls: Recalls,
        returns: Returns,
        *,
        acquiring: dict[int, Acquisition],
        claimed: Counter[int],
    ) -> None:
        """`acquiring`: what the holder is taking; `claimed`: where its operations wait for others."""
        self._keys = keys
        self._holder = holder
        self._cache = holder.cache
        self._ahead = holder.ahead
        self._recalls = recalls
        self._returns = returns
        self._acquiring = acquiring
        self._claimed = claimed
        self._taking: dict[int, _Taking] = {}
        self._ending: dict[int, Group] = {}
        self._session: Session | None = None
        self._nursery: trio.Nursery | None = None
        self._begun: dict[int, Group] = {}
        """The turns that this mount has had last; most are over."""
        self.rivals = Rivals()
        self.taken = 0
        self.missed = 0
        """How often operations went on without a turn, because it did not come in time."""

    # -- life --------------------------------------------------------------------------------------------------------

    async def serve(self, session: Session) -> None:
        """Take turns in `session` until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._session, self._nursery = session, nursery
                await trio.sleep_forever()
        finally:
            self.end()

    def end(self) -> None:
        """The session is gone, or ends."""
        self._session = self._nursery = None
        for taking in self._taking.values():
            taking.done.set()
        self._taking.clear()
        self._ending.clear()
        self._begun.clear()
        self.rivals.clear()

    # -- taking ------------------------------------------------------------------------------------------------------

    async def have(self, group: int, *, joins: bool = False) -> bool:
        """If this mount competes for a group (`joins`: that another holds exclusively), wait for its turn: whether it
        has come. No checkpoint otherwise."""
        nursery, session = self._nursery, self._session
        taking = self._taking.get(group)
        if taking is None:
            if not self.rivals.competes(group, joins=joins) or self._cache.is_exclusive(group):
                return False
            if nursery is None or session is None or group in self._acquiring:
                return False
            if not self._holder.may_take() or not self._ahead.accepts(session):
                return False
            taking = self._taking[group] = _Taking()
            nursery.start_soon(self._wait_and_take, session, group, taking, self._holder.new_claim())
        await taking.done.wait()
        return self._cache.is_exclusive(group)

    def is_taking(self, group: int) -> bool:
        """Whether a turn on a group is being waited for: then it is not taken otherwise."""
        return group in self._taking

    async def _wait_and_take(self, session: Session, group: int, taking: _Taking, claim: Claim) -> None:
        self._claimed[group] += 1
        self._returns.above.hurry(group)
        try:
            with trio.move_on_after(WAIT_S) as waiting:
                while not await self._take(session, group, taking, claim):
                    await self._recalls.stand_in_line(session, group, claim)
            if waiting.cancelled_caught:
                self.missed += 1
                log.info("no turn on directory %#x within %.0f s", group, WAIT_S)
        except MetadataError as exc:
            log.info("no turn on directory %#x: %s", group, exc)
        finally:
            self._holder.unclaim((group,))
            if self._taking.get(group) is taking:
                del self._taking[group]
            taking.done.set()
            if claim.waits:
                await self._recalls.leave_line(session, claim)

    async def _take(self, session: Session, group: int, taking: _Taking, claim: Claim) -> bool:
        """One transaction, a write: whether there is no need to wait for others. StaleInode if the group is gone."""
        if self._cache.is_exclusive(group):
            return True
        if group in self._cache.groups:
            self._holder.give_back(group)
        await self._returns.through(group)  # from here to the request: no checkpoint, or a deletion could come after it
        if session.in_doubt:
            raise DeadlineExceeded("a transaction of this mount is in doubt")
        began = trio.current_time()
        asked = self._questions(group)
        others = Range(self._keys.writers_on(group), prefix_end(self._keys.writers_on(group)), keys_only=True)
        number, lease = session.number, session.lease_id
        keys = (self._keys.delegation(group, number), self._keys.exclusive(group, number))
        writes: list[Op] = [*(Put(key, b"", lease) for key in keys), *claim.waits.values()]
        taking.acquisition = self._acquiring[group] = Acquisition()
        try:
            outcome = await session.commit(
                self._free(session, group, claim),
                (*writes, *asked, others),
                NOTED,
                time_ns=time.time_ns(),
                orelse=(Range(self._keys.inode(group), keys_only=True),),
            )
            self._ahead.observe(outcome.revision)
        except BaseException:
            if self._session is session:
                self._holder.give_back(group)  # whether or not the key is there
            raise
        finally:
            del self._acquiring[group]
        if not isinstance(outcome, Committed):
            if outcome.ranges[0] is not None and not outcome.ranges[0].kvs:
                raise StaleInode("it is gone")
            return False
        claim.waits.clear()
        if self._session is session:
            found = [each for each in (outcome.ranges or ())[len(writes) :] if each is not None]
            self._begin(group, taking, asked, found, outcome.revision)
            self._lasts(group, taking, trio.current_time() - began)
        return True

    def _questions(self, group: int) -> list[Range]:
        """All of a group: its entries, and the directory's own attributes."""
        keys = self._keys
        entries, children = keys.dentries_of(group), keys.children_of(group)
        return [
            Range(entries, prefix_end(entries), limit=ENTRIES_MAX),
            Range(keys.inode(group)),
            Range(keys.times(group)),
            Range(children, prefix_end(children), count_only=True),
        ]

    def _free(self, session: Session, group: int, claim: Claim) -> list[Compare]:
        """That the group is there, that nobody else holds it, and that nobody waits for it who was there before."""
        prefix, mine = self._keys.delegations_on(group), self._keys.delegation(group, session.number)
        line = self._keys.writers_on(group)
        return [
            Compare(self._keys.inode(group), Target.CREATE, Relation.GREATER, 0),
            Compare(prefix, Target.CREATE, Relation.EQUAL, 0, mine),
            Compare(mine + b"\0", Target.CREATE, Relation.EQUAL, 0, prefix_end(prefix)),
            Compare(line, Target.CREATE, Relation.GREATER, claim.since - 1, prefix_end(line))
            if claim.since
            else Compare(line, Target.CREATE, Relation.EQUAL, 0, prefix_end(line)),
        ]

    def _begin(
        self, group: int, taking: _Taking, asked: Sequence[Range], found: Sequence[RangeResult], revision: int
    ) -> None:
        """The group is held exclusively as of `revision`, and this was read with it. No checkpoint."""
        acquisition = taking.acquisition
        too_large = bool(found) and found[0].more
        if too_large:
            self.rivals.too_large(group)
        if too_large or not found or acquisition.poisoned or acquisition.shared:
            self._holder.give_back(group)
            return
        held = self._cache.hold(group, revision)
        self._cache.learn(group, asked[1:], found[1 : len(asked)], revision)
        self._cache.learn_page(group, self._keys.dentries_of(group), found[0], revision)
        for write, written in acquisition.writes:
            self._cache.apply(group, write, written)
        held.exclusive = held.in_turns = True
        self._begun.pop(group, None)
        self._begun[group] = held
        if len(self._begun) > BEGUN_MAX:
            self._begun.pop(next(iter(self._begun)))
        self.taken += 1
        taking.recalled = taking.recalled or bool(found[-1].kvs)

    def _lasts(self, group: int, taking: _Taking, took_s: float) -> None:
        held = self._cache.groups.get(group)
        if held is not None:
            held.changed_at = trio.current_time()
            held.turn_until = held.changed_at + min(max(SLICE_S, LISTINGS_IN_SLICE * took_s), SLICE_S_MAX)
            if taking.recalled:
                self.recalled(group)
            self._holder.trim()

    # -- ending ------------------------------------------------------------------------------------------------------

    def recalled(self, group: int) -> bool:
        """Somebody else wants to change a group: whether it is given back when this mount's turn is over."""
        held = self._cache.groups.get(group)
        if held is None and group in self._taking and group in self._acquiring:
            self.rivals.recalled(group)
            self._taking[group].recalled = True
            return True
        if held is None or not held.in_turns or not held.exclusive or self._nursery is None:
            return False
        self.rivals.recalled(group)
        if self._ending.get(group) is not held:
            self._ending[group] = held
            self._nursery.start_soon(self._end, group, held)
        return True

    def end_all(self) -> None:
        """This mount passes a lock on to another one, which will want what was changed under it: hand that on. No
        checkpoint."""
        begun, self._begun = self._begun, {}
        for group, held in begun.items():
            if held.in_turns:
                self._hand_on(group, held)

    async def _end(self, group: int, held: Group) -> None:
        while self._cache.groups.get(group) is held:
            left_s = min(held.turn_until, held.changed_at + QUIET_S) - trio.current_time()
            if left_s <= 0:
                break
            await trio.sleep(left_s)
        if self._ending.get(group) is held:
            del self._ending[group]
        self._hand_on(group, held)

    def _hand_on(self, group: int, held: Group) -> None:
        if self._cache.groups.get(group) is held:
            self.rivals.keeps(group)
            self._holder.give_back(group)

    def is_passing(self, group: int) -> bool:
        """Whether a held group will be handed on in a moment, so that nobody above should remember anything of it."""
        held = self._cache.groups.get(group)
        if held is None or not held.in_turns:
            return False
        if self.rivals.is_contested(group):
            return True
        held.in_turns = False  # the others have gone: it is held as any other
        return False
