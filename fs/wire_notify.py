"""Messages of ours on a descriptor of /dev/fuse. Loads no FUSE library: the guard does without."""

from __future__ import annotations

import contextlib
import errno
import os
from struct import Struct

from apollofs.fs.wire_constants import Notify

REQUEST_BYTES_MAX = (1 << 20) + (64 << 10)
"""libfuse's largest WRITE with its header."""
_HEADER = Struct("<IiQ")
_REQUEST = Struct("<IIQ")


def notify(fd: int, code: Notify, body: bytes) -> bool:
    """Send one notification; False on ENOENT and ENOTDIR, which say that the kernel has nothing cached."""
    try:
        os.writev(fd, (_HEADER.pack(_HEADER.size + len(body), code, 0), body))
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise
    return True


def notify_if_known(fd: int, code: Notify, body: bytes) -> bool:
    """As `notify`; False too where the kernel does not know such a notification."""
    try:
        return notify(fd, code, body)
    except OSError as exc:
        if exc.errno in (errno.EINVAL, errno.ENOSYS):
            return False
        raise


def inc_epoch(fd: int) -> bool:
    """Have every cached entry of the mount looked up again at its next use; never waits.

    False where the kernel cannot (before Linux 6.16).
    """
    return notify_if_known(fd, Notify.INC_EPOCH, b"")


def refuse_waiting(fd: int, error: int) -> int:
    """Answer every request that nobody has read yet with `error`; how many. `fd` does not block.

    For when nobody will read them any more. Returns when none is left, or the mount has gone.
    """
    count = 0
    while True:
        try:
            request = os.read(fd, REQUEST_BYTES_MAX)
        except OSError as exc:
            if exc.errno in (errno.EINTR, errno.EIO):
                continue  # EIO: it does not fit, and the kernel has answered it
            return count
        _, _, unique = _REQUEST.unpack_from(request)
        # nobody waits for an answer to FORGET and INTERRUPT
        with contextlib.suppress(OSError):
            os.write(fd, _HEADER.pack(_HEADER.size, -error, unique))
        count += 1
