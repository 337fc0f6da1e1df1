"""What clients (`client.py`) are asked to do, in their own process, where the files stay open."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import struct
from collections.abc import Callable
from pathlib import Path

OPEN: dict[str, int] = {}
"""Descriptors of this client by the test's names for them."""


def open_as(name: str, path: Path, flags: int, mode: int = 0o644) -> None:
    OPEN[name] = os.open(path, flags, mode)


def close(name: str) -> None:
    os.close(OPEN.pop(name))


def flock(name: str, operation: int) -> None:
    fcntl.flock(OPEN[name], operation)


def lockf(name: str, operation: int, length: int = 0, start: int = 0) -> None:
    fcntl.lockf(OPEN[name], operation, length, start)


def write(name: str, data: bytes, offset: int) -> int:
    return os.pwrite(OPEN[name], data, offset)


def read(name: str, size: int, offset: int) -> bytes:
    return os.pread(OPEN[name], size, offset)


def fsync(name: str) -> None:
    os.fsync(OPEN[name])


class Interrupted(Exception):
    """Raised by the handler, so that Python does not restart the call."""


def interruptible(function: Callable[..., None], *args: object) -> str:
    """Call it; "interrupted" if SIGUSR1 ended it, "done" otherwise."""

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        function(*args)
    except Interrupted:
        return "interrupted"
    finally:
        signal.signal(signal.SIGUSR1, before)
    return "done"


def write_file(path: Path, data: bytes) -> None:
    """As a checkpoint is saved: a temporary name, fsync, rename."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def save_random(path: Path, seed: int, size: int) -> None:
    write_file(path, random.Random(seed).randbytes(size))


def is_random(path: Path, seed: int, size: int) -> bool:
    """Whether the file is what `save_random` made, byte for byte, by read and by mmap."""
    wanted = random.Random(seed).randbytes(size)
    with path.open("rb") as file:
        if file.read() != wanted:
            return False
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            return mapped[:] == wanted


def append_lines(path: Path, tag: bytes, count: int) -> None:
    """`count` appends, each one line of the same length, each committed."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        for number in range(count):
            os.write(fd, b"%s %06d\n" % (tag, number))
            os.fsync(fd)
    finally:
        os.close(fd)


def create_many(directory: Path, tag: str, count: int) -> int:
    """Exclusive creates of f0000..; how many of them this client won."""
    won = 0
    for number in range(count):
        try:
            os.close(os.open(directory / f"{tag}{number:04d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            won += 1
        except FileExistsError:
            continue
    return won


def add_one_each_time(path: Path, times: int) -> None:
    """Read, add one, write, under an exclusive record lock."""
    fd = os.open(path, os.O_RDWR)
    try:
        for _ in range(times):
            fcntl.lockf(fd, fcntl.LOCK_EX)
            number = int(os.pread(fd, 20, 0) or b"0") + 1
            os.pwrite(fd, b"%020d" % number, 0)
            os.fsync(fd)
            fcntl.lockf(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def errno_of(function: Callable[..., object], *args: object) -> int:
    """0, or the errno that the call fails with."""
    try:
        function(*args)
    except OSError as exc:
        return exc.errno or -1
    return 0


FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602


def set_flags(path: Path, flags: int) -> None:
    """FS_IMMUTABLE_FL and its like, as chattr does."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags))
    finally:
        os.close(fd)


def get_flags(path: Path) -> int:
    """As lsattr does."""
    fd = os.open(path, os.O_RDONLY)
    try:
        flags: int = struct.unpack("l", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)))[0]
    finally:
        os.close(fd)
    return flags


def churn(directory: Path, rounds: int) -> None:
    """Names that come and go."""
    for number in range(rounds):
        path = directory / f"zz-churn-{os.getpid()}-{number}"
        path.touch()
        path.unlink()
