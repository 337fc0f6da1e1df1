"""Write-back of names: what this mount holds exclusively it changes at once, and commits in order right behind.

Rules
1. A mount may hold a group *exclusively* (`E/<dir>/<session>` beside its delegation), put by a transaction that proves
   that nobody else holds the group. While the key is there nobody takes the group, and who would read it from the
   store has the holder commit and share it first.
2. An operation all of whose facts and writes lie in groups held exclusively is decided on what is cached, errors too,
   applied to the cache, answered, and queued here. Nobody can have changed what it was decided on, nor can until it
   is committed: its transaction compares only that the groups are held as they were.
3. The queue is committed in order, one transaction at a time: at once where somebody waits for it, else after LINGER_S,
   so that a file's body, which follows its name, goes along with that. So what a lost session takes with it is the end
   of what was answered, never a piece out of the middle.
4. `E/` and the delegation go only when nothing of the group is queued, and nothing more is queued for it then.
5. An operation that is not decided so waits until nothing that it compares or writes is queued. What it writes is not
   a fact for anybody else until it has come back.
6. What is read from the store is read when nothing of it is queued that was answered before. What is queued is newer
   than all that is read until it has been committed.
7. With the session the queue goes. Everybody who asked for durability hears of it, and the log says how much it was.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import trio

from apollofs.metadata.errors import (
    DeadlineExceeded,
    MetadataError,
    RequestTooLarge,
    SessionLost,
    StoreAuthFailed,
    StoreFull,
    StoreMisuse,
)
from apollofs.metadata.group_cache import GroupCache
from apollofs.metadata.groups import groups_written
from apollofs.metadata.journal import Change
from apollofs.metadata.keys import Keys
from apollofs.metadata.patience import Patience
from apollofs.metadata.session import Committed, Session
from apollofs.metadata.store import (
    OPS_MAX,
    REQUEST_BYTES_MAX,
    Compare,
    Delete,
    Op,
    Put,
    Range,
    Relation,
    Target,
)

log = logging.getLogger(__name__)
QUEUED_MAX = 4096
QUEUED_BYTES_MAX = 16 << 20
OPS_IN_BATCH = OPS_MAX - 2
"""The slot's own compare and put come on top."""
RETRY_S = 0.2
LINGER_S = 0.02
"""What nobody waits for lets so much time pass until it is committed."""
LATE_S = 30.0
"""When the queue has waited for so long for a transaction, nothing more is answered before it is committed."""


@dataclass(slots=True)
class Queued:
    """An operation that was applied here and not yet in the store."""

    writes: Sequence[Put | Delete]
    change: Change | None
    time_ns: int
    born: int
    size: int
    groups: tuple[int, ...]
    committed: Callable[[int], None]
    """Called with the revision when it is in the store."""
    keys: tuple[bytes, ...] = field(default_factory=tuple)


