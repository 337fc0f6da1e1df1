"""What this site's agent is bringing: a file that many nodes of a site read at the same time comes from afar once.

Where a policy keeps at a site what is read there, each node that opens a file asks the site's agent for a copy
(`mount_sites.py`). A large one it then reads from its own site's store, block by block as the agent puts it there; from
afar only if nothing of it comes for a while, or if that store is in trouble.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import trio

from apollofs.fs.errors import BodyError, MissingBlob
from apollofs.fs.user_error import UserError
from apollofs.metadata.errors import MetadataError

log = logging.getLogger(__name__)
T = TypeVar("T")
STALL_S = 5.0
"""How long an agent may take to begin with a blob, and then from one block to the next that this mount reads."""
PAUSE_FIRST_S, PAUSE_MAX_S = 0.05, 0.5
BLOBS_MAX = 4096


class NotComing(Exception):
    """The bytes are to be read elsewhere."""


class Arrivals:
    """Of one mount."""

    def __init__(self) -> None:
        self._until: dict[int, float] = {}
        """By blob, trio's clock."""

    def expect(self, blobs: Iterable[int]) -> None:
        """From now on these are read at this site, as they come."""
        for blob in blobs:
            self._until.pop(blob, None)
            self._until[blob] = trio.current_time() + STALL_S
        while len(self._until) > BLOBS_MAX:
            self._until.pop(next(iter(self._until)))

    def forget(self, blobs: Iterable[int]) -> None:
        """Nobody brings them."""
        for blob in blobs:
            self._until.pop(blob, None)

    def expects(self, blob: int) -> bool:
        return blob in self._until

    async def read(self, blob: int, read: Callable[[], Awaitable[T]]) -> T:
        """What `read` finds at this site of a blob that is expected, as soon as it is there. NotComing."""
        pause_s = PAUSE_FIRST_S
        while blob in self._until:
            try:
                found = await read()
            except MissingBlob:
                if trio.current_time() >= self._until.get(blob, 0.0):
                    log.info("blob %#x does not come to this site in time", blob)
                    break
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_MAX_S)
            except (BodyError, UserError, MetadataError) as exc:
                log.info("blob %#x is not waited for at this site: %s", blob, exc)
                break
            else:
                if blob in self._until:
                    self.expect([blob])
                return found
        self.forget([blob])
        raise NotComing
