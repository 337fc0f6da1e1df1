"""Advisory locks over all mounts: flock(2) and fcntl(2) ranges.

Locks are keys under the session's lease, so a mount that dies frees its locks, and every change of them is a
transaction of the session, so a mount that has lost its session gets none. Who must wait puts a key into the store's
queue and sleeps until a watch says that its turn has come; nothing is polled. Requests are served in order of arrival
over all mounts: one that conflicts with an earlier one that waits, waits behind it, also if the lock is free. Only
requests that wait for a lock of the same owner on that inode are passed over. (So owners that lock several inodes in
different orders can wait for each other over a request in the queue, where Linux has no queue and lets readers pass.)

What is remembered here: the inodes on which this mount holds or awaits locks (`lock_board.py` has the rules).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from apollofs.metadata.errors import InvalidArgument, SessionLost, TooManyLocks
from apollofs.metadata.keys import Keys
from apollofs.metadata.lock_board import Board
from apollofs.metadata.lock_deadlock import closes_a_circle
from apollofs.metadata.lock_picture import Places, all_held
from apollofs.metadata.lock_queue import Waiter
from apollofs.metadata.lock_ranges import conflict
from apollofs.metadata.lock_records import RANGE_END, Lock, LockKind, LockType
from apollofs.metadata.session import Session, SessionOptions, retry
from apollofs.metadata.store import Range, Store

__all__ = ["RANGE_END", "Lock", "LockKind", "LockManager", "LockType"]

ACQUIRING_MAX = 4096
"""Requests of one mount that may be under way or wait at once."""


class LockManager:
    """One mount's locks. All calls raise SessionLost, StoreError, DeadlineExceeded besides what is named."""

    def __init__(self, store: Store, keys: Keys, options: SessionOptions) -> None:
        self._store = store
        self._keys = keys
        self._options = options
        self._session: Session | None = None
        self._boards: dict[tuple[int, LockKind], Board] = {}
        self._tickets = 0
        self._acquiring = 0

    # -- session -----------------------------------------------------------------------------------------------------

    def begin(self, session: Session) -> None:
        """Locks belong to `session` from now on; nothing is held. No await."""
        self.end()
        self._session = session

    def end(self) -> None:
        """The session has been lost or closes: nothing is held any more, who waits gets SessionLost. No await."""
        self._session = None
        boards, self._boards = self._boards, {}
        for board in boards.values():
            board.end()

    # -- calls -------------------------------------------------------------------------------------------------------

    async def acquire(
        self, ino: int, kind: LockKind, owner: int, start: int, end: int, type_: LockType, pid: int, *, wait: bool
    ) -> None:
        """Lock bytes [start, end] (inclusive) for `owner`. Replaces what the owner held in the range.

        One request if nobody else holds or awaits a lock there, or this mount knows how things stand; none if the
        owner holds it already, or another owner of this mount forbids it. With `wait` there is no deadline.
        Raises LockConflict (not `wait`), LockDeadlock (`wait`, POSIX), TooManyLocks, InvalidArgument.

        Cancelled, it has left the queue and holds nothing new: what it may have got is given back, which takes up to
        ten seconds if the store does not answer. As in Linux a flock lock to be converted is given up first, so it is
        lost if the new one can't be had.
        """
        self._check_range(start, end)
        session = self._require_session()
        if self._acquiring >= ACQUIRING_MAX:
            raise TooManyLocks(f"more than {ACQUIRING_MAX} lock requests of one mount at once")
        with self._board(session, ino, kind) as board:
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
        """Give back what the owner holds in the range. One request; none if it holds nothing there.

        Raises TooManyLocks (a range that would be split; nothing changed), InvalidArgument. After any other error, or
        cancelled, the owner holds nothing here, and the store is told by the next call on this inode or by `mend`.
        """
        self._check_range(start, end)
        known = self._boards.get((ino, kind))
        if self._session is None or known is None:
            return
        with self._board(self._session, ino, kind) as board:
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
        """The first lock in the file, of any mount, that would stand in the way, or None (F_GETLK). One request.

        Raises InvalidArgument, CorruptRecord.
        """
        self._check_range(start, end)
        session = self._require_session()
        places = Places(self._keys, ino, kind, session.number)
        found = await retry(
            lambda: self._store.range(Range(places.all, places.end)), self._options.operation_deadline_s
        )
        wanted = Lock(session.number, owner, start, end, type_, 0)
        standing = (lock for lock in all_held(places, found.kvs) if conflict(lock, wanted))
        return min(standing, key=lambda lock: lock.start, default=None)

    async def mend(self) -> None:
        """Take back what calls that failed have left in the store. No request if there is nothing; worth calling now
        and then. Errors are logged, and the rest is left for the next time."""
        session = self._session
        if session is None:
            return
        for ino, kind in [place for place, board in self._boards.items() if not board.settled]:
            with self._board(session, ino, kind) as board:
                await board.clean_up()

    # -- parts -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _board(self, session: Session, ino: int, kind: LockKind) -> Iterator[Board]:
        """The inode's board for as long as somebody uses it or it has something to remember."""
        key = (ino, kind)
        board = self._boards.get(key)
        if board is None:
            board = Board(self._store, self._keys, self._options, session, ino, kind, self._new_ticket)
            self._boards[key] = board
        board.users += 1
        try:
            yield board
        finally:
            board.users -= 1
            if board.idle and self._boards.get(key) is board:
                del self._boards[key]

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
