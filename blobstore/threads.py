"""How the adapters leave the event loop: blocking calls in threads, behind the adapter's own limiter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from .errors import BlobStoreTimeout

T = TypeVar("T")


async def run_blocking(
    call: Callable[[], T], *, limiter: trio.CapacityLimiter, deadline_s: float, what: str, abandon: bool = True
) -> T:
    """Run `call` in a thread, for at most `deadline_s` seconds, waiting for a free thread included.

    `abandon`: on cancellation and at the deadline the thread is left to end by itself (it keeps its place in the
    limiter until then, so stuck threads are bounded). So `call` may only hold what nobody changes afterwards; where it
    holds a caller's mutable buffer pass False, and cancellation waits for the call.

    Raises `BlobStoreTimeout`, and what `call` raises.
    """
    with trio.move_on_after(deadline_s) as scope:
        return await trio.to_thread.run_sync(call, limiter=limiter, abandon_on_cancel=abandon)
    assert scope.cancelled_caught
    raise BlobStoreTimeout(f"{what}: no answer within {deadline_s:g} s")
