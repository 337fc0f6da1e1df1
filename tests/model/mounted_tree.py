"""The system calls of the state machine, and what a mount shows, to compare it with the model."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.model.plain_tree import Node, fail

AT_FDCWD = -100
PUNCH_HOLE_KEEP_SIZE = 3
LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    if result != 0:
        raise fail(ctypes.get_errno())


@contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags | os.O_NOFOLLOW, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def write(path: Path, offset: int, data: bytes) -> None:
    with opened(path, os.O_RDWR) as fd:
        assert os.pwrite(fd, data, offset) == len(data)


def append(path: Path, data: bytes) -> None:
    with opened(path, os.O_RDWR | os.O_APPEND) as fd:
        assert os.write(fd, data) == len(data)


def map_and_write(fd: int, offset: int, data: bytes) -> None:
    """Through a shared mapping; committed at the end. Within the file's size."""
    with mmap.mmap(fd, 0) as mapped:
        mapped[offset : offset + len(data)] = data
        mapped.flush()
    os.fsync(fd)


def punch(fd: int, offset: int, length: int) -> None:
    checked(LIBC.fallocate(fd, PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(length)))


def renameat2(source: Path, target: Path, flags: int) -> None:
    checked(LIBC.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags))


def differences(path: Path, node: Node) -> list[str]:
    """How what a mount shows at `path` differs from a node of the model, its names included, but not what they mean."""
    found = os.lstat(path)
    seen: dict[str, object] = {"mode": stat.S_IMODE(found.st_mode), "nlink": found.st_nlink}
    wanted: dict[str, object] = {"mode": node.mode, "nlink": node.nlink}
    if node.mtime_ns is not None:
        seen["mtime"], wanted["mtime"] = found.st_mtime_ns, node.mtime_ns
    if node.target is not None:
        seen["target"], wanted["target"] = os.readlink(path), node.target
        return _compare(path, seen, wanted)
    seen["xattrs"] = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    wanted["xattrs"] = node.xattrs
    if node.children is not None:
        seen["names"], wanted["names"] = sorted(os.listdir(path)), sorted(node.children)
    else:
        seen["size"], wanted["size"] = found.st_size, len(node.data)
        with opened(path, os.O_RDONLY) as fd:
            differing = difference(os.pread(fd, len(node.data) + 10, 0), node.data)
        seen["body"], wanted["body"] = differing, ""
    return _compare(path, seen, wanted)


def difference(seen: bytes, wanted: bytes | bytearray) -> str:
    """Where two bodies differ; nothing if they do not."""
    if seen == wanted:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(seen, wanted, strict=False)) if a != b), min(len(seen), len(wanted)))
    return f"from {at}: {seen[at : at + 20]!r} for {bytes(wanted[at : at + 20])!r}, {len(seen)} bytes for {len(wanted)}"


def _compare(path: Path, seen: dict[str, object], wanted: dict[str, object]) -> list[str]:
    return [f"{path}: {name} is {seen[name]!r}, not {wanted[name]!r}" for name in wanted if seen[name] != wanted[name]]
