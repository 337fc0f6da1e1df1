"""Taking a mount out of the tree: umount2(2) for root, fusermount3 for everybody else. Blocking: for threads."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess

from apollofs.fs.user_error import UserError

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
FUSERMOUNT_DEADLINE_S = 60.0


class MountBusy(UserError):
    """Somebody has a file open, or stands, below the mountpoint."""


def unmount(mountpoint: str, *, lazy: bool) -> None:
    """Unmount what is on top at `mountpoint`; `lazy`: now from the tree, and for good when the last user is gone.

    Not being mounted is no error: somebody else was faster. Raises MountBusy, UserError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
    if libc.umount2(os.fsencode(mountpoint), flags) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EPERM:
        _unmount_as_user(mountpoint, lazy=lazy)
    elif number == errno.EBUSY:
        raise MountBusy(f"{mountpoint} is busy: a process has a file open or its directory there")
    elif number not in (errno.EINVAL, errno.ENOENT):
        raise UserError(f"{mountpoint} can't be unmounted: {os.strerror(number)}")


def _unmount_as_user(mountpoint: str, *, lazy: bool) -> None:
    program = shutil.which("fusermount3")
    if program is None:
        raise UserError(f"{mountpoint} can't be unmounted: fusermount3 is not installed, and you are not root")
    words = [program, "-u", *(["-z"] if lazy else []), "--", mountpoint]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=FUSERMOUNT_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise UserError(f"{mountpoint} can't be unmounted: fusermount3 does not end") from exc
    if done.returncode == 0 or "not mounted" in done.stderr or "not found in" in done.stderr:
        return
    if "busy" in done.stderr:
        raise MountBusy(f"{mountpoint} is busy: a process has a file open or its directory there")
    raise UserError(f"{mountpoint} can't be unmounted: {done.stderr.strip()[-300:]}")


def sync_filesystem(mountpoint: str) -> None:
    """syncfs(2): have the kernel hand over what is dirty in mapped pages. Raises UserError."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if libc.syncfs(fd) != 0:
            raise UserError(f"{mountpoint} can't be synced: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)
