"""Asking a running mount: a unix socket of its own, one JSON line each way.

    {"ask": "status", ...arguments}  ->  {"ok": true, "answer": {...}}   or   {"ok": false, "error": "one line"}

The socket is `<runtime dir>/<minor>.sock`, where `minor` is the mount's device number: the one name that every bind
mount of it shares, and that can be found without touching the mount. Only its owner and root may ask. The kernel uses
a number again as soon as its mount is gone, so while a former daemon still commits, its path may be another mount's.

Bounds: `CLIENTS_MAX` clients at once, one request each, of at most `REQUEST_BYTES_MAX` in `REQUEST_DEADLINE_S`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import trio

from apollofs.fs.user_error import UserError

log = logging.getLogger(__name__)

CLIENTS_MAX = 16
REQUEST_BYTES_MAX = 65_536
REQUEST_DEADLINE_S = 10.0
ANSWER_DEADLINE_S = 10.0
_PEER = struct.Struct("3i")

Handler: TypeAlias = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]


def socket_path(runtime_dir: str, device: str) -> str:
    """Where the mount on `device` ("major:minor") listens."""
    return os.path.join(runtime_dir, f"{device.replace(':', '-')}.sock")


def prepare_runtime_dir(runtime_dir: str) -> None:
    """Make the directory of the sockets, for its owner only. Raises UserError where it is somebody else's."""
    try:
        os.makedirs(runtime_dir, mode=0o700, exist_ok=True)
        found = os.lstat(runtime_dir)
    except OSError as exc:
        raise UserError(f"the runtime directory {runtime_dir} can't be made: {exc.strerror}") from exc
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise UserError(f"the runtime directory {runtime_dir} can be written by others; remove it, or name another")


class ControlServer:
    """Serves `handlers` on one socket. A handler raises UserError for what the asker should read."""

    def __init__(self, path: str, handlers: Mapping[str, Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._limit = trio.CapacityLimiter(CLIENTS_MAX)
        self._listener: trio.SocketListener | None = None
        self._made: tuple[int, int, int] | None = None
        self._busy = 0
        self._idle = trio.Event()
        self._idle.set()

    async def bind(self) -> None:
        """Take the socket; one that a dead mount left is replaced. Raises UserError."""
        listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            await listening.bind(self._path)
            os.chmod(self._path, 0o600)
            self._made = _identity(self._path)
            listening.listen(CLIENTS_MAX)
        except OSError as exc:
            listening.close()
            raise UserError(f"the control socket {self._path} can't be made: {exc.strerror}") from exc
        self._listener = trio.SocketListener(listening)

    async def serve(self) -> None:
        """Answer until cancelled; the socket is removed then, unless another mount has its path. After `bind`."""
        assert self._listener is not None
        try:
            async with trio.open_nursery() as nursery:
                await trio.serve_listeners(self._serve_client, [self._listener], handler_nursery=nursery)
        finally:
            with contextlib.suppress(FileNotFoundError):
                if _identity(self._path) == self._made:
                    os.unlink(self._path)

    async def drained(self, deadline_s: float) -> None:
        """Wait until every request has been answered, but no longer than `deadline_s`."""
        with trio.move_on_after(deadline_s):
            await self._idle.wait()

    async def _serve_client(self, stream: trio.SocketStream) -> None:
        async with stream:
            self._busy += 1
            if self._idle.is_set():
                self._idle = trio.Event()
            try:
                async with self._limit:
                    reply = await self._reply_to(stream)
                with trio.move_on_after(ANSWER_DEADLINE_S, shield=True):
                    await stream.send_all(json.dumps(reply).encode() + b"\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                log.debug("a client of the control socket went away")
            finally:
                self._busy -= 1
                if not self._busy:
                    self._idle.set()

    async def _reply_to(self, stream: trio.SocketStream) -> Mapping[str, Any]:
        try:
            _check_peer(stream)
            request = await _read_request(stream)
            handler = self._handlers.get(request["ask"])
            if handler is None:
                raise UserError(f"this mount does not know {request['ask']!r}: is it of another version?")
            return {"ok": True, "answer": dict(await handler(request))}
        except UserError as exc:
            return {"ok": False, "error": str(exc)}
        except trio.BrokenResourceError:
            raise
        except Exception as exc:  # a bug in one answer must not end the mount
            log.exception("a request on the control socket failed")
            return {"ok": False, "error": f"the mount failed to answer ({type(exc).__name__}); see its log"}


def _identity(path: str) -> tuple[int, int, int]:
    """Tells this file from every other that has had its path, also from one that was given its inode number."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _check_peer(stream: trio.SocketStream) -> None:
    _, uid, _ = _PEER.unpack(stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid not in (0, os.geteuid()):
        raise UserError("only root and who made the mount may ask it")


async def _read_request(stream: trio.SocketStream) -> dict[str, Any]:
    text = bytearray()
    with trio.move_on_after(REQUEST_DEADLINE_S) as scope:
        while b"\n" not in text and len(text) <= REQUEST_BYTES_MAX:
            part = await stream.receive_some(REQUEST_BYTES_MAX)
            if not part:
                break
            text += part
    if scope.cancelled_caught or not text.endswith(b"\n") or len(text) > REQUEST_BYTES_MAX:
        raise UserError("the request is no line of JSON, or came too late")
    try:
        request = json.loads(text)
    except ValueError as exc:
        raise UserError("the request is no JSON") from exc
    if not isinstance(request, dict) or not isinstance(request.get("ask"), str):
        raise UserError("the request does not say what it asks")
    return request


# -- the asking side: plain blocking sockets, for the command --------------------------------------------------------

ANSWER_BYTES_MAX = 64 << 20


class MountSilent(UserError):
    """The mount's daemon does not answer in time: it is frozen, or very busy."""


class MountDead(MountSilent):
    """Nobody listens: the mount's daemon is dead, or keeps its socket elsewhere."""


def ask(path: str, what: str, arguments: Mapping[str, Any] | None = None, *, deadline_s: float) -> dict[str, Any]:
    """Ask the mount at `path`. Raises MountDead, MountSilent, or UserError with the mount's line."""
    request = json.dumps({**(arguments or {}), "ask": what}).encode() + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(deadline_s)
        try:
            client.connect(path)
            client.sendall(request)
            text = _read_line(client)
        except TimeoutError as exc:
            raise MountSilent(f"the mount did not answer within {deadline_s:g} s") from exc
        except PermissionError as exc:
            raise UserError("only root and who made the mount may ask it") from exc
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE):
                raise UserError(f"the control socket {path} can't be used: {exc.strerror}") from exc
            raise MountDead("the mount's daemon does not run") from exc
    try:
        reply = json.loads(text)
    except ValueError as exc:
        raise MountDead("the mount's daemon ended while it was asked") from exc
    if not reply["ok"]:
        raise UserError(reply["error"])
    answer: dict[str, Any] = reply["answer"]
    return answer


def _read_line(client: socket.socket) -> bytes:
    parts: list[bytes] = []
    size = 0
    while size < ANSWER_BYTES_MAX:
        part = client.recv(1 << 16)
        parts.append(part)
        size += len(part)
        if not part or part.endswith(b"\n"):
            break
    return b"".join(parts)
