"""The whole-namespace checker: reads every key of a volume as of one revision and names each violated invariant.

It holds one small record an inode in memory (about 300 bytes). It changes nothing, and may run beside mounts: all pages
are one snapshot. If etcd compacts that away meanwhile, `Compacted` is raised and the check must be run again.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from apollofs.metadata import codec, journal
from apollofs.metadata.check_references import BlobReferences
from apollofs.metadata.check_seals import SealsSeen
from apollofs.metadata.copies import decode_copies
from apollofs.metadata.errors import CorruptRecord, UnsupportedFormat
from apollofs.metadata.format import absence, pages
from apollofs.metadata.keys import Keys
from apollofs.metadata.policy import decode_policy
from apollofs.metadata.records import ROOT_INO, Extent, Inode, Usage
from apollofs.metadata.retention import decode_retention
from apollofs.metadata.seal_records import decode_count, decode_seal
from apollofs.metadata.store import KeyValue, Range, Store

TABLES = b"SNDPXmsuZzYrbpiwtcdvxekgEGRICQAHLafFWlyKO"
"""In the order in which they are read: who shares blobs before the inodes, inodes before the names that refer to them.
"""


@dataclass(frozen=True, slots=True)
class Violation:
    """One invariant that does not hold. `table` is the letter of the key, `ino` what it is about (0: the volume)."""

    table: str
    ino: int
    message: str


@dataclass(slots=True)
class _Seen:
    """What is known of one inode so far."""

    file_type: int
    nlink: int
    own: bool
    parent: int = 0
    name: bytes = b""
    size_bytes: int = 0
    inline_bytes: int | None = None
    extent_pages: int = 0
    xattrs: int = 0
    names: int = 0
    has_child_key: bool = False
    has_times: bool = False
    has_inline: bool = False
    pages_found: int = 0
    xattrs_found: int = 0

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.file_type)


@dataclass(slots=True)
class Checker:
    """Fed with every key in the order of TABLES by `check_volume`; `finish` says what only the whole can tell."""

    keys: Keys
    inodes: dict[int, _Seen] = field(default_factory=dict)
    moved: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    embedded_at: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    bodies: dict[int, int] = field(default_factory=dict)
    """Under which number `v/` is to have the inline body of which inode."""
    buried: set[int] = field(default_factory=set)
    sessions: set[int] = field(default_factory=set)
    loose: list[tuple[str, int]] = field(default_factory=list)
    """(table, ino) of bodies and attributes whose inode has no name; a tombstone may own them."""
    references: BlobReferences = field(default_factory=BlobReferences)
    seals: SealsSeen = field(default_factory=SealsSeen)
    copied: set[int] = field(default_factory=set)
    """Blobs that are said to have copies, and to which nothing was seen to refer yet."""
    exclusives: dict[int, int] = field(default_factory=dict)
    """Who holds a directory exclusively."""
    usage: Usage = Usage(0, 0)
    counted: Usage = Usage(0, 0)

    def visit(self, table: str, kv: KeyValue) -> Iterator[Violation]:
        visitor = {
            "m": self._mount,
            "s": self._slot,
            "u": self._usage,
            "Z": self._seal,
            "z": self._of_seal,
            "Y": self._of_seal,
            "r": self._reference,
            "b": self._copies,
            "p": self._policy,
            "i": self._inode,
            "w": self._moved,
            "t": self._times,
            "c": self._child,
            "d": self._dentry,
            "v": self._inline,
            "x": self._xattr,
            "e": self._extents,
            "k": self._lock,
            "g": self._tombstone,
            "G": self._delegation,
            "R": self._delegation,
            "E": self._exclusive,
            "I": self._recall,
            "C": self._collecting,
            "Q": self._collecting,
            "A": self._collecting,
            "L": self._elected,
            "F": self._elected,
            "K": self._retention,
            "O": self._elected,
        }.get(table)
        if visitor is None:
            return
        try:
            yield from visitor(kv)
        except (CorruptRecord, UnsupportedFormat) as exc:
            yield Violation(table, 0, f"key {kv.key[len(self.keys.prefix) :]!r}: {exc}")

    # -- volume ------------------------------------------------------------------------------------------------------

    def _mount(self, kv: KeyValue) -> Iterator[Violation]:
        record = codec.decode_mount(kv.value)
        self.sessions.add(record.session)
        if not kv.lease:
            yield Violation("m", 0, f"session {record.session} is not bound to a lease")

    def _slot(self, kv: KeyValue) -> Iterator[Violation]:
        session = self.keys.parse_numbers(kv.key)[0]
        journal.decode(kv.value)
        if session and session not in self.sessions:
            yield Violation("s", 0, f"a journal slot of session {session}, which has no mount")

    def _usage(self, kv: KeyValue) -> Iterator[Violation]:
        usage = codec.decode_usage(kv.value)
        self.usage = Usage(self.usage.bytes + usage.bytes, self.usage.inodes + usage.inodes)
        yield from ()

    def _seal(self, kv: KeyValue) -> Iterator[Violation]:
        if kv.key == self.keys.seal_counter:
            decode_count(kv.value)
        else:
            self.seals.add(decode_seal(kv.value, kv.mod_revision))
        yield from ()

    def _of_seal(self, kv: KeyValue) -> Iterator[Violation]:
        """That a session trusts a seal, or a term for those who do."""
        number = self.keys.parse_numbers(kv.key)[0]
        if number not in self.seals.seals:
            yield Violation(kv.key[len(self.keys.prefix) :][:1].decode(), 0, f"of seal {number}, which does not stand")

    def _lock(self, kv: KeyValue) -> Iterator[Violation]:
        if not kv.lease:
            yield Violation(
                "k", self.keys.parse_numbers(kv.key[: len(self.keys.prefix) + 10])[0], "a lock without lease"
            )

    def _delegation(self, kv: KeyValue) -> Iterator[Violation]:
        """A delegation, or a writer that waits for one to end."""
        directory, session, *_ = self.keys.parse_numbers(kv.key)
        if kv.key.startswith(self.keys.table(b"G")) and self.exclusives.get(directory, session) != session:
            yield Violation("G", directory, f"session {session} holds it, and another one exclusively")
        if not kv.lease or session not in self.sessions:
            yield Violation(kv.key[len(self.keys.prefix) :][:1].decode(), directory, f"session {session} has no mount")

    def _exclusive(self, kv: KeyValue) -> Iterator[Violation]:
        """A directory that is held exclusively has this one holder only; E comes before G here."""
        directory, session = self.keys.parse_numbers(kv.key)
        if directory in self.exclusives:
            yield Violation("E", directory, "two sessions hold it exclusively")
        self.exclusives[directory] = session
        yield from self._delegation(kv)

    def _recall(self, kv: KeyValue) -> Iterator[Violation]:
        if not kv.lease:
            yield Violation("I", self.keys.parse_numbers(kv.key)[1], "a recall notice without lease")

    def _collecting(self, kv: KeyValue) -> Iterator[Violation]:
        """The collector, what it asks, and what mounts have answered: all of it goes with a lease."""
        if not kv.lease:
            yield Violation(kv.key[len(self.keys.prefix) :][:1].decode(), 0, "a key of the collector without lease")

    def _elected(self, kv: KeyValue) -> Iterator[Violation]:
        """Who archives the change log, reads it for a group, or applies retention: for as long as they are alive."""
        if not kv.lease:
            yield Violation(kv.key[len(self.keys.prefix) :][:1].decode(), 0, "an elected one's key without lease")

    # -- inodes ------------------------------------------------------------------------------------------------------

    def _inode(self, kv: KeyValue) -> Iterator[Violation]:
        ino = self.keys.parse_numbers(kv.key)[0]
        inode = codec.decode_inode(kv.value, kv.mod_revision)
        if inode.ino != ino:
            yield Violation("i", ino, f"the record says inode {inode.ino:#x}")
        yield from self._note(inode, own=True)

    def _note(self, inode: Inode, *, own: bool) -> Iterator[Violation]:
        if inode.ino in self.inodes:
            yield Violation("d", inode.ino, "the inode is kept in two places")
            return
        self.inodes[inode.ino] = _Seen(
            stat.S_IFMT(inode.mode),
            inode.nlink,
            own,
            inode.parent,
            inode.name,
            inode.size_bytes,
            inode.inline_bytes if inode.is_inline else None,
            inode.extent_pages,
            inode.xattrs,
        )
        if inode.is_inline:
            self.bodies[inode.inline_number] = inode.ino
        allocated = inode.allocated_bytes if inode.is_file else 0
        self.counted = Usage(self.counted.bytes + allocated, self.counted.inodes + 1)
        if inode.is_inline and inode.inline_bytes > inode.size_bytes:
            yield Violation("i", inode.ino, "its inline body is longer than the file")
        if inode.copy and len(inode.copy) != inode.inline_bytes:
            yield Violation("i", inode.ino, "the copy of its inline body is not the body")
        if not inode.is_file and (inode.extents or inode.is_inline):
            yield Violation("i", inode.ino, "it has a body, but is no regular file")
        yield from _check_extents("i", inode.ino, inode.extents, inode.size_bytes)
        yield from self._blobs(inode.ino, inode.extents)
        yield from (Violation("Z", inode.ino, message) for message in self.seals.inode(inode))

    def _reference(self, kv: KeyValue) -> Iterator[Violation]:
        self.references.add(*self.keys.parse_numbers(kv.key))
        yield from ()

    def _copies(self, kv: KeyValue) -> Iterator[Violation]:
        decode_copies(kv)
        self.copied.add(self.keys.parse_numbers(kv.key)[0])
        yield from ()

    def _policy(self, kv: KeyValue) -> Iterator[Violation]:
        decode_policy(kv.value)
        yield from ()

    def _retention(self, kv: KeyValue) -> Iterator[Violation]:
        decode_retention(kv.value)
        yield from ()

    def _blobs(self, ino: int, extents: tuple[Extent, ...]) -> Iterator[Violation]:
        self.copied.difference_update(extent.blob for extent in extents)
        for message in self.references.referred(ino, {extent.blob for extent in extents}):
            yield Violation("r", ino, message)

    def _moved(self, kv: KeyValue) -> Iterator[Violation]:
        self.moved[self.keys.parse_numbers(kv.key)[0]] = codec.decode_location(kv.value)
        yield from ()

    def _times(self, kv: KeyValue) -> Iterator[Violation]:
        ino = self.keys.parse_numbers(kv.key)[0]
        codec.decode_times(kv.value)
        seen = self.inodes.get(ino)
        if seen is None or not seen.is_dir:
            yield Violation("t", ino, "times of a directory that does not exist")
            return
        seen.has_times = True

    def _child(self, kv: KeyValue) -> Iterator[Violation]:
        parent, ino = self.keys.parse_numbers(kv.key)
        seen = self.inodes.get(ino)
        if seen is None or not seen.is_dir or seen.parent != parent:
            yield Violation("c", ino, f"counted as a subdirectory of {parent:#x}, which it is not")
            return
        seen.has_child_key = True

    # -- names -------------------------------------------------------------------------------------------------------

    def _dentry(self, kv: KeyValue) -> Iterator[Violation]:
        parent, name = self.keys.parse_dentry(kv.key)
        dentry = codec.decode_dentry(kv.value, kv.mod_revision)
        directory = self.inodes.get(parent)
        if directory is None or not directory.is_dir:
            yield Violation("d", dentry.ino, f"its name {name!r} is in {parent:#x}, which is no directory")
        if dentry.inode is not None:
            yield from self._note(dentry.inode, own=False)
            self.embedded_at[dentry.ino] = (parent, name)
        seen = self.inodes.get(dentry.ino)
        if seen is None:
            yield Violation("d", dentry.ino, f"the name {name!r} in {parent:#x} refers to an inode that does not exist")
            return
        seen.names += 1
        for message in self.seals.name(parent, dentry.ino, is_dir=seen.is_dir):
            yield Violation("Z", dentry.ino, message)
        if seen.file_type != dentry.file_type:
            yield Violation("d", dentry.ino, f"the name {name!r} has another type than the inode")
        if seen.is_dir and (seen.parent, seen.name) != (parent, name):
            yield Violation(
                "d", dentry.ino, f"the directory is at {name!r} in {parent:#x}, but its inode says otherwise"
            )

    # -- bodies and attributes ---------------------------------------------------------------------------------------

    def _inline(self, kv: KeyValue) -> Iterator[Violation]:
        number = self.keys.parse_numbers(kv.key)[0]
        ino = self.bodies.get(number)
        if ino is not None:
            seen = self.inodes[ino]
            seen.has_inline = True
            if len(kv.value) != seen.inline_bytes:
                yield Violation("v", ino, f"its inline body has {len(kv.value)} bytes, not {seen.inline_bytes}")
        elif number in self.inodes:
            yield Violation("v", number, "an inline body of a file that is not inline")
        else:
            self.loose.append(("v", number))

    def _xattr(self, kv: KeyValue) -> Iterator[Violation]:
        ino, _ = self.keys.parse_xattr(kv.key)
        seen = self.inodes.get(ino)
        if seen is None:
            self.loose.append(("x", ino))
        else:
            seen.xattrs_found += 1
        yield from ()

    def _extents(self, kv: KeyValue) -> Iterator[Violation]:
        ino, _ = self.keys.parse_numbers(kv.key)
        seen = self.inodes.get(ino)
        extents = codec.decode_extents(kv.value)
        self.copied.difference_update(extent.blob for extent in extents)
        if seen is None:
            self.loose.append(("e", ino))
            return
        seen.pages_found += 1
        yield from _check_extents("e", ino, extents, seen.size_bytes)
        yield from self._blobs(ino, extents)

    def _tombstone(self, kv: KeyValue) -> Iterator[Violation]:
        stone = codec.decode_tombstone(kv.value, kv.mod_revision)
        blobs = {blob for blob, _ in stone.blobs}
        if stone.inode is not None:
            blobs |= {extent.blob for extent in stone.inode.extents}
        yield from (Violation("g", stone.ino, message) for message in self.references.dropped(stone.ino, blobs))
        self.copied -= blobs
        if stone.inode is not None:
            self.buried |= {stone.ino, stone.inode.inline_number}
            if stone.ino in self.inodes:
                yield Violation("g", stone.ino, "the inode is buried, but has a name")

    # -- the whole ---------------------------------------------------------------------------------------------------

    def finish(self) -> Iterator[Violation]:
        for ino, seen in self.inodes.items():
            yield from self._whole_inode(ino, seen)
        for ino, location in self.moved.items():
            if self.embedded_at.get(ino) != location:
                yield Violation("w", ino, "where the inode is said to have moved, it is not")
        for (table, ino), count in Counter(self.loose).items():
            if ino not in self.buried:
                yield Violation(table, ino, f"{count} keys of an inode that has neither a name nor a tombstone")
        for blob, ino in self.references.left_over(self.buried):
            yield Violation("r", ino, f"it shares blob {blob:#x}, but neither it nor a tombstone of it refers to that")
        yield from (Violation("Z", ino, message) for ino, message in self.seals.finish())
        for blob in sorted(self.copied):
            yield Violation("b", 0, f"copies of blob {blob:#x}, to which nothing refers")
        yield from self._unreachable()

    def _whole_inode(self, ino: int, seen: _Seen) -> Iterator[Violation]:
        if seen.is_dir:
            if seen.names != (0 if ino == ROOT_INO else 1):
                yield Violation("i", ino, f"a directory with {seen.names} names")
            if ino != ROOT_INO and not seen.has_child_key:
                yield Violation("c", ino, "the directory is not counted in its parent")
            if not seen.has_times:
                yield Violation("t", ino, "the directory has no times")
        elif seen.names != seen.nlink:
            yield Violation("i", ino, f"a file with {seen.names} names, the inode says {seen.nlink}")
        if seen.inline_bytes is not None and not seen.has_inline:
            yield Violation("v", ino, "the inline body is missing")
        if seen.pages_found != seen.extent_pages:
            yield Violation("e", ino, f"{seen.pages_found} pages of extents, the inode says {seen.extent_pages}")
        if seen.xattrs_found != seen.xattrs:
            yield Violation("x", ino, f"{seen.xattrs_found} attributes, the inode says {seen.xattrs}")

    def _unreachable(self) -> Iterator[Violation]:
        """Directories from which the root can't be reached: a cycle."""
        reaches = {ROOT_INO}
        for start, seen in self.inodes.items():
            path: list[int] = []
            ino = start
            while seen.is_dir and ino not in reaches and ino in self.inodes and len(path) <= len(self.inodes):
                path.append(ino)
                ino = self.inodes[ino].parent
                if ino in path:
                    yield Violation("i", start, "the directory is in a cycle")
                    break
            reaches.update(path)