class Ahead:
    """The queue of one mount, over all its sessions."""

    def __init__(self, keys: Keys, cache: GroupCache, *, enabled: bool, wait_s: float, patience: Patience) -> None:
        self._keys = keys
        self._cache = cache
        self._enabled = enabled
        self._wait_s = wait_s
        self._patience = patience
        self._times = keys.table(b"t")
        self._session: Session | None = None
        self._queue: deque[Queued] = deque()
        self._bytes = 0
        self._keys_queued: Counter[bytes] = Counter()
        self._groups_queued: Counter[int] = Counter()
        self._added = 0
        self._done = 0
        """How many operations were queued, and how many of them have left the queue, committed or lost."""
        self._stuck = False
        """The last attempt failed, or takes long: nothing more is answered before it is committed."""
        self._refused: StoreFull | StoreAuthFailed | None = None
        """Why it failed, where that will not pass by itself."""
        self._late_at = math.inf
        self._newest = 0
        self.losses = 0
        """How often a session took answered operations with it."""
        self._work = trio.Event()
        self._waiting = 0
        self._wanted = trio.Event()
        """Somebody waits for what is queued, or there is enough for a transaction."""
        self._moved = trio.lowlevel.ParkingLot()
        self.batches = 0

    # -- life --------------------------------------------------------------------------------------------------------

    def begin(self, session: Session) -> None:
        """Operations are queued for `session` from now on. `end` came before."""
        self._session = session if self._enabled else None

    def end(self) -> None:
        """The session is gone, and what is queued with it. No await."""
        self._session = None
        self._on_time()
        if self._queue:
            self.losses += 1
            log.error("%d operations that had been answered are lost with the session", len(self._queue))
        self._queue.clear()
        self._keys_queued.clear()
        self._groups_queued.clear()
        self._bytes = 0
        self._done = self._added
        self._moved.unpark_all()

    def statistics(self) -> dict[str, float]:
        """Counters for `status`."""
        return {
            "queued": len(self._queue),
            "operations": self._added,
            "transactions": self.batches,
            "losses": self.losses,
        }

    # -- queueing: without a checkpoint ------------------------------------------------------------------------------

    def observe(self, revision: int) -> None:
        """The store was at `revision`."""
        self._newest = max(self._newest, revision)

    @property
    def revision(self) -> int:
        """As of which revision what is queued now is remembered: newer than all that is known, and not newer than the
        one that it will be committed at."""
        return self._newest + 1

    def accepts(self, session: Session) -> bool:
        """Whether operations of `session` may be queued now."""
        if not self._stuck and trio.current_time() > self._late_at:
            self._get_stuck("the metadata store does not answer")
        return self._session is session and not self._stuck

    def _get_stuck(self, why: object) -> None:
        if not self._stuck:
            log.warning("what was answered can't be committed yet: %s", why)
        self._stuck = True
        self._refused = why if isinstance(why, (StoreFull, StoreAuthFailed)) else None
        self._moved.unpark_all()

    def _on_time(self) -> None:
        self._stuck, self._refused = False, None
        self._late_at = math.inf

    @property
    def is_full(self) -> bool:
        """Whether an operation should wait (`settled`) before it is queued."""
        return len(self._queue) >= QUEUED_MAX or self._bytes >= QUEUED_BYTES_MAX

    def covers(self, writes: Sequence[Put | Delete], born: int) -> bool:
        """Whether all that an operation writes is held exclusively, and not being written otherwise."""
        for write in writes:
            if isinstance(write, Delete) and write.range_end:
                return False
            group = self._keys.group_of(write.key)
            if group is None:
                if not self._keys.belongs_to_a_file(write.key):
                    return False
            elif group != born and not self._cache.is_exclusive(group):
                return False
            if self._cache.is_pending(write.key) and not write.key.startswith(self._times):
                return False
        size = sum(len(write.key) + len(write.value) for write in writes if isinstance(write, Put))
        return len(writes) <= OPS_IN_BATCH // 2 and size <= REQUEST_BYTES_MAX // 2

    def add(
        self,
        writes: Sequence[Put | Delete],
        change: Change | None,
        time_ns: int,
        born: int,
        committed: Callable[[int], None],
    ) -> int:
        """Queue an operation that has been applied to the cache; its place, for `settled`."""
        size = sum(len(write.key) + (len(write.value) if isinstance(write, Put) else 0) for write in writes)
        groups = tuple(groups_written(self._keys, writes))
        keys = tuple(write.key for write in writes)
        self._queue.append(Queued(writes, change, time_ns, born, size, groups, committed, keys))
        self._bytes += size
        self._keys_queued.update(keys)
        self._groups_queued.update(groups)
        self._added += 1
        self._work.set()
        if len(self._queue) >= OPS_IN_BATCH // 2:
            self._wanted.set()
        return self._added

    # -- waiting -----------------------------------------------------------------------------------------------------

    async def settled(self, place: int | None = None) -> None:
        """Wait until everything up to `place` (None: all that is queued now) is in the store. No checkpoint if it is.

        Raises SessionLost if some of it is lost, StoreFull and StoreAuthFailed at once where it is refused (it stays
        queued), DeadlineExceeded.
        """
        place = self._added if place is None else place
        losses = self.losses
        await self._until(lambda: self._done >= place)
        if self.losses != losses:
            message = "the session's lease has ended before all was committed that had been answered"
            raise SessionLost(message, in_doubt=True)

    def is_clear(self, group: int) -> bool:
        """Whether nothing of a group is queued."""
        return group not in self._groups_queued

    async def clear_of(self, group: int) -> None:
        """Wait until nothing of a group is queued, or the session is gone."""
        with self._hurried():
            while group in self._groups_queued:
                await self._moved.park()

    @contextlib.contextmanager
    def _hurried(self) -> Iterator[None]:
        """Somebody waits for what is queued."""
        self._waiting += 1
        self._wanted.set()
        try:
            yield
        finally:
            self._waiting -= 1

    def touches(self, compares: Iterable[Compare], writes: Iterable[Put | Delete], asked: Iterable[Range]) -> bool:
        """Whether something is queued of what an operation compares, writes or asks."""
        if not self._queue:
            return False
        singles = [c.key for c in compares if not c.range_end]
        singles += [w.key for w in writes if not w.key.startswith(self._times)]
        singles += [r.key for r in asked if not r.range_end]
        if any(key in self._keys_queued for key in singles):
            return True
        ranged = [c.key for c in compares if c.range_end] + [r.key for r in asked if r.range_end]
        groups = (self._keys.group_of(key) for key in ranged)
        return any(group in self._groups_queued for group in groups if group is not None)

    async def wait_for(
        self, compares: Iterable[Compare], writes: Iterable[Put | Delete] = (), asked: Iterable[Range] = ()
    ) -> None:
        """Wait until `touches` says no, or all is gone with the session. Raises as `settled`, but for SessionLost."""
        await self._until(lambda: not self.touches(compares, writes, asked))

    async def before_reading(self, asked: Sequence[Range]) -> None:
        """Wait until of what is asked nothing is queued that was before this call. Raises as `wait_for`."""
        place = self._added
        await self._until(lambda: self._done >= place or not self.touches((), (), asked))

    async def _until(self, reached: Callable[[], bool]) -> None:
        if reached():
            return
        with self._hurried(), self._patience.bounded(), trio.move_on_after(self._wait_s):
            while not reached():
                if self._refused is not None:
                    raise type(self._refused)(*self._refused.args) from self._refused
                await self._moved.park()
            return
        raise DeadlineExceeded("what was answered before can't be committed")

    # -- committing --------------------------------------------------------------------------------------------------

    async def serve(self, session: Session) -> None:
        """Commit what is queued, until cancelled. Runs beside the session's keepalive."""
        while self._session is session and session.alive:
            if not self._queue:
                self._work = trio.Event()
                await self._work.wait()
            await self._linger()
            with trio.CancelScope(shield=True):
                if self._queue:
                    await self._commit(session, *self._next_batch())

    async def _linger(self) -> None:
        """Let what follows come, as long as nobody waits and more fits."""
        if not self._waiting and len(self._queue) < OPS_IN_BATCH // 2:
            self._wanted = trio.Event()
            with trio.move_on_after(LINGER_S):
                await self._wanted.wait()

    async def finish(self, session: Session) -> None:
        """Commit what is queued when `serve` has ended; ends with the session."""
        while self._queue and self._session is session and session.alive:
            await self._commit(session, *self._next_batch())

    def _next_batch(self) -> tuple[list[Queued], list[Op]]:
        """From the head of the queue on. A key that is written twice is written as the last one leaves it: nobody else
        could have looked at it in between."""
        batch: list[Queued] = []
        ops: dict[bytes, Op] = {}
        size = 0
        for member in self._queue:
            more = sum(key not in ops for key in member.keys)
            if batch and (len(ops) + more > OPS_IN_BATCH or size + member.size > REQUEST_BYTES_MAX // 2):
                break
            for write in member.writes:
                ops[write.key] = write
            size += member.size
            batch.append(member)
        return batch, list(ops.values())

    async def _commit(self, session: Session, batch: list[Queued], ops: list[Op]) -> None:
        born = {member.born for member in batch}
        groups = dict.fromkeys(group for member in batch for group in member.groups if group not in born)
        compares = [self._held(group, session) for group in groups]
        changes = tuple(member.change for member in batch if member.change)
        self._late_at = trio.current_time() + LATE_S
        while session.alive and self._session is session:
            try:
                # without a deadline: a copy that was given up might arrive after what comes later in the queue
                outcome = await session.commit(compares, ops, changes, time_ns=batch[-1].time_ns, deadline_s=math.inf)
            except SessionLost:
                return
            except (StoreMisuse, RequestTooLarge) as exc:
                self._give_up(session, exc)
                return
            except MetadataError as exc:  # it was not applied, and never will be
                self._get_stuck(exc)
                await trio.sleep(RETRY_S)
                continue
            except Exception as exc:  # noqa: BLE001  (a bug; what is queued behind it could not be committed in order)
                self._give_up(session, exc)
                return
            if isinstance(outcome, Committed):
                self._leave(batch, outcome.revision)
            else:
                log.error("a group that was held exclusively has been taken away: the session is given up")
                session.give_up()
            return

    def _give_up(self, session: Session, why: Exception) -> None:
        log.error("what was answered can't ever be committed: the session is given up", exc_info=why)
        session.give_up()

    def _held(self, group: int, session: Session) -> Compare:
        return Compare(self._keys.exclusive(group, session.number), Target.CREATE, Relation.GREATER, 0)

    def _leave(self, batch: list[Queued], revision: int) -> None:
        if not self._queue or self._queue[0] is not batch[0]:
            return  # the session was lost meanwhile
        self._on_time()
        self.batches += 1
        self.observe(revision)
        for member in batch:
            self._queue.popleft()
            self._bytes -= member.size
            _subtract(self._keys_queued, member.keys)
            _subtract(self._groups_queued, member.groups)
            self._done += 1
            member.committed(revision)
            self._catch_up(member, revision)
        self._moved.unpark_all()

    def _catch_up(self, member: Queued, revision: int) -> None:
        for key in member.keys:
            if key not in self._keys_queued:
                self._cache.committed(key, revision)
        for group in member.groups:
            if group not in self._groups_queued:
                self._cache.caught_up(group, revision)


def _subtract(counts: Counter[bytes] | Counter[int], gone: Iterable[bytes | int]) -> None:
    for each in gone:
        counts[each] -= 1  # type: ignore[index]  # keys of the counter that they were added to
        if counts[each] <= 0:  # type: ignore[index]
            del counts[each]
