"""MoveBody: let a file refer to a copy of bytes that it has, in another blob. What a reader sees stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from apollofs.metadata import codec, extents
from apollofs.metadata.copies import decode_copies, encode_copies
from apollofs.metadata.errors import StaleInode
from apollofs.metadata.extents import Extents
from apollofs.metadata.journal import Kind
from apollofs.metadata.ops.body import BodyKeys
from apollofs.metadata.ops.common import Home, Location, Scope
from apollofs.metadata.records import Extent, InodeFlag
from apollofs.metadata.store import Put
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View

Ranges = tuple[tuple[int, int, int], ...]
"""(start, end, where in the new blob) of bytes of a blob, in order."""


@dataclass(frozen=True, slots=True)
class Copied:
    """A shared blob that was put, and which bytes of which blobs are copied there."""

    blob: int
    length: int
    parts: Mapping[int, Ranges]
    """Old blob -> its ranges."""
    sites: tuple[int, ...] = ()
    """That have all of the new blob, besides its own."""


@dataclass(frozen=True, slots=True)
class MoveBody:
    """Replies True once the file refers to `copied` instead of the old blobs, which go to a tombstone: readers of the
    former version keep them. The mtime stays, the ctime is now. False, and nothing is changed, if the file has no name
    any more, may not be changed, refers to none of these bytes or to others of the same blobs too, or if `collector`,
    a session, is not the volume's collector any more: then another one may have removed the new blob.
    """

    scope: Scope
    ino: int
    location: Location | None
    copied: Copied
    collector: int

    def decide(self, view: View) -> Decision[bool]:
        refused: Decision[bool] = Decision(lambda _, __: False)
        scope, copied = self.scope, self.copied
        role = view.get(scope.keys.collector)
        if role is None or codec.decode_mount(role.value).session != self.collector:
            return refused
        try:
            home = scope.find(view, self.ino, self.location)
        except StaleInode:
            return refused
        if not may_move(home.inode.is_file, home.inode.seal, home.inode.flags):
            return refused
        body = BodyKeys(scope, home.location)
        before = body.load(view, home.inode)
        moved = relocate(before.extents, copied)
        if moved is None or moved == before.extents:
            return refused
        after = before._replace(extents=moved, ctime_ns=scope.now_ns, body_version=before.body_version + 1)
        stored, writes = body.store(before, after)
        writes.append(Put(scope.keys.reference(copied.blob, self.ino), b""))
        writes += self._copies(view)
        writes.append(scope.store(home, stored))
        record = scope.change(Kind.COMMIT, Home(stored, home.location), mtime_offset_ns=before.mtime_ns - scope.now_ns)
        return Decision(lambda _, __: True, writes, record, rests_elsewhere=True)

    def _copies(self, view: View) -> list[Put]:
        """Where the new blob is besides its own site, added to what site agents have noted meanwhile."""
        if not self.copied.sites:
            return []
        key = self.scope.keys.copies(self.copied.blob)
        noted = decode_copies(view.get(key, likely_absent=True))
        wanted = noted.with_complete(*self.copied.sites)
        return [Put(key, encode_copies(wanted))] if wanted != noted else []


def may_move(is_file: bool, seal: int, flags: InodeFlag) -> bool:
    """Whether an inode's body may be elsewhere: what is sealed or immutable stays as it is."""
    return is_file and not seal and not flags & InodeFlag.IMMUTABLE


def relocate(before: Extents, copied: Copied) -> Extents | None:
    """The extents with all bytes of the old blobs in the new one; None if one has bytes that were not copied."""
    found = []
    for extent in before:
        if extent.blob not in copied.parts:
            found.append(extent)
            continue
        at = _place(copied.parts[extent.blob], extent)
        if at is None:
            return None
        found.append(replace(extent, blob=copied.blob, blob_offset=at, blob_length=copied.length))
    return extents.merge(found)


def _place(ranges: Ranges, extent: Extent) -> int | None:
    """Where the extent's bytes are in the new blob, if one of the ranges has them all."""
    for start, end, at in ranges:
        if start <= extent.blob_offset and extent.blob_offset + extent.length <= end:
            return at + extent.blob_offset - start
    return None
