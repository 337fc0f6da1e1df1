"""Running in the background: the command returns when the mount answers, or says in one line why it does not.

    result = start_detached(serve, log_path=..., deadline_s=...)     # in the command; no thread may be running

forks. The child leaves the terminal and the session of its parent and calls `serve(readiness)`, which calls
`readiness.ready({...})` once and goes on. What the child tells the parent travels as one JSON line through a pipe:

    {"ready": {...}}   or   {"error": "the one line"}

The end of the pipe without either means that the child died; the parent then says so and names the log.

A fork, not a new interpreter: nothing secret has to travel, and the start is quick. That is why no library that
starts threads (grpc above all) may be imported by the command before it forks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from apollofs.fs.user_error import UserError

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 65_536
END_GRACE_S = 10.0
"""How long a child that was told to end before it was ready has for it."""


class StartFailed(UserError):
    """The child could not do its work; the message is its one line."""


class Readiness(Protocol):
    """How a long-running service tells whoever started it that it serves."""

    def ready(self, facts: Mapping[str, Any]) -> None:
        """Say once that everything works; a second call, or one after the parent has gone, changes nothing."""
        ...


class ForegroundReadiness:
    """For `--foreground`: there is no parent to tell; the log has it."""

    def ready(self, facts: Mapping[str, Any]) -> None:
        log.info("ready: %s", ", ".join(f"{name}={value}" for name, value in facts.items()))


class NotifyReadiness:
    """For systemd's Type=notify: one datagram to the socket that it names (sd_notify(3))."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ready(self, facts: Mapping[str, Any]) -> None:
        name = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifying:
                notifying.settimeout(5)
                notifying.sendto(b"READY=1", name)
        except OSError as exc:
            log.warning("systemd could not be told that the mount is ready: %s", exc)


class PipeReadiness:
    """The child's end of the pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ready(self, facts: Mapping[str, Any]) -> None:
        self._tell({"ready": dict(facts)})

    def failed(self, line: str) -> None:
        """Say in one line why it will not come to `ready`."""
        self._tell({"error": line})

    def _tell(self, message: Mapping[str, Any]) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        # The parent may have given up waiting: then nobody needs to know.
        with contextlib.suppress(BrokenPipeError):
            os.write(fd, json.dumps(message).encode()[:MESSAGE_BYTES_MAX])
        os.close(fd)


def start_detached(
    serve: Callable[[PipeReadiness], int], *, log_path: str, deadline_s: float, describe: Callable[[BaseException], str]
) -> dict[str, Any]:
    """Fork, run `serve` in the child, and return what it reports as ready.

    `serve` returns the child's exit status; what it raises is put in one line by `describe`. Standard input is closed
    in the child; its output and errors go to `log_path`, which is created. Raises StartFailed: the child's own line, or
    that it died, or that it did not answer in `deadline_s` (it is then ended). KeyboardInterrupt ends the child too.
    """
    assert threading.active_count() == 1, "a fork takes only one thread along, and the locks of all"
    try:
        os.makedirs(os.path.dirname(log_path) or ".", exist_ok=True)
        log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    except OSError as exc:
        raise UserError(f"the log file {log_path} can't be written: {exc.strerror}") from exc
    read_fd, write_fd = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become_daemon(log_fd, write_fd)
        _run_child(serve, PipeReadiness(write_fd), describe)
    os.close(write_fd)
    os.close(log_fd)
    child = _Child(pid)
    try:
        return _await_readiness(child, read_fd, log_path, deadline_s)
    except BaseException:
        child.end()
        raise
    finally:
        os.close(read_fd)
        child.close()


def _become_daemon(log_fd: int, pipe_fd: int) -> None:
    """Leave the parent's session and terminal; of all descriptors only the log and the pipe stay open."""
    os.setsid()
    os.chdir("/")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    null_fd = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null_fd, 0)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != pipe_fd:
            # the descriptor of this listing is among them, and closed already
            with contextlib.suppress(OSError):
                os.close(int(name))


def _run_child(
    serve: Callable[[PipeReadiness], int], readiness: PipeReadiness, describe: Callable[[BaseException], str]
) -> NoReturn:
    """Never returns into the parent's code, whatever happens."""
    status = 1
    try:
        status = serve(readiness)
    except BaseException as exc:
        # After ready() nobody listens any more, but the log is read.
        log.debug("the background process ends with an error", exc_info=exc)
        readiness.failed(describe(exc))
    finally:
        logging.shutdown()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _await_readiness(child: _Child, fd: int, log_path: str, deadline_s: float) -> dict[str, Any]:
    text = _read_all(fd, time.monotonic() + deadline_s)
    if text is None:
        raise StartFailed(f"it did not answer within {deadline_s:g} s and was ended; its log is {log_path}")
    try:
        message: dict[str, Any] = json.loads(text)
    except ValueError:
        how = _how_it_ended(child)
        raise StartFailed(f"it {how} before it answered; its log is {log_path}") from None
    if "error" in message:
        raise StartFailed(str(message["error"]))
    ready: dict[str, Any] = message["ready"]
    return ready


def _read_all(fd: int, deadline: float) -> bytes | None:
    """What the child wrote until it closed its end; None when the deadline came first."""
    parts = b""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while len(parts) < MESSAGE_BYTES_MAX:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poller.poll(left_s * 1000):
            return None
        part = os.read(fd, MESSAGE_BYTES_MAX)
        if not part:
            break
        parts += part
    return parts


def _how_it_ended(child: _Child) -> str:
    status = child.wait(END_GRACE_S)
    if status is None:
        return "closed its pipe"
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


class _Child:
    """A process that was forked, told from every other that gets its number once it is collected."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._pidfd = -1
        self._status: int | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # the kernel has collected it: somebody ignores SIGCHLD
            self._status = 0

    def close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)

    def wait(self, grace_s: float) -> int | None:
        """Its wait status; 0 if somebody else has collected it; None if it lives on after `grace_s`."""
        if self._status is None:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if not poller.poll(grace_s * 1000):
                return None
            try:
                self._status = os.waitpid(self._pid, 0)[1]
            except ChildProcessError:
                self._status = 0
        return self._status

    def end(self) -> None:
        """SIGTERM, so that it can unmount; SIGKILL if that does not help. Nothing for one that has ended."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.wait(0) is None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, number)
                self.wait(END_GRACE_S)
