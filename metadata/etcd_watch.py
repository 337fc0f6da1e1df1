"""Watches: all of a store share one stream to one endpoint, and each goes on by itself after any break.

Rules
1. A watch remembers the next revision that it owes its consumer. Whatever happens to the stream, the endpoint or the
   server's side of the watch, it is created anew from there.
2. It asks the server to start one revision earlier and drops what it has seen. A compaction at revision R keeps the
   state at R but not the deletions made at R; asked for R - 1, the server says `compacted` instead of leaving them out.
3. Nothing grows without bound: a consumer that lags has its watch taken from the server (and from the shared stream)
   until it has caught up with what is buffered here.
4. A batch ends at the end of a revision. A response that the server has split may end in the middle of one; that
   revision waits until its rest has come.
5. Only consumers do work: whoever waits for a batch opens the stream if there is none. If there is one, a watch begins
   at the server as it is entered.
6. A watch that ends at a revision is taken from the server as soon as all up to that has come.

The stream has two threads, whatever the number of watches: gRPC's, which sends, and a reader.
"""

from __future__ import annotations

import itertools
import logging
import queue
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import trio

from apollofs.metadata.errors import Compacted, StoreAuthFailed, StoreError, StoreMisuse, StoreUnavailable
from apollofs.metadata.etcd_client import Endpoint, EtcdClient
from apollofs.metadata.etcd_codec import decode_events
from apollofs.metadata.etcd_connection import Connection, Metadata
from apollofs.metadata.etcd_errors import classify, classify_status
from apollofs.metadata.etcdrpc import rpc_pb2 as rpc
from apollofs.metadata.store import NOW, Event, WatchBatch

LOG = logging.getLogger(__name__)
BUFFER_BYTES_MAX = 4 << 20
"""What one watch may hold for its consumer before it is taken from the server; one response more is let in."""
EVENT_OVERHEAD_BYTES = 200
BACKOFF_FIRST_S = 0.02
BACKOFF_MAX_S = 1.0
JOIN_DEADLINE_S = 5.0
ANY_WATCH = -1
"""etcd 3.5 answers a refused creation with this number instead of ours."""


@dataclass(slots=True)
class _Batch:
    batch: WatchBatch
    size_bytes: int


@dataclass(eq=False)
class _Watch:
    """One consumer's watch. `number` is its name at the server, new each time it is created there; 0: not there.
    `next_revision` NOW: it has not begun; the server then starts after the revision with which it says `created`."""

    key: bytes
    range_end: bytes
    next_revision: int
    last_revision: int = 0
    """After which the consumer wants nothing; 0: it does not end."""
    number: int = 0
    created: bool = False
    denied: int = 0
    failure: StoreError | None = None
    buffer: deque[_Batch] = field(default_factory=deque)
    buffered_bytes: int = 0
    unfinished: list[Event] = field(default_factory=list)
    """Events of a revision of which the rest is still to come."""
    changed: trio.Event = field(default_factory=trio.Event)

    def wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    @property
    def is_over(self) -> bool:
        """All that is owed has come."""
        return 0 < self.last_revision < self.next_revision

    def take(self) -> WatchBatch | None:
        if not self.buffer:
            return None
        first = self.buffer.popleft()
        self.buffered_bytes -= first.size_bytes
        return first.batch

    def add(self, events: list[Event], more_to_come: bool) -> None:
        """Queue the revisions that are complete."""
        if events and events[0].kv.mod_revision < self.next_revision:
            events = [event for event in events if event.kv.mod_revision >= self.next_revision]
        if not self.unfinished:
            self.unfinished = events
        else:
            self.unfinished += events
        if not self.unfinished:
            return
        last = self.unfinished[-1].kv.mod_revision
        whole = self.unfinished
        rest: list[Event] = []
        if more_to_come:
            whole = [event for event in self.unfinished if event.kv.mod_revision < last]
            rest = self.unfinished[len(whole) :]
        self.unfinished = rest
        if whole:
            self._queue(WatchBatch(whole[-1].kv.mod_revision, tuple(whole)))

    def progress(self, revision: int) -> None:
        """The server has sent everything up to `revision`."""
        if revision >= self.next_revision:
            self._queue(WatchBatch(revision, ()))

    def _queue(self, batch: WatchBatch) -> None:
        batch = batch.until(self.last_revision)
        size = sum(EVENT_OVERHEAD_BYTES + len(event.kv.key) + len(event.kv.value) for event in batch.events)
        self.buffer.append(_Batch(batch, size))
        self.buffered_bytes += size
        self.next_revision = batch.revision + 1


