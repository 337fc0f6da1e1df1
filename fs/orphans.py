"""What becomes of the attributes of a file that has lost its last name while it was open here."""

from __future__ import annotations

import stat

from apollofs.metadata.records import NOW, Inode, SetAttr, without_suid


def changed_here(inode: Inode, change: SetAttr) -> Inode:
    """An orphan's inode with a change that only this mount will ever see. The size is not looked at."""
    now_ns = max(inode.ctime_ns + 1, inode.mtime_ns)
    mode = inode.mode if change.mode is None else stat.S_IFMT(inode.mode) | stat.S_IMODE(change.mode)
    return inode._replace(
        mode=without_suid(mode) if change.clear_suid else mode,
        uid=inode.uid if change.uid is None else change.uid,
        gid=inode.gid if change.gid is None else change.gid,
        atime_ns=_time(change.atime_ns, inode.atime_ns, now_ns),
        mtime_ns=_time(change.mtime_ns, inode.mtime_ns, now_ns),
        ctime_ns=now_ns,
    )


def _time(given: int | None, before_ns: int, now_ns: int) -> int:
    if given is None:
        return before_ns
    return now_ns if given == NOW else given
