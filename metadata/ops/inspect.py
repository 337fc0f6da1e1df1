"""Reading: what to ask for an inode, and how the answers become one."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata import codec
from apollofs.metadata.codec import Dentry, Times
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.body import PAGES_MAX
from apollofs.metadata.ops.common import Location
from apollofs.metadata.records import Inode
from apollofs.metadata.store import Range, RangeResult, prefix_end

DIRECTORY_BYTES = 4096
"""st_size of every directory."""


def directory_questions(keys: Keys, ino: int) -> tuple[Range, Range]:
    """What a directory's attributes need beside `i/<ino>`: its times, and how many subdirectories it has."""
    children = keys.children_of(ino)
    return Range(keys.times(ino)), Range(children, prefix_end(children), count_only=True)


def with_answers(inode: Inode, times: RangeResult, children: RangeResult) -> Inode:
    """A directory's inode completed by the answers to `directory_questions`."""
    known = codec.decode_times(times.kvs[0].value) if times.kvs else None
    return with_directory(inode, known, children.count)


def with_directory(inode: Inode, times: Times | None, children: int) -> Inode:
    """A directory's inode completed by what `t/` and the count of `c/` say.

    nlink is 2 and one for each subdirectory's ".."; ctime is the later of the inode's own and that of its names.
    """
    mtime_ns, ctime_ns = inode.mtime_ns, inode.ctime_ns
    if times is not None:
        mtime_ns, ctime_ns = times.mtime_ns, max(ctime_ns, times.ctime_ns)
    return inode._replace(mtime_ns=mtime_ns, ctime_ns=ctime_ns, nlink=2 + children, size_bytes=DIRECTORY_BYTES)


def own_questions(keys: Keys, ino: int) -> tuple[Range, Range, Range]:
    """All of an inode that has a key of its own, directory or not."""
    return (Range(keys.inode(ino)), *directory_questions(keys, ino))


def own_inode(found: RangeResult, times: RangeResult, children: RangeResult) -> Inode | None:
    """The answers to `own_questions`; None if there is no such inode."""
    if not found.kvs:
        return None
    inode = codec.decode_inode(found.kvs[0].value, found.kvs[0].mod_revision)
    return with_answers(inode, times, children) if inode.is_dir else inode


def single_dentry(found: RangeResult) -> Dentry | None:
    return codec.decode_dentry(found.kvs[0].value, found.kvs[0].mod_revision) if found.kvs else None


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """The answer to a question by number: the inode, or where to ask next, or neither (it is gone)."""

    inode: Inode | None
    moved: Location | None


def number_questions(keys: Keys, ino: int, location: Location | None) -> list[Range]:
    """An inode by number, wherever it is: its own key, where it has moved to, and where it was last seen."""
    asked = [*own_questions(keys, ino), Range(keys.moved(ino))]
    if location is not None:
        asked.append(Range(keys.dentry(*location)))
    return asked


def number_answer(ino: int, location: Location | None, found: list[RangeResult]) -> Whereabouts:
    """The answers to `number_questions`."""
    if location is not None:
        dentry = single_dentry(found[4])
        if dentry is not None and dentry.ino == ino and dentry.inode is not None:
            return Whereabouts(dentry.inode, None)
    inode = own_inode(*found[:3])
    if inode is not None:
        return Whereabouts(inode, None)
    if found[3].kvs:
        target = codec.decode_location(found[3].kvs[0].value)
        if target != location:
            return Whereabouts(None, target)
    return Whereabouts(None, None)


def body_questions(keys: Keys, ino: int, inline_number: int = 0) -> tuple[Range, Range]:
    """The inline body, under its own number (`Inode.inline_number`) if that is not the inode's, and the pages of
    extents."""
    pages = keys.extents_of(ino)
    return Range(keys.inline(inline_number or ino)), Range(pages, prefix_end(pages), limit=PAGES_MAX)
