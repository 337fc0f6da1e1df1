"""Lock managers for tests: several mounts of one volume, without the rest of a mount."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio
import trio.testing

from apollofs.metadata.counting import CountingStore
from apollofs.metadata.format import format_volume
from apollofs.metadata.inbox import Inbox
from apollofs.metadata.keys import Keys
from apollofs.metadata.lock_picture import Waiting
from apollofs.metadata.lock_queue import has_lock
from apollofs.metadata.lock_ranges import add
from apollofs.metadata.lock_records import Arrival, decode_held, decode_waiting
from apollofs.metadata.locks import RANGE_END, Lock, LockKind, LockManager, LockType
from apollofs.metadata.session import Session, SessionOptions
from apollofs.metadata.session_opening import open_session
from apollofs.metadata.store import Range, Store, prefix_end
from tests.support.volumes import SITE, mount_record

INO = 77
BOUND_S = 60
OPTIONS = SessionOptions(lease_ttl_s=600, operation_deadline_s=10, slots=8)
SHARED, EXCLUSIVE = LockType.SHARED, LockType.EXCLUSIVE
POSIX, FLOCK = LockKind.POSIX, LockKind.FLOCK


@dataclass
class LockMount:
    """One mount's locks, with shorter calls: whole file of inode INO unless told otherwise. An owner is its pid."""

    store: CountingStore
    keys: Keys
    session: Session
    locks: LockManager
    inbox: Inbox

    async def acquire(
        self,
        owner: int,
        type_: LockType = EXCLUSIVE,
        start: int = 0,
        end: int = RANGE_END,
        *,
        wait: bool = True,
        ino: int = INO,
        kind: LockKind = POSIX,
    ) -> None:
        await self.locks.acquire(ino, kind, owner, start, end, type_, owner, wait=wait)

    async def release(
        self, owner: int, start: int = 0, end: int = RANGE_END, *, ino: int = INO, kind: LockKind = POSIX
    ) -> None:
        await self.locks.release(ino, kind, owner, start, end)

    @property
    def in_use(self) -> set[tuple[int, LockKind]]:
        """Where it holds or wants something, or has something to mend."""
        return {place for place, board in self.locks._boards.items() if not board.idle}

    @property
    def alone(self) -> set[tuple[int, LockKind]]:
        """Where it decides alone."""
        return {place for place, board in self.locks._boards.items() if board.alone}

    def sleeps(self, ino: int = INO, kind: LockKind = POSIX) -> bool:
        """Whether a request of this mount sleeps there: only then has it been found to close no circle. (The store's
        queue has it before.)"""
        board = self.locks._boards.get((ino, kind))
        return board is not None and any(waiter.sleeps for waiter in board.waiters)

    async def hear(self, nursery: trio.Nursery) -> None:
        """From now on, as long as `nursery` lives, recalls reach it: it may decide alone."""
        nursery.start_soon(self.locks.serve)
        nursery.start_soon(self.inbox.serve, self.session)
        while not self.inbox.hearing:
            await trio.testing.wait_all_tasks_blocked()
        self.store.reset()

    async def lose_session(self) -> None:
        """The lease ends, and the mount comes to know."""
        self.inbox.hearing = False
        await self.session.close()
        await self.locks.close()


async def make_lock_volume(store: Store, volume: str) -> None:
    await format_volume(
        store, volume, site_name=SITE, site_store=(("kind", "memory"),), inline_bytes_max=4096, block_bytes=1 << 16
    )


async def lock_mount(store: Store, volume: str, options: SessionOptions = OPTIONS) -> LockMount:
    """One more mount. Its session is not kept alive: the lease is long."""
    keys = Keys(volume)
    counting = CountingStore(store)
    session = await open_session(counting, keys, options, mount_record(), 1)
    inbox = Inbox(counting, keys)
    locks = LockManager(counting, keys, options, inbox)
    locks.begin(session)
    counting.reset()
    return LockMount(counting, keys, session, locks, inbox)


@contextlib.asynccontextmanager
async def lock_mounts(store: Store, volume: str, count: int) -> AsyncIterator[list[LockMount]]:
    """A fresh volume with that many mounts; their sessions end with the context."""
    await make_lock_volume(store, volume)
    mounts = [await lock_mount(store, volume) for _ in range(count)]
    try:
        yield mounts
    finally:
        for mount in mounts:
            await mount.lose_session()


async def in_store(
    store: Store, keys: Keys, ino: int = INO, kind: LockKind = POSIX
) -> tuple[list[Lock], list[Lock], int]:
    """What the store says is held, by position too, what waits (oldest first), and how many keys that takes.

    Of what a mount decides alone the store says nothing."""
    prefix = keys.locks_of(ino, kind)
    found = await store.range(Range(prefix, prefix_end(prefix)))
    held: tuple[Lock, ...] = ()
    requests: list[Waiting] = []
    alone = False
    for kv in found.kvs:
        if kv.key.startswith(prefix + b"h/"):
            holding = decode_held(kv.value)
            held += holding.locks
            alone = alone or holding.sole
        else:
            lock, arrival = decode_waiting(kv.value)
            requests.append(Waiting(arrival or Arrival(kv.create_revision), lock))
    requests.sort(key=lambda each: each.arrival)
    holders, waiting = held, []
    for request in requests:
        if not alone and has_lock(request, holders, requests):
            theirs = [lock for lock in held if lock.session == request.lock.session]
            held = (*(lock for lock in held if lock.session != request.lock.session), *add(theirs, request.lock))
        else:
            waiting.append(request.lock)
    return list(held), waiting, len(found.kvs)


async def until_waiting(store: Store, keys: Keys, count: int, ino: int = INO, kind: LockKind = POSIX) -> None:
    """Return when that many requests wait in the store's queue."""
    while len((await in_store(store, keys, ino, kind))[1]) != count:
        await trio.testing.wait_all_tasks_blocked(0.001)
