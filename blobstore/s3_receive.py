"""Whole objects from S3, received into memory that is there already: by a signed URL, over plain HTTP/1.1.

Both clients collect pieces and join them, which costs twice the processor time of receiving (`docs/PERFORMANCE.md`).
A request is tried once here, but for one: on a connection that was idle, and that the server may have closed.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Final
from urllib.parse import urlsplit

from .errors import BlobStoreError, BlobStoreRefused, BlobStoreUnavailable, RangeUnavailable
from .s3_errors import connection_error, error_of_status
from .s3_options import S3Options

ERROR_BYTES_MAX: Final = 64 << 10
_CODE: Final = re.compile(rb"<Code>(\w{1,60})</Code>")


class Receiver:
    """The connections of one store. `sign` makes the URL of a GET of a key; it may block, and raise BlobStoreError."""

    def __init__(self, sign: Callable[[str], str], options: S3Options) -> None:
        self._sign = sign
        self._options = options
        self._idle: deque[HTTPConnection] = deque(maxlen=options.threads)
        self._tls: ssl.SSLContext | None = None

    def begin(self) -> Reception:
        return Reception(self)

    def url(self, key: str) -> str:
        return self._sign(key)

    def idle(self) -> HTTPConnection | None:
        """One that has been used, the last one first."""
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return None

    def connect(self, url: str) -> HTTPConnection:
        """A new one. Raises OSError."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        timeout_s = self._options.connect_timeout_s
        if parts.scheme == "https":
            self._tls = self._tls or ssl.create_default_context(cafile=self._options.ca_file)
            made: HTTPConnection = HTTPSConnection(parts.hostname, parts.port, timeout=timeout_s, context=self._tls)
        else:
            made = HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
        made.connect()
        made.sock.settimeout(self._options.read_timeout_s)
        return made

    def keep(self, connection: HTTPConnection) -> None:
        """Its answer was read to the end."""
        if connection.sock is not None:
            self._idle.append(connection)

    def close(self) -> None:
        """Of what is idle."""
        while (connection := self.idle()) is not None:
            connection.close()


class Reception:
    """One object. `receive` in a thread, once; `abort` from any other, whatever that one is doing."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._connection: HTTPConnection | None = None
        self._lock = threading.Lock()
        """For the two below: what is shut down is this object's, and no other's by then."""
        self._sock: socket.socket | None = None
        self._aborted = False

    def receive(self, key: str, what: str, into: memoryview) -> None:
        """Fill `into` with the first bytes of an object. Blocks. Raises BlobStoreError as the port's `read`."""
        answer: HTTPResponse | None = None
        try:
            answer = self._ask(key, f"bytes=0-{len(into) - 1}")
            if answer.status not in (200, 206):
                raise _refusal(answer, what)
            _check(answer, len(into), what)
            have = 0
            while have < len(into):
                if self._aborted:
                    raise ConnectionAbortedError
                count = answer.readinto(into[have:])
                if not count:
                    raise connection_error(what, timed_out=False)
                have += count
        except BaseException as exc:
            self._release()
            if answer is not None:
                answer.close()
            if self._connection is not None:
                self._connection.close()
            if isinstance(exc, OSError | HTTPException):
                raise _connection_error(exc, what) from exc
            raise
        assert self._connection is not None
        self._release()
        if answer.isclosed() and not self._aborted:
            self._receiver.keep(self._connection)
        else:
            answer.close()
            self._connection.close()

    def abort(self) -> None:
        """Nobody wants it any more: the thread ends soon, by an error."""
        with self._lock:
            self._aborted = True
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    # not the method of a TLS socket, which would take its state from the thread that reads
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _hold(self, connection: HTTPConnection) -> None:
        """Keep its socket: http.client forgets it where the server says that it will close. Raises OSError."""
        with self._lock:
            if self._aborted:
                raise ConnectionAbortedError
            self._sock = connection.sock

    def _release(self) -> None:
        with self._lock:
            self._sock = None

    def _ask(self, key: str, wanted: str) -> HTTPResponse:
        """The answer's head. Raises OSError, HTTPException."""
        url = self._receiver.url(key)
        while True:
            used = self._receiver.idle()
            self._connection = used or self._receiver.connect(url)
            self._hold(self._connection)
            try:
                return _request(self._connection, url, wanted)
            except (ConnectionError, HTTPException):
                if used is None or self._aborted:
                    raise
                self._release()
                used.close()


def _request(connection: HTTPConnection, url: str, wanted: str) -> HTTPResponse:
    parts = urlsplit(url)
    connection.request("GET", f"{parts.path}?{parts.query}", headers={"Range": wanted, "Accept-Encoding": "identity"})
    return connection.getresponse()


def _check(answer: HTTPResponse, length: int, what: str) -> None:
    """Believe no server that answers another range than was asked for."""
    served = answer.getheader("Content-Range", "bytes 0-")
    if not served.startswith("bytes 0-"):
        raise BlobStoreUnavailable(f"{what}: the server ignored the range")
    if answer.length is not None and answer.length < length:
        raise RangeUnavailable(f"{what}: it has {answer.length} bytes, not the range [0, {length})")


def _refusal(answer: HTTPResponse, what: str) -> BlobStoreError:
    """Not a word of the answer's text: it may quote the request's signature."""
    code = _CODE.search(answer.read(ERROR_BYTES_MAX))
    return error_of_status(answer.status, code[1].decode("ascii") if code is not None else "", what)


def _connection_error(exc: OSError | HTTPException, what: str) -> BlobStoreError:
    if isinstance(exc, ssl.SSLCertVerificationError):
        return BlobStoreRefused(f"{what}: the server's certificate isn't trusted; name its authority")
    return connection_error(what, timed_out=isinstance(exc, TimeoutError))
