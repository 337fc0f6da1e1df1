"""Errors that nurseries wrap in groups, as themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from apollofs.fs.user_error import leaves


@contextmanager
def ungrouped() -> Iterator[None]:
    """One error that comes in groups leaves as itself: callers name what they expect."""
    try:
        yield
    except BaseExceptionGroup as group:
        found = leaves(group)
        if len(found) > 1 or isinstance(found[0], trio.Cancelled):
            raise
        raise found[0] from found[0].__cause__
