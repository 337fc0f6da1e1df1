"""Whether a request that waits would wait for ever: fcntl(2)'s EDEADLK, as far as one mount can see."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from apollofs.metadata.lock_board import Board
from apollofs.metadata.lock_queue import Waiter
from apollofs.metadata.lock_ranges import same_owner
from apollofs.metadata.lock_records import Lock


def closes_a_circle(board: Board, waiter: Waiter, boards: Collection[Board]) -> bool:
    """Whether an owner that `waiter` waits for waits, directly or through others, for the owner of `waiter`.

    `boards` are all of this mount's with POSIX locks, `board` among them, and its picture is new. Seen are circles of
    owners of this mount over any inodes, and of owners of any mounts on this inode; what this mount knows of other
    mounts' locks on other inodes may be out of date, and EDEADLK must be true.
    """
    seen: set[tuple[int, int]] = set()
    pending = list(board.blockers(waiter.lock, waiter.arrival))
    while pending:
        lock = pending.pop()
        if same_owner(lock, waiter.lock):
            return True
        if (lock.session, lock.owner) not in seen:
            seen.add((lock.session, lock.owner))
            pending += _awaited_by(lock, board, boards)
    return False


def _awaited_by(owner: Lock, board: Board, boards: Collection[Board]) -> Iterator[Lock]:
    """The locks and requests that the owner of a lock waits for."""
    for waiting in board.waiting_elsewhere:
        if same_owner(waiting.lock, owner):
            yield from board.blockers(waiting.lock, waiting.arrival)
    for each in boards:
        for other in each.waiters:
            if same_owner(other.lock, owner):
                found = each.blockers(other.lock, other.arrival)
                yield from (lock for lock in found if each is board or lock.session == owner.session)
