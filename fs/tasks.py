"""Several calls side by side."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import trio

from apollofs.fs.errors import BodyError

T = TypeVar("T")


async def each(call: Callable[[T], Awaitable[None]], items: Iterable[T], workers: int) -> None:
    """`call` with each item, by at most so many tasks. The first BodyError ends the others and is raised itself, not as
    a group."""
    errors: list[BodyError] = []
    left = iter(items)

    async def worker() -> None:
        try:
            for item in left:
                await call(item)
        except BodyError as exc:
            errors.append(exc)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(workers):
            nursery.start_soon(worker)
    if errors:
        raise errors[0]