def _check_extents(table: str, ino: int, extents: tuple[Extent, ...], size_bytes: int) -> Iterator[Violation]:
    end = 0
    for extent in extents:
        if extent.offset < end or extent.length <= 0:
            yield Violation(table, ino, f"the extent at {extent.offset} overlaps the one before it, or is empty")
        if extent.end > size_bytes:
            yield Violation(table, ino, f"the extent at {extent.offset} ends past the file's size {size_bytes}")
        if extent.blob_offset < 0 or extent.blob_offset + extent.length > extent.blob_length:
            yield Violation(table, ino, f"the extent at {extent.offset} reaches out of its blob")
        end = extent.end


@dataclass(slots=True)
class CheckTotals:
    """What a check has read; complete when the iteration has ended."""

    keys: int = 0
    inodes: int = 0
    bytes: int = 0
    revision: int = 0
    usage: Usage = Usage(0, 0)
    """What the sessions' sums say (statfs). It may differ from what was counted: mounts write their sums now and then,
    and one that crashed has not written its last; so a difference is no violation."""


async def check_volume(store: Store, volume: str, totals: CheckTotals | None = None) -> AsyncIterator[Violation]:
    """Every violated invariant of the volume's metadata. Raises NotFormatted, Compacted, StoreError."""
    keys = Keys(volume)
    totals = totals if totals is not None else CheckTotals()
    found = await store.range(Range(keys.superblock))
    if not found.kvs:
        raise await absence(store, volume)
    codec.decode_superblock(found.kvs[0].value)
    totals.revision = found.revision
    checker = Checker(keys)
    for letter in TABLES.decode():
        async for kv in pages(store, keys.table(letter.encode())[:-1], revision=found.revision):
            totals.keys += 1
            for violation in checker.visit(letter, kv):
                yield violation
    if ROOT_INO not in checker.inodes:
        yield Violation("i", ROOT_INO, "the root directory is missing")
    for violation in checker.finish():
        yield violation
    totals.inodes, totals.bytes, totals.usage = checker.counted.inodes, checker.counted.bytes, checker.usage
    async for kv in pages(store, keys.prefix, revision=found.revision, keys_only=True):
        table = kv.key[len(keys.prefix) : len(keys.prefix) + 1]
        if table not in TABLES:
            yield Violation(table.decode("latin-1"), 0, f"a key that no table knows: {kv.key[len(keys.prefix) :]!r}")
