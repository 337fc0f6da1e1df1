"""The collector's metadata: tombstones past their grace, what they own, and who refers to it. Blobs are only numbers
here; `fs/collector.py` removes their objects.

Rules
1. One collector works on a volume: who holds the key `C` under its lease. Its transactions are fenced like a mount's.
2. What an unlinked inode owned can be restored until its tombstone is *condemned*; nothing is removed before that. From
   then on every verdict here stays true for ever, so that a collector which was stopped in the middle, or has lost its
   session without knowing, does no harm when it goes on.
3. A blob is garbage when no mount uses what the tombstone says was dropped (`use_questions.py`), and no other inode
   refers to it. A blob without any key `r/<blob>/...` belongs to the tombstone's inode alone. In a shared one each
   inode that refers to it has a key; that of the tombstone's inode counts as dropped unless it was put after the
   tombstone: then the inode refers to the blob again, or a later tombstone speaks of it. Where one transaction did
   both, the inode itself is looked at.
4. Objects first, at every site that `b/` names too (`replicas.py`), then the keys `r/` and `b/`, then the tombstone
   with all keys of a dead inode, in one transaction. Done again after an interruption at any place, each step finds
   itself done.
5. Two inodes that drop one blob at the same time can't each take the other for the one that is left: the transaction
   that removes a key `r/` compares that the one it relies on is still there.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import trio

from apollofs.metadata import codec
from apollofs.metadata.codec import Tombstone
from apollofs.metadata.election import Election
from apollofs.metadata.errors import CollectorBusy
from apollofs.metadata.format import read_superblock
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import Extent, MountRecord
from apollofs.metadata.replicas import Replicas
from apollofs.metadata.returns import NOTED
from apollofs.metadata.session import Committed, Session, SessionOptions, retry
from apollofs.metadata.session_opening import open_session
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
from apollofs.metadata.tree import Tree
from apollofs.metadata.use_questions import UseQuestions

T = TypeVar("T")
READ_S = 30.0
READS_IN_TRANSACTION = 100
OPS_IN_TRANSACTION = 100
STONES_IN_PAGE = 500
MAX_NS = (1 << 64) - 1
SLOTS = 4


@dataclass(frozen=True, slots=True)
class Stone:
    """A tombstone and its key, as of when it was read."""

    key: bytes
    time_ns: int
    ino: int
    body_version: int
    """The version that the inode would have had, or has, without what was dropped."""
    dropped_revision: int
    mod_revision: int
    tombstone: Tombstone


@dataclass(frozen=True, slots=True)
class Release:
    """Keys `r/` and `b/` that go in one transaction, and what that compares."""

    compares: tuple[Compare, ...]
    deletes: tuple[Delete, ...]


@dataclass(slots=True)
class Verdict:
    """What becomes of the blobs that some tombstones own."""

    garbage: dict[int, int] = field(default_factory=dict)
    """Blob -> its length; nobody refers to it, nor ever will."""
    shared: dict[int, int] = field(default_factory=dict)
    """Others still refer to these."""
    elsewhere: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Garbage of which objects may be at these sites too, besides its own."""
    releases: list[Release] = field(default_factory=list)


