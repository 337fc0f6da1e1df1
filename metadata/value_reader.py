"""Reading values: what a name means and its whole body, as of one revision."""

from __future__ import annotations

from collections.abc import Mapping

from apollofs.metadata import codec
from apollofs.metadata.codec import Dentry
from apollofs.metadata.errors import CorruptRecord, NoSuchEntry, StaleInode
from apollofs.metadata.namespace_reader import NamespaceReader
from apollofs.metadata.ops import inspect
from apollofs.metadata.ops.common import MOVES_MAX, check_name
from apollofs.metadata.records import Body, DirectoryPage, Inode
from apollofs.metadata.store import Range, RangeResult, prefix_end


class ValueReader(NamespaceReader):
    """The part of a Volume that takes files for values. Linearizable, as all of its reading."""

    def cached_value(self, parent: int, name: bytes) -> Body | None:
        """As `read_value`, of what is delegated; None: ask. Raises NoSuchEntry where that is known."""
        known = self._groups.peek(parent, self._keys.dentry(parent, name))
        if known is None:
            return None
        if known[0] is None:
            check_name(name)
            raise NoSuchEntry("no such name")
        dentry = codec.decode_dentry(known[0].value, known[0].mod_revision)
        inode = dentry.inode or self._delegated_own(dentry.ino)
        return self._body_memory.of(inode) if inode is not None else None

    async def read_value(self, parent: int, name: bytes) -> Body:
        """The inode that a name means, with its inline bytes or all its extents, both as of one revision.

        No request for what is delegated; otherwise one, or two if the name means another file, with a body that its
        record does not hold, than when it was last seen. Raises NoSuchEntry.
        """
        check_name(name)
        cached = self.cached_value(parent, name)
        if cached is not None:
            return cached
        key = self._keys.dentry(parent, name)
        expected = self._last_seen(parent, key)
        for _ in range(MOVES_MAX):
            asked = self._value_questions(expected)
            others = (expected.ino,) if expected is not None and expected.inode is None else ()
            found = await self._read_group(parent, [Range(key), *asked], others)
            dentry = inspect.single_dentry(found[0])
            if dentry is None:
                raise NoSuchEntry("no such name")
            answers = dict(zip(asked, found[1:], strict=True))
            body = self._body_memory.of(dentry.inode) if dentry.inode is not None else None
            if body is not None:
                return body
            if all(question in answers for question in self._value_questions(dentry)):
                return self._value(dentry, answers)
            expected = dentry
        raise StaleInode("the name keeps changing")

    def _last_seen(self, parent: int, key: bytes) -> Dentry | None:
        """What a name meant when it was last read: worth asking for in advance."""
        known = self._groups.peek(parent, key)
        kv = known[0] if known is not None else None
        if kv is None:
            recalled = self._recollection.get(key)
            kv = recalled[0] if recalled is not None else None
        return codec.decode_dentry(kv.value, kv.mod_revision) if kv is not None else None

    def _value_questions(self, dentry: Dentry | None) -> tuple[Range, ...]:
        """What the body of what a dentry names needs beside it."""
        if dentry is None:
            return ()
        if dentry.inode is None:
            return (Range(self._keys.inode(dentry.ino)), *inspect.body_questions(self._keys, dentry.ino))
        inline, pages = inspect.body_questions(self._keys, dentry.ino)
        if dentry.inode.extent_pages:
            return (pages,)
        return (inline,) if dentry.inode.is_inline and not dentry.inode.copy else ()

    def _value(self, dentry: Dentry, answers: Mapping[Range, RangeResult]) -> Body:
        inode = dentry.inode
        if inode is None:
            own = answers[Range(self._keys.inode(dentry.ino))].kvs
            if not own:
                raise CorruptRecord(f"dentry without inode {dentry.ino:#x}")
            inode = codec.decode_inode(own[0].value, own[0].mod_revision)
        known = self._body_memory.of(inode)
        if known is not None:
            return known
        inline, pages = (answers.get(each) for each in inspect.body_questions(self._keys, dentry.ino))
        body = _whole(inode, inline, pages)
        self._body_memory.put(body)
        return body

    async def list_values(
        self, parent: int, prefix: bytes, after: bytes, limit: int, revision: int = 0
    ) -> DirectoryPage:
        """Up to `limit` names with a prefix and greater than `after`, in byte order. One request.

        `revision` 0: the newest state; otherwise the snapshot of an earlier page. Raises Compacted.
        """
        names = self._keys.dentries_of(parent) + prefix
        start = max(names, self._keys.dentries_of(parent) + after + b"\0") if after else names
        if start >= prefix_end(names):
            return DirectoryPage((), False, revision)
        self.asked += 1
        asked = Range(start, prefix_end(names), limit=limit, revision=revision)
        _, (found,) = await self._transactor.read([asked])
        return self._page(parent, found.kvs, found.more, revision or found.revision)


def _whole(inode: Inode, inline: RangeResult | None, pages: RangeResult | None) -> Body:
    if inode.extent_pages:
        assert pages is not None, "it was asked for"
        extents = tuple(extent for kv in pages.kvs for extent in codec.decode_extents(kv.value))
        return Body(inode._replace(extents=extents))
    if not inode.is_inline:
        return Body(inode)
    if inline is None or not inline.kvs:
        raise CorruptRecord(f"inode {inode.ino:#x} lacks its inline body")
    return Body(inode, inline.kvs[0].value)
