"""The key-value store for programs without trio: a thread that runs it, and calls that wait for their answers.

Any thread may call; calls of several threads go on side by side. A forked child has no such thread: every call there is
a RuntimeError, and the parent goes on undisturbed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, suppress
from typing import TypeVar

import trio

from apollofs.fs.kv import PAGE_MAX, Change, Client, Key, KeyEvent, KeyValues, KeyWatch, Page, Value
from apollofs.metadata.store import NOW

T = TypeVar("T")


class _Runner:
    """A thread with a trio run in which a client is open."""

    def __init__(self, opening: Callable[[], AbstractAsyncContextManager[Client]]) -> None:
        self._opening = opening
        self._pid = os.getpid()
        self._begun = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop: trio.Event | None = None
        self._failure: BaseException | None = None
        self._ready = False
        self.client: Client
        # a program that ends without leaving the block must not wait for it: the session ends with its lease
        self._thread = threading.Thread(target=self._run, name="apollofs-kv", daemon=True)

    def start(self) -> None:
        """Returns when the client is open. Raises what `opening` does."""
        self._thread.start()
        self._begun.wait()
        if not self._ready:
            assert self._failure is not None
            raise self._failure

    def stop(self) -> None:
        """End the session and the thread. In a forked child: nothing. Raises what has ended the run before."""
        if os.getpid() != self._pid:
            return
        if self._stop is not None:
            self.soon(self._stop.set)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` there and wait for it."""
        if os.getpid() != self._pid:
            raise RuntimeError("the volume was opened before this process was forked: open it here anew")

        async def run() -> T:
            return await work()

        try:
            return trio.from_thread.run(run, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled) as exc:
            raise RuntimeError("the volume is closed") from (self._failure or exc)

    def soon(self, work: Callable[[], object]) -> None:
        """Have `work` done there before all calls that come later. Waits for nothing; after the end nothing is done."""
        if self._token is not None and os.getpid() == self._pid:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(work)

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as exc:  # noqa: BLE001  (whatever it is, those who wait are told)
            self._failure = exc
        finally:
            self._begun.set()

    async def _main(self) -> None:
        self._stop = trio.Event()
        async with self._opening() as self.client:
            self._token = trio.lowlevel.current_trio_token()
            self._ready = True
            self._begun.set()
            await self._stop.wait()


class SyncClient:
    """As `kv.Client`; made by `api.open_volume_sync`."""

    def __init__(self, runner: _Runner) -> None:
        self._runner = runner

    def kv(self, directory: str | bytes, *, create: bool = False) -> SyncKeyValues:
        return SyncKeyValues(self._runner, self._runner.call(lambda: self._runner.client.kv(directory, create=create)))

    def transaction(self, changes: Sequence[Change]) -> int:
        return self._runner.call(lambda: self._runner.client.transaction(changes))


class SyncKeyValues:
    """As `kv.KeyValues`, method by method."""

    def __init__(self, runner: _Runner, values: KeyValues) -> None:
        self._runner = runner
        self._call = runner.call
        self._values = values
        self.change = values.change
        self.removal = values.removal
        self.unchanged = values.unchanged

    def get(self, key: Key, *, revision: int = 0) -> Value:
        return self._call(lambda: self._values.get(key, revision=revision))

    def put(self, key: Key, value: bytes, *, mode: int = 0o644) -> int:
        return self._call(lambda: self._values.put(key, value, mode=mode))

    def put_if(self, key: Key, value: bytes, revision: int, *, mode: int = 0o644) -> int:
        return self._call(lambda: self._values.put_if(key, value, revision, mode=mode))

    def put_if_absent(self, key: Key, value: bytes, *, mode: int = 0o644) -> int:
        return self._call(lambda: self._values.put_if_absent(key, value, mode=mode))

    def delete(self, key: Key, *, revision: int | None = None) -> bool:
        return self._call(lambda: self._values.delete(key, revision=revision))

    def transaction(self, changes: Sequence[Change]) -> int:
        return self._call(lambda: self._values.transaction(changes))

    def list(self, prefix: Key = "", *, after: Key = "", limit: int = PAGE_MAX, revision: int = 0) -> Page:
        return self._call(lambda: self._values.list(prefix, after=after, limit=limit, revision=revision))

    @contextmanager
    def watch(self, prefix: Key = "", *, from_revision: int = NOW) -> Iterator[SyncKeyWatch]:
        stack = AsyncExitStack()
        watch = self._call(lambda: stack.enter_async_context(self._values.watch(prefix, from_revision=from_revision)))
        told = SyncKeyWatch(self._runner, watch)
        try:
            yield told
        finally:
            self._call(lambda: told.end(stack))


class SyncKeyWatch:
    """As `kv.KeyWatch`; the iterator waits for the next change.

    Whoever waits may be interrupted (Ctrl-C, a signal's handler that raises): the event that comes meanwhile is kept
    for the next call, and `position` is before it. Threads that share a watch wait one after the other.
    """

    def __init__(self, runner: _Runner, watch: KeyWatch) -> None:
        self._runner = runner
        self._watch = watch
        self._position = watch.position
        self._turn = threading.Lock()
        self._scope = trio.CancelScope()
        """Of the wait that is under way, or was the last one."""
        self._in_order = trio.Lock()
        """One wait that was interrupted is over before the next one begins."""
        self._kept: KeyEvent | None = None
        """Taken from the watch, and not handed out yet."""
        self._is_closed = False

    @property
    def position(self) -> int:
        return self._position

    def __iter__(self) -> SyncKeyWatch:
        return self

    def __next__(self) -> KeyEvent:
        event = self.next()
        assert event is not None
        return event

    def next(self, timeout_s: float | None = None) -> KeyEvent | None:
        """The next change; None if there is none within `timeout_s` (None: wait for it). Raises RuntimeError when the
        watch is closed."""
        with self._turn:
            self._scope = scope = trio.CancelScope()
            try:
                event, position = self._runner.call(lambda: self._wait(scope, timeout_s))
            except BaseException:
                self._runner.soon(scope.cancel)
                raise
            self._position, self._kept = position, None
            return event

    async def _wait(self, scope: trio.CancelScope, timeout_s: float | None) -> tuple[KeyEvent | None, int]:
        """The next change, which stays kept, and the position behind it."""
        with scope:
            if timeout_s is not None:
                scope.deadline = trio.current_time() + timeout_s
            async with self._in_order:
                if self._kept is None and not self._is_closed:
                    self._kept = await anext(self._watch)
        if self._is_closed:
            raise RuntimeError("the watch is closed")
        return self._kept, self._watch.position

    async def end(self, opened: AsyncExitStack) -> None:
        """Close what the watch is open in; who still waits is told."""
        self._is_closed = True
        self._scope.cancel()
        async with self._in_order:
            await opened.aclose()


@contextmanager
def open_client_sync(opening: Callable[[], AbstractAsyncContextManager[Client]]) -> Iterator[SyncClient]:
    """A client that a thread of its own keeps open until the block ends."""
    runner = _Runner(opening)
    runner.start()
    try:
        yield SyncClient(runner)
    finally:
        runner.stop()
