"""Work on many things, by a few tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import trio

T = TypeVar("T")


async def share_out(
    work: Callable[[T], Awaitable[None]], items: Iterable[T], workers: int, raised: tuple[type[Exception], ...]
) -> None:
    """`work` on each item, by so many tasks; an item is taken when a task is free for it, in order.

    The first error of the kinds `raised` ends the others and is raised itself, not as a group.
    """
    errors: list[Exception] = []
    waiting = iter(items)

    async def worker() -> None:
        try:
            for item in waiting:
                await work(item)
        except raised as exc:
            errors.append(exc)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(workers):
            nursery.start_soon(worker)
    if errors:
        raise errors[0]