class _Stream:
    """One Watch call: requests go in by a queue, responses come to `on_response` in the trio thread, one at a time.

    The reader waits until a response has been handled before it reads the next, and gRPC's own window holds back the
    server, so nothing piles up here.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        metadata: Metadata,
        on_response: Callable[[_Stream, Any], None],
        on_end: Callable[[_Stream, BaseException | None], None],
    ) -> None:
        self.endpoint = endpoint
        self.connection: Connection = endpoint.connection
        self.metadata = metadata
        self.over = False
        self._on_response = on_response
        self._on_end = on_end
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._trio = trio.lowlevel.current_trio_token()
        self._call = self.connection.watch(iter(self._requests.get, None), metadata=metadata)
        self._reader = threading.Thread(target=self._read, name="etcd-watch", daemon=True)
        self._reader.start()

    def send(self, request: Any) -> None:
        self._requests.put(request)

    def cancel(self) -> None:
        """End the call; the reader ends soon after."""
        self.over = True
        self._requests.put(None)
        self._call.cancel()

    async def join(self) -> None:
        """Wait for the reader, a bounded time."""
        await trio.to_thread.run_sync(self._reader.join, JOIN_DEADLINE_S, abandon_on_cancel=True)

    def _read(self) -> None:
        """The reader's thread."""
        error: BaseException | None = None
        try:
            for response in self._call:
                trio.from_thread.run_sync(self._on_response, self, response, trio_token=self._trio)
        except trio.RunFinishedError:
            self._call.cancel()
        except Exception as exc:  # noqa: BLE001 - whatever it is, the watches are told
            error = exc
        self._requests.put(None)
        try:
            self._trio.run_sync_soon(self._on_end, self, error)
        except trio.RunFinishedError:
            pass  # nobody is left to be told


class _Batches:
    """The iterator that a consumer has. Whoever is cancelled while waiting for a batch may ask again."""

    def __init__(self, hub: WatchHub, watch: _Watch) -> None:
        self._hub = hub
        self._watch = watch
        self._backoff_s = BACKOFF_FIRST_S

    def __aiter__(self) -> AsyncIterator[WatchBatch]:
        return self

    async def __anext__(self) -> WatchBatch:
        await trio.lowlevel.checkpoint()
        watch = self._watch
        while True:
            batch = watch.take()
            if batch is not None:
                self._backoff_s = BACKOFF_FIRST_S
                return batch
            if watch.is_over:
                raise StopAsyncIteration
            if watch.failure is not None:
                raise watch.failure
            if self._hub.closed:
                raise StoreUnavailable("the store has been closed")
            if watch.number:
                await watch.changed.wait()
            elif not await self._attached():
                await trio.sleep(self._backoff_s * (0.5 + random.random()))
                self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)

    async def _attached(self) -> bool:
        """Create the watch at a server and wait until it says something. False: try again later."""
        watch = self._watch
        try:
            await self._hub.attach(watch)
        except StoreUnavailable as exc:
            LOG.info("a watch waits for a server: %s", exc)
            return False
        while watch.number and not watch.created and not watch.buffer:
            await watch.changed.wait()
        return bool(watch.number or watch.buffer or watch.failure)


