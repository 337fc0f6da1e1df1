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

        No request for what is delegated; otherwise one, or two for a body that the record does not hold and that is
        elsewhere than when the name was last seen: not if one value has replaced another. Raises NoSuchEntry.
        """
        check_name(name)
        cached = self.cached_value(parent, name)
        if cached is not None:
            return cached
        key = self._keys.dentry(parent, name)
        expected, number = self._last_seen(parent, key), 0
        for _ in range(MOVES_MAX):
            asked = self._value_questions(expected, number)
            others = (expected.ino,) if expected is not None and expected.inode is None else ()
            found = await self._read_group(parent, [Range(key), *asked], others)
            dentry = inspect.single_dentry(found[0])
            if dentry is None:
                raise NoSuchEntry("no such name")
            answers = dict(zip(asked, found[1:], strict=True))
            inode = dentry.inode or self._own_of(dentry, answers)
            body = self._body_memory.of(inode) if inode is not None else None
            if body is not None:
                return body
            number = inode.inline_number if inode is not None else 0
            if inode is not None and all(each in answers for each in self._value_questions(dentry, number)):
                return self._value(inode, answers)
            expected = dentry
        raise StaleInode("the name keeps changing")

    def _value_questions(self, dentry: Dentry | None, number: int) -> tuple[Range, ...]:
        """What the body of what a dentry names needs beside it. `number`: where an inode that is not in the dentry has
        its inline body, if that is known."""
        if dentry is None:
            return ()
        if dentry.inode is None:
            return (Range(self._keys.inode(dentry.ino)), *inspect.body_questions(self._keys, dentry.ino, number))
        inline, pages = inspect.body_questions(self._keys, dentry.ino, dentry.inode.inline_number)
        if dentry.inode.extent_pages:
            return (pages,)
        return (inline,) if dentry.inode.is_inline and not dentry.inode.copy else ()

    def _own_of(self, dentry: Dentry, answers: Mapping[Range, RangeResult]) -> Inode | None:
        """The inode that has a key of its own; None if that was not asked for."""
        own = answers.get(Range(self._keys.inode(dentry.ino)))
        if own is None:
            return None
        if not own.kvs:
            raise CorruptRecord(f"dentry without inode {dentry.ino:#x}")
        return codec.decode_inode(own.kvs[0].value, own.kvs[0].mod_revision)

    def _value(self, inode: Inode, answers: Mapping[Range, RangeResult]) -> Body:
        questions = inspect.body_questions(self._keys, inode.ino, inode.inline_number)
        body = _whole(inode, *(answers.get(each) for each in questions))
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
        is_behind = start >= prefix_end(names)
        self.asked += 1
        # there is nothing behind the last name; a revision as of which that is so there is all the same
        asked = Range(names, revision=revision) if is_behind else Range(start, prefix_end(names), limit, revision)
        _, (found,) = await self._transactor.read([asked])
        if is_behind:
            return DirectoryPage((), False, revision or found.revision)
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
