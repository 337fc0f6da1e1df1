"""What the kernel was given of each group, and until when it may use it. No I/O, that is in `kernel_cache.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import trio

from apollofs.metadata.session import boot_time


@dataclass(slots=True)
class Share:
    """What the kernel was given of one group, and until when (`boot_time`) it may use the last of it."""

    group: int
    inodes: set[int] = field(default_factory=set)
    names: set[bytes] = field(default_factory=set)
    """Changed by `Shares` alone, which counts them."""
    paged: set[int] = field(default_factory=set)
    """Inodes of files that have pages as well, or are about to."""
    until: float = 0.0
    epoch: int = 0
    """Of the listings that were handed out since the group is held; 0: none was."""
    listed_until: float = 0.0
    """Until when the attributes that came along with the last one hold."""
    hurried: trio.Event = field(default_factory=trio.Event)

    def forget(self, ino: int) -> None:
        """The kernel has nothing of an inode that it was given as part of this group."""
        self.inodes.discard(ino)
        self.paged.discard(ino)


class Shares:
    """Those of one mount's kernel. An inode may be in several, of groups that it was in; one of them is its home."""

    def __init__(self) -> None:
        self._shares: dict[int, Share] = {}
        self._home: dict[int, Share] = {}
        self.names = 0
        """Entries over all groups, those of absent names too."""

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[int]:
        return iter(self._shares)

    @property
    def inodes(self) -> int:
        """How many have a home."""
        return len(self._home)

    def clear(self) -> None:
        """The kernel has nothing."""
        self._shares.clear()
        self._home.clear()
        self.names = 0

    def find(self, group: int) -> Share | None:
        return self._shares.get(group)

    def lengthen(self, group: int, validity_s: float) -> Share:
        """Something of a group is given for so many seconds from now."""
        share = self._shares.get(group)
        if share is None:
            share = self._shares[group] = Share(group)
        share.until = boot_time() + validity_s
        return share

    def discard(self, group: int) -> None:
        """The kernel has nothing of a group."""
        share = self._shares.pop(group, None)
        if share is not None:
            self.names -= len(share.names)
            self.leave(share, share.inodes)

    # -- inodes ------------------------------------------------------------------------------------------------------

    def home(self, ino: int) -> Share | None:
        """The share under which something of an inode was given last."""
        return self._home.get(ino)

    def add(self, share: Share, ino: int) -> None:
        """Something of an inode is given, as part of a group."""
        share.inodes.add(ino)
        self._home[ino] = share

    def leave(self, share: Share, inos: Collection[int]) -> None:
        """Inodes have nothing of this share any more; those of which another one is the home by now stay there."""
        for ino in inos:
            if self._home.get(ino) is share:
                del self._home[ino]

    def move_out(self, ino: int) -> Share | None:
        """An inode is in another group now. The share that has been its home, and knows of it still."""
        return self._home.pop(ino, None)

    def forget(self, ino: int) -> None:
        """The kernel knows the inode no more."""
        share = self._home.pop(ino, None)
        if share is not None:
            share.forget(ino)

    # -- names -------------------------------------------------------------------------------------------------------

    def add_name(self, share: Share, name: bytes) -> None:
        if name not in share.names:
            share.names.add(name)
            self.names += 1

    def remove_names(self, share: Share, names: Collection[bytes]) -> None:
        before = len(share.names)
        share.names.difference_update(names)
        self.names -= before - len(share.names)
