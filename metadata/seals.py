"""The seals that one mount trusts: what they cover it caches without delegations, for a term, lease or no lease.

Rules (`seal_records.py` has what is in the store)
1. Trust begins with a transaction that compares that the seal stands as it was read, and puts `z/<seal>/<session>`,
   which no lease takes away: who unseals waits for that key to go, or for one term.
2. It lasts one term (less a margin for clocks) from before the request was *sent* that last found the seal's record
   unchanged. While it lasts nobody has changed what has the seal's number, whether the mount reaches the store or not.
3. Kept under it is what was read as of the revision that made it SEALED, or later.
4. When it ends (the record has changed, or the term is over) nothing of it is answered any more, the kernel drops what
   it was given, and only then the key goes. A group that is being dropped is not taken again meanwhile.
5. The kernel may keep what is covered for as long as the trust lasts, not longer.
6. Cut off, a mount also answers for the directories on the way to the tree; of these only what a seal keeps as it is.
   Their times and the number of their subdirectories it doesn't know then, and says so: they are as at their birth,
   and nlink is 1.

Each mount reads all seals every quarter of the shortest term that it trusts: one request, however much is covered.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import trio

from apollofs.metadata import codec
from apollofs.metadata.errors import MetadataError
from apollofs.metadata.group_cache import GroupCache
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import Inode
from apollofs.metadata.returns import NOTED
from apollofs.metadata.seal_records import Phase, SealRecord, decode_seal
from apollofs.metadata.session import CLOCK_RATE_MARGIN, Committed, Session, boot_time, retry
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
MEMBERS_MAX = 65_536
"""Groups of which it is remembered which seal's number they have."""
CONFIRMED_IN_TERM = 4
READ_S = 10.0
RETRY_S = 1.0
RELOOK_S = 1.0
"""A seal that was not SEALED yet is looked at again when something of it is read so much later."""


@dataclass(slots=True)
class _Trust:
    record: SealRecord
    sessions: set[int]
    """In whose names a key may stand: one, but where it is not known whether the next one's does."""
    until: float
    """`boot_time`."""
    waypoints: dict[int, Inode]
    groups: set[int] = field(default_factory=set)
    """What was cached under it, and given to the kernel."""

    @property
    def left_s(self) -> float:
        """Seconds from now."""
        return max(0.0, self.until - boot_time())

    @property
    def lasts(self) -> bool:
        return boot_time() < self.until


@dataclass(slots=True)
class _Ended:
    """A trust that is over, or was never known to have begun, until its keys are gone."""

    sessions: set[int]
    groups: set[int] = field(default_factory=set)
    answering: bool = False


