"""Leftovers: working copies of mounts that died, or lost their session, with what was perhaps never committed.

    <cache_dir>/left/<mount>-<ino>-<n>.copy     with the attribute user.apollofs.place: hex of the parent, "/", name

What had been committed as it is shows in the inode: its size and its mtime, to the nanosecond, are the copy's. Those
go at the next mount; the others are kept for a week, for `apollofs staging`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from apollofs.fs.working_copy import is_released
from apollofs.metadata.errors import MetadataError, StaleInode
from apollofs.metadata.records import Inode

log = logging.getLogger(__name__)
KEEP_S = 7 * 86400.0
SUFFIX = ".copy"
_PLACE = "user.apollofs.place"
Place = tuple[int, bytes]
"""(parent, name) under which the file was opened."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """One of them, as it is on the disk."""

    name: str
    path: str
    ino: int
    place: Place | None
    size_bytes: int
    written_ns: int
    """Its mtime, which a program may have set."""
    left_ns: int
    """When it was left behind, or written to after that."""
    in_use: bool
    """Whether a process still has it open or mapped, and may be writing."""


class Names(Protocol):
    """What is asked of the volume."""

    def remember(self, ino: int, parent: int, name: bytes) -> None: ...
    async def getattr(self, ino: int) -> Inode: ...


def directory_of(cache_dir: str) -> str:
    return os.path.join(cache_dir, "left")


def note_place(fd: int, place: Place | None) -> None:
    """Write down what a new working copy is of. Where the disk can't keep that, it is not found by name later."""
    if place is not None:
        with contextlib.suppress(OSError):
            os.setxattr(fd, _PLACE, b"%x/%s" % place)


def rescue(mount_directory: str, cache_dir: str) -> None:
    """Move the working copies of a mount that has ended out of its directory. Blocks; raises OSError."""
    left = directory_of(cache_dir)
    for entry in os.scandir(mount_directory):
        if not entry.name.endswith(SUFFIX):
            continue
        if not entry.stat().st_size:
            os.unlink(entry.path)
            continue
        os.makedirs(left, mode=0o700, exist_ok=True)
        os.rename(entry.path, os.path.join(left, f"{os.path.basename(mount_directory)}-{entry.name}"))


def leftovers(cache_dir: str) -> Iterator[Leftover]:
    """Those of a volume's cache directory. Blocks."""
    try:
        entries = sorted(os.scandir(directory_of(cache_dir)), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        with contextlib.suppress(FileNotFoundError, ValueError):
            if entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False):
                yield _described(entry.name, entry.path)


def _described(name: str, path: str) -> Leftover:
    """Raises ValueError for a name that is none of ours."""
    _, ino, _ = name.removesuffix(SUFFIX).split("-")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        return Leftover(
            name.removesuffix(SUFFIX),
            path,
            int(ino, 16),
            _place_of(fd),
            found.st_size,
            found.st_mtime_ns,
            found.st_ctime_ns,
            not is_released(fd),
        )
    finally:
        os.close(fd)


def _place_of(fd: int) -> Place | None:
    try:
        parent, _, name = os.getxattr(fd, _PLACE).partition(b"/")
        return int(parent, 16), name
    except (OSError, ValueError):
        return None


def drop(leftover: Leftover) -> None:
    """Delete it. Blocks."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(leftover.path)


def recover(leftover: Leftover, target: str) -> None:
    """Copy its bytes to a new file, anywhere; holes stay holes. Blocks. Raises OSError; FileExistsError."""
    with open(leftover.path, "rb") as source, open(target, "xb") as copy:
        shutil.copyfileobj(source, copy, 8 << 20)
        os.utime(copy.fileno(), ns=(leftover.written_ns, leftover.written_ns))


async def settle(cache_dir: str, volume: Names) -> None:
    """Delete what was committed as it is, or is of a file that is gone, or too old. Raises nothing."""
    try:
        for leftover in await trio.to_thread.run_sync(lambda: list(leftovers(cache_dir))):
            if leftover.in_use:
                log.warning("a process still writes %s, which a mount that ended has left behind", leftover.path)
            elif await _is_settled(leftover, volume):
                await trio.to_thread.run_sync(partial(drop, leftover))
            else:
                log.warning("%s may hold what was never committed: see `apollofs staging list`", leftover.path)
    except (OSError, MetadataError) as exc:
        log.warning("working copies that were left behind could not be looked at: %s", exc)


async def _is_settled(leftover: Leftover, volume: Names) -> bool:
    if time.time_ns() - leftover.left_ns > KEEP_S * 1e9:
        return True
    if leftover.place is None:
        return False
    volume.remember(leftover.ino, *leftover.place)
    try:
        inode = await volume.getattr(leftover.ino)
    except StaleInode:
        return True
    return (inode.size_bytes, inode.mtime_ns) == (leftover.size_bytes, leftover.written_ns)
