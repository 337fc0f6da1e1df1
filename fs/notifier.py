"""What the kernel is told without its asking: to drop what it was given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import trio

log = logging.getLogger(__name__)
T = TypeVar("T")


class Notifier(Protocol):
    """Of one mount; `wire_device.Device`. All but `invalidate_attributes` and `inc_epoch` may wait for locks in the
    kernel. Raises OSError when the mount has ended."""

    def invalidate_attributes(self, ino: int) -> bool: ...
    def invalidate_attributes_of(self, inos: Sequence[int]) -> list[int]: ...
    def invalidate_pages_of(self, inos: Sequence[int]) -> None: ...
    def expire_entries(self, parent: int, names: Sequence[bytes]) -> None: ...
    def inc_epoch(self) -> bool: ...


async def in_thread(call: Callable[..., T], limiter: trio.CapacityLimiter, *args: Any) -> T | None:
    """`call` in a thread; None if the mount has ended meanwhile, which leaves nothing to drop."""
    try:
        return await trio.to_thread.run_sync(partial(call, *args), abandon_on_cancel=True, limiter=limiter)
    except OSError as exc:
        log.info("the kernel takes no notifications any more: %s", exc)
        return None
