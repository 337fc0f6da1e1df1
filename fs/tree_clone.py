"""Cloning a file or a tree of a mount, from outside: the kernel's calls on paths, nothing else.

A clone is made beside its target under a temporary name and then renamed, so it is there whole or not at all; a tree as
much as a file. Contents are shared by copy_file_range, which within one mount moves no byte but those of the smallest
files. Kept are types, modes, owners (where the caller may give them), times, extended attributes, symlinks, and hard
links among what is cloned.

Memory: one directory's names, the directories that are still to be done, and the hard links that are not all found.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

from apollofs.fs.mountinfo import absolute, mount_of
from apollofs.fs.user_error import UserError

WORKERS = 8
"""Files that are cloned at once: they share transactions."""
ATTEMPTS = 3
"""For a file that is changed while it is cloned, and needs more than one call."""
CALL_BYTES = 1 << 40
NAME_BYTES = 200
"""How much of the target's name is in that of what is made beside it."""
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NOT_FOR_US = frozenset({errno.EPERM, errno.ENOTSUP, errno.EACCES})


@dataclass
class Cloned:
    """What a clone has made so far."""

    files: int = 0
    directories: int = 0
    others: int = 0
    """Symlinks, fifos, sockets, devices."""
    size_bytes: int = 0
    """Sum of the files' sizes."""


def clone(source: str, target: str, progress: Callable[[Cloned], None] = lambda _: None) -> Cloned:
    """Clone the file or tree `source` to `target`, which must not exist; both are on one apollofs mount.

    `progress` is called after each inode. Raises UserError, OSError (EXDEV: not one mount). Failed or interrupted,
    nothing is left at `target`, nor beside it; killed, what was made is beside it.
    """
    source, target = absolute(source), absolute(target)
    _check(source, target)
    parent, name = os.path.split(target)
    temporary = os.path.join(parent, f".{os.fsdecode(os.fsencode(name)[:NAME_BYTES])}.clone-{secrets.token_hex(4)}")
    workers = ThreadPoolExecutor(WORKERS)
    try:
        job = _Job(os.lstat(source).st_dev, workers, progress)
        job.run(source, temporary)
        _rename_new(temporary, target)
    except BaseException:
        workers.shutdown(cancel_futures=True)
        _remove(temporary)
        raise
    workers.shutdown()
    return job.done


def _check(source: str, target: str) -> None:
    status = os.lstat(source)
    parent = os.path.dirname(target)
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; a clone replaces nothing")
    if os.stat(parent).st_dev != status.st_dev:
        raise OSError(
            errno.EXDEV, "not on the same mount: blobs can be shared within one only", f"{source} -> {target}"
        )
    mount = mount_of(source)
    if mount is None or not mount.is_apollofs:
        raise UserError(f"{source} is not on an apollofs mount")
    if stat.S_ISDIR(status.st_mode) and (parent + "/").startswith(source.rstrip("/") + "/"):
        raise UserError(f"{target} lies within {source}: a tree can't be cloned into itself")


def _rename_new(old: str, new: str) -> None:
    """Rename without replacing anything. Raises UserError if `new` exists by now, OSError."""
    if _libc().renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EEXIST:
        raise UserError(f"{new} was made by somebody else meanwhile; a clone replaces nothing")
    raise OSError(number, os.strerror(number), new)


@cache
def _libc() -> ctypes.CDLL:
    # Python has no call for renameat2.
    return ctypes.CDLL(None, use_errno=True)


def _remove(path: str) -> None:
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        return


