"""`apollofs umount`: asks the daemon to commit and unmount, and waits for its end; does what it can without one."""

from __future__ import annotations

import errno
import os
import select
import threading
from typing import Any

from apollofs.fs.control import MountDead, MountSilent, ask, socket_path
from apollofs.fs.mountinfo import MountEntry, mount_at
from apollofs.fs.unmounting import unmount
from apollofs.fs.user_error import UserError

ASK_DEADLINE_S = 600.0
PROBE_DEADLINE_S = 10.0
END_DEADLINE_S = 30.0
"""For the process to end once everything is committed."""


def apollofs_mount_at(mountpoint: str) -> MountEntry:
    """Raises UserError unless an apollofs mount is on top there."""
    entry = mount_at(mountpoint) or mount_at(os.path.realpath(mountpoint))
    if entry is None:
        raise UserError(f"{mountpoint} is not mounted")
    if not entry.is_apollofs:
        raise UserError(f"{mountpoint} is no apollofs mount but {entry.fstype}")
    return entry


def unmount_and_wait(mountpoint: str, runtime_dir: str, *, lazy: bool) -> dict[str, Any]:
    """Commit, unmount, wait for the daemon's end. Raises UserError; the mount then stays, unless the line says more."""
    entry = apollofs_mount_at(mountpoint)
    path = socket_path(runtime_dir, entry.device)
    try:
        ask(path, "status", deadline_s=PROBE_DEADLINE_S)
    except MountSilent as exc:
        return _without_daemon(entry, exc, lazy=lazy)
    answer = ask(path, "unmount", {"lazy": lazy}, deadline_s=ASK_DEADLINE_S)
    ended = bool(answer["ended"])
    if ended:
        _await_end(int(answer["pid"]))
    return {"mountpoint": entry.mountpoint, "unmounted": True, "committed": True, "ended": ended}


def _without_daemon(entry: MountEntry, why: MountSilent, *, lazy: bool) -> dict[str, Any]:
    """A dead daemon's mount is taken away; one that lives and does not answer only where --lazy says so."""
    if not lazy and not (isinstance(why, MountDead) and _is_dead(entry.mountpoint)):
        raise UserError(
            f"{entry.mountpoint}: {why}; --lazy detaches it, and what is not committed may be lost"
        ) from why
    unmount(entry.mountpoint, lazy=True)
    return {"mountpoint": entry.mountpoint, "unmounted": True, "committed": False, "ended": False}


def _is_dead(mountpoint: str) -> bool:
    """Whether the kernel knows that the daemon is gone. In a thread: a frozen daemon would keep the question."""
    dead: list[bool] = []

    def probe() -> None:
        try:
            os.statvfs(mountpoint)
        except OSError as exc:
            dead.append(exc.errno in (errno.ENOTCONN, errno.ECONNABORTED))

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_DEADLINE_S)
    return dead == [True]


def _await_end(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(END_DEADLINE_S * 1000):
            raise UserError(f"it is unmounted and committed, but its process {pid} does not end")
    finally:
        os.close(pidfd)
