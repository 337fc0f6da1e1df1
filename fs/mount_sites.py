"""What a mount does about other sites: it reads from the nearest, and has what it reads from afar kept at its own site
where a policy says so; large files it then leaves to the agent that brings them (`arrivals.py`). Who has only one site,
or no policy, pays nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

from apollofs.fs.arrivals import Arrivals
from apollofs.fs.blobs import BlobSource, block_count, site_of
from apollofs.fs.commit_copies import CommitCopies
from apollofs.fs.known_copies import KnownCopies
from apollofs.metadata.errors import MetadataError
from apollofs.metadata.placement import Placement
from apollofs.metadata.records import Inode

log = logging.getLogger(__name__)
WISHES_MAX = 1024
"""Files that were asked for lately."""
AGAIN_S = 60.0
"""A file that is read again is asked for again after this."""
OUTSTANDING_MAX = 256
"""Wishes of a mount that the agent has not dealt with. What is opened beyond them is asked for when that is done
again."""
LOOKED_AT_MAX, LOOK_AGAIN_S = 100, 0.25
"""Where they are that many, it is looked how many of the oldest are still wanted, no more often than this."""
LARGE_BLOCKS = 4
"""Less is fetched sooner than an agent has brought it."""


class MountSites:
    """`placement` None: bodies are read where they were written, and nothing else is done."""

    def __init__(self, placement: Placement | None, block_bytes: int) -> None:
        self.arrivals = Arrivals()
        self._placement = placement
        self._block_bytes = block_bytes
        self._known = KnownCopies(placement.replicas) if placement is not None else None
        self._wished: dict[int, float] = {}
        self._outstanding: dict[int, bool] = {}
        """Files that were asked for; whether etcd has said so."""
        self._look_again_at = 0.0

    @property
    def here(self) -> int:
        return self._placement.here if self._placement is not None else 0

    @property
    def copies_of(self) -> Callable[[int], Awaitable[Sequence[int]]] | None:
        """For `BlobSource`."""
        return self._known.of if self._known is not None else None

    def commit_copies(self, source: BlobSource) -> CommitCopies:
        return CommitCopies(source, self._placement, self._known)

    def will_read(self, inode: Inode, nursery: trio.Nursery) -> None:
        """A file is opened to be read: where its policy says so, have this site's agent keep its body here. No
        checkpoint."""
        if self._placement is None or not inode.policy or not self._is_afar(inode):
            return
        now = trio.current_time()
        if self._wished.get(inode.ino, 0.0) > now:
            return
        self._wished.pop(inode.ino, None)
        self._wished[inode.ino] = now + AGAIN_S
        while len(self._wished) > WISHES_MAX:
            self._wished.pop(next(iter(self._wished)))
        large, policy = self._large(inode), self._placement.policies.peek(inode.policy)
        if policy is not None and self.here in policy.read:
            self.arrivals.expect(large)
        nursery.start_soon(self._wish, self._placement, inode, large)

    def _is_afar(self, inode: Inode) -> bool:
        return bool(inode.extent_pages) or any(site_of(extent.blob) != self.here for extent in inode.extents)

    def _large(self, inode: Inode) -> set[int]:
        """The blobs of other sites that a reader had better leave to the agent."""
        blobs = {extent.blob: extent.blob_length for extent in inode.extents if site_of(extent.blob) != self.here}
        return {blob for blob, length in blobs.items() if block_count(length, self._block_bytes) >= LARGE_BLOCKS}

    async def _wish(self, placement: Placement, inode: Inode, large: set[int]) -> None:
        try:
            policy = await placement.policies.get(inode.policy)
            if policy is None or placement.here not in policy.read:
                self.arrivals.forget(large)
                return
            blobs = {extent.blob for extent in inode.extents if site_of(extent.blob) != placement.here}
            known = await placement.replicas.read(blobs)
            if inode.extent_pages or any(placement.here not in copies.complete for copies in known.values()):
                if await self._ask(placement, inode.ino):
                    self.arrivals.expect(large)
                else:
                    self.arrivals.forget(large)
        except MetadataError as exc:
            self.arrivals.forget(large)
            log.info("inode %#x is not asked for: %s", inode.ino, exc)

    async def _ask(self, placement: Placement, ino: int) -> bool:
        """Whether this site's agent brings it. Not where too much is asked for already, or there is no agent."""
        if ino not in self._outstanding and len(self._outstanding) >= OUTSTANDING_MAX:
            await self._look_at_oldest(placement)
            if len(self._outstanding) >= OUTSTANDING_MAX:
                self._wished.pop(ino, None)
                return False
        self._outstanding[ino] = False
        try:
            has_agent = await placement.want_here(ino)
        finally:  # who does not know what became of it finds out when it looks
            self._outstanding[ino] = True
        if not has_agent:
            self._outstanding.pop(ino, None)
        return has_agent

    async def _look_at_oldest(self, placement: Placement) -> None:
        now = trio.current_time()
        if now >= self._look_again_at:
            self._look_again_at = now + LOOK_AGAIN_S
            oldest = [ino for ino, is_told in self._outstanding.items() if is_told][:LOOKED_AT_MAX]
            still = await placement.still_wanted(oldest)
            for ino in set(oldest) - still:
                self._outstanding.pop(ino, None)
