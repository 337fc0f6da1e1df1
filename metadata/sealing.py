"""Sealing a tree, and unsealing it: many transactions, each of which may be the last before an interruption.

Begun again with the same directory, either goes on where it was. Sealing marks from the top down: a directory that is
marked takes no names and loses none, so what is listed in it is all that there will be. Unsealing asks those who trust
the seal, waits, and clears from the bottom up: what could be moved out of the tree has no number any more.

Memory: one page of names for each directory between the root and where the walk is.
"""

from __future__ import annotations

import math
import stat
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import trio

from apollofs.metadata import codec
from apollofs.metadata.errors import MetadataError, SealRefused
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.seal import Advance, BeginSeal, EndSeal, Mark, Release, Unmark, paths_of
from apollofs.metadata.records import MountRecord
from apollofs.metadata.returns import NOTED
from apollofs.metadata.seal_records import TERM_S_MAX, TERM_S_MIN, Phase, SealRecord, decode_seal
from apollofs.metadata.session import Session, retry
from apollofs.metadata.store import NOW, KeyValue, Op, Put, Range, Store, WatchBatch, prefix_end
from apollofs.metadata.volume import Volume
from apollofs.metadata.workers import share_out

READ_S = 30.0
PAGE_KEYS = 500
NAMES_IN_TRANSACTION = 20
"""A subdirectory takes four compares of its transaction."""
MARKS_AT_ONCE = 8
NOTICES_IN_TRANSACTION = 100
TERM_SPARE_S = 1


@dataclass(frozen=True, slots=True)
class Trusting:
    """A session that trusts a seal: of a mount, or (`mount` None) of one that has ended and did not say so."""

    session: int
    mount: MountRecord | None


@dataclass
class SealProgress:
    """How far it is."""

    phase: Phase = Phase.SEALING
    inodes: int = 0
    """Marked, or cleared, by this call."""
    waits_for: list[Trusting] = field(default_factory=list)
    """In phase ENDING: who has not answered; their trust ends with the term."""


Tell = Callable[[SealProgress], None]


@dataclass(slots=True)
class _Frame:
    """A directory on the way of the walk."""

    directory: int
    below: list[int] = field(default_factory=list)
    after: bytes = b""
    more: bool = True


async def read_seals(store: Store, keys: Keys) -> list[SealRecord]:
    """All standing seals, by number. One request. Raises DeadlineExceeded, StoreError."""
    found = await retry(lambda: store.range(Range(keys.seals, prefix_end(keys.seals))), READ_S)
    return [decode_seal(kv.value, kv.mod_revision) for kv in found.kvs]


async def trusting(store: Store, keys: Keys, number: int) -> list[Trusting]:
    """Who trusts a seal, or did and has not said that it is over. One request. DeadlineExceeded, StoreError."""
    trusts = keys.trusts_in(number)
    asked = (Range(trusts, prefix_end(trusts), keys_only=True), Range(keys.mounts, prefix_end(keys.mounts)))
    result = await retry(lambda: store.txn((), asked), READ_S)
    held, mounted = [found for found in result.ranges if found is not None]
    mounts = {record.session: record for record in map(_mount, mounted.kvs)}
    sessions = [keys.parse_numbers(kv.key)[1] for kv in held.kvs]
    return [Trusting(session, mounts.get(session)) for session in sessions]


