"""The collector asks every live mount which inodes it still uses, and waits for the answers; `use_answers.py` answers.

One question is one key that all mounts read, a notice in each mount's inbox, and one answer from each. A mount whose
session ends needs no answer any more.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import trio

from apollofs.metadata import codec
from apollofs.metadata.errors import MetadataError
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import MountRecord
from apollofs.metadata.returns import NOTED
from apollofs.metadata.session import Session, retry
from apollofs.metadata.store import NOW, Delete, Event, Op, Put, Range, Store, WatchBatch, prefix_end

NOTICES_IN_TRANSACTION = 100
READ_S = 30.0


@dataclass(slots=True)
class Uses:
    """What the mounts have said."""

    oldest: dict[int, int] = field(default_factory=dict)
    """Inode -> the oldest body_version of it that some mount may still read."""
    users: dict[int, MountRecord] = field(default_factory=dict)
    """Inode -> a mount that uses it."""
    blobs: set[int] = field(default_factory=set)
    """Blobs to which mounts are about to refer."""
    silent: list[MountRecord] = field(default_factory=list)
    """Mounts that live and have not answered in time."""

    def add(self, mount: MountRecord, used: Sequence[int], blobs: Sequence[int]) -> None:
        self.blobs.update(blobs)
        for ino, version in zip(used[::2], used[1::2], strict=True):
            if version <= self.oldest.get(ino, version):
                self.oldest[ino], self.users[ino] = version, mount


class UseQuestions:
    """Asks in the collector's session; `wait_s` bounds the wait for one question's answers."""

    def __init__(self, store: Store, keys: Keys, session: Session, wait_s: float) -> None:
        self._store = store
        self._keys = keys
        self._session = session
        self._wait_s = wait_s
        self._batch = 0

    async def forget_earlier(self) -> None:
        """Delete the answers that an earlier collector has left."""
        everything = Delete(self._keys.answers, prefix_end(self._keys.answers))
        await self._session.commit((), (everything,), NOTED, time_ns=time.time_ns())

    async def ask(self, inos: Sequence[int]) -> Uses:
        """Who uses which of these inodes, as of some moment after the call. Raises SessionLost, DeadlineExceeded,
        StoreError. Cancelled, it leaves keys that go with the session, or with the next collector."""
        self._batch += 1
        prefix = self._keys.answers_to(self._session.number, self._batch)
        async with AsyncExitStack() as stack:
            answers = await self._watch(stack, prefix)
            ends = await self._watch(stack, self._keys.mounts)
            mounts = await self._mounts()
            await self._announce(inos, mounts)
            # a mount that has ended since needs no answer
            poll = _Poll(self._keys, {mount.session: mount for mount in await self._mounts() if mount in mounts})
            with trio.move_on_after(self._wait_s):
                await poll.run(answers, ends)
        await self._take_away(mounts)
        return poll.uses

    async def _watch(self, stack: AsyncExitStack, prefix: bytes) -> AsyncIterator[WatchBatch]:
        """Every change below the prefix from now on, until the stack ends."""
        watching = self._store.watch(prefix, prefix_end(prefix), start_revision=NOW)
        batches = await stack.enter_async_context(watching)
        await anext(batches)
        return batches

    async def _mounts(self) -> list[MountRecord]:
        keys = self._keys
        found = await retry(lambda: self._store.range(Range(keys.mounts, prefix_end(keys.mounts))), READ_S)
        records = [codec.decode_mount(kv.value) for kv in found.kvs]
        return [record for record in records if record.serves_files]

    async def _announce(self, inos: Sequence[int], mounts: Sequence[MountRecord]) -> None:
        """The question first: who is told of it must find it."""
        keys, lease = self._keys, self._session.lease_id
        me = self._session.number
        await self._commit([Put(keys.question(me, self._batch), codec.encode_fields(inos), lease)])
        await self._commit(
            [Put(keys.collection_notice(mount.session, me, self._batch), b"", lease) for mount in mounts]
        )

    async def _take_away(self, mounts: Sequence[MountRecord]) -> None:
        """The question goes with its answers, in one transaction: none comes after that."""
        keys, me = self._keys, self._session.number
        answers = keys.answers_to(me, self._batch)
        await self._commit([Delete(keys.question(me, self._batch)), Delete(answers, prefix_end(answers))])
        await self._commit([Delete(keys.collection_notice(mount.session, me, self._batch)) for mount in mounts])

    async def _commit(self, writes: Sequence[Op]) -> None:
        for at in range(0, len(writes), NOTICES_IN_TRANSACTION):
            part = writes[at : at + NOTICES_IN_TRANSACTION]
            await self._session.commit((), part, NOTED, time_ns=time.time_ns())


class _Poll:
    """The mounts that have not answered yet, and what the others have said."""

    def __init__(self, keys: Keys, asked: dict[int, MountRecord]) -> None:
        self._keys = keys
        self._asked = asked
        self._waiting = set(asked)
        self._done = trio.Event()
        self._errors: list[MetadataError] = []
        self.uses = Uses()

    async def run(self, answers: AsyncIterator[WatchBatch], ends: AsyncIterator[WatchBatch]) -> None:
        """Until all have answered or ended. Cancelled, who is left is silent. Raises StoreError."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, answers, self._answered)
                nursery.start_soon(self._follow, ends, self._ended)
                if self._waiting:
                    await self._done.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.uses.silent = [self._asked[session] for session in sorted(self._waiting)]
        if self._errors:
            raise self._errors[0]

    async def _follow(self, batches: AsyncIterator[WatchBatch], tell: Callable[[Event], None]) -> None:
        try:
            async for batch in batches:
                for event in batch.events:
                    tell(event)
        except MetadataError as exc:
            self._errors.append(exc)
            self._done.set()

    def _answered(self, event: Event) -> None:
        session = self._keys.parse_numbers(event.kv.key)[2]
        if not event.deleted and session in self._waiting:
            self.uses.add(self._asked[session], *codec.decode_fields(event.kv.value))
            self._leave(session)

    def _ended(self, event: Event) -> None:
        if event.deleted:
            self._leave(self._keys.parse_session(event.kv.key))

    def _leave(self, session: int) -> None:
        self._waiting.discard(session)
        if not self._waiting:
            self._done.set()
