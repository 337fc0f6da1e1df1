"""Policies that make commits wait: the bytes are at the named sites, or at any N, before fsync or close returns.

While a blob is written its blocks go to these sites at the same time (`begin`); before the transaction what is missing
somewhere is copied (`settle`), and the transaction says who has all of it. So a mount needs no agent for this. Of "any
N" the nearest sites are taken; one that fails, or takes longer than `BlobSource.haste_s` for a block, is replaced by
the next. Slow ones are waited for when all have been tried. Of files that share a blob and commit at the same time one
copies it to a site; the others wait for what becomes of that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.fs.blob_copies import CopyLimits, copy_blob, referred_blocks
from apollofs.fs.blobs import BlobSource, site_of
from apollofs.fs.errors import BodyError, BodyUnavailable
from apollofs.fs.known_copies import KnownCopies
from apollofs.fs.user_error import UserError
from apollofs.metadata.errors import MetadataError
from apollofs.metadata.placement import Placement
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import Extent

log = logging.getLogger(__name__)
BLOCKS_IN_MEMORY = 8
PATIENCE_S = 60.0
"""How long a block may take to the sites of "any N" when none was quick."""
BLOBS_MAX = 4096
"""Blobs whose copies by this mount are remembered."""

Copied = tuple[tuple[int, tuple[int, ...]], ...]
"""(blob, sites that have all of it besides its own): `BodyChange.copies`."""


@dataclass(slots=True)
class _Flight:
    """A blob that is being copied to a site; `error`: why it did not get there. Without one and not there: whoever
    copied was cancelled. `put_s`: how long a block might take."""

    put_s: float
    ended: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None


class CommitCopies:
    """Of one mount; `placement` None: there is no policy, ever."""

    def __init__(self, source: BlobSource, placement: Placement | None, known: KnownCopies | None) -> None:
        self._source = source
        self._placement = placement
        self._known = known
        self._sites: tuple[int, ...] = ()
        self._limits = CopyLimits(trio.CapacityLimiter(BLOCKS_IN_MEMORY), _at_once)
        self._have: dict[int, set[int]] = {}
        """Blob -> the other sites that have all of it, by what this mount has done."""
        self._flights: dict[tuple[int, int], _Flight] = {}
        """By blob and site: no more of them than commits under way."""

    def begin(self, policy_number: int, blob: int) -> None:
        """The blob is about to be written for a file with this policy: put its blocks elsewhere at the same time. No
        request, and no checkpoint: goes by what is known of the policy."""
        policy = self._placement.policies.peek(policy_number) if self._placement is not None and policy_number else None
        if policy is None or not policy.holds_up_commits:
            return
        home = site_of(blob)
        chosen = {site for site in policy.commit if site != home}
        for site in self._source.nearness.order(site for site in self._sites if site != home):
            if 1 + len(chosen) < policy.commit_any:
                chosen.add(site)
        self._source.spread(blob, chosen)

    async def settle(self, policy_number: int, stored: Sequence[Extent]) -> Copied:
        """Have the blobs of these extents, which are all at their own site, where the policy wants them; where they are
        then. Nothing is asked for where there is no policy.

        Raises BodyUnavailable, BlobStoreFull, CorruptBody, and what reading the policy or a site's record raises.
        """
        if self._placement is None or not policy_number or not stored:
            return ()
        policy = await self._placement.policies.get(policy_number)
        if policy is None or not policy.holds_up_commits:
            return ()
        self._sites = await self._placement.site_ids()
        found = []
        for blob in {extent.blob for extent in stored}:
            have = self._have.pop(blob, set())
            have |= self._source.end_spread(blob)
            self._have[blob] = have  # the same set for all that commit with it now
            await self._bring(policy, [extent for extent in stored if extent.blob == blob], have)
            found.append((blob, tuple(sorted(have))))
            if self._known is not None:
                self._known.note(blob, tuple(sorted(have)))
        while len(self._have) > BLOBS_MAX:
            self._have.pop(next(iter(self._have)))
        return tuple(found)

    async def _bring(self, policy: Policy, stored: Sequence[Extent], have: set[int]) -> None:
        """`stored`: of one blob."""
        blob = stored[0].blob
        home = site_of(blob)
        for site in policy.commit:
            if site != home and site not in have:
                await self._copy(stored, site, have)
        for put_s in (self._source.haste_s, PATIENCE_S):
            others = self._source.nearness.order(site for site in self._sites if site != home and site not in have)
            for site in others:
                if 1 + len(have) >= policy.commit_any:
                    return
                try:
                    await self._copy(stored, site, have, put_s)
                except (BodyError, BlobStoreError, MetadataError) as exc:
                    log.info("blob %#x is not at site %d yet: %s", blob, site, exc)
                    self._source.nearness.troubled(site, str(exc))
        if 1 + len(have) < policy.commit_any:
            raise BodyUnavailable(f"{1 + len(have)} sites have the bytes; the policy wants {policy.commit_any}")

    async def _copy(self, stored: Sequence[Extent], site: int, have: set[int], put_s: float = math.inf) -> None:
        """Have the blob at `site`, whoever copies it. Raises what that one's copying raises."""
        blob = stored[0].blob
        while site not in have:
            flight = self._flights.get((blob, site))
            if flight is None:
                await self._fly(stored, site, have, put_s)
                return
            await flight.ended.wait()
            if flight.error is not None and flight.put_s >= put_s:
                raise copy(flight.error) from flight.error

    async def _fly(self, stored: Sequence[Extent], site: int, have: set[int], put_s: float) -> None:
        blob, length = stored[0].blob, stored[0].blob_length
        referred = referred_blocks(blob, stored, self._source.block_bytes)
        flight = self._flights[blob, site] = _Flight(put_s)
        try:
            limits = replace(self._limits, put_s=put_s)
            await copy_blob(self._source, blob, length, referred, site, limits)
            have.add(site)
        except UserError as exc:
            flight.error = BodyUnavailable(f"site {site}: {exc}")
            raise flight.error from exc
        except (BodyError, BlobStoreError, MetadataError) as exc:
            flight.error = exc
            raise
        finally:
            del self._flights[blob, site]
            flight.ended.set()


async def _at_once(_: int) -> None:
    await trio.lowlevel.checkpoint()