class Sealing:
    """Works in the session of an open volume. Methods raise SessionLost, DeadlineExceeded, StoreError."""

    def __init__(self, store: Store, volume: Volume, tell: Tell = lambda _: None) -> None:
        self._store = store
        self._keys = Keys(volume.superblock.name)
        self._volume = volume
        self._tell = tell
        self.progress = SealProgress()

    async def seal(self, root: int, term_s: float) -> SealRecord:
        """Seal a directory and all below it. On return nobody changes it any more, and mounts trust the seal for
        `term_s` at a time. What is open for writing is as it was last committed; later commits fail.

        Raises SealRefused (another seal is in the way, a term out of bounds), NotADirectory, NoSuchEntry. After a
        refusal in the middle of it the tree is left half sealed: `unseal` undoes it. Cancelled, likewise.
        """
        if not TERM_S_MIN <= term_s <= TERM_S_MAX:
            raise SealRefused(f"a term of {term_s:g} s: from {TERM_S_MIN:g} s to {TERM_S_MAX / 86_400:g} days")
        record = await self._volume.transact(lambda scope: BeginSeal(scope, root, term_s))
        if record.phase is Phase.SEALED:
            return record
        self.progress = SealProgress(Phase.SEALING, 1)
        await self._walk(record, old=0, new=record.number)
        return await self._advance(record.number, (Phase.SEALING,), Phase.SEALED)

    async def unseal(self, number: int) -> None:
        """Take a seal away. On return the tree can be changed, and no mount answers from what was before.

        Waits until each mount that trusted the seal has answered, or the term has passed. SealRefused if there is no
        such seal.
        """
        standing = {each.number: each for each in await read_seals(self._store, self._keys)}
        record = standing.get(number)
        if record is None:
            raise SealRefused("it is not sealed")
        if record.phase is not Phase.OPENING:
            record = await self._advance(number, (Phase.SEALING, Phase.SEALED), Phase.ENDING)
            await self._until_released(record)
        self.progress = SealProgress(Phase.OPENING)
        self._tell(self.progress)
        await self._walk(record, old=number, new=0)
        await self._remove(number)

    async def _advance(self, number: int, since: tuple[Phase, ...], phase: Phase, lease: int = 0) -> SealRecord:
        return await self._volume.transact(lambda scope: Advance(scope, number, since, phase, lease))

    # -- the walk ----------------------------------------------------------------------------------------------------

    async def _walk(self, record: SealRecord, old: int, new: int) -> None:
        """Mark all below the root, which is marked first, or (`new` 0) cleared last, by `_remove`."""
        frames = [_Frame(record.root)]
        while frames:
            frame = frames[-1]
            if frame.below:
                frames.append(_Frame(frame.below.pop()))
            elif frame.more:
                await self._page(frame, old, new)
            else:
                frames.pop()
                if not new and frame.directory != record.root:
                    await self._unmark(frame.directory, old)

    async def _page(self, frame: _Frame, old: int, new: int) -> None:
        """The next names of a directory."""
        page = await self._volume.readdir(frame.directory, frame.after, PAGE_KEYS)
        frame.more = page.more
        names: list[bytes] = []
        for entry in page.entries:
            frame.after = entry.name
            is_dir = entry.file_type == stat.S_IFDIR
            if is_dir:
                frame.below.append(entry.ino)
            if (is_dir and not new) or (entry.inode is not None and entry.inode.seal == new):
                continue
            names.append(entry.name)
        await self._mark_all(frame.directory, names, old, new)
        if not new:
            frame.below = [ino for ino in frame.below if await self._has(ino, old)]

    async def _mark_all(self, directory: int, names: Sequence[bytes], old: int, new: int) -> None:
        """Mark, several transactions at a time; the first error ends the others, and is raised itself."""

        async def mark(at: int) -> None:
            await self._mark(directory, tuple(names[at : at + NAMES_IN_TRANSACTION]), old, new)

        starts = range(0, len(names), NAMES_IN_TRANSACTION)
        await share_out(mark, starts, MARKS_AT_ONCE, (MetadataError,))

    async def _mark(self, directory: int, names: tuple[bytes, ...], old: int, new: int) -> None:
        self._count(await self._volume.transact(lambda scope: Mark(scope, directory, names, old, new)))

    async def _unmark(self, directory: int, number: int) -> None:
        self._count(await self._volume.transact(lambda scope: Unmark(scope, directory, number)))

    async def _has(self, directory: int, number: int) -> bool:
        """Whether a directory still has the number: what is below one that was cleared was cleared before."""
        found = await retry(lambda: self._store.range(Range(self._keys.inode(directory))), READ_S)
        return any(codec.decode_inode(kv.value, kv.mod_revision).seal == number for kv in found.kvs)

    def _count(self, marked: int) -> None:
        self.progress.inodes += marked
        self._tell(self.progress)

    async def _remove(self, number: int) -> None:
        while not await self._try_remove(number):
            pass  # another seal was made or removed meanwhile

    async def _try_remove(self, number: int) -> bool:
        seals = self._keys.seals
        asked = (Range(self._keys.seal_counter), Range(seals, prefix_end(seals)))
        result = await retry(lambda: self._store.txn((), asked), READ_S)
        counted, standing = [found for found in result.ranges if found is not None]
        others = [decode_seal(kv.value, kv.mod_revision) for kv in standing.kvs]
        above = paths_of([record for record in others if record.number != number])
        as_of = counted.kvs[0].mod_revision if counted.kvs else 0
        return await self._volume.transact(lambda scope: EndSeal(scope, number, above, as_of))

    # -- those who trust it ------------------------------------------------------------------------------------------

    async def _until_released(self, record: SealRecord) -> None:
        """Ask who trusts the seal, and wait until nobody does, or the term is over."""
        if not record.has_term and await self._release(record.number):
            return
        if not record.has_term:
            lease = await retry(lambda: self._store.lease_grant(math.ceil(record.term_s) + TERM_SPARE_S), READ_S)
            await self._advance(record.number, (Phase.ENDING,), Phase.ENDING, lease.id)
        trusts, term = self._keys.trusts_in(record.number), self._keys.seal_term(record.number)
        session = self._volume.session
        async with AsyncExitStack() as stack:
            changes = [await self._watch(stack, trusts, prefix_end(trusts)), await self._watch(stack, term, b"")]
            with session.bound():
                await self._wait(session, record, changes)

    async def _release(self, number: int) -> bool:
        return await self._volume.transact(lambda scope: Release(scope, number)) is not None

    async def _watch(self, stack: AsyncExitStack, key: bytes, end: bytes) -> AsyncIterator[WatchBatch]:
        batches = await stack.enter_async_context(self._store.watch(key, end, start_revision=NOW))
        await anext(batches)
        return batches

    async def _wait(self, session: Session, record: SealRecord, changes: list[AsyncIterator[WatchBatch]]) -> None:
        """Look whenever something has changed: an answer is a key that goes. `changes` began before the first look."""
        asked: set[int] = set()
        send, receive = trio.open_memory_channel[MetadataError | None](1)
        async with trio.open_nursery() as nursery:
            for batches in changes:
                nursery.start_soon(_pass_on, batches, send)
            while not await self._release(record.number):
                self.progress = SealProgress(Phase.ENDING, 0, await trusting(self._store, self._keys, record.number))
                await self._notify(session, record.number, asked)
                self._tell(self.progress)
                failed = await receive.receive()
                if failed is not None:
                    raise failed
            nursery.cancel_scope.cancel()

    async def _notify(self, session: Session, number: int, asked: set[int]) -> None:
        """A notice to each that lives and was not asked yet; who begins a new session later looks by itself."""
        new = [one.session for one in self.progress.waits_for if one.mount is not None and one.session not in asked]
        asked.update(new)
        puts: list[Op] = [Put(self._keys.seal_notice(each, number), b"", session.lease_id) for each in new]
        for at in range(0, len(puts), NOTICES_IN_TRANSACTION):
            part = puts[at : at + NOTICES_IN_TRANSACTION]
            await session.commit((), part, NOTED, time_ns=time.time_ns())


async def _pass_on(batches: AsyncIterator[WatchBatch], send: trio.MemorySendChannel[MetadataError | None]) -> None:
    """Tell that something has changed, or that this can't be told any more."""
    try:
        async for _ in batches:
            await send.send(None)
    except MetadataError as exc:
        await send.send(exc)


def _mount(kv: KeyValue) -> MountRecord:
    return codec.decode_mount(kv.value)
