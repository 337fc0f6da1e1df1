"""A mount that decides an inode's locks alone is asked to tell who holds and who waits there, and does."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import trio

from apollofs.metadata.errors import DeadlineExceeded
from apollofs.metadata.lock_ledger import Ledger
from apollofs.metadata.lock_picture import Keeper
from apollofs.metadata.lock_queue import Waiter
from apollofs.metadata.lock_records import Lock, encode_waiting
from apollofs.metadata.lock_watch import LockWatch
from apollofs.metadata.session import Committed, Conflict
from apollofs.metadata.store import Compare, Delete, Op, Put, Relation, Target

PLACED_IN_TRANSACTION = 50


def compare_keeper(keeper: Keeper) -> Compare:
    """That it still decides alone: meanwhile it does not write its key."""
    return Compare(keeper.key, Target.MOD, Relation.EQUAL, keeper.revision)


def notice(ledger: Ledger, session: int) -> bytes:
    """The key, in a session's inbox, that asks it to tell."""
    return ledger.places.recall(session)


async def ask_to_tell(ledger: Ledger, *, wait: bool = True) -> None:
    """Put a notice to the keeper in the picture; with `wait` return when it, and the picture, says more.

    Its session's end answers too, so the wait is no longer than a lease. Raises DeadlineExceeded if it is.
    """
    keeper = ledger.picture.keeper
    while keeper is not None:
        put = Put(notice(ledger, keeper.session), b"", ledger.session.lease_id)
        outcome = await ledger.commit((compare_keeper(keeper),), (put,))
        if isinstance(outcome, Conflict):
            return  # it has told before, and the picture knows
        if not wait:
            return
        await _until_told(ledger, keeper)
        keeper = ledger.picture.keeper


async def _until_told(ledger: Ledger, keeper: Keeper) -> None:
    watch = LockWatch(ledger)
    try:
        with trio.move_on_after(ledger.deadline_s) as waiting:
            while ledger.picture.keeper == keeper:
                await watch.changed()
    finally:
        await watch.close()
    if waiting.cancelled_caught:
        raise DeadlineExceeded("another mount has not told who holds the lock (nothing was changed)")


async def tell(ledger: Ledger, held: tuple[Lock, ...], waiters: Sequence[Waiter], waiting: Collection[Waiter]) -> bool:
    """Say in the store what is held and that `waiters`, which are not there yet, wait; then others decide too.

    One transaction, more only if very many wait: the last one ends it. `waiting` is looked at again after each, as some
    may have left. False: it was refused, as something was in doubt.
    """
    while len(waiters) > PLACED_IN_TRANSACTION:
        if not await _place(ledger, waiters[:PLACED_IN_TRANSACTION], waiting):
            return False
        waiters = waiters[PLACED_IN_TRANSACTION:]
    return await _place(ledger, waiters, waiting, last=held)


async def _place(
    ledger: Ledger, waiters: Sequence[Waiter], waiting: Collection[Waiter], last: tuple[Lock, ...] | None = None
) -> bool:
    """Put requests into the store, and with `last` say that this is held. Whether it was applied."""
    lease = ledger.session.lease_id
    puts: list[Op] = [Put(each.key, encode_waiting(each.lock, each.arrival), lease) for each in waiters]
    ledger.strays.difference_update(each.key for each in waiters)
    done = False
    try:
        if last is None:
            done = isinstance(await ledger.commit((), puts), Committed)
        else:
            own_notice = Delete(notice(ledger, ledger.session.number))
            done = await ledger.mend(last, (*puts, own_notice), tell=True)
    finally:
        for waiter in waiters:
            if waiter not in waiting:
                ledger.strays.add(waiter.key)
            elif done:
                waiter.placed = True
                ledger.placed.add(waiter.key)
    return done
