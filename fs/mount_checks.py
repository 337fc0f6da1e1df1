"""What is looked at on this host before anything is mounted: each fault has its own clear line."""

from __future__ import annotations

import errno
import os
import stat
import tempfile

from apollofs.fs.mountinfo import absolute, mount_at
from apollofs.fs.unmounting import unmount
from apollofs.fs.user_error import UserError
from apollofs.metadata.name_text import name_text

FUSE_DEVICE = "/dev/fuse"


def check_fuse_device(path: str = FUSE_DEVICE) -> None:
    """Raises UserError unless FUSE can be used here."""
    try:
        if not stat.S_ISCHR(os.stat(path).st_mode):
            raise UserError(f"{path} is no device: is FUSE set up on this host?")
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError as exc:
        raise UserError(
            f"{path} is missing: load the kernel module (modprobe fuse), or give it to the container"
        ) from exc
    except OSError as exc:
        raise UserError(f"{path} can't be opened: {exc.strerror}") from exc


def check_mountpoint(path: str) -> str:
    """The mountpoint's absolute path. Raises UserError if it is missing, no directory, busy, or no UTF-8.

    An apollofs mount whose daemon has died is taken away first, so that a restart after a crash needs no hand.
    """
    mountpoint = absolute(path)
    _check_text("mountpoint", mountpoint)
    _clear_or_refuse(mountpoint)
    try:
        found = os.stat(mountpoint)
    except FileNotFoundError as exc:
        raise UserError(f"the mountpoint {mountpoint} does not exist") from exc
    except OSError as exc:
        raise UserError(f"the mountpoint {mountpoint} can't be used: {exc.strerror}") from exc
    if not stat.S_ISDIR(found.st_mode):
        raise UserError(f"the mountpoint {mountpoint} is not a directory")
    resolved = os.path.realpath(mountpoint)
    _check_text("mountpoint", resolved)
    if resolved != mountpoint:
        _clear_or_refuse(resolved)
    return resolved


def _check_text(what: str, path: str) -> None:
    """Other hosts, logs and reports get it as text. Raises UserError."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError as exc:
        raise UserError(f"the {what} {name_text(os.fsencode(path))} is no UTF-8: give it another name") from exc


def _clear_or_refuse(mountpoint: str) -> None:
    entry = mount_at(mountpoint)
    if entry is None:
        return
    if not entry.is_apollofs:
        raise UserError(f"the mountpoint {mountpoint} is busy: {entry.fstype} is mounted there")
    try:
        os.statvfs(mountpoint)  # a stat the kernel may answer without the daemon
    except OSError as exc:
        if exc.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise UserError(
                f"the mountpoint {mountpoint} is busy: an apollofs mount that answers {exc.strerror}"
            ) from exc
        unmount(mountpoint, lazy=True)
    else:
        raise UserError(
            f"the mountpoint {mountpoint} is busy: apollofs volume {entry.volume!r} is mounted there already"
        )


def check_cache_dir(path: str) -> str:
    """Make the cache directory if it is missing; its absolute path. Raises UserError unless files can be made there."""
    directory = os.path.abspath(path)
    _check_text("cache directory", directory)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe-"):
            pass
    except OSError as exc:
        raise UserError(f"the cache directory {directory} can't be written: {exc.strerror}") from exc
    return directory
