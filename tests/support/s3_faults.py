"""A broken S3 server on loopback: a proxy before a real one that spoils chosen requests.

    with FaultyS3.serving(gateway.endpoint) as faulty:
        faulty.add(Fault("status", method="GET", status=503, code="SlowDown", times=2))
        ... use faulty.endpoint ...

Signatures stay valid, because the client's Host header is passed on. Faults are matched in the order of `add`; each
spoils its next `times` matching requests, then is used up. Without an upstream everything unmatched is a 404.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

Kind: TypeAlias = Literal[
    "status",  # an error answer; the request never reaches the upstream
    "hang",  # no answer at all, until the client gives up
    "reset",  # the connection is reset instead of an answer
    "lost_reply",  # the upstream does it, then the connection is reset
    "truncate",  # half of the body, then an orderly end of the connection
    "reset_body",  # half of the body, then a reset
    "stall",  # half of the body, then nothing, until the client gives up
    "flip",  # one bit of the body is wrong
    "short",  # a complete answer that holds half of the body
    "ignore_range",  # the right bytes, but as if they were the whole object: status 200
]


@dataclass
class Fault:
    kind: Kind
    method: str = ""
    """Empty: any."""
    path: str = ""
    """A part of the request's path and query; empty: any."""
    times: int = 1
    status: int = 500
    code: str = "InternalError"
    position: int = 0
    """Of `flip`: the byte of the body, from its end if negative."""

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method in ("", method) and self.path in path


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    range: str
    fault: str
    """The kind of the fault that hit it, or empty."""


class FaultyS3:
    """The server. `requests` holds what came, oldest first (the last 1000)."""

    def __init__(self, upstream: str) -> None:
        self.requests: deque[Request] = deque(maxlen=1000)
        self._upstream = urlsplit(upstream)
        self._faults: list[Fault] = []
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self)

    @classmethod
    @contextmanager
    def serving(cls, upstream: str = "") -> Iterator[FaultyS3]:
        """Serve until the end of the block; then every connection is closed and every thread has ended."""
        faulty = cls(upstream)
        thread = threading.Thread(target=faulty._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield faulty
        finally:
            faulty._server.shutdown()
            faulty.disconnect()
            thread.join()
            faulty._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, *faults: Fault) -> None:
        with self._lock:
            self._faults.extend(faults)

    def clear(self) -> None:
        """Forget the faults and the requests."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    def count(self, method: str) -> int:
        """How many requests of this method came."""
        return sum(request.method == method for request in list(self.requests))

    def choose(self, method: str, path: str, range_: str) -> Fault | None:
        """Record a request, and use up one `times` of the first fault that it matches."""
        with self._lock:
            fault = next((each for each in self._faults if each.matches(method, path)), None)
            if fault is not None:
                fault.times -= 1
            self.requests.append(Request(method, path, range_, fault.kind if fault else ""))
            return fault

    def forward(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        if not self._upstream.hostname:
            return 404, [("Content-Type", "application/xml")], error_body("NoSuchKey")
        connection = http.client.HTTPConnection(self._upstream.hostname, self._upstream.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for key, value in headers.items():
                if key.lower() not in ("connection", "expect"):
                    connection.putheader(key, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def opened(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)

    def disconnect(self) -> None:
        """End every connection, also those that are idle."""
        with self._lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the client was faster


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], faulty: FaultyS3) -> None:
        self.faulty = faulty
        super().__init__(address, _Handler)

    def shutdown_request(self, request: Any) -> None:
        """Close without a shutdown first: so a connection that lingers for no time is reset."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.faulty.opened(self.connection)

    def finish(self) -> None:
        self.server.faulty.closed(self.connection)
        super().finish()

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline:
            self.close_connection = True
            return
        if self.parse_request():
            self._serve()

    def _serve(self) -> None:
        faulty = self.server.faulty
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = faulty.choose(self.command, self.path, self.headers.get("Range", ""))
        kind = fault.kind if fault else ""
        if kind == "hang":
            self._wait_for_client()
        elif kind == "reset":
            self._reset()
        elif fault is not None and kind == "status":
            answer = b"" if self.command == "HEAD" else error_body(fault.code)
            self._answer(fault.status, [("Content-Type", "application/xml")], answer, len(answer))
        else:
            status, headers, answer = faulty.forward(self.command, self.path, self.headers, body)
            self._spoil(fault, status, headers, answer)

    def _spoil(self, fault: Fault | None, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        kind = fault.kind if fault else ""
        if kind == "lost_reply":
            self._reset()
            return
        if fault is not None and kind == "flip":
            spoilt = bytearray(body)
            spoilt[fault.position] ^= 1
            body = bytes(spoilt)
        if kind == "ignore_range":
            # Range is signed, so the upstream can't be asked for more: what came is passed off as the whole.
            status, headers = 200, [(key, value) for key, value in headers if key.lower() != "content-range"]
        declared = len(body)
        if kind in ("truncate", "reset_body", "stall", "short"):
            body = body[: len(body) // 2]
        if kind == "short":
            declared = len(body)
        if self.command == "HEAD":
            declared = int(dict(headers).get("Content-Length", 0))
        self._answer(status, headers, body, declared)
        if kind == "truncate":
            self.close_connection = True
        elif kind == "reset_body":
            self._reset()
        elif kind == "stall":
            self._wait_for_client()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, declared: int) -> None:
        self.send_response_only(status)
        for key, value in headers:
            if key.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(declared))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _wait_for_client(self) -> None:
        """Until the client, or `serving`, ends the connection."""
        self.close_connection = True
        while self.connection.recv(65536):
            pass

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def error_body(code: str) -> bytes:
    """What S3 says in an error."""
    text = '<?xml version="1.0" encoding="UTF-8"?>'
    return f"{text}<Error><Code>{code}</Code><Message>injected</Message><RequestId>0</RequestId></Error>".encode()
