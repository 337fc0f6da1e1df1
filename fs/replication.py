"""Getting bodies to the sites that shall hold them: a small port, and one implementation that copies by itself.

A copy is the same objects under the same names in the other site's store; `b/<blob>` says that it is complete
(`metadata/replicas.py` has the rules). What a site agent has copied meanwhile is seen there, and not copied again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from apollofs.fs.blob_copies import CopyLimits, copy_blob, note_copies, referred_blocks, remove_copy
from apollofs.fs.blobs import BlobSource, site_of
from apollofs.fs.workers import share_out
from apollofs.metadata.copies import NOWHERE, Copies
from apollofs.metadata.records import Extent
from apollofs.metadata.replicas import Referent, Replicas
from apollofs.metadata.session import Session

log = logging.getLogger(__name__)
BLOBS_AT_ONCE = 4
BLOCKS_IN_MEMORY = 8


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file with a body in blobs, and the key that proves, unchanged, that it refers to them."""

    referent: Referent
    extents: tuple[Extent, ...]


@dataclass(slots=True)
class Lacking:
    """A blob that some sites should have and don't."""

    blob: int
    length: int
    referent: Referent
    sites: tuple[int, ...]
    copies: Copies = NOWHERE
    referred: set[int] = field(default_factory=set)
    """Indices of its blocks that files refer to; others may never have been stored."""


class Replication(Protocol):
    """Methods raise BodyError, BlobStoreError, MetadataError."""

    async def lacking(self, files: Sequence[StoredFile], sites: Collection[int]) -> list[Lacking]:
        """The blobs of these files that some of these sites have not completely."""
        ...

    async def provide(self, lacking: Sequence[Lacking]) -> None:
        """Have them copied. On return either `lacking` doesn't name them any more, or their files have changed."""
        ...


class DirectReplication:
    """Copies from here, store to store. `copied` hears of bytes that are on their way."""

    def __init__(
        self,
        source: BlobSource,
        replicas: Replicas,
        session: Session,
        copied: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._source = source
        self._replicas = replicas
        self._session = session
        self._copied = copied
        self._limits = CopyLimits(trio.CapacityLimiter(BLOCKS_IN_MEMORY), self._turn)

    async def lacking(self, files: Sequence[StoredFile], sites: Collection[int]) -> list[Lacking]:
        """See `Replication`. One request for a hundred blobs."""
        found: dict[int, Lacking] = {}
        size = self._source.block_bytes
        for file in files:
            for extent in file.extents:
                one = found.setdefault(extent.blob, Lacking(extent.blob, extent.blob_length, file.referent, ()))
                one.referred |= referred_blocks(extent.blob, (extent,), size)
        known = await self._replicas.read(found)
        for one in found.values():
            one.copies = known[one.blob]
            there = {site_of(one.blob), *one.copies.complete}
            one.sites = tuple(site for site in sites if site not in there)
        return [one for one in found.values() if one.sites]

    async def provide(self, lacking: Sequence[Lacking]) -> None:
        """See `Replication`. Each copy is announced, made, and noted; cancelled, the next call goes on."""
        for site in sorted({site for one in lacking for site in one.sites}):
            await self._provide(site, {one.blob: one for one in lacking if site in one.sites})

    async def _provide(self, site: int, blobs: Mapping[int, Lacking]) -> None:
        known = await self._replicas.read(blobs)
        wanted = {blob: (known[blob], one.referent) for blob, one in blobs.items() if site not in known[blob].complete}
        begun = await self._replicas.begin(self._session, site, wanted)

        async def copy(blob: int) -> None:
            one = blobs[blob]
            await copy_blob(self._source, blob, one.length, one.referred, site, self._limits)

        await share_out(copy, begun, BLOBS_AT_ONCE)
        await self._finish(site, begun, blobs)

    async def _turn(self, size_bytes: int) -> None:
        await trio.lowlevel.checkpoint()
        self._copied(size_bytes)

    async def _finish(self, site: int, copied: dict[int, Copies], blobs: Mapping[int, Lacking]) -> None:
        """Note the copies; remove those of blobs that were collected meanwhile."""

        async def remove(blob: int) -> None:
            await remove_copy(self._source, blob, blobs[blob].length, site)

        left = await note_copies(self._replicas, self._session, site, copied, remove)
        if left:
            log.info("%d copies at site %d are noted later: others keep noting theirs", len(left), site)
