"""Rewriting packs: what is left of objects that small files share is copied into new ones, when most of them is dead.

Steps, for as many packs of a site as fill a new one; whatever ends it between two of them, the next run goes on:

1. the bytes that files with a name still refer to are read, and put as a new blob, at each site that has the old ones.
   Interrupted here, it is an upload that was never committed;
2. each of these files is moved, in a transaction of its own, which recalls it from the mounts that have it cached
   (`metadata/ops/move_body.py`). Where a file has changed meanwhile, nothing of it is moved, and the old pack stays.

What a file no longer refers to is in a tombstone, so an old pack goes as everything does: after the grace, when no
mount reads from it any more. A pack of a sealed or immutable file stays, since it could not go even without the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from apollofs.blobstore import BlobStoreError
from apollofs.fs.blobs import BlobSource, Block, block_of, site_of
from apollofs.fs.collection import CollectOptions, CollectReport
from apollofs.fs.errors import BodyError
from apollofs.fs.pace import Pace
from apollofs.fs.packing import PACK_BYTES_MAX
from apollofs.fs.user_error import UserError
from apollofs.fs.workers import share_out
from apollofs.metadata.collector import Collector
from apollofs.metadata.collector_packs import Pack, measure, referents, shared_blobs
from apollofs.metadata.errors import StaleInode
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.common import Location
from apollofs.metadata.ops.move_body import Copied, MoveBody, Ranges, may_move
from apollofs.metadata.records import SiteRecord
from apollofs.metadata.replicas import Replicas
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Store
from apollofs.metadata.tree import Tree
from apollofs.metadata.volume import Volume, open_volume

log = logging.getLogger(__name__)
PACKS_AT_ONCE = 200_000
"""Blobs that are held in memory while all names are read."""
REWRITTEN_MAX = 10_000
"""Of these, so many at most are rewritten in a run: the deadest."""
FILES_AT_ONCE = 16
SESSION = SessionOptions(delegations=False, write_back=False)
Owners = Mapping[int, Location | None]
"""Inode -> where it is embedded."""


@dataclass(slots=True)
class _Left:
    """What is left of a pack: its used bytes, and whose they are."""

    ranges: Ranges
    """Where they are in `data`, and so in the new blob if that begins with it."""
    data: bytes
    files: dict[int, Location | None]


class Repacking:
    """A part of one run of the collector, which `report` is of."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        collector: Collector,
        source: BlobSource,
        options: CollectOptions,
        pace: Pace,
        report: CollectReport,
    ) -> None:
        self._store = store
        self._keys = keys
        self._collector = collector
        self._source = source
        self._options = options
        self._pace = pace
        self._report = report
        self._tree = Tree(store, keys)
        self._replicas = Replicas(store, keys)
        self._bytes_max = min(PACK_BYTES_MAX, source.block_bytes)

    async def run(self, sites: Sequence[SiteRecord]) -> None:
        """Rewrite the packs of these sites. Raises SessionLost, DeadlineExceeded, StoreError; what a blob store refuses
        is in the report."""
        async with aclosing(shared_blobs(self._store, self._keys, PACKS_AT_ONCE)) as portions:
            async for packs in portions:
                await self._deal_with(packs, sites)

    async def _deal_with(self, packs: Mapping[int, Pack], sites: Sequence[SiteRecord]) -> None:
        await measure(self._store, self._keys, packs, self._bytes_max)
        worst = sorted(self._mostly_dead(packs), key=lambda blob: packs[blob].used_bytes / packs[blob].length)
        chosen = [blob for blob in worst[:REWRITTEN_MAX] if await self._is_old(blob, packs[blob])]
        if self._options.dry_run:
            self._report.rewritten.blobs += len(chosen)
            self._report.rewritten.bytes += sum(packs[blob].used_bytes for blob in chosen)
        elif chosen:
            owners = await referents(self._store, self._keys, chosen)
            for site in sites:
                of_site = {blob: packs[blob] for blob in chosen if site_of(blob) == site.id}
                await self._rewrite_at(site, of_site, owners)

    def _mostly_dead(self, packs: Mapping[int, Pack]) -> Iterator[int]:
        """Of a pack that nobody refers to nothing is left to copy; it waits for its tombstones."""
        for blob, pack in packs.items():
            if pack.length <= self._bytes_max and 0 < pack.used_bytes < self._options.pack_used_min * pack.length:
                yield blob

    async def _is_old(self, blob: int, pack: Pack) -> bool:
        """Of a young one the other files may not be committed yet."""
        await self._pace.step()
        try:
            put_s = await self._source.stored_s(block_of(blob, pack.length, 0, self._source.block_bytes))
        except (BodyError, BlobStoreError, UserError) as exc:
            self._failed(exc)
            return False
        return put_s <= time.time() - self._options.grace_s

    async def _rewrite_at(self, site: SiteRecord, packs: Mapping[int, Pack], owners: Mapping[int, Owners]) -> None:
        """Those of one site, in a session of their own there: its transactions recall what mounts have cached."""
        if not packs:
            return
        record = replace(self._collector.session.record, session=0, site=site.name)
        async with open_volume(self._store, self._keys.volume, site.name, SESSION, record) as volume:
            found: dict[int, _Left] = {}
            size = 0
            for blob, pack in packs.items():
                left = await self._left_of(blob, pack.length, owners[blob])
                if left is None:
                    continue
                if size + len(left.data) > self._bytes_max:
                    await self._rewrite(volume, found)
                    found, size = {}, 0
                found[blob] = left
                size += len(left.data)
            if found:
                await self._rewrite(volume, found)

    async def _left_of(self, blob: int, length: int, owners: Owners) -> _Left | None:
        """None if nothing is left, or it can't be moved or read."""
        used: list[tuple[int, int]] = []
        files: dict[int, Location | None] = {}
        for ino, location in owners.items():
            try:
                inode = await self._tree.find(ino, location)
            except StaleInode:
                return None  # it is being moved about: the next run
            own = [each for each in inode.extents if each.blob == blob] if inode is not None else []
            if inode is None or not own:
                continue
            if not may_move(inode.is_file, inode.seal, inode.flags):
                return None
            files[ino] = location
            used += [(each.blob_offset, each.blob_offset + each.length) for each in own]
        if not used:
            return None
        ranges = _united(used)
        first, last = ranges[0][0], ranges[-1][1]
        await self._pace.step()
        try:
            block = block_of(blob, length, 0, self._source.block_bytes)
            data = await self._source.read_block(block, first, last - first)
        except (BodyError, BlobStoreError, UserError) as exc:
            self._failed(exc)
            return None
        parts = [data[start - first : end - first] for start, end, _ in ranges]
        return _Left(ranges, b"".join(parts), files)

    async def _rewrite(self, volume: Volume, found: Mapping[int, _Left]) -> None:
        """Put what is left of these packs as one blob, and let the files refer to it."""
        data = b"".join(left.data for left in found.values())
        block = Block(volume.new_blob(), 0, len(data))
        noted = await self._replicas.read(found)
        sites = tuple(sorted({site for copies in noted.values() for site in copies.complete} - {site_of(block.blob)}))
        try:
            for site in (site_of(block.blob), *sites):
                await self._pace.step()
                await self._source.put_block(block, data, site)
        except (BodyError, BlobStoreError, UserError) as exc:
            self._failed(exc)
            return
        copied = Copied(block.blob, len(data), _laid(found), sites)
        files = {ino: where for left in found.values() for ino, where in left.files.items()}
        collector = self._collector.session.number

        async def move(ino: int) -> None:
            await self._pace.step()
            if await volume.transact(lambda scope: MoveBody(scope, ino, files[ino], copied, collector)):
                self._report.rewritten.files += 1

        await share_out(move, files, FILES_AT_ONCE)
        self._report.rewritten.blobs += len(found)
        self._report.rewritten.bytes += len(data)

    def _failed(self, exc: Exception) -> None:
        self._report.fail(f"a pack is not rewritten: {exc}")
        log.info("a pack is not rewritten: %s", exc)


def _united(used: Sequence[tuple[int, int]]) -> Ranges:
    """Ranges of a blob that overlap or touch as one, each with its place when they stand one behind the other."""
    united: list[tuple[int, int]] = []
    for start, end in sorted(used):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(united[-1][1], end))
        else:
            united.append((start, end))
    found, at = [], 0
    for start, end in united:
        found.append((start, end, at))
        at += end - start
    return tuple(found)


def _laid(found: Mapping[int, _Left]) -> dict[int, Ranges]:
    """Where the bytes of each pack are in the new blob, which has those of all, one behind the other."""
    laid, at = {}, 0
    for blob, left in found.items():
        laid[blob] = tuple((start, end, at + place) for start, end, place in left.ranges)
        at += len(left.data)
    return laid
