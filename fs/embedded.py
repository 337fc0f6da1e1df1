"""A private etcd of one node, for `apollofs up`: its data, ports, process and log below one directory.

    DIRECTORY/apollofs.json    ports and volume, chosen once
    DIRECTORY/etcd/            etcd's data
    DIRECTORY/etcd.pid, etcd.log, lock

It listens on the loopback address only. It is started detached, so it outlives the command; `start` finds it running
the next time, or starts it again on the same data. What tells of it is written when it is healthy; one that a killed
start has left is found by its command line. Everything here blocks and is bounded by a deadline.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from apollofs.fs.user_error import UserError

HOST = "127.0.0.1"
VOLUME = "main"
SCHEMA = 1
START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 30.0
POLL_S = 0.05
QUOTA_BYTES = 8 << 30
COMPACT_AFTER = "1h"
"""History that is kept: long enough for a listing or a check that goes on, short enough for the quota."""
LOG_BYTES_MAX = 16 << 20


DATA_OPTION = "--data-dir="


class EtcdMissing(UserError):
    """The server's program is not installed."""


@dataclass(frozen=True, slots=True)
class EmbeddedState:
    """What is kept in apollofs.json."""

    client_port: int
    peer_port: int
    volume: str = VOLUME
    schema: int = SCHEMA