class _Job:
    """One clone under way. Files with one name are cloned by WORKERS at once; everything else in order, here."""

    def __init__(self, device: int, workers: ThreadPoolExecutor, progress: Callable[[Cloned], None]) -> None:
        self.done = Cloned()
        self._device = device
        self._workers = workers
        self._progress = progress
        self._under_way: deque[Future[os.stat_result]] = deque()
        self._linked: dict[int, tuple[str, int]] = {}
        """By inode with several names: where its clone is, and how many of the names have not been met."""

    def run(self, source: str, target: str) -> None:
        """Returns when all is there. Raises the first error, with some files still under way."""
        pending = self._one(source, target)
        self._finish(0)
        while pending:
            pending += self._directory(*pending.pop())

    def _directory(self, source: str, target: str) -> list[tuple[str, str]]:
        """Clone what is in a directory, then its attributes. Returns the subdirectories, which are made, and empty."""
        below: list[tuple[str, str]] = []
        for name in sorted(os.listdir(source)):
            below += self._one(os.path.join(source, name), os.path.join(target, name))
        self._finish(0)
        _keep_attributes(source, target, os.lstat(source))
        return below

    def _one(self, source: str, target: str) -> list[tuple[str, str]]:
        """Clone one inode, or begin to; a directory is only made, and returned."""
        status = os.lstat(source)
        if status.st_dev != self._device:
            raise OSError(errno.EXDEV, "another filesystem is mounted here; blobs are shared within one mount", source)
        if stat.S_ISDIR(status.st_mode):
            os.mkdir(target, 0o700)
            self._note(status)
            return [(source, target)]
        if status.st_nlink == 1:
            self._under_way.append(self._workers.submit(_clone_inode, source, target, status))
            self._finish(2 * WORKERS)
        elif not self._link(status, target):
            self._note(_clone_inode(source, target, status))
        return []

    def _link(self, status: os.stat_result, target: str) -> bool:
        """Whether it is a further name of what has been cloned already."""
        first, left = self._linked.pop(status.st_ino, (target, status.st_nlink))
        if left > 1:
            self._linked[status.st_ino] = (first, left - 1)
        if first == target:
            return False
        os.link(first, target, follow_symlinks=False)
        return True

    def _finish(self, left: int) -> None:
        """Wait until so many at most are under way."""
        while len(self._under_way) > left:
            self._note(self._under_way.popleft().result())

    def _note(self, status: os.stat_result) -> None:
        if stat.S_ISREG(status.st_mode):
            self.done.files += 1
            self.done.size_bytes += status.st_size
        elif stat.S_ISDIR(status.st_mode):
            self.done.directories += 1
        else:
            self.done.others += 1
        self._progress(self.done)


def _clone_inode(source: str, target: str, status: os.stat_result) -> os.stat_result:
    """Clone what is no directory; its attributes as they were then."""
    if stat.S_ISREG(status.st_mode):
        status = _clone_file(source, target)
    elif stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(source), target)
    else:
        os.mknod(target, status.st_mode, status.st_rdev)
    _keep_attributes(source, target, status)
    return status


def _clone_file(source: str, target: str) -> os.stat_result:
    """One file's bytes, as of one moment; its attributes then. What one call shares is of one moment, whoever writes
    meanwhile; where more are needed nobody may. Raises UserError if others keep changing it."""
    into = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        of = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for _ in range(ATTEMPTS):
                before = os.fstat(of)
                calls = _clone_bytes(of, into)
                after = os.fstat(of)
                if calls <= 1 or (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
                    return before
                os.ftruncate(into, 0)
        finally:
            os.close(of)
    finally:
        os.close(into)
    raise UserError(f"{source} is changed again and again while it is cloned")


def _clone_bytes(of: int, into: int) -> int:
    """In how many calls."""
    at = calls = 0
    while True:
        copied = os.copy_file_range(of, into, CALL_BYTES, at, at)
        if not copied:
            return calls
        at += copied
        calls += 1


def _keep_attributes(source: str, target: str, status: os.stat_result) -> None:
    """Owner, extended attributes, mode and times, in an order in which none undoes another."""
    made = os.lstat(target)
    if (made.st_uid, made.st_gid) != (status.st_uid, status.st_gid):
        with _refusal_allowed():
            os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    for name in os.listxattr(source, follow_symlinks=False):
        value = os.getxattr(source, name, follow_symlinks=False)
        with nullcontext() if name.startswith("user.") else _refusal_allowed():
            os.setxattr(target, name, value, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(target, stat.S_IMODE(status.st_mode))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


@contextmanager
def _refusal_allowed() -> Iterator[None]:
    """What only root may do is left out for others."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _NOT_FOR_US:
            raise
