"""What this mount last read of bodies, kept by version: an inode that is known to be the newest brings its body."""

from __future__ import annotations

from collections import OrderedDict

from apollofs.metadata.records import Body, Inode

BYTES_MAX = 32 << 20
EXTENT_BYTES = 200
"""What an extent takes up in memory, about."""


class BodyMemory:
    """Bodies that are not in the inode's record: inline bytes, and extents that are paged out. Bounded by BYTES_MAX;
    those that were not used for longest leave first. A body's version is never used for another body."""

    def __init__(self) -> None:
        self._bodies: OrderedDict[int, Body] = OrderedDict()
        self._bytes = 0

    def put(self, body: Body) -> None:
        """Remember it, unless a newer one is there."""
        inode = body.inode
        held = self._bodies.get(inode.ino)
        if inode.copy or not (inode.is_inline or inode.extent_pages):
            return
        if held is not None:
            if held.inode.body_version > inode.body_version:
                return
            self.forget(inode.ino)
        self._bodies[inode.ino] = body
        self._bytes += _bytes_of(body)
        while self._bytes > BYTES_MAX:
            self._bytes -= _bytes_of(self._bodies.popitem(last=False)[1])

    def of(self, inode: Inode) -> Body | None:
        """The body of an inode as this record has it; None if that must be read."""
        if inode.copy or not (inode.is_inline or inode.extent_pages):
            return Body(inode, inode.copy)
        held = self._bodies.get(inode.ino)
        if held is None or held.inode.body_version != inode.body_version:
            return None
        self._bodies.move_to_end(inode.ino)
        return Body(inode._replace(extents=held.inode.extents), held.inline)

    def forget(self, ino: int) -> None:
        """The kernel knows the inode no more, or it is replaced."""
        held = self._bodies.pop(ino, None)
        if held is not None:
            self._bytes -= _bytes_of(held)


def _bytes_of(body: Body) -> int:
    return len(body.inline) + EXTENT_BYTES * (1 + len(body.inode.extents))