class EmbeddedEtcd:
    """The etcd below one directory."""

    def __init__(self, directory: str, environment: Mapping[str, str], program: str | None = None) -> None:
        """`environment`: for the server, of which its own variables (ETCD_*) are left out."""
        self.directory = os.path.realpath(directory)
        self._environment = {name: value for name, value in environment.items() if not name.startswith("ETCD_")}
        self._program = program
        self._data = os.path.join(self.directory, "etcd")
        self._pid_file = os.path.join(self.directory, "etcd.pid")
        self._log_file = os.path.join(self.directory, "etcd.log")
        self._state_file = os.path.join(self.directory, "apollofs.json")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else brings this directory up or down meanwhile. Raises UserError."""
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            fd = os.open(os.path.join(self.directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise UserError(f"the directory {self.directory} can't be written: {exc.strerror}") from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(fd)
            raise UserError(f"another `apollofs up` or `down` of {self.directory} is at work") from exc
        try:
            yield
        finally:
            os.close(fd)

    def state(self) -> EmbeddedState | None:
        """None where nothing was ever brought up. Raises UserError for a damaged or newer file."""
        try:
            with open(self._state_file, encoding="utf-8") as file:
                state = EmbeddedState(**json.load(file))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as exc:
            raise UserError(f"{self._state_file} is damaged, or was written by a newer version") from exc
        if state.schema != SCHEMA:
            raise UserError(f"{self._state_file} was written by a newer version")
        return state

    def has_data(self) -> bool:
        """Whether it was started here, though it may never have become healthy."""
        return os.path.isdir(self._data)

    def start(self, deadline_s: float = START_DEADLINE_S) -> EmbeddedState:
        """Have it running and healthy. The ports are kept; a port that somebody took meanwhile is chosen anew.

        Raises EtcdMissing, UserError with the last line of its log.
        """
        deadline = time.monotonic() + deadline_s
        state = self.state()
        pid = self.running_pid()
        if pid is not None and state is not None and self._listens(pid, state):
            self._await_health(pid, None, state.client_port, deadline)
            return state
        if pid is not None:
            self.stop(max(0.0, deadline - time.monotonic()))
        wanted = self._with_free_ports(state)
        process = self._spawn(wanted)
        try:
            self._await_health(process.pid, process, wanted.client_port, deadline)
            if wanted != state:
                self._write(self._state_file, json.dumps(asdict(wanted)))
            self._write(self._pid_file, str(process.pid))
        except BaseException as exc:
            process.kill()
            process.wait()
            if isinstance(exc, OSError):
                raise UserError(f"the directory {self.directory} can't be written: {exc.strerror}") from exc
            raise
        # The interpreter must not warn that a child of ours lives on: that is its purpose.
        process.returncode = 0
        return wanted

    def stop(self, deadline_s: float = STOP_DEADLINE_S) -> bool:
        """End it cleanly; False if it did not run. Raises UserError if it can't be ended."""
        pid = self.running_pid()
        if pid is None:
            return False
        for number, grace_s in ((signal.SIGTERM, deadline_s), (signal.SIGKILL, 5.0)):
            if _end(pid, number, grace_s):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._pid_file)
                return True
        raise UserError(f"etcd (process {pid}) does not end")

    def running_pid(self) -> int | None:
        """The process of our etcd, if it lives: its command line must name our data. Also one that no file tells of."""
        with contextlib.suppress(OSError, ValueError), open(self._pid_file, encoding="ascii") as file:
            pid = int(file.read())
            if self._is_ours(pid):
                return pid
        return next((int(name) for name in os.listdir("/proc") if name.isdecimal() and self._is_ours(int(name))), None)

    def _is_ours(self, pid: int) -> bool:
        """By the directory itself: its path may be another's in a container, and another path may lead to it."""
        for word in _command_line(pid):
            if word.startswith(DATA_OPTION):
                with contextlib.suppress(OSError):
                    return os.path.samefile(f"/proc/{pid}/root/{word.removeprefix(DATA_OPTION)}", self._data)
        return False

    def _listens(self, pid: int, state: EmbeddedState) -> bool:
        """Whether the process was started with these ports."""
        return f"--listen-client-urls=http://{HOST}:{state.client_port}" in _command_line(pid)

    def _with_free_ports(self, state: EmbeddedState | None) -> EmbeddedState:
        if state is not None and _port_is_free(state.client_port) and _port_is_free(state.peer_port):
            return state
        client_port, peer_port = free_ports(2)
        if state is None:
            return EmbeddedState(client_port, peer_port)
        return replace(state, client_port=client_port, peer_port=peer_port)

    def _spawn(self, state: EmbeddedState) -> subprocess.Popen[bytes]:
        program = self._program or shutil.which("etcd", path=self._environment.get("PATH"))
        if program is None:
            raise EtcdMissing("etcd is not installed: apt-get install etcd-server")
        client, peer = (f"http://{HOST}:{port}" for port in (state.client_port, state.peer_port))
        words = [
            program,
            "--name=apollofs",
            f"{DATA_OPTION}{self._data}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=apollofs={peer}",
            f"--quota-backend-bytes={QUOTA_BYTES}",
            "--auto-compaction-mode=periodic",
            f"--auto-compaction-retention={COMPACT_AFTER}",
            "--logger=zap",
            "--log-level=warn",
            "--log-outputs=stderr",
        ]
        os.makedirs(self._data, mode=0o700, exist_ok=True)
        if os.path.exists(self._log_file) and os.path.getsize(self._log_file) > LOG_BYTES_MAX:
            os.replace(self._log_file, f"{self._log_file}.1")
        with open(self._log_file, "ab") as log_file:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                env=self._environment,
                cwd="/",
                start_new_session=True,
            )

    def _await_health(self, pid: int, process: subprocess.Popen[bytes] | None, port: int, deadline: float) -> None:
        while not _is_healthy(port):
            ended = process.poll() is not None if process is not None else self.running_pid() != pid
            if ended:
                raise UserError(f"etcd ended at once: {self._last_log_line()} (its log is {self._log_file})")
            if time.monotonic() > deadline:
                raise UserError(f"etcd does not become healthy on port {port}; its log is {self._log_file}")
            time.sleep(POLL_S)

    def _last_log_line(self) -> str:
        with open(self._log_file, "rb") as file:
            file.seek(max(0, os.path.getsize(self._log_file) - 2000))
            lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1][-400:] if lines else "its log is empty"

    def _write(self, path: str, text: str) -> None:
        """Whole or not at all."""
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)


def _command_line(pid: int) -> list[str]:
    """Empty for a process that has ended."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [os.fsdecode(word) for word in file.read().split(b"\0")]
    except OSError:
        return []


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read(4096)).get("health") in ("true", True)
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_ports(count: int) -> list[int]:
    """Different ports of HOST that nobody listens on, kept for who binds them by number within a minute.

    A connection to each, closed first by its listening side, leaves the port in TIME_WAIT: the kernel gives it then to
    nobody who asks for any port, and still to a server that asks for this one (with SO_REUSEADDR, as servers do).
    """
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, 0))
            listener.listen(1)
            with socket.create_connection(listener.getsockname()[:2], timeout=5):
                listener.accept()[0].close()
            ports.append(int(listener.getsockname()[1]))
        return ports


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a connection that was closed a moment ago does not keep the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _end(pid: int, number: signal.Signals, grace_s: float) -> bool:
    """Send the signal; whether the process has ended within `grace_s`. Collects it where it is a child of ours."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        signal.pidfd_send_signal(pidfd, number)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        ended = bool(poller.poll(grace_s * 1000))
    except ProcessLookupError:
        ended = True
    finally:
        os.close(pidfd)
    if ended:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return ended
