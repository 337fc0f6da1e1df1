"""What the fault tests on mounts share: patience, work that reports what was made durable, and a mount with a bug."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from time import monotonic

import pytest

WAIT_S = 90.0
POLL_S = 0.05


def until(condition: Callable[[], bool], what: str, within_s: float = WAIT_S) -> None:
    """Ask until it is so; fails the test after `within_s` seconds."""
    pause, deadline = Event(), monotonic() + within_s
    while not condition():
        if monotonic() > deadline:
            pytest.fail(f"{what}: not within {within_s:g} s")
        pause.wait(POLL_S)


def works(path: Path) -> bool:
    """Whether a file can be made, written and made durable there."""
    try:
        with path.open("wb") as file:
            file.write(b"works")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return False
    return True


def save_until_it_fails(directory: Path, report: Path, size: int) -> int:
    """Save files 0, 1, 2..., write the number of each to `report` once it was fsynced; the errno that ends it."""
    with report.open("wb", buffering=0) as told:
        number = 0
        while True:
            try:
                fd = os.open(directory / f"f{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                try:
                    os.write(fd, content(number, size))
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as exc:
                return exc.errno or errno.EIO
            told.write(b"%d\n" % number)
            number += 1


def content(number: int, size: int) -> bytes:
    """The bytes of file `number`: different for each, and not the same twice within one."""
    line = b"%08d:%%08d\n" % number
    return b"".join(line % index for index in range(size // 18 + 1))[:size]


def saved(report: Path) -> int:
    """How many files `save_until_it_fails` has made durable so far."""
    return len(report.read_bytes().splitlines()) if report.exists() else 0


def open_and_write(path: Path, data: bytes) -> int:
    """0, or the errno of creating, writing, fsync or close."""
    try:
        with path.open("wb", buffering=0) as file:
            at = 0
            while at < len(data):
                at += file.write(memoryview(data)[at:])  # a disk that gets full takes a part
            os.fsync(file.fileno())
    except OSError as exc:
        return exc.errno or errno.EIO
    return 0


def read_or_errno(path: Path) -> bytes | int:
    """All of it, or the errno of open or read."""
    try:
        return path.read_bytes()
    except OSError as exc:
        return exc.errno or errno.EIO