class Seals:
    """One mount's, over all its sessions. `drop`: have the kernel drop what it was given of a group. `give_back`: give
    back the delegation on a group."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        drop: Callable[[int], Awaitable[None]],
        give_back: Callable[[int], None],
        enabled: bool,
    ) -> None:
        self._store = store
        self._keys = keys
        self._drop = drop
        self._give_back = give_back
        self._enabled = enabled
        self.cache: GroupCache
        """Set by who makes both."""
        self._trusts: dict[int, _Trust] = {}
        self._ended: dict[int, _Ended] = {}
        self._members: OrderedDict[int, int] = OrderedDict()
        self._asked: set[int] = set()
        """Seals to be looked at."""
        self._looked: OrderedDict[int, float] = OrderedDict()
        """When, by trio's clock, a seal was looked at that could not be trusted."""
        self.dropping: set[int] = set()
        """Groups that the kernel is dropping."""
        self._dropped = trio.Event()
        self._wakeup = trio.Event()
        self._changed = trio.Event()
        self.confirmations = 0

    # -- what is trusted: no awaits ----------------------------------------------------------------------------------

    def trusts(self, number: int) -> bool:
        """Whether what is cached under a seal may be answered."""
        trust = self._trusts.get(number)
        return trust is not None and trust.lasts

    def left_s(self, group: int) -> float | None:
        """For how many seconds from now what is held of a group may be answered; None: it is not held under a seal."""
        held = self.cache.groups.get(group)
        if held is None or not held.seal:
            return None
        trust = self._trusts.get(held.seal)
        return trust.left_s if trust is not None else 0.0

    def keeps_from(self, group: int) -> bool:
        """Whether the group must not be taken by a delegation now: it is covered, or being dropped."""
        return group in self.dropping or self.trusts(self._members.get(group, 0))

    def waypoint(self, parent: int, name: bytes) -> int:
        """The directory that a name on the way to a trusted tree leads to; 0: it is on none."""
        for trust in self._trusts.values():
            if trust.lasts and (parent, name) in trust.record.path:
                at = trust.record.path.index((parent, name)) + 1
                return trust.record.path[at][0] if at < len(trust.record.path) else trust.record.root
        return 0

    def waypoint_inode(self, ino: int) -> Inode | None:
        """What is certain of a directory on the way to a trusted tree: see rule 6."""
        for trust in self._trusts.values():
            if trust.lasts and ino in trust.waypoints:
                inode, born_ns = trust.waypoints[ino], trust.waypoints[ino].btime_ns
                return inode._replace(atime_ns=born_ns, mtime_ns=born_ns, ctime_ns=born_ns, nlink=1)
        return None

    def statistics(self) -> dict[str, float]:
        """Counters for `status`."""
        return {
            "trusted": len(self._trusts),
            "ending": len(self._ended),
            "groups": sum(len(trust.groups) for trust in self._trusts.values()),
            "confirmations": self.confirmations,
        }

    # -- learning: no awaits -----------------------------------------------------------------------------------------

    def see(
        self, group: int, asked: Iterable[Range], answers: Iterable[RangeResult], revision: int, *, busy: bool
    ) -> None:
        """A group was read as of `revision`: if a trusted seal covers it, it is held under that from now on. `busy`: it
        is being taken by a delegation, or given back."""
        if not self._enabled:
            return
        number = self._number_of(group, asked, answers)
        trust = self._trusts.get(number)
        if number and trust is None:
            self._look(number)
        if trust is None or not trust.lasts or group in self.dropping:
            return
        held = self.cache.groups.get(group)
        if not busy and held is None and revision >= trust.record.revision:
            self.cache.hold(group, revision).seal = number
            trust.groups.add(group)
        elif held is not None and not held.seal:
            self._give_back(group)

    def _number_of(self, group: int, asked: Iterable[Range], answers: Iterable[RangeResult]) -> int:
        own = self._keys.inode(group)
        for question, answer in zip(asked, answers, strict=True):
            if question.key == own and not question.range_end and answer.kvs:
                kv = answer.kvs[0]
                self._remember(group, codec.decode_inode(kv.value, kv.mod_revision).seal)
        return self._members.get(group, 0)

    def _remember(self, group: int, number: int) -> None:
        self._members.pop(group, None)
        if number:
            self._members[group] = number
            if len(self._members) > MEMBERS_MAX:
                self._members.popitem(last=False)

    def _look(self, number: int) -> None:
        if number in self._ended or trio.current_time() < self._looked.get(number, -RELOOK_S) + RELOOK_S:
            return
        self._looked[number] = trio.current_time()
        if len(self._looked) > MEMBERS_MAX:
            self._looked.popitem(last=False)
        self._asked.add(number)
        self._wakeup.set()

    def recalled(self, wanted: tuple[int, ...], what: bytes) -> None:
        """See `inbox.Listener`; the notice that a seal has ended has four numbers. What has become of it is read."""
        if len(wanted) == 4:
            self._asked.add(wanted[0])
            self._wakeup.set()

    def deaf(self) -> None:
        """See `inbox.Listener`: that a seal has ended is noticed when it is confirmed, or its term is over."""

    # -- ending ------------------------------------------------------------------------------------------------------

    def let_go(self, group: int) -> bool:
        """If a group is held under a seal, it is not any more, and the kernel drops it too. Whether it was."""
        held = self.cache.groups.get(group)
        if held is None or not held.seal:
            return False
        self.cache.drop(group)
        trust = self._trusts.get(held.seal)
        if trust is not None:
            trust.groups.discard(group)
        self.dropping.add(group)
        self._changed.set()
        return True

    def _end(self, number: int) -> None:
        """A seal is not trusted any more."""
        trust = self._trusts.pop(number)
        for group in trust.groups:
            held = self.cache.groups.get(group)
            if held is not None and held.seal == number:
                self.cache.drop(group)
        self.dropping |= trust.groups
        self._ended[number] = _Ended(trust.sessions, trust.groups)
        self._looked[number] = trio.current_time()
        self._changed.set()
        self._wakeup.set()
        log.info("seal %d is not trusted any more: %d directories are dropped", number, len(trust.groups))

    async def watch(self) -> None:
        """End trust when its term is over, and have the kernel drop what was cached under it; until cancelled. Runs
        beside the sessions, and between them."""
        under_way: set[int] = set()
        async with trio.open_nursery() as nursery:
            while True:
                changed = self._changed = trio.Event()
                for number in [number for number, trust in self._trusts.items() if not trust.lasts]:
                    self._end(number)
                for group in self.dropping - under_way:
                    under_way.add(group)
                    nursery.start_soon(self._drop_group, group, under_way)
                next_s = min((trust.left_s for trust in self._trusts.values()), default=float("inf"))
                with trio.move_on_after(next_s):
                    await changed.wait()

    async def _drop_group(self, group: int, under_way: set[int]) -> None:
        while True:
            try:
                await self._drop(group)
                break
            except Exception:
                log.exception("what a seal covered can't be dropped yet")
                await trio.sleep(RETRY_S)
        under_way.discard(group)
        self.dropping.discard(group)
        self._dropped.set()
        self._dropped = trio.Event()

    # -- in a session ------------------------------------------------------------------------------------------------

    async def serve(self, session: Session) -> None:
        """Learn of seals that were met, confirm those that are trusted, answer for those that are not any more; until
        cancelled."""
        async with trio.open_nursery() as nursery:
            for ended in self._ended.values():
                ended.answering = False
            while True:
                wakeup = self._wakeup = trio.Event()
                pause_s = RETRY_S
                try:
                    await self._confirm(session)
                    terms = (trust.record.term_s for trust in self._trusts.values())
                    pause_s = min(terms, default=float("inf")) / CONFIRMED_IN_TERM
                except MetadataError as exc:
                    log.info("seals are confirmed later: %s", exc)
                for number, ended in self._ended.items():
                    if not ended.answering:
                        ended.answering = True
                        nursery.start_soon(self._answer, session, number, ended)
                with trio.move_on_after(pause_s):
                    await wakeup.wait()

    async def _confirm(self, session: Session) -> None:
        asked = set(self._asked)
        if not (asked or self._trusts):
            return
        sent = boot_time()
        seals = self._keys.seals
        found = await retry(lambda: self._store.range(Range(seals, prefix_end(seals))), READ_S)
        standing = {self._keys.parse_numbers(kv.key)[0]: kv for kv in found.kvs}
        self._asked -= asked - self._ended.keys()  # those when they are answered for
        self.confirmations += 1
        for number, trust in list(self._trusts.items()):
            kv = standing.get(number)
            if self._trusts.get(number) is not trust:
                continue
            if kv is None or kv.mod_revision != trust.record.revision:
                self._end(number)
            elif not trust.lasts:
                continue  # over already; `watch` ends it
            elif trust.sessions == {session.number}:
                trust.until = max(trust.until, sent + trust.record.term_s * CLOCK_RATE_MARGIN)
            else:
                await self._begin(session, kv)
        for number in asked - self._trusts.keys() - self._ended.keys():
            if number in standing:
                await self._begin(session, standing[number])

    async def _begin(self, session: Session, kv: KeyValue) -> None:
        """Trust a seal that was read, or go on trusting it in another session."""
        record = decode_seal(kv.value, kv.mod_revision)
        if record.phase is Phase.ENDING:
            await self._deny(session, record.number)
        if record.phase is not Phase.SEALED:
            return
        before = self._trusts.get(record.number)
        key = self._keys.trust(record.number, session.number)
        writes: list[Put | Delete] = [Put(key, b"")]
        if before is not None:
            others = before.sessions - {session.number}
            writes += [Delete(self._keys.trust(record.number, other)) for other in others]
        above = [Range(self._keys.inode(ino)) for ino, _ in record.path]
        sent = boot_time()
        unchanged = Compare(kv.key, Target.MOD, Relation.EQUAL, kv.mod_revision)
        try:
            outcome = await session.commit((unchanged,), (*writes, *above), NOTED, time_ns=time.time_ns())
        except (MetadataError, trio.Cancelled):
            self._may_stand(record.number, session)
            raise
        if not isinstance(outcome, Committed) or outcome.ranges is None:
            if isinstance(outcome, Committed):  # the reply was lost
                self._may_stand(record.number, session)
            self._asked.add(record.number)
            self._wakeup.set()
            return
        found = [answer.kvs[0] for answer in outcome.ranges[len(writes) :] if answer is not None and answer.kvs]
        inodes = [codec.decode_inode(one.value, one.mod_revision) for one in found]
        if record.number in self._ended:
            self._may_stand(record.number, session)  # its term was over meanwhile: `_answer` takes the key away
            return
        until = sent + record.term_s * CLOCK_RATE_MARGIN
        trust = _Trust(record, {session.number}, until, {inode.ino: inode for inode in inodes})
        if before is not None and self._trusts.get(record.number) is before:
            before.sessions, before.until = {session.number}, until
            return
        self._trusts[record.number] = trust
        self._changed.set()
        for group, held in list(self.cache.groups.items()):
            if not held.seal and self._members.get(group) == record.number:
                self._give_back(group)

    def _may_stand(self, number: int, session: Session) -> None:
        """A key in the session's name may be in the store though nothing rests on it. Nobody would take it away when
        the session has ended, and who unseals would wait for it: it goes with the trust's, or by itself."""
        held = self._trusts.get(number) or self._ended.setdefault(number, _Ended(set()))
        held.sessions.add(session.number)
        self._asked.add(number)

    async def _deny(self, session: Session, number: int) -> None:
        """A seal that has ended is not trusted here: whether or not a key of this session says that it is."""
        gone = (
            Delete(self._keys.trust(number, session.number)),
            Delete(self._keys.seal_notice(session.number, number)),
        )
        await session.commit((), gone, NOTED, time_ns=time.time_ns())

    async def _answer(self, session: Session, number: int, ended: _Ended) -> None:
        """When nothing of it is cached here or in the kernel, the key goes that says that the seal is trusted."""
        while self.dropping & ended.groups:
            await self._dropped.wait()
        gone = [Delete(self._keys.trust(number, each)) for each in ended.sessions | {session.number}]
        gone.append(Delete(self._keys.seal_notice(session.number, number)))
        try:
            await session.commit((), gone, NOTED, time_ns=time.time_ns())
        except MetadataError as exc:
            log.info("that a seal is not trusted any more is told later: %s", exc)
            await trio.sleep(RETRY_S)
            ended.answering = False
            self._wakeup.set()
            return
        if self._ended.get(number) is ended:
            del self._ended[number]
            if number in self._asked:
                self._wakeup.set()

    async def leave(self, session: Session) -> None:
        """The mount ends, and with it what it has cached: nobody need wait for it. Raises MetadataError."""
        held = [(number, trust.sessions) for number, trust in self._trusts.items()]
        held += [(number, ended.sessions) for number, ended in self._ended.items()]
        keys = [self._keys.trust(number, each) for number, sessions in held for each in sessions]
        self._trusts.clear()
        for at in range(0, len(keys), 100):
            part = [Delete(key) for key in keys[at : at + 100]]
            await session.commit((), part, NOTED, time_ns=time.time_ns())
