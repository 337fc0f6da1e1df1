"""Letting etcd forget history behind the archive. Compaction is of the whole etcd: everybody who uses it is concerned.

Rules
1. Only what every volume in this etcd has archived, as its own record says. A volume that is not archived would lose
   its log: it holds compaction back, unless it is named as one whose log is not wanted.
2. Only what was archived some time ago (KEEP_S_MIN for anybody but tests). Mounts watch from where they last heard
   something, which etcd tells an idle watch every ten minutes; checkers and listings read snapshots.
3. Keys that are not apollofs's belong to somebody who may rely on history; they hold compaction back, unless told
   otherwise.
A record of how far a volume is archived only grows, so an archiver that was frozen before it compacts does no harm.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from apollofs.metadata.changes.archive_index import ArchiveIndex
from apollofs.metadata.errors import Compacted
from apollofs.metadata.keys import Keys, volume_of, volumes_prefix
from apollofs.metadata.session import retry
from apollofs.metadata.store import Range, Store, prefix_end

READ_S = 30.0
KEEP_S_MIN = 1200.0
"""Twice what an idle watch may be behind; a mount that is behind the compaction drops all that it has cached."""
FIRST_KEY, LAST_END = b"\0", b"\0"
"""etcd's: from the first key; to the last one."""


class CompactableStore(Store, Protocol):
    """A store that can forget; see the adapters."""

    async def compact(self, revision: int) -> None:
        """Forget states before `revision`. Raises Compacted if they are forgotten."""
        ...


@dataclass(frozen=True, slots=True)
class CompactionOptions:
    """What may be forgotten."""

    keep_s: float = 3600.0
    """What was archived less than this ago stays in etcd."""
    unarchived: frozenset[str] = frozenset()
    """Volumes whose change log may be lost."""
    shared: bool = False
    """Other applications in this etcd do not need its history."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """What came of it: compacted up to `revision` (0: nothing), and who holds it back."""

    revision: int
    held_back_by: str = ""


async def compact_behind_archive(store: CompactableStore, options: CompactionOptions) -> Compaction:
    """Forget what nobody needs. Raises DeadlineExceeded, StoreError."""
    if not options.shared and await _has_strangers(store):
        return Compaction(0, "keys of other applications in this etcd")
    limits: dict[str, int] = {}
    async for volume in volumes(store):
        if volume not in options.unarchived:
            limits[volume] = await _archived_before(store, volume, time.time_ns() - int(options.keep_s * 1e9))
    if not limits:
        return Compaction(0, "no archive")
    volume, revision = min(limits.items(), key=lambda each: each[1])
    if not revision:
        return Compaction(0, f"volume {volume!r}, of which nothing was archived so long ago")
    try:
        await store.compact(revision)
    except Compacted:
        return Compaction(0, f"volume {volume!r}: all but the last that it has archived is forgotten already")
    return Compaction(revision)


async def volumes(store: Store) -> AsyncIterator[str]:
    """The names of all volumes in a store. One request for each."""
    start, end = volumes_prefix(), prefix_end(volumes_prefix())
    while True:
        found = await retry(lambda: store.range(Range(start, end, limit=1, keys_only=True)), READ_S)  # noqa: B023
        if not found.kvs:
            return
        name = volume_of(found.kvs[0].key)
        yield name
        start = Keys(name).end


async def _archived_before(store: Store, volume: str, time_ns: int) -> int:
    """The newest revision of which is known that it was archived by a time; 0: none."""
    points = (await ArchiveIndex(store, Keys(volume)).state()).points
    return max((revision for revision, when in points if when <= time_ns), default=0)


async def _has_strangers(store: Store) -> bool:
    ours = volumes_prefix()
    for start, end in ((FIRST_KEY, ours), (prefix_end(ours), LAST_END)):
        asked = Range(start, end, limit=1, keys_only=True)
        if (await retry(lambda: store.range(asked), READ_S)).kvs:  # noqa: B023
            return True
    return False
