"""Passthrough: which inodes the kernel reads and writes by itself, from a local file.

The kernel has an inode open in one mode at a time: through its page cache and this daemon (*ordinary*), or on a backing
file (*passing*). Mixing them is EIO. So the mode is kept here, by inode, and changes only when nothing of it is open.

Source: fs/fuse/iomode.c and fs/fuse/passthrough.c of Linux 6.9 and later.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from dataclasses import dataclass
from typing import Final, Protocol

log = logging.getLogger(__name__)

OFF: Final = "switched off by -o passthrough=off"
NOT_MOUNTED: Final = "nothing is mounted yet"
_WHY: Final = {
    errno.EPERM: "the daemon lacks CAP_SYS_ADMIN",
    errno.ENOTTY: "the kernel is older than Linux 6.9",
    errno.EINVAL: "the kernel is older than Linux 6.9",
    errno.ELOOP: "the cache directory lies on a stacked filesystem",
    errno.EOPNOTSUPP: "the cache directory's filesystem can't be passed through",
}


class BackingDevice(Protocol):
    """What is asked of the FUSE device (`wire_device.Device`)."""

    def backing_open(self, file_fd: int) -> int: ...
    def backing_close(self, backing_id: int) -> None: ...


@dataclass(slots=True)
class _Backing:
    backing_id: int
    opens: int


class Passthrough:
    """The modes of one mount's inodes. For the event loop's thread; no call waits."""

    def __init__(self, *, wanted: bool = True) -> None:
        self.why_not = NOT_MOUNTED if wanted else OFF
        """Why it is not in use; empty if it is."""
        self.opens = 0
        """Opens that the kernel serves by itself, since the mount."""
        self.refused = 0
        """Opens that could have been, but for another open of the same inode in the other mode."""
        self._wanted = wanted
        self._device: BackingDevice | None = None
        self._ordinary: Counter[int] = Counter()
        self._backings: dict[int, _Backing] = {}

    def attach(self, device: BackingDevice, negotiated: bool, probe_fd: int) -> None:
        """The mount is there: see whether passthrough works, with a file on the disk of what is to be passed through.

        `negotiated`: whether INIT has settled FUSE_PASSTHROUGH.
        """
        if not self._wanted:
            return
        if not negotiated:
            self.why_not = _WHY[errno.ENOTTY]
            return
        try:
            device.backing_close(device.backing_open(probe_fd))
        except OSError as exc:
            self.why_not = _WHY.get(exc.errno or 0, f"the kernel refuses it: {exc.strerror}")
            log.info("passthrough is not used: %s", self.why_not)
            return
        self._device = device
        self.why_not = ""

    def detach(self) -> None:
        """The mount is ending: no more backing files."""
        self._device = None
        if self._wanted:
            self.why_not = NOT_MOUNTED

    @property
    def available(self) -> bool:
        return self._device is not None

    # -- by inode ----------------------------------------------------------------------------------------------------

    def is_ordinary(self, ino: int) -> bool:
        """Whether the inode is open through this daemon: until that has ended, every open of it must be."""
        return ino in self._ordinary

    def is_passing(self, ino: int) -> bool:
        """Whether the inode is open on a backing file: until that has ended, every open of it must be."""
        return ino in self._backings

    def opened_ordinary(self, ino: int) -> None:
        assert ino not in self._backings
        self._ordinary[ino] += 1

    def closed_ordinary(self, ino: int) -> None:
        self._ordinary[ino] -= 1
        if not self._ordinary[ino]:
            del self._ordinary[ino]

    def opened(self, ino: int, fd: int) -> int:
        """The inode is opened on the file behind `fd`, which must be that of all its opens; its backing id.

        Raises OSError where the kernel takes no backing file (then the open must be ordinary).
        """
        assert ino not in self._ordinary
        backing = self._backings.get(ino)
        if backing is None:
            if self._device is None:
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
            backing = self._backings[ino] = _Backing(self._device.backing_open(fd), 0)
        backing.opens += 1
        self.opens += 1
        return backing.backing_id

    def closed(self, ino: int) -> None:
        """One of these opens is released. With the last one the kernel lets go of the file."""
        backing = self._backings[ino]
        backing.opens -= 1
        if backing.opens:
            return
        del self._backings[ino]
        if self._device is not None:
            try:
                self._device.backing_close(backing.backing_id)
            except OSError as exc:
                log.warning("a backing file could not be given back to the kernel: %s", exc)

    def statistics(self) -> dict[str, float]:
        """Counters for `status`."""
        return {
            "passthrough": int(self.available),
            "passthrough_files": len(self._backings),
            "passthrough_opens": self.opens,
            "passthrough_refused": self.refused,
        }
