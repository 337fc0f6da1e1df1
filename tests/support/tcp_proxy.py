"""A TCP proxy that a test makes slow, deaf or treacherous while connections go through it.

    with TcpProxy.started(("127.0.0.1", 2379)) as proxy:
        ... connect to proxy.endpoint ...
        proxy.swallow_replies(times=1)

It runs in a thread of its own; every method may be called from any other thread, trio's too, and takes effect before it
returns. What it does:

- `delay_ms`: each piece of data arrives that much later, each way; order and throughput stay.
- `swallow_replies`: what the client sends reaches the server. The server's first reply to it is dropped, and then the
  client's connection is cut. The server's side stays open for a while, so that nothing makes it give up the request.
- `blackhole`: nothing gets through, either way; connections stay, and new ones are accepted. `heal` lets everything
  that has waited go on, as a network partition does when it ends.
- `drop_connections`: every connection is reset now. `refuse`: new ones are closed at once, until `heal`.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

HOST = "127.0.0.1"
CHUNK_BYTES = 64 << 10
CHUNKS_DELAYED_MAX = 4096
START_TIMEOUT_S = 10.0
CUT_AFTER_S = 0.02
"""How long both sides must have been silent before the connection is cut."""
SERVER_LINGER_S = 5.0


class _Connection:
    """One client's connection and ours to the server."""

    def __init__(self, client: trio.SocketStream, server: trio.SocketStream) -> None:
        self.client = client
        self.server = server
        self.scope = trio.CancelScope()
        self.asked = False
        """The client has sent something since replies began to be swallowed."""
        self.cut = False
        self.sent = 0
        """How many pieces the server has been sent."""

    def reset_client(self) -> None:
        """Close the client's side with a RST, as a dying host or a firewall does."""
        self.cut = True
        reset(self.client)


def reset(stream: trio.SocketStream) -> None:
    try:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # closed already
    stream.socket.close()


