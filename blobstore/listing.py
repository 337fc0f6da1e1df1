"""Ending a listing early without leaving a half-run generator to the garbage collector."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import cast

from .port import BlobStat


def closing(found: AsyncIterator[BlobStat]) -> AbstractAsyncContextManager[AsyncGenerator[BlobStat, None]]:
    """Close `found` at the end of the block. Every store's `list` is an async generator, as the contract suite checks;
    the port names less, so that callers need not care.
    """
    return aclosing(cast("AsyncGenerator[BlobStat, None]", found))
