"""What the daemon tells the kernel unasked: invalidations, pages, passthrough backing files.

None of these calls holds the GIL while it is in the kernel.  `invalidate_attributes`, `inc_epoch` and the backing
calls never wait.  The others can wait for a lock that the kernel holds until some request of ours is answered: call
those from a thread (`trio.to_thread.run_sync`), never from the event loop's thread, which would have to answer.
"""

from __future__ import annotations

import errno
import fcntl
import os
from array import array
from collections.abc import Sequence
from struct import Struct

from apollofs.fs.wire_constants import EXPIRE_ONLY, IOC_BACKING_CLOSE, IOC_BACKING_OPEN, IOC_CLONE, Notify
from apollofs.fs.wire_load import hook
from apollofs.fs.wire_notify import inc_epoch, notify, notify_if_known
from apollofs.fs.wire_replies import encode_delete, encode_inval_entry, encode_inval_inode, encode_prune, encode_store

_BACKING_MAP = Struct("<iI8x")
_BACKING_ID = Struct("<I")
_DESCRIPTOR = Struct("<I")
DEVICE = "/dev/fuse"


class DeviceClosedError(OSError):
    """The mount has ended; nothing can be said to the kernel any more."""

    def __init__(self) -> None:
        super().__init__(errno.ENOTCONN, "the mount has ended")


class Device:
    """The mount's descriptor of /dev/fuse, which pyfuse3 owns.

    `close` must come before pyfuse3.close(), after the threads that use this object have ended: the number of a closed
    descriptor may be given to another file.  After it every call raises DeviceClosedError.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Make every later call fail; does not close pyfuse3's descriptor."""
        self._fd = -1

    def invalidate_attributes(self, ino: int) -> bool:
        """Have the kernel ask again for the attributes of `ino`; never waits.  False: it does not know the inode."""
        return self._notify(Notify.INVAL_INODE, encode_inval_inode(ino, -1, 0))

    def invalidate_pages(self, ino: int, offset: int = 0, length: int = 0) -> bool:
        """Drop attributes and cached pages from `offset`, `length` bytes of them (0: to the end).

        Waits for READs in flight on those pages: from a thread only.  False: the kernel does not know the inode.
        """
        return self._notify(Notify.INVAL_INODE, encode_inval_inode(ino, offset, length))

    def invalidate_entry(self, parent: int, name: bytes) -> bool:
        """Drop the cached entry, positive or negative.  False: there was none.

        Waits for every operation in flight that changes the directory `parent`: from a thread only.
        """
        return self._notify(Notify.INVAL_ENTRY, encode_inval_entry(parent, name, 0))

    def expire_entry(self, parent: int, name: bytes) -> bool:
        """As `invalidate_entry`, but the entry is only looked up again at its next use; mounts below it stay.

        From a thread only.  Needs HAS_EXPIRE_ONLY (Linux 6.2); older kernels take it for `invalidate_entry`.
        """
        return self._notify(Notify.INVAL_ENTRY, encode_inval_entry(parent, name, EXPIRE_ONLY))

    def delete_entry(self, parent: int, ino: int, name: bytes) -> bool:
        """As `invalidate_entry` if the name still means `ino`, and inotify watchers hear of it.  From a thread only."""
        return self._notify(Notify.DELETE, encode_delete(parent, ino, name))

    def invalidate_attributes_of(self, inos: Sequence[int]) -> list[int]:
        """As `invalidate_attributes` for many; returns those that the kernel does not know.

        From a thread: an inode that is just being evicted is waited for, and with it what it still writes back.
        """
        found = hook.invalidate_inodes(self._open_fd(), array("Q", inos).tobytes(), -1)
        return array("Q", found).tolist()

    def invalidate_pages_of(self, inos: Sequence[int]) -> None:
        """As `invalidate_pages`, all of them, for many.  From a thread only."""
        hook.invalidate_inodes(self._open_fd(), array("Q", inos).tobytes(), 0)

    def expire_entries(self, parent: int, names: Sequence[bytes]) -> None:
        """As `expire_entry` for many names of one directory.  From a thread only."""
        hook.expire_entries(self._open_fd(), parent, tuple(names))

    def store(self, ino: int, offset: int, data: bytes) -> bool:
        """Put bytes into the page cache, extending the file's size if they reach past it.

        Waits for locks of those pages: from a thread only.  False: the kernel does not know the inode.
        """
        return self._notify(Notify.STORE, encode_store(ino, offset, data))

    def inc_epoch(self) -> bool:
        """Have every cached entry of the mount looked up again at its next use; never waits.

        False where the kernel cannot (before Linux 6.16).
        """
        return inc_epoch(self._open_fd())

    def prune(self, inos: Sequence[int]) -> bool:
        """Drop, of these inodes, those that nobody uses: a FORGET comes for each.  From a thread: what they still have
        to write back is waited for.  False where the kernel cannot (before Linux 6.18)."""
        return notify_if_known(self._open_fd(), Notify.PRUNE, encode_prune(inos))

    def backing_open(self, file_fd: int) -> int:
        """Register an open local file for passthrough; returns its backing id for `Wire.open_reply`.

        Raises OSError: EPERM without CAP_SYS_ADMIN or without PASSTHROUGH negotiated, ELOOP when the file lies on too
        deep a stack of filesystems, EOPNOTSUPP when it is no regular file.  Close it with `backing_close` after the
        inode's last RELEASE.
        """
        # A mutable buffer: given bytes, fcntl.ioctl() returns the buffer and not the id.
        backing_id: int = fcntl.ioctl(self._open_fd(), IOC_BACKING_OPEN, bytearray(_BACKING_MAP.pack(file_fd, 0)))
        return backing_id

    def backing_close(self, backing_id: int) -> None:
        """Give a backing id back; open descriptors that use it go on.  Raises OSError ENOENT for an unknown id."""
        fcntl.ioctl(self._open_fd(), IOC_BACKING_CLOSE, bytearray(_BACKING_ID.pack(backing_id)))

    def clone(self) -> int:
        """A new descriptor of the same connection, which does not block: notifications go through it, and requests that
        are read from it are answered on it. The connection lives until the last such descriptor is closed.

        Raises OSError.
        """
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(fd, IOC_CLONE, bytearray(_DESCRIPTOR.pack(self._open_fd())))
        except OSError:
            os.close(fd)
            raise
        return fd

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise DeviceClosedError
        return self._fd

    def _notify(self, code: Notify, body: bytes) -> bool:
        return notify(self._open_fd(), code, body)
