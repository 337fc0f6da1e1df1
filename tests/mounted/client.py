"""A process of its own that calls functions for a test: to hold locks, to be killed, to be interrupted, to be nobody.

    with Client.started() as client:
        client.call(os.stat, path)
        waiting = client.start(fcntl.lockf, ...)      # runs while the test goes on
        waiting.result()

Functions and arguments travel by pickle, so functions are those of modules. One call at a time; a client dies with the
block, whatever it does. Functions that need state between calls keep it in the client's process: see `clients.py`.
"""

from __future__ import annotations

import importlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0


class Pending(Generic[T]):
    """A call under way in a client."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def is_done(self, within_s: float = 0.0) -> bool:
        """Whether it has ended, waiting up to `within_s`."""
        return bool(select.select([self._client.replies], [], [], within_s)[0])

    def result(self) -> T:
        """Wait for what the call returns, or raises."""
        if not self.is_done(DEADLINE_S):
            raise TimeoutError(f"client {self._client.pid} does not answer")
        reply = _receive(self._client.replies)
        assert reply is not None, f"client {self._client.pid} has died"
        good, value = reply
        if not good:
            raise value
        answer: T = value
        return answer


class Client:
    """Made by `started`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    @contextmanager
    def started(cls, *, uid: int = 0, directory: Path = ROOT) -> Iterator[Client]:
        """A new process, with this user and the group of the same number and no others, that stands in `directory`.

        What leads to the directory may be closed to the user: then calls name files relative to it.
        """
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.mounted.client", str(uid), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        try:
            yield cls(process)
        finally:
            process.kill()
            process.wait(DEADLINE_S)
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with pipe:
                    pass

    @property
    def replies(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        assert self._process.stdin is not None
        _send(self._process.stdin, (function, args, kwargs))
        return Pending(self)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self.start(function, *args, **kwargs).result()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.wait(DEADLINE_S)


def _send(stream: IO[bytes], message: object) -> None:
    data = pickle.dumps(message)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """A message; None at the end."""
    header = stream.read(8)
    if not header:
        return None
    (size,) = struct.unpack("<Q", header)
    return pickle.loads(stream.read(size))


def _portable(exc: BaseException) -> BaseException:
    """What can be pickled; errno survives."""
    if isinstance(exc, OSError):
        return OSError(exc.errno, exc.strerror)
    return AssertionError("".join(traceback.format_exception(exc)))


def become(uid: int, directory: str) -> None:
    """Only after everything is imported: a checkout may be in a directory that others can't enter."""
    importlib.import_module("tests.mounted.clients")
    os.chdir(directory)
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def main() -> None:
    become(int(sys.argv[1]), sys.argv[2])
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while request := _receive(requests):
        function, args, kwargs = request
        try:
            answer = (True, function(*args, **kwargs))
        except BaseException as exc:  # noqa: BLE001  (told to the test)
            answer = (False, _portable(exc))
        _send(replies, answer)


if __name__ == "__main__":
    main()
