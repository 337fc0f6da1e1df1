"""Handles: what the kernel's numbers `fh` stand for."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from apollofs.fs.errors import BadHandle
from apollofs.fs.late_errors import ErrorCursor
from apollofs.fs.open_file import OpenFile
from apollofs.fs.reader import AccessPattern

T = TypeVar("T")


@dataclass(slots=True)
class FileHandle:
    """One open file description."""

    file: OpenFile
    flags: int
    """open(2)'s."""
    opener: int
    """Thread id of the process that opened it, 0 if not known."""
    cursor: ErrorCursor
    losses: int = 0
    """`Volume.losses` as last reported here."""
    direct: bool = False
    """Whether it was opened past the page cache."""
    passing: bool = False
    """Whether the kernel serves it, or at least its mappings, from a local file by itself."""
    directory: int = 0
    """Where the file was made, by the call that opened it; else 0."""
    watched: bool = True
    """Whether the guard, if there is one, knows that the kernel may have pages of it."""
    pattern: AccessPattern = field(default_factory=AccessPattern)

    @property
    def is_synchronous(self) -> bool:
        return bool(self.flags & (os.O_SYNC | os.O_DSYNC))

    @property
    def may_write(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


class HandleTable(Generic[T]):
    """Numbers for handles; as many as the kernel has open files. A number is not used again soon."""

    def __init__(self) -> None:
        self._handles: dict[int, T] = {}
        self._last = 0

    def add(self, handle: T) -> int:
        self._last += 1
        self._handles[self._last] = handle
        return self._last

    def get(self, fh: int) -> T:
        """Raises BadHandle."""
        try:
            return self._handles[fh]
        except KeyError:
            raise BadHandle(f"there is no open file {fh}") from None

    def pop(self, fh: int) -> T:
        """Raises BadHandle."""
        handle = self.get(fh)
        del self._handles[fh]
        return handle

    def __len__(self) -> int:
        return len(self._handles)

    def all(self) -> list[T]:
        return list(self._handles.values())


def closes_for_opener(opener: int, closer: int) -> bool:
    """Whether a close by thread `closer` counts as one by the process of thread `opener`.

    A forked child closes what it inherited while its parent goes on writing; that must not commit (DATAPATH rule 8).
    Where the opener has ended, or can't be seen from here, the answer is yes: rather one commit too many.
    """
    if opener == closer or not opener or not closer:
        return True
    group = _thread_group(opener)
    return group is None or group == _thread_group(closer)


def _thread_group(thread: int) -> int | None:
    with contextlib.suppress(OSError), open(f"/proc/{thread}/status", "rb") as status:
        for line in status:
            if line.startswith(b"Tgid:"):
                return int(line[5:])
    return None
