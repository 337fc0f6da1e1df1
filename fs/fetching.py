"""A block on its way from the store, for however many wait for it."""

from __future__ import annotations

from contextlib import suppress

import trio

from apollofs.fs.errors import BodyError, BodyUnavailable


class Fetch:
    """After `done` either `data` or `error` is there; after `ended` nothing more is done with it."""

    __slots__ = ("data", "done", "ended", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.ended = trio.Event()
        self.data: memoryview | None = None
        self.error: Exception | None = None

    def arrived(self, data: memoryview) -> None:
        self.data = data
        self.done.set()

    def tell(self, token: trio.lowlevel.TrioToken, data: memoryview) -> None:
        """From another thread: `arrived`, as soon as the program of `token` can, if it has not ended meanwhile."""
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(self.arrived, data)

    async def result(self) -> memoryview:
        """Raises what ended the fetch."""
        await self.done.wait()
        if self.data is not None:
            return self.data
        assert self.error is not None
        if isinstance(self.error, BodyError):
            # Each waiter gets an exception of its own: a shared one would collect everybody's tracebacks.
            raise type(self.error)(*self.error.args) from self.error
        raise self.error

    def end(self) -> None:
        """The fetch has ended, also if it was cancelled."""
        if self.data is None and self.error is None:
            self.error = BodyUnavailable("the mount is ending")
        self.done.set()
        self.ended.set()