class WatchHub:
    """All watches of one store."""

    def __init__(self, client: EtcdClient) -> None:
        self._client = client
        client.on_leave = self._on_leave
        self._numbers = itertools.count(1)
        self._watches: dict[int, _Watch] = {}
        """Those at the server, in the order of creation, by their number there."""
        self._stream: _Stream | None = None
        self._opening = trio.Lock()
        self.closed = False
        """Set once, by `aclose`."""

    @asynccontextmanager
    async def watch(
        self, key: bytes, range_end: bytes, start_revision: int, last_revision: int
    ) -> AsyncIterator[AsyncIterator[WatchBatch]]:
        """See the port. Leaving the block takes the watch from the server."""
        if start_revision < NOW or not key:
            raise StoreMisuse("a watch needs a key and a revision to start from")
        watch = _Watch(key, range_end, start_revision, last_revision)
        if self._stream is not None and not self._stream.over:
            self._create(self._stream, watch)
        try:
            yield _Batches(self, watch)
        finally:
            self._detach(watch)

    async def aclose(self) -> None:
        """End the stream; consumers that wait get StoreUnavailable."""
        self.closed = True
        for watch in list(self._watches.values()):
            self._detach(watch)
            watch.wake()
        if self._stream is not None:
            self._stream.cancel()
            await self._stream.join()

    # -- at the server -------------------------------------------------------------------------------------------------

    async def attach(self, watch: _Watch) -> None:
        """Create the watch at the server, from the revision that it owes."""
        async with self._opening:
            stream = self._stream
            if stream is None or stream.over:
                endpoint = await self._client.serving()
                stream = _Stream(endpoint, self._client.metadata, self._on_response, self._on_end)
                self._stream = stream
            elif watch.denied:
                await self._client.renew_token(stream.metadata)
                if stream.metadata is not self._client.metadata:
                    self._break(stream)
                    endpoint = await self._client.serving()
                    stream = _Stream(endpoint, self._client.metadata, self._on_response, self._on_end)
                    self._stream = stream
        if self.closed:
            stream.cancel()
            raise StoreUnavailable("the store has been closed")
        self._create(stream, watch)

    def _create(self, stream: _Stream, watch: _Watch) -> None:
        watch.number = next(self._numbers)
        watch.created = False
        watch.unfinished = []
        self._watches[watch.number] = watch
        create = rpc.WatchCreateRequest(
            key=watch.key,
            range_end=watch.range_end,
            start_revision=watch.next_revision and max(1, watch.next_revision - 1),
            progress_notify=True,
            fragment=True,
            watch_id=watch.number,
        )
        stream.send(rpc.WatchRequest(create_request=create))

    def _detach(self, watch: _Watch) -> None:
        """Take the watch from the server. What is buffered stays."""
        if not watch.number:
            return
        cancel = rpc.WatchCancelRequest(watch_id=watch.number)
        if self._stream is not None and not self._stream.over:
            self._stream.send(rpc.WatchRequest(cancel_request=cancel))
        self._forget(watch)

    def _forget(self, watch: _Watch) -> None:
        self._watches.pop(watch.number, None)
        watch.number = 0
        watch.unfinished = []

    # -- the stream's side; plain calls in the trio thread ------------------------------------------------------------

    def _on_response(self, stream: _Stream, response: Any) -> None:
        if stream is not self._stream or stream.over:
            return
        watch = self._watches.get(response.watch_id)
        if watch is None and response.watch_id == ANY_WATCH and response.canceled:
            watch = next((each for each in self._watches.values() if not each.created), None)
        if watch is None:
            return  # cancelled by us a moment ago
        if response.canceled:
            self._on_cancelled(stream, watch, response)
        elif response.created:
            watch.created = True
            watch.denied = 0
            if watch.next_revision == NOW:
                watch.progress(response.header.revision)
        elif response.events:
            watch.add(decode_events(response.events), response.fragment)
        elif not response.fragment:
            watch.progress(response.header.revision)
        if watch.number and (watch.is_over or watch.buffered_bytes > BUFFER_BYTES_MAX):
            self._detach(watch)
        watch.wake()

    def _on_cancelled(self, stream: _Stream, watch: _Watch, response: Any) -> None:
        """The server has ended a watch."""
        self._forget(watch)
        if response.compact_revision:
            first = response.compact_revision + 1
            watch.failure = Compacted(f"history before revision {first} is no longer kept", first)
            return
        reason = classify_status(grpc.StatusCode.UNKNOWN, response.cancel_reason, str(stream.endpoint))
        if isinstance(reason.error, StoreAuthFailed):
            # The token of a long-lived stream expires; a new stream has a new one. Refused again, it is a real no.
            watch.denied += 1
            if watch.denied > 1 or len(self._client.metadata) == 1:
                watch.failure = reason.error
        else:
            LOG.info("a watch was ended: %s", reason.text)

    def _on_leave(self, connection: Connection) -> None:
        if self._stream is not None and not self._stream.over and self._stream.connection is connection:
            self._break(self._stream)

    def _on_end(self, stream: _Stream, error: BaseException | None) -> None:
        if stream.over:
            return
        text = f"etcd {stream.endpoint}: watch stream ended"
        if isinstance(error, grpc.RpcError):
            text = classify(error, str(stream.endpoint)).text
        elif error is not None:
            LOG.error("the watch stream failed", exc_info=error)
        self._client.leave(stream.endpoint, stream.connection, text)
        self._break(stream)

    def _break(self, stream: _Stream) -> None:
        """End the stream; every watch on it will be created again by its consumer."""
        stream.cancel()
        for watch in list(self._watches.values()):
            self._forget(watch)
            watch.wake()
