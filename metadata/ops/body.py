"""How a body is kept: inline in `v/<ino>`, as extents in the inode, or, if there are many, in `e/<ino>/<page>`."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata import codec
from apollofs.metadata.errors import CorruptRecord, TooManyExtents
from apollofs.metadata.ops.common import Location, Scope
from apollofs.metadata.records import Extent, Inode, InodeFlag
from apollofs.metadata.store import Delete, Put
from apollofs.metadata.view import View

EXTENTS_IN_INODE_MAX = 32
EXTENTS_IN_PAGE_MAX = 512
PAGES_MAX = 16
EXTENTS_MAX = EXTENTS_IN_PAGE_MAX * PAGES_MAX
COPY_BYTES_MAX = 256
"""Inline bodies up to this size are kept in the inode too: listings drag them along, and an open needs no request."""
Writes = list[Put | Delete]


@dataclass(frozen=True, slots=True)
class BodyKeys:
    """Reads and writes what an inode says of its body. Inodes with paged extents are handled with all of them."""

    scope: Scope
    location: Location | None = None
    """Where the inode is embedded; a tombstone of dropped blobs names it."""

    def load(self, view: View, inode: Inode) -> Inode:
        """The inode with all its extents."""
        if not inode.extent_pages:
            return inode
        found: list[Extent] = []
        for page in range(inode.extent_pages):
            kv = view.get(self.scope.keys.extents(inode.ino, page))
            if kv is None:
                raise CorruptRecord(f"inode {inode.ino:#x} lacks page {page} of its extents")
            found += codec.decode_extents(kv.value)
        return inode._replace(extents=tuple(found))

    def store(self, before: Inode, after: Inode) -> tuple[Inode, Writes]:
        """Make `after` (with all its extents, and its new body_version) what is kept; the inode as it is to be stored.

        `before` has all its extents too. Blobs that are no longer referred to go to a tombstone.
        Raises TooManyExtents.
        """
        keys = self.scope.keys
        writes: Writes = [*self.scope.discard(before, after, self.location)]
        if before.is_inline:
            writes.append(Delete(keys.inline(before.inline_number)))
        if len(after.extents) > EXTENTS_MAX:
            raise TooManyExtents(f"more than {EXTENTS_MAX} extents")
        pages: list[tuple[Extent, ...]] = []
        if len(after.extents) > EXTENTS_IN_INODE_MAX:
            starts = range(0, len(after.extents), EXTENTS_IN_PAGE_MAX)
            pages = [after.extents[at : at + EXTENTS_IN_PAGE_MAX] for at in starts]
        for number, page in enumerate(pages):
            writes.append(Put(keys.extents(after.ino, number), codec.encode_extents(page)))
        writes += [Delete(keys.extents(after.ino, number)) for number in range(len(pages), before.extent_pages)]
        inode = after._replace(
            flags=after.flags & ~InodeFlag.INLINE,
            inline_bytes=0,
            extents=() if pages else after.extents,
            extent_pages=len(pages),
            extents_bytes=sum(extent.length for extent in after.extents) if pages else 0,
            copy=b"",
            inline_at=0,
        )
        return inode, writes

    def store_inline(self, before: Inode, after: Inode, data: bytes) -> tuple[Inode, Writes]:
        """Make `data` the whole body; bytes between it and `after.size_bytes` are a hole."""
        keys = self.scope.keys
        copy = data if len(data) <= COPY_BYTES_MAX else b""
        bare = after._replace(extents=(), extent_pages=0, extents_bytes=0, inline_bytes=len(data), copy=copy)
        writes: Writes = [*self.scope.discard(before, bare, self.location)]
        writes += [Delete(keys.extents(after.ino, number)) for number in range(before.extent_pages)]
        if data:
            writes.append(Put(keys.inline(after.inline_number), data))
            return bare._replace(flags=after.flags | InodeFlag.INLINE), writes
        if before.is_inline:
            writes.append(Delete(keys.inline(after.inline_number)))
        return bare._replace(flags=after.flags & ~InodeFlag.INLINE, inline_at=0), writes

    def resize_inline(self, view: View, after: Inode) -> tuple[Inode, Writes]:
        """Cut an inline body to the inode's new size; growing leaves a hole behind it."""
        if after.size_bytes >= after.inline_bytes:
            return after, []
        data = b""
        if after.size_bytes > 0:
            kv = view.get(self.scope.keys.inline(after.inline_number))
            if kv is None:
                raise CorruptRecord(f"inode {after.ino:#x} lacks its inline body")
            data = kv.value[: after.size_bytes]
        return self.store_inline(after, after, data)