class TcpProxy:
    """See the module. `cuts` counts the replies that were swallowed."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._delay_s = 0.0
        self._swallow_left = 0
        self._refusing = False
        self._open = trio.Event()
        self._open.set()
        self._connections: set[_Connection] = set()
        self._scope = trio.CancelScope()
        self._ready = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread = threading.Thread(target=trio.run, args=(self._main,), name="tcp-proxy", daemon=True)
        self.endpoint = (HOST, 0)
        self.cuts = 0
        self.accepted = 0

    @classmethod
    @contextmanager
    def started(cls, target: tuple[str, int]) -> Iterator[TcpProxy]:
        """A proxy to `target` on a free loopback port; connections are cut at the end of the block."""
        proxy = cls(target)
        proxy._thread.start()
        if not proxy._ready.wait(START_TIMEOUT_S):
            raise RuntimeError("the proxy did not start")
        try:
            yield proxy
        finally:
            proxy._do(proxy._scope.cancel)
            proxy._thread.join(START_TIMEOUT_S)

    # -- what a test does --------------------------------------------------------------------------------------------

    def delay_ms(self, milliseconds: float) -> None:
        """Delay everything that is received from now on by this, each way; 0: no longer."""
        self._do(lambda: setattr(self, "_delay_s", milliseconds / 1000))

    def swallow_replies(self, times: int = 1_000_000) -> None:
        """Swallow the next `times` replies, each with its connection; then forward again. 0: stop."""
        self._do(lambda: self._arm(times))

    def blackhole(self) -> None:
        """Let nothing through until `heal`."""
        self._do(self._close_gate)

    def refuse(self) -> None:
        """Reset all connections, and close new ones at once, until `heal`."""
        self._do(self._refuse)

    def drop_connections(self) -> None:
        """Reset all connections now; new ones are welcome."""
        self._do(self._drop)

    def heal(self) -> None:
        """End of `blackhole`, `refuse`, `swallow_replies` and `delay_ms`."""
        self._do(self._heal)

    # -- in the proxy's thread ---------------------------------------------------------------------------------------

    def _do(self, change: Callable[[], object]) -> None:
        """Run `change` in the proxy's thread, and wait until it has."""
        done = threading.Event()

        def run() -> None:
            change()
            done.set()

        assert self._token is not None
        try:
            self._token.run_sync_soon(run)
        except trio.RunFinishedError:
            return
        if not done.wait(START_TIMEOUT_S):
            raise RuntimeError("the proxy's thread is stuck")

    def _arm(self, times: int) -> None:
        self._swallow_left = times
        for connection in self._connections:
            connection.asked = False

    def _close_gate(self) -> None:
        self._open = trio.Event()

    def _refuse(self) -> None:
        self._refusing = True
        self._drop()

    def _drop(self) -> None:
        for connection in list(self._connections):
            connection.reset_client()
            connection.scope.cancel()

    def _heal(self) -> None:
        self._refusing = False
        self._delay_s = 0.0
        self._arm(0)
        self._open.set()

    async def _main(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                (listener,) = await trio.open_tcp_listeners(0, host=HOST)
                self.endpoint = (HOST, listener.socket.getsockname()[1])
                self._token = trio.lowlevel.current_trio_token()
                self._ready.set()
                await trio.serve_listeners(self._serve, [listener], handler_nursery=nursery)

    async def _serve(self, client: trio.SocketStream) -> None:
        self.accepted += 1
        await self._open.wait()
        if self._refusing:
            reset(client)
            return
        try:
            server = await trio.open_tcp_stream(*self._target)
        except OSError:
            reset(client)
            return
        connection = _Connection(client, server)
        self._connections.add(connection)
        try:
            with connection.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, connection, client, server)
                    nursery.start_soon(self._pump, connection, server, client)
        finally:
            self._connections.discard(connection)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await trio.aclose_forcefully(client)
                await trio.aclose_forcefully(server)

    async def _pump(self, connection: _Connection, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        """Forward one way, until the source ends or fails; then both sides end, unless only a half was closed."""
        send, receive = trio.open_memory_channel[tuple[float, bytes]](CHUNKS_DELAYED_MAX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, connection, receive, sink)
            try:
                with send:
                    await self._read(connection, source, send)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                if not connection.cut:
                    connection.scope.cancel()

    async def _read(
        self, connection: _Connection, source: trio.SocketStream, send: trio.MemorySendChannel[tuple[float, bytes]]
    ) -> None:
        while True:
            data = await source.receive_some(CHUNK_BYTES)
            await self._open.wait()
            if source is connection.server and (connection.cut or (self._swallow_left and connection.asked)):
                await self._swallow(connection)
                return
            if not data:
                return
            await send.send((trio.current_time() + self._delay_s, data))

    async def _swallow(self, connection: _Connection) -> None:
        """A reply has begun: read it away, cut the client, and let the server finish what it does."""
        quiet = False
        while not quiet and not connection.cut:
            sent = connection.sent
            with trio.move_on_after(CUT_AFTER_S) as pause:
                if not await connection.server.receive_some(CHUNK_BYTES):
                    break
            quiet = pause.cancelled_caught and connection.sent == sent
        if not connection.cut:
            self._swallow_left = max(0, self._swallow_left - 1)
            self.cuts += 1
            connection.reset_client()
        with trio.move_on_after(SERVER_LINGER_S):
            while await connection.server.receive_some(CHUNK_BYTES):
                pass
        connection.scope.cancel()

    async def _write(
        self,
        connection: _Connection,
        receive: trio.MemoryReceiveChannel[tuple[float, bytes]],
        sink: trio.SocketStream,
    ) -> None:
        try:
            async for due, data in receive:
                await trio.sleep_until(due)
                await self._open.wait()
                if sink is connection.server and self._swallow_left:
                    connection.asked = True
                await sink.send_all(data)
                if sink is connection.server:
                    connection.sent += 1
            if not connection.cut:
                await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if not connection.cut:
                connection.scope.cancel()
