"""Running the archiver from outside any mount, and what is known of the archive."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import trio

from apollofs.blobstore import BlobStoreOptions
from apollofs.fs.changes import open_archiver
from apollofs.metadata.changes.archive_index import ArchiveIndex
from apollofs.metadata.changes.archiver import ArchiveOptions, Archiver, ArchiveReport
from apollofs.metadata.changes.compaction import (
    CompactableStore,
    Compaction,
    CompactionOptions,
    compact_behind_archive,
)
from apollofs.metadata.changes.groups import list_groups
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.role import holder_of
from apollofs.metadata.errors import DeadlineExceeded, OutcomeUnknown, RoleLost, StoreError, StoreUnavailable
from apollofs.metadata.format import read_superblock
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import retry
from apollofs.metadata.store import Range, Store

log = logging.getLogger(__name__)
COMPACT_EVERY_S = 300.0
AGAIN_S = 1.0
READ_S = 30.0


@dataclass(frozen=True, slots=True)
class ArchiveRun:
    """How the archiver is run."""

    site: str
    """In whose store segments go; "": the first one's."""
    once: bool
    options: ArchiveOptions
    compaction: CompactionOptions | None
    """None: nothing is compacted."""
    ca_file: str | None = None


@dataclass(frozen=True, slots=True)
class ArchiveDone:
    """What a run has done."""

    report: ArchiveReport
    compacted: int = 0
    """The revision up to which etcd's history was compacted; 0: it was not."""
    held_back: str = ""
    """Why not."""


async def archive_changes(store: Store, volume: str, run: ArchiveRun) -> ArchiveDone:
    """Archive a volume's change log, once or until cancelled. Raises as `Archiver.run` does, UserError."""
    stores = BlobStoreOptions(ca_file=run.ca_file)
    async with open_archiver(store, volume, stores, run.site, run.options) as archiver:
        if run.once:
            await archiver.run(once=True)
            compaction = await _compact(store, run.compaction) if run.compaction else Compaction(0)
            return ArchiveDone(archiver.report, compaction.revision, compaction.held_back_by)
        async with trio.open_nursery() as nursery:
            if run.compaction is not None:
                nursery.start_soon(_compact_at_times, store, archiver, run.compaction)
            await _keep_archiving(archiver)
            nursery.cancel_scope.cancel()
        return ArchiveDone(archiver.report)


async def _keep_archiving(archiver: Archiver) -> None:
    """Until cancelled, or the volume is gone. An etcd that does not answer for a while costs the role, no more."""
    while True:
        try:
            await archiver.run(once=False)
        except (RoleLost, StoreUnavailable, OutcomeUnknown, DeadlineExceeded) as exc:
            log.warning("the archiver begins again: %s", exc)
        await trio.sleep(AGAIN_S)


async def _compact(store: Store, options: CompactionOptions) -> Compaction:
    # every adapter can; only this asks for it, so the port that all hold does not have it
    return await compact_behind_archive(cast(CompactableStore, store), options)


async def _compact_at_times(store: Store, archiver: Archiver, options: CompactionOptions) -> None:
    held_back = ""
    while True:
        await trio.sleep(COMPACT_EVERY_S)
        if not archiver.report.through:
            continue  # it waits for another archiver to end
        try:
            done = await _compact(store, options)
        except (StoreError, DeadlineExceeded) as exc:
            log.warning("etcd's history could not be compacted: %s", exc)
            continue
        if done.held_back_by != held_back:
            held_back = done.held_back_by
            log.info("compaction is held back by %s", held_back or "nobody")


async def archive_facts(store: Store, volume: str) -> dict[str, Any]:
    """For `changes status`. Raises NotFormatted, DeadlineExceeded, StoreError."""
    await read_superblock(store, volume)
    keys = Keys(volume)
    index = ArchiveIndex(store, keys)
    newest = (await retry(lambda: store.range(Range(keys.superblock)), READ_S)).revision
    facts: dict[str, Any] = {"volume": volume, "revision": newest, "through": (await index.state()).through}
    facts |= {"segments": 0, "changes": 0, "size_bytes": 0, "first": None, "first_time_s": 0.0}
    revision, more = 0, True
    while more:
        page = await index.page(revision)
        more = page.more
        for entry in page.entries:
            if not facts["segments"]:
                facts |= {"first": str(Position(entry.first_revision)), "first_time_s": entry.first_time_ns / 1e9}
            facts["segments"] += 1
            facts["changes"] += entry.changes
            facts["size_bytes"] += entry.size_bytes
            revision = entry.last_revision + 1
    facts["archiver"] = await holder_of(store, keys.archiver)
    facts["groups"] = [
        {"name": name, "position": str(position), "reader": await holder_of(store, keys.group_reader(name))}
        for name, position in (await list_groups(store, keys)).items()
    ]
    return facts
