"""Commit: make what was uploaded, or is small, the body of a file."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata import extents
from apollofs.metadata.copies import decode_copies, encode_copies
from apollofs.metadata.errors import (
    BodyConflict,
    CloneSourceChanged,
    FileTooLarge,
    OperationNotPermitted,
    StaleInode,
)
from apollofs.metadata.journal import Kind
from apollofs.metadata.ops.body import BodyKeys
from apollofs.metadata.ops.common import Home, Location, Scope, check_unsealed
from apollofs.metadata.records import FILE_BYTES_MAX, BodyChange, Inode, InodeFlag, Usage, storable_time
from apollofs.metadata.store import Put
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View


@dataclass(frozen=True, slots=True)
class CommitBody:
    """Lays a BodyChange over the newest body. Replies the inode with all its extents.

    Raises BodyConflict where the two can't be merged, CloneSourceChanged, TooManyExtents, StaleInode if the file has no
    name any more.
    """

    scope: Scope
    ino: int
    location: Location | None
    change: BodyChange
    source_location: Location | None = None
    """Where the inode is whose blobs the change shares."""

    def decide(self, view: View) -> Decision[Inode]:
        home = self.scope.find(view, self.ino, self.location)
        if not home.inode.is_file:
            raise StaleInode("not a regular file")
        check_unsealed(home.inode)
        if home.inode.flags & InodeFlag.IMMUTABLE:
            raise OperationNotPermitted("the inode is immutable")
        body = BodyKeys(self.scope, home.location)
        before = body.load(view, home.inode)
        self._check_mergeable(before)
        mtime_ns = storable_time(self.change.mtime_ns or self.scope.now_ns)
        after = before._replace(mtime_ns=mtime_ns, ctime_ns=self.scope.now_ns, body_version=before.body_version + 1)
        if self.change.inline is not None:
            after = after._replace(size_bytes=max(before.size_bytes, self.change.size_at_least))
            stored, writes = body.store_inline(before, after, self.change.inline)
        else:
            after = self._overlay(before, after)
            stored, writes = body.store(before, after)
        writes += self._references(view, before)
        writes.append(self.scope.store(home, stored))
        writes += self._copies(view)
        record = self.scope.change(
            Kind.COMMIT,
            Home(stored, home.location),
            mtime_offset_ns=mtime_ns - self.scope.now_ns if self.change.mtime_ns else None,
        )
        usage = Usage(stored.allocated_bytes - before.allocated_bytes, 0)
        whole = stored._replace(extents=after.extents if self.change.inline is None else ())
        return Decision(
            lambda revision, _: whole._replace(revision=revision),
            writes,
            record,
            usage=usage,
            rests_elsewhere=self.change.cloned_from not in (0, self.ino),
        )

    def _references(self, view: View, before: Inode) -> list[Put]:
        """The keys that say who shares the blobs of the change: this inode; of a clone, its source too."""
        change = self.change
        owners = {self.ino} if change.is_packed else set()
        blobs = {extent.blob for extent in change.extents}
        if change.cloned_from:
            source = before if change.cloned_from == self.ino else self._source(view)
            if not blobs <= {extent.blob for extent in source.extents}:
                raise CloneSourceChanged("the source has lost what is to be shared")
            if source is not before:
                owners |= {self.ino, source.ino}
        keys = self.scope.keys
        return [Put(keys.reference(blob, ino), b"") for blob in sorted(blobs) for ino in sorted(owners)]

    def _copies(self, view: View) -> list[Put]:
        """Where the change's blobs are besides their own site, added to what site agents have noted meanwhile."""
        found = []
        for blob, sites in self.change.copies:
            key = self.scope.keys.copies(blob)
            kv = view.get(key, likely_absent=True)
            found.append(Put(key, encode_copies(decode_copies(kv).with_complete(*sites))))
        return found

    def _source(self, view: View) -> Inode:
        """Compared as it is now: if it has lost the blobs meanwhile, nothing is committed."""
        try:
            home = self.scope.find(view, self.change.cloned_from, self.source_location)
        except StaleInode as exc:
            raise CloneSourceChanged("the source has no name any more") from exc
        return BodyKeys(self.scope).load(view, home.inode)

    def _check_mergeable(self, before: Inode) -> None:
        change = self.change
        if before.body_version == change.base_version:
            return
        if change.inline is not None or change.rewrites_all or change.lifts_inline or before.is_inline:
            raise BodyConflict("another mount has changed this body since it was read")
        if change.append_from is not None and before.size_bytes < change.append_from:
            raise BodyConflict("another mount has cut the file below where something was appended")

    def _overlay(self, before: Inode, after: Inode) -> Inode:
        change = self.change
        if before.is_inline and not change.lifts_inline:
            raise BodyConflict("the inline body must be taken along")
        laid, size = change.extents, change.size_at_least
        if change.append_from is not None and before.size_bytes > change.append_from:
            distance = before.size_bytes - change.append_from
            laid = extents.shift(laid, change.append_from, distance)
            size += distance
        size = max(size, before.size_bytes)
        if size > FILE_BYTES_MAX:
            raise FileTooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
        kept = () if change.rewrites_all else before.extents
        for offset, length in change.holes:
            kept = extents.punch(kept, offset, length)
        return after._replace(size_bytes=size, extents=extents.overlay(kept, laid))
