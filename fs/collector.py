"""The collector: removes the bodies of what was unlinked or replaced, once nobody uses them, and uploads that were
never committed. `metadata/collector.py` has the rules of what is garbage.

A batch of tombstones goes through these steps; whatever ends it between two of them, the next run goes on:

1. every mount is asked which of the inodes it still uses; those stay, and if a mount that lives does not answer, all;
2. unlinked inodes are condemned: they can't be restored any more;
3. objects of blobs that nobody else refers to are deleted;
4. references, then tombstones with all that their inodes had, are deleted.

Uploads come after the tombstones, and then the packs that are mostly dead (`collector_packs.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.blobstore.listing import closing
from apollofs.fs.blobs import BlobSource, Block, block_count, block_named, block_of, site_of
from apollofs.fs.collection import CollectOptions, CollectReport
from apollofs.fs.collector_packs import Repacking
from apollofs.fs.errors import BodyError
from apollofs.fs.pace import Pace
from apollofs.fs.user_error import UserError
from apollofs.metadata.collector import Collector, Stone, Verdict
from apollofs.metadata.dead_uploads import unreferenced
from apollofs.metadata.errors import Compacted
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import MountRecord, SiteRecord
from apollofs.metadata.store import Store
from apollofs.metadata.use_questions import Uses

log = logging.getLogger(__name__)
DELETES_AT_ONCE = 16
BLOBS_AT_ONCE = 10_000
"""Blobs that are judged at once; one very fragmented file may have as many."""
ATTEMPTS = 8
COMPACTED_MAX = 2
"""How often reading all names is begun anew."""
LISTED_IN_STEP = 1000
"""Objects that a store lists in one request."""
IN_USE = "in use"
SILENT = "a mount does not answer"
FAILED = "its objects could not be deleted"
CHANGING = "its blobs are being cloned"

Group = list[tuple[Stone, dict[int, int]]]
"""Tombstones, each with its blobs and their lengths."""


@dataclass(slots=True)
class _Upload:
    """A blob in the store, as listed."""

    blocks: int
    bytes: int
    newest_s: float


class Collection:
    """One run of the collector; `report` grows while it goes."""

    def __init__(
        self, store: Store, keys: Keys, collector: Collector, source: BlobSource, options: CollectOptions
    ) -> None:
        self._store = store
        self._keys = keys
        self._collector = collector
        self._source = source
        self._options = options
        self._pace = Pace(options.ops_per_s)
        self._down: set[int] = set()
        """Sites whose stores could not be used: they are not tried again in this run."""
        self.report = CollectReport()
        self._repacking = Repacking(store, keys, collector, source, options, self._pace, self.report)

    async def run(self, sites: Sequence[SiteRecord]) -> CollectReport:
        """Collect, in all these sites' stores. Raises SessionLost, DeadlineExceeded, StoreError; what a blob store
        refuses is in the report. Cancelled, nothing is left that the next run does not find."""
        await self._collect_tombstones()
        if self._options.uploads:
            for site in sites:
                await self._collect_uploads(site)
        if self._options.pack_used_min:
            await self._repacking.run(sites)
        return self.report

    # -- tombstones --------------------------------------------------------------------------------------------------

    async def _collect_tombstones(self) -> None:
        until_ns = time.time_ns() - int(self._options.grace_s * 1e9)
        self.report.young = await self._collector.count_younger(until_ns)
        after = b""
        while True:
            stones = await self._collector.stones(until_ns, after, self._options.batch_max)
            if not stones:
                return
            after = stones[-1].key
            uses = await self._collector.questions.ask(sorted({stone.ino for stone in stones}))
            free = self._unused(stones, uses)
            if not self._options.dry_run:
                free = await self._collector.condemn(free)
            await self._settle_all(free, uses.blobs)
            if self.report.silent_mounts:
                return  # every further batch would wait for the same mount

    def _unused(self, stones: Sequence[Stone], uses: Uses) -> list[Stone]:
        """Those that no mount uses; why the others stay is reported."""
        self.report.silent_mounts += [_name_of(mount) for mount in uses.silent]
        free = []
        for stone in stones:
            if uses.silent:
                self._keep(stone, SILENT)
            elif uses.oldest.get(stone.ino, stone.body_version) < stone.body_version:
                self._keep(stone, IN_USE, f"on {_name_of(uses.users[stone.ino])}")
            else:
                free.append(stone)
        return free

    async def _settle_all(self, stones: Iterable[Stone], busy: set[int]) -> None:
        """All but those of whose blobs one is `busy`: a mount is about to refer to it."""
        group: Group = []
        blobs = 0
        for stone in stones:
            owned = await self._collector.blobs_of(stone)
            if not busy.isdisjoint(owned):
                self._keep(stone, IN_USE, "by a commit under way")
                continue
            if group and blobs + len(owned) > BLOBS_AT_ONCE:
                await self._settle(group)
                group, blobs = [], 0
            group.append((stone, owned))
            blobs += len(owned)
        await self._settle(group)

    async def _settle(self, group: Group) -> None:
        """Remove what only these tombstones own, and them."""
        for _ in range(ATTEMPTS):
            if not group:
                return
            verdict = await self._collector.judge(group)
            if self._options.dry_run:
                self._count(verdict, len(group))
                return
            failed = await self._delete_blobs(verdict)
            if failed:
                group = self._without(group, failed, FAILED)
            elif await self._collector.release(verdict):
                self._count(verdict, await self._collector.bury([stone for stone, _ in group]))
                return
        for stone, _ in group:
            self._keep(stone, CHANGING)

    def _without(self, group: Group, blobs: set[int], reason: str) -> Group:
        """Those that own none of these blobs; why the others stay is reported."""
        for stone, owned in group:
            if not blobs.isdisjoint(owned):
                self._keep(stone, reason)
        return [(stone, owned) for stone, owned in group if blobs.isdisjoint(owned)]

    def _count(self, verdict: Verdict, stones: int) -> None:
        self.report.tombstones += stones
        self.report.dropped.blobs += len(verdict.garbage)
        self.report.dropped.bytes += sum(verdict.garbage.values())
        self.report.shared_blobs += len(verdict.shared)

    def _keep(self, stone: Stone, reason: str, detail: str = "") -> None:
        self.report.keep(stone.ino, stone.tombstone.name, reason, detail)

    # -- uploads -----------------------------------------------------------------------------------------------------

    async def _collect_uploads(self, site: SiteRecord) -> None:
        """Remove the blobs in a site's store that ended sessions have left, and nothing refers to: uploads, and what an
        agent that was killed has copied of a blob while that was being removed."""
        try:
            found: dict[int, _Upload] = {}
            listed = 0
            async with closing(self._source.objects(site.id)) as objects:
                async for entry in objects:
                    if listed % LISTED_IN_STEP == 0:
                        await self._pace.step()
                    listed += 1
                    block = block_named(entry.name, max(0, entry.size_bytes))
                    if block is None:
                        continue
                    if block.blob not in found and len(found) >= self._options.candidates_max:
                        await self._remove_uploads(site.id, found)
                        found.clear()
                    upload = found.setdefault(block.blob, _Upload(0, 0, 0.0))
                    upload.blocks = max(upload.blocks, block.index + 1)
                    upload.bytes += block.length
                    upload.newest_s = max(upload.newest_s, entry.modified_s)
            await self._remove_uploads(site.id, found)
        except (BodyError, BlobStoreError, UserError) as exc:
            self.report.fail(f"site {site.name}: {exc}")

    async def _remove_uploads(self, site: int, found: Mapping[int, _Upload]) -> None:
        old_s = time.time() - self._options.grace_s
        left = await self._unreferenced(found)
        young = {blob for blob in left if found[blob].newest_s > old_s}
        self.report.young_uploads += len(young)
        dead = sorted(left - young)
        failed: set[int] = set()
        if not self._options.dry_run:
            failed = await self._delete(
                (site, Block(blob, index, 0)) for blob in dead for index in range(found[blob].blocks)
            )
        removed = [found[blob] for blob in dead if blob not in failed]
        self.report.uploads.blobs += len(removed)
        self.report.uploads.bytes += sum(upload.bytes for upload in removed)

    async def _unreferenced(self, blobs: Iterable[int]) -> set[int]:
        """Reading every name takes its time; where etcd forgets too early how things were, it is begun anew."""
        for _ in range(COMPACTED_MAX):
            with suppress(Compacted):
                return await unreferenced(self._store, self._keys, blobs)
        return await unreferenced(self._store, self._keys, blobs)

    # -- objects -----------------------------------------------------------------------------------------------------

    async def _delete_blobs(self, verdict: Verdict) -> set[int]:
        """Delete the objects of all garbage, at every site; the blobs of which some are left."""
        size = self._source.block_bytes
        return await self._delete(
            (site, block_of(blob, length, index, size))
            for blob, length in verdict.garbage.items()
            for site in (site_of(blob), *verdict.elsewhere.get(blob, ()))
            for index in range(block_count(length, size))
        )

    async def _delete(self, objects: Iterator[tuple[int, Block]]) -> set[int]:
        """Delete blocks at sites; the blobs of which some are left."""
        failed: set[int] = set()

        async def worker() -> None:
            for site, block in objects:
                if site in self._down:
                    failed.add(block.blob)
                elif block.blob not in failed:
                    await self._pace.step()
                    await self._delete_one(site, block, failed)

        async with trio.open_nursery() as nursery:
            for _ in range(DELETES_AT_ONCE):
                nursery.start_soon(worker)
        return failed

    async def _delete_one(self, site: int, block: Block, failed: set[int]) -> None:
        try:
            await self._source.delete_block(block, site)
        except (BodyError, BlobStoreError, UserError) as exc:
            failed.add(block.blob)
            self._down.add(site)
            self.report.fail(str(exc))
            log.info("an object could not be deleted: %s", exc)


def _name_of(mount: MountRecord) -> str:
    return f"{mount.host}:{mount.mountpoint} (session {mount.session})"
