"""The proxy that fault tests trust does what it says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from tests.support.tcp_proxy import TcpProxy

BOUND_S = 20


class Echo:
    """Answers each line with itself, and remembers it."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint: tuple[str, int] = self.listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return  # closed by the test
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as stream:
            try:
                for line in stream:
                    self.heard.append(line)
                    stream.write(line)
                    stream.flush()
            except OSError:
                return  # the proxy's side was reset


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    with closing(server.listener):
        yield server


@pytest.fixture
def proxy(echo: Echo) -> Iterator[TcpProxy]:
    with TcpProxy.started(echo.endpoint) as running:
        yield running


@contextmanager
def connected(proxy: TcpProxy) -> Iterator[socket.socket]:
    with socket.create_connection(proxy.endpoint, timeout=BOUND_S) as connection:
        yield connection


def ask(connection: socket.socket, line: bytes) -> bytes:
    connection.sendall(line + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        piece = connection.recv(100)
        if not piece:
            raise ConnectionResetError
        answer += piece
    return answer[:-1]


def test_it_forwards_both_ways(proxy: TcpProxy) -> None:
    with connected(proxy) as one, connected(proxy) as other:
        assert (ask(one, b"1"), ask(other, b"2"), ask(one, b"x" * 200_000)) == (b"1", b"2", b"x" * 200_000)
    proxy.delay_ms(5)
    with connected(proxy) as one:
        assert ask(one, b"3") == b"3"


def test_a_swallowed_reply(proxy: TcpProxy, echo: Echo) -> None:
    with connected(proxy) as connection:
        assert ask(connection, b"1") == b"1"
        proxy.swallow_replies(times=1)
        with pytest.raises(ConnectionError):
            ask(connection, b"2")
    with connected(proxy) as connection:
        assert ask(connection, b"3") == b"3"
    assert echo.heard == [b"1\n", b"2\n", b"3\n"]
    assert proxy.cuts == 1


def test_a_black_hole_holds_and_lets_go(proxy: TcpProxy, echo: Echo) -> None:
    with connected(proxy) as connection:
        assert ask(connection, b"1") == b"1"
        proxy.blackhole()
        connection.sendall(b"2\n")
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.recv(100)
        assert echo.heard == [b"1\n"]
        connection.settimeout(BOUND_S)
        proxy.heal()
        assert connection.recv(100) == b"2\n"


def test_dropped_and_refused_connections(proxy: TcpProxy) -> None:
    with connected(proxy) as connection:
        assert ask(connection, b"1") == b"1"
        proxy.drop_connections()
        with pytest.raises(ConnectionError):
            ask(connection, b"2")
    proxy.refuse()
    with pytest.raises(ConnectionError), connected(proxy) as connection:  # while it connects, or after
        ask(connection, b"3")
    proxy.heal()
    with connected(proxy) as connection:
        assert ask(connection, b"4") == b"4"