class Collector:
    """Made by `open_collector`. Methods raise SessionLost, DeadlineExceeded, StoreError."""

    def __init__(self, store: Store, keys: Keys, session: Session, answer_wait_s: float) -> None:
        self._store = store
        self._keys = keys
        self.session = session
        self._replicas = Replicas(store, keys)
        self.questions = UseQuestions(store, keys, session, answer_wait_s)

    async def elect(self) -> None:
        """Become the volume's collector for as long as the session lives. Raises CollectorBusy."""
        other = await Election(self._store, self._keys, self.session, self._keys.collector).stand()
        if other is not None:
            raise CollectorBusy(f"garbage is being collected already, by process {other.pid} on {other.host}")
        await self.questions.forget_earlier()

    # -- tombstones --------------------------------------------------------------------------------------------------

    async def stones(self, until_ns: int, after: bytes, limit: int) -> list[Stone]:
        """The oldest tombstones from before `until_ns` whose keys are greater than `after` (b"": all), in order."""
        start = after + b"\0" if after else self._keys.tombstones
        end = self._keys.tombstone(until_ns, 0, 0)
        if start >= end:
            return []
        found = await retry(lambda: self._store.range(Range(start, end, limit=limit)), READ_S)
        return [stone_of(self._keys, kv) for kv in found.kvs]

    async def count_younger(self, since_ns: int) -> int:
        """How many tombstones there are from `since_ns` on."""
        asked = Range(self._keys.tombstone(since_ns, 0, 0), prefix_end(self._keys.tombstones), count_only=True)
        return (await retry(lambda: self._store.range(asked), READ_S)).count

    async def condemn(self, stones: Sequence[Stone]) -> list[Stone]:
        """From now on these can't be restored. Those that were, or are gone, are not in what is returned."""
        found: list[Stone] = []
        for at in range(0, len(stones), OPS_IN_TRANSACTION):
            found += await self._condemn(stones[at : at + OPS_IN_TRANSACTION])
        return found

    async def _condemn(self, stones: Sequence[Stone]) -> list[Stone]:
        fresh = [stone for stone in stones if stone.tombstone.inode is not None and not stone.tombstone.condemned]
        if not fresh:
            return list(stones)
        marked = {stone.key: replace(stone.tombstone, condemned=True) for stone in fresh}
        puts = [Put(key, codec.encode_tombstone(stone)) for key, stone in marked.items()]
        outcome = await self.session.commit(_unchanged(fresh), puts, NOTED, time_ns=time.time_ns())
        if isinstance(outcome, Committed):
            return [
                replace(stone, tombstone=marked[stone.key], mod_revision=outcome.revision)
                if stone.key in marked
                else stone
                for stone in stones
            ]
        if len(stones) == 1:
            return []
        half = len(stones) // 2
        return [*await self._condemn(stones[:half]), *await self._condemn(stones[half:])]

    async def blobs_of(self, stone: Stone) -> dict[int, int]:
        """Blob -> length of all that the tombstone says was dropped. One request for a very fragmented dead inode."""
        inode = stone.tombstone.inode
        if inode is None:
            return dict(stone.tombstone.blobs)
        extents: list[Extent] = list(inode.extents)
        if inode.extent_pages:
            prefix = self._keys.extents_of(inode.ino)
            found = await retry(lambda: self._store.range(Range(prefix, prefix_end(prefix))), READ_S)
            extents += [extent for kv in found.kvs for extent in codec.decode_extents(kv.value)]
        return {extent.blob: extent.blob_length for extent in extents}

    # -- references --------------------------------------------------------------------------------------------------

    async def judge(self, dropped: Sequence[tuple[Stone, dict[int, int]]]) -> Verdict:
        """What becomes of the blobs of these tombstones, as of now. A request for each hundred blobs."""
        stones: dict[int, list[Stone]] = {}
        lengths: dict[int, int] = {}
        for stone, blobs in dropped:
            lengths.update(blobs)
            for blob in blobs:
                stones.setdefault(blob, []).append(stone)
        verdict = Verdict()
        found = await self._references_to(stones)
        for blob, those in stones.items():
            last: dict[bytes, Stone] = {}
            for stone in sorted(those, key=lambda each: each.dropped_revision):
                last[self._keys.reference(blob, stone.ino)] = stone
            there = found[blob]
            gone = [key for key, stone in last.items() if await self._has_dropped(blob, stone, there.get(key, 0))]
            others = sorted(there.keys() - set(gone))
            (verdict.shared if others else verdict.garbage)[blob] = lengths[blob]
            verdict.releases += _releases(gone, there, others)
        for blob, copies in (await self._replicas.read(verdict.garbage)).items():
            if copies.sites:
                key = self._keys.copies(blob)
                verdict.elsewhere[blob] = copies.sites
                unchanged = Compare(key, Target.MOD, Relation.EQUAL, copies.revision)
                verdict.releases.append(Release((unchanged,), (Delete(key),)))
        return verdict

    async def _has_dropped(self, blob: int, stone: Stone, put_revision: int) -> bool:
        """Whether the key `r/` of a tombstone's inode, put at a revision (0: there is none), is to go.

        Where one transaction has done both, several operations in it, only the inode tells which came last; it lives,
        or is in a tombstone of its own.
        """
        if put_revision != stone.dropped_revision or stone.tombstone.inode is not None:
            return 0 < put_revision <= stone.dropped_revision
        where = (stone.tombstone.parent, stone.tombstone.name) if stone.tombstone.parent else None
        inode = await Tree(self._store, self._keys).find(stone.ino, where)
        if inode is not None:
            return blob not in {extent.blob for extent in inode.extents}
        after: bytes = b""
        while page := await self.stones(MAX_NS, after, STONES_IN_PAGE):
            after = page[-1].key
            for other in page:
                if other.ino == stone.ino and other.tombstone.inode is not None:
                    return blob not in await self.blobs_of(other)
        return True

    async def _references_to(self, stones: Mapping[int, Sequence[Stone]]) -> dict[int, dict[bytes, int]]:
        """For each blob keys `r/` and their mod_revisions: all those of the tombstones' inodes, and at least one of
        another inode if there is one."""
        first = []
        for blob, those in stones.items():
            prefix = self._keys.references_of(blob)
            first.append(
                Range(prefix, prefix_end(prefix), limit=len({stone.ino for stone in those}) + 1, keys_only=True)
            )
        answers = dict(zip(stones, await self._read(first), strict=True))
        found = {blob: {kv.key: kv.mod_revision for kv in answer.kvs} for blob, answer in answers.items()}
        rest = [
            (blob, self._keys.reference(blob, ino))
            for blob, answer in answers.items()
            if answer.more
            for ino in {stone.ino for stone in stones[blob]}
        ]
        each = await self._read([Range(key, keys_only=True) for _, key in rest])
        for (blob, _), answer in zip(rest, each, strict=True):
            found[blob].update((kv.key, kv.mod_revision) for kv in answer.kvs)
        return found

    async def release(self, verdict: Verdict) -> bool:
        """Remove the keys `r/` of the inodes that have dropped a blob, and those that say where garbage had copies.
        Objects of garbage must be gone before.

        False: something has changed since it was judged; judge again.
        """
        for chunk in _chunks(verdict.releases):
            compares = dict.fromkeys(compare for each in chunk for compare in each.compares)
            deletes = [delete for each in chunk for delete in each.deletes]
            outcome = await self.session.commit(tuple(compares), deletes, NOTED, time_ns=time.time_ns())
            if not isinstance(outcome, Committed):
                return False
        return True

    async def bury(self, stones: Sequence[Stone]) -> int:
        """Remove tombstones whose blobs have been dealt with, each with what its dead inode had; how many. One that
        has changed meanwhile stays."""
        done = 0
        for chunk in _portions(stones, OPS_IN_TRANSACTION // 4):
            deletes = [delete for stone in chunk for delete in self._owned(stone)]
            outcome = await self.session.commit(_unchanged(chunk), deletes, NOTED, time_ns=time.time_ns())
            if isinstance(outcome, Committed):
                done += len(chunk)
            elif len(chunk) > 1:
                for stone in chunk:
                    done += await self.bury([stone])
        return done

    def _owned(self, stone: Stone) -> list[Delete]:
        keys, inode = self._keys, stone.tombstone.inode
        found = [Delete(stone.key)]
        if inode is None:
            return found
        if inode.is_inline:
            found.append(Delete(keys.inline(inode.inline_number)))
        for count, prefix in ((inode.xattrs, keys.xattrs_of), (inode.extent_pages, keys.extents_of)):
            if count:
                found.append(Delete(prefix(inode.ino), prefix_end(prefix(inode.ino))))
        return found

    async def _read(self, asked: Sequence[Range]) -> list[RangeResult]:
        found: list[RangeResult] = []
        for part in _portions(asked, READS_IN_TRANSACTION):
            result = await retry(lambda part=part: self._store.txn((), part), READ_S)  # type: ignore[misc]
            found += [answer for answer in result.ranges if answer is not None]
        return found


def stone_of(keys: Keys, kv: KeyValue) -> Stone:
    """Raises CorruptRecord."""
    time_ns, ino, body_version = keys.parse_tombstone(kv.key)
    tombstone = codec.decode_tombstone(kv.value, kv.mod_revision)
    return Stone(kv.key, time_ns, ino, body_version, kv.create_revision, kv.mod_revision, tombstone)


def _unchanged(stones: Iterable[Stone]) -> list[Compare]:
    return [Compare(stone.key, Target.MOD, Relation.EQUAL, stone.mod_revision) for stone in stones]


def _releases(gone: Sequence[bytes], found: Mapping[bytes, int], others: Sequence[bytes]) -> Iterable[Release]:
    """The end of keys of one blob; where others refer to it, in each transaction one of them must be there still."""
    stays = tuple(Compare(key, Target.CREATE, Relation.GREATER, 0) for key in others[:1])
    for part in _portions(gone, OPS_IN_TRANSACTION - 1):
        compares = (Compare(key, Target.MOD, Relation.EQUAL, found[key]) for key in part)
        yield Release((*compares, *stays), tuple(Delete(key) for key in part))


def _portions(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _chunks(releases: Sequence[Release]) -> Iterable[list[Release]]:
    """As many as fit into one transaction."""
    chunk: list[Release] = []
    count = 0
    for release in releases:
        if chunk and count + len(release.compares) > OPS_IN_TRANSACTION:
            yield chunk
            chunk, count = [], 0
        chunk.append(release)
        count += len(release.compares)
    if chunk:
        yield chunk


@asynccontextmanager
async def open_collector(
    store: Store, volume: str, record: MountRecord, options: SessionOptions, answer_wait_s: float
) -> AsyncIterator[Collector]:
    """Be the collector of a volume while the context lasts. Raises NotFormatted, CollectorBusy, StoreError."""
    await read_superblock(store, volume)
    keys = Keys(volume)
    session = await open_session(store, keys, replace(options, slots=SLOTS), record, 0)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.keep_alive)
            collector = Collector(store, keys, session, answer_wait_s)
            await collector.elect()
            yield collector
            nursery.cancel_scope.cancel()
    finally:
        await session.close()
