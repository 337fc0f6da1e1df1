"""Where blobs have copies, as a mount remembers it: a hint for reading, never more than a little old.

A copy goes only with its blob, so what was once known to be somewhere is there as long as anybody reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from apollofs.metadata.errors import MetadataError
from apollofs.metadata.replicas import Replicas

log = logging.getLogger(__name__)
BLOBS_MAX = 65_536
SOME_S, NONE_S = 60.0, 5.0
"""How long it is remembered where copies are, and that there are none."""


class KnownCopies:
    """One request for each blob that is asked for, now and then."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._known: dict[int, tuple[tuple[int, ...], float]] = {}

    async def of(self, blob: int) -> Sequence[int]:
        """The sites that have all of a blob besides its own. Where etcd does not answer, what was known before."""
        sites, until = self._known.get(blob, ((), 0.0))
        if trio.current_time() < until:
            return sites
        try:
            sites = (await self._replicas.read([blob]))[blob].complete
        except MetadataError as exc:
            log.info("where blob %#x has copies can't be asked: %s", blob, exc)
            return sites
        self.note(blob, sites)
        return sites

    def note(self, blob: int, sites: tuple[int, ...]) -> None:
        """It is known that these sites have it."""
        self._known.pop(blob, None)
        self._known[blob] = (sites, trio.current_time() + (SOME_S if sites else NONE_S))
        while len(self._known) > BLOBS_MAX:
            self._known.pop(next(iter(self._known)))
