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
"""How long an agent may take to begin with a blob, and then from one block to the next that this mount reads; and this
site's store to answer."""
EXPECTED_S = 60.0
"""When nothing of a blob was read for so long, it is as any other."""
PAUSE_FIRST_S, PAUSE_MAX_S = 0.05, 0.5
BLOBS_MAX = 4096


class NotComing(Exception):
    """The bytes are to be read as if nobody brought them; `trouble`: this site's store did not answer in time."""

    def __init__(self, trouble: str = "") -> None:
        super().__init__(trouble)
        self.trouble = trouble


class Arrivals:
    """Of one mount."""

    def __init__(self) -> None:
        self._heard: dict[int, float] = {}
        """When something was last heard of a blob that is expected; by trio's clock."""

    def expect(self, blobs: Iterable[int]) -> None:
        """From now on these are read at this site, as they come."""
        for blob in blobs:
            self._heard.pop(blob, None)
            self._heard[blob] = trio.current_time()
        while len(self._heard) > BLOBS_MAX:
            self._heard.pop(next(iter(self._heard)))

    def forget(self, blobs: Iterable[int]) -> None:
        """Nobody brings them."""
        for blob in blobs:
            self._heard.pop(blob, None)

    def expects(self, blob: int) -> bool:
        return trio.current_time() < self._heard.get(blob, -EXPECTED_S) + EXPECTED_S

    async def read(self, blob: int, read: Callable[[], Awaitable[T]]) -> T:
        """What `read` finds at this site of a blob that is expected, as soon as it is there. NotComing."""
        began, pause_s = trio.current_time(), PAUSE_FIRST_S
        why = ""
        while blob in self._heard:
            try:
                with trio.fail_after(STALL_S):
                    found = await read()
            except MissingBlob:
                if trio.current_time() >= max(began, self._heard.get(blob, 0.0)) + STALL_S:
                    log.info("blob %#x does not come to this site in time", blob)
                    break
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_MAX_S)
            except (BodyError, UserError, MetadataError, trio.TooSlowError) as exc:
                why = str(exc) or f"no answer within {STALL_S:g} s"
                break
            else:
                if blob in self._heard:
                    self.expect([blob])
                return found
        self.forget([blob])
        raise NotComing(why)
