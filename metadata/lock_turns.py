"""Turns on one inode's locks: a mount that gives back what excluded everybody keeps it for others of its own that wait.

If each of them had to be reached in the order of arrival over all mounts, a lock for which several processes of several
mounts wait would change mounts with every unlock, for a transaction and an event of a watch each time, and the
directory with the files that it protects would change mounts as often.

Rules
1. A turn is deciding alone (rule 5 of `lock_board.py`) that begins with the end of a lock of this mount's that excludes
   everybody: the transaction that would have given it back says that this mount decides alone. So nobody else has
   anything at that moment, and nothing need be compared.
2. It lasts SLICE_S, longer where the store is far away (`slice_until`), whoever waits; it ends sooner when nobody here
   holds or wants anything and others wait. Its end is told as ever.
3. Who still waits here then comes behind all others that wait, and the end of a lock that is held then begins no turn:
   nobody waits longer than one turn of each mount.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from apollofs.metadata.lock_ledger import Ledger
from apollofs.metadata.lock_queue import Waiter
from apollofs.metadata.lock_records import RANGE_END, Arrival, Lock, LockType

SLICE_S = 0.05
"""How long a mount passes a lock on among its own processes while others wait, at least:"""
TRANSACTIONS_IN_SLICE = 10
"""so many times as long as the transaction took that began it,"""
SLICE_S_MAX = 0.2
"""but not longer than this."""


def slice_until(began: float) -> float:
    """Until when, by trio's clock, a turn lasts at least whose transaction was sent at `began` and is back now."""
    now = trio.current_time()
    return now + min(TRANSACTIONS_IN_SLICE * (now - began), SLICE_S_MAX)


def excludes_everybody(held: Iterable[Lock]) -> bool:
    """Whether each of these locks leaves nobody else anything to lock."""
    return all(lock.type is LockType.EXCLUSIVE and lock.start == 0 and lock.end == RANGE_END for lock in held)


async def step_behind(ledger: Ledger, waiters: Iterable[Waiter], new_ticket: Callable[[], int]) -> None:
    """The turn is over: these requests, which are not in the store, come behind all that are. One request."""
    await ledger.read()
    for waiter in sorted(waiters, key=lambda each: each.arrival):
        waiter.arrival = Arrival(ledger.picture.revision, new_ticket())
