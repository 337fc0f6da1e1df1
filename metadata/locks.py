"""Advisory locks over all mounts: flock(2) and fcntl(2) ranges.

Locks are keys under the session's lease, so a mount that dies frees its locks, and every change of them is a
transaction of the session, so a mount that has lost its session gets none. Who must wait puts a key into the store's
queue and sleeps until a watch says that its turn has come; nothing is polled. Requests are served in order of arrival
over all mounts: one that conflicts with an earlier one that waits, waits behind it, also if the lock is free; but a
lock of the whole file is passed on for a moment among the processes of one mount (`lock_turns.py`). Only requests that
wait for a lock of the same owner on that inode are passed over. (So owners that lock several inodes in different orders
can wait for each other over a request in the queue, where Linux has no queue and lets readers pass.)

A mount decides alone about an inode on which nobody else holds or wants locks: the next ones cost nothing. Who else
wants one there asks for that back through the mount's inbox (`inbox.py`), and from then on they take turns as above.

What is remembered here: the inodes on which this mount holds or awaits locks, and a bounded number of those on which it
decides alone or has waited a moment ago (`lock_board.py` has the rules).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import trio

from apollofs.metadata.errors import InvalidArgument, MetadataError, SessionLost, TooManyLocks
from apollofs.metadata.inbox import Inbox
from apollofs.metadata.keys import Keys
from apollofs.metadata.lock_board import Board
from apollofs.metadata.lock_deadlock import closes_a_circle
from apollofs.metadata.lock_ledger import Ledger
from apollofs.metadata.lock_picture import Places
from apollofs.metadata.lock_powers import Powers
from apollofs.metadata.lock_queue import Waiter
from apollofs.metadata.lock_records import RANGE_END, Lock, LockKind, LockType
from apollofs.metadata.lock_turns import SLICE_S
from apollofs.metadata.pauses import Pauses
from apollofs.metadata.session import Session, SessionOptions
from apollofs.metadata.store import Store

__all__ = ["RANGE_END", "Lock", "LockKind", "LockManager", "LockType"]

log = logging.getLogger(__name__)
ACQUIRING_MAX = 4096
"""Requests of one mount that may be under way or wait at once."""
KEPT_MAX = 1024
"""Inodes that are remembered though nobody holds or wants a lock there now."""
RETRY_S = 0.5


class LockManager:
    """One mount's locks. All calls raise SessionLost, StoreError, DeadlineExceeded besides what is named."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        options: SessionOptions,
        inbox: Inbox,
        passed_on: Callable[[], None] = lambda: None,
    ) -> None:
        """What is recalled is heard from `inbox`. `passed_on` is called when a process of this mount is about to give
        back what another mount waits for."""
        self._store = store
        self._keys = keys
        self._options = options
        self._inbox = inbox
        inbox.add(self)
        self._session: Session | None = None
        self._boards: dict[tuple[int, LockKind], Board] = {}
        self._resting: dict[tuple[int, LockKind], int] = {}
        """Those of no use at the moment that are kept, least recently used first; with how often `mend` had run."""
        self._mended = 0
        self._ended: list[Board] = []
        """Of a session that is over; their watches are still to be closed."""
        self._powers = Powers(self._new_ticket, self._may_decide_alone, self._turn_begins, self._has_asked, passed_on)
        self._pauses = Pauses()
        self._nursery: trio.Nursery | None = None
        self._telling: set[tuple[int, LockKind]] = set()
        self._tickets = 0
        self._acquiring = 0
        self.recalls_heard = 0
        self.recalls_sent = 0
        self.turns = 0
        """How often this mount passed a lock on among its own processes first."""

    # -- session -----------------------------------------------------------------------------------------------------

    def begin(self, session: Session) -> None:
        """Locks belong to `session` from now on; nothing is held. No await."""
        self.end()
        self._session = session

    def end(self) -> None:
        """The session has been lost or closes: nothing is held any more, who waits gets SessionLost. No await."""
        self._session = None
        boards, self._boards = self._boards, {}
        self._resting.clear()
        for board in boards.values():
            board.end()
        self._ended = [board for board in (*self._ended, *boards.values()) if board.is_watching]

    async def close(self) -> None:
        """`end`, and close the watches that are open."""
        self.end()
        while self._ended:
            await self._ended.pop().rest()

    async def serve(self) -> None:
        """Give back what others ask for, until cancelled. Without it, or while the inbox is not heard, this mount
        decides nothing alone. Runs beside the session's keepalive."""
        while self._ended:
            await self._ended.pop().rest()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def recalled(self, wanted: tuple[int, ...], what: bytes) -> None:
        """See `inbox.Listener`."""
        if len(wanted) == 2:
            self.recalls_heard += 1
            ino, kind = wanted[0], LockKind(wanted[1])
            self._pauses.begin(_place_number(ino, kind))
            self._start_telling((ino, kind))

    def deaf(self) -> None:
        """See `inbox.Listener`."""
        for place in list(self._boards):
            self._start_telling(place)

    def statistics(self) -> dict[str, float]:
        """Counters for `status`."""
        return {
            "inodes": len(self._boards),
            "waiting": sum(waiter.sleeps for board in self._boards.values() for waiter in board.waiters),
            "decided_alone": sum(board.alone for board in self._boards.values()),
            "recalls_heard": self.recalls_heard,
            "recalls_sent": self.recalls_sent,
            "turns": self.turns,
        }

    # -- calls -------------------------------------------------------------------------------------------------------

    async def acquire(
        self, ino: int, kind: LockKind, owner: int, start: int, end: int, type_: LockType, pid: int, *, wait: bool
    ) -> None:
        """Lock bytes [start, end] (inclusive) for `owner`. Replaces what the owner held in the range.

        One request if nobody else holds or awaits a lock there, or this mount knows how things stand; none if this
        mount decides alone, the owner holds it already, or another owner of this mount forbids it. With `wait` there
        is no deadline.
        Raises LockConflict (not `wait`), LockDeadlock (`wait`, POSIX), TooManyLocks, InvalidArgument.

        Cancelled, it has left the queue and holds nothing new: what it may have got is given back, which takes up to
        ten seconds if the store does not answer. As in Linux a flock lock to be converted is given up first, so it is
        lost if the new one can't be had.
        """
        self._check_range(start, end)
        session = self._require_session()
        if self._acquiring >= ACQUIRING_MAX:
            raise TooManyLocks(f"more than {ACQUIRING_MAX} lock requests of one mount at once")
        async with self._board(session, ino, kind) as board:
            self._acquiring += 1
            board.acquiring[owner] += 1
            wanted = Lock(session.number, owner, start, end, type_, pid)
            try:
                await board.acquire(wanted, wait=wait, deadlocked=lambda waiter: self._deadlocked(board, waiter))
            except BaseException:
                await board.clean_up()
                raise
            finally:
                self._acquiring -= 1
                board.acquiring[owner] -= 1
                if not board.acquiring[owner]:
                    del board.acquiring[owner]

    async def release(self, ino: int, kind: LockKind, owner: int, start: int = 0, end: int = RANGE_END) -> None:
        """Give back what the owner holds in the range. One request; none if this mount decides alone, or the owner
        holds nothing there.

        Raises TooManyLocks (a range that would be split; nothing changed), InvalidArgument. After any other error, or
        cancelled, the owner holds nothing here, and the store is told by the next call on this inode or by `mend`.
        """
        self._check_range(start, end)
        known = self._boards.get((ino, kind))
        if self._session is None or known is None:
            return
        async with self._board(self._session, ino, kind) as board:
            try:
                await board.release(owner, start, end)
            except BaseException:
                await board.clean_up()
                raise

    def holds(self, ino: int, kind: LockKind, owner: int) -> bool:
        """Whether this mount holds, or is acquiring, a lock for that owner. No request."""
        board = self._boards.get((ino, kind))
        return board is not None and (owner in board.acquiring or any(lock.owner == owner for lock in board.held))

    async def test(self, ino: int, kind: LockKind, owner: int, start: int, end: int, type_: LockType) -> Lock | None:
        """The first lock in the file, of any mount, that would stand in the way, or None (F_GETLK).

        One request, none if this mount decides alone; a mount that does so elsewhere is asked first. Raises
        InvalidArgument, CorruptRecord.
        """
        self._check_range(start, end)
        session = self._require_session()
        async with self._board(session, ino, kind) as board:
            standing = await board.test(Lock(session.number, owner, start, end, type_, 0))
            return min(standing, key=lambda lock: lock.start, default=None)

    async def mend(self) -> None:
        """Take back what calls that failed have left in the store, and forget where nobody has waited since the last
        call but one. No request if there is nothing; worth calling now and then. Errors are logged, and the rest is
        left for the next time."""
        session = self._session
        if session is None:
            return
        for ino, kind in [place for place, board in self._boards.items() if not board.settled]:
            async with self._board(session, ino, kind) as board:
                await board.clean_up()
        for place in [place for place, since in self._resting.items() if since < self._mended]:
            await self._forget(place)
        self._mended += 1

    # -- parts -------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _board(self, session: Session, ino: int, kind: LockKind) -> AsyncIterator[Board]:
        """The inode's board for as long as somebody uses it or it has something to remember."""
        place = (ino, kind)
        board = self._boards.get(place)
        if board is None:
            places = Places(self._keys, ino, kind, session.number)
            ledger = Ledger(self._store, session, places, self._options.operation_deadline_s)
            board = self._boards[place] = Board(ledger, kind, self._powers)
        self._resting.pop(place, None)
        board.users += 1
        try:
            yield board
        finally:
            board.users -= 1
            if self._boards.get(place) is not board:
                await board.rest()
            elif board.idle:
                await self._rest(place, board)

    async def _rest(self, place: tuple[int, LockKind], board: Board) -> None:
        if not board.alone and not board.is_watching:
            del self._boards[place]
            return
        self._resting[place] = self._mended
        if len(self._resting) > KEPT_MAX:
            oldest = next(iter(self._resting))
            self._start_telling(oldest)
            await self._forget(oldest)
            self._resting.pop(oldest, None)

    async def _forget(self, place: tuple[int, LockKind]) -> None:
        """Close the watch of an inode that rests, and remember no more of it than must be."""
        board = self._boards.get(place)
        if board is None:
            return
        await board.rest()
        if not board.alone and board.idle and self._boards.get(place) is board:
            del self._boards[place]
            self._resting.pop(place, None)

    # -- deciding alone ----------------------------------------------------------------------------------------------

    def _may_decide_alone(self, ino: int, kind: LockKind) -> bool:
        return self._is_heard() and self._pauses.is_over(_place_number(ino, kind))

    def _is_heard(self) -> bool:
        """Whether this mount hears who wants what it decides alone, and would tell."""
        session = self._session
        return session is not None and self._nursery is not None and self._inbox.hearing and session.proven

    def _turn_begins(self, ino: int, kind: LockKind) -> float:
        if not self._is_heard() or SLICE_S <= 0:
            return 0.0
        self.turns += 1
        self._start_telling((ino, kind))
        return trio.current_time() + SLICE_S

    def _has_asked(self, ino: int, kind: LockKind) -> None:
        self.recalls_sent += 1
        self._pauses.begin(_place_number(ino, kind))

    def _start_telling(self, place: tuple[int, LockKind]) -> None:
        """What this mount decides alone there, or is about to, it tells."""
        if self._nursery is not None and place in self._boards and place not in self._telling:
            self._telling.add(place)
            self._nursery.start_soon(self._tell, place)

    async def _tell(self, place: tuple[int, LockKind]) -> None:
        try:
            while self._session is not None and self._session.alive and place in self._boards:
                async with self._board(self._session, *place) as board:
                    try:
                        await board.tell()
                        return
                    except SessionLost:
                        return
                    except MetadataError as exc:
                        log.info("the locks of inode %d are still to be told: %s", place[0], exc)
                await trio.sleep(RETRY_S)
        finally:
            self._telling.discard(place)

    # -- small parts -------------------------------------------------------------------------------------------------

    def _new_ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    def _deadlocked(self, board: Board, waiter: Waiter) -> bool:
        if board.kind is not LockKind.POSIX:
            return False
        boards = [each for each in self._boards.values() if each.kind is LockKind.POSIX and each.waiters]
        return closes_a_circle(board, waiter, boards)

    def _require_session(self) -> Session:
        if self._session is None or not self._session.alive:
            raise SessionLost("the mount has lost its session and is opening a new one")
        return self._session

    @staticmethod
    def _check_range(start: int, end: int) -> None:
        if not 0 <= start <= end <= RANGE_END:
            raise InvalidArgument(f"bytes {start} to {end} are no range")


def _place_number(ino: int, kind: LockKind) -> int:
    return ino << 1 | kind
