"""Reading a volume: by name, by number, whole directories. What is delegated costs no request.

What the kernel knows are numbers, so the mount remembers for each file where it was last seen; other mounts may have
moved it meanwhile, and `w/<ino>` or `i/<ino>` then say where it is.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from apollofs.metadata import codec
from apollofs.metadata.body_memory import BodyMemory
from apollofs.metadata.codec import Dentry
from apollofs.metadata.delegations import Delegations
from apollofs.metadata.errors import NoSuchEntry, StaleInode
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops import inspect
from apollofs.metadata.ops.common import MOVES_MAX, Location, check_name
from apollofs.metadata.records import ROOT_INO, Body, DirectoryEntry, DirectoryPage, Inode
from apollofs.metadata.store import KeyValue, Range, RangeResult, prefix_end
from apollofs.metadata.transact import Transactor
from apollofs.metadata.view import Recollection
from apollofs.metadata.walks import Walks

LISTING_MAX = 20_000
"""Entries of a directory that are handed out at once when it is completely known."""
INODES_AHEAD = 29
"""Subdirectories whose attributes come along with those of the first one that is asked for."""
LISTINGS_AHEAD = 8
"""Subdirectories that are listed along with one, once a walk is under way."""
ENTRIES_AHEAD = 500
"""Entries of each of them; what has more is listed when its turn comes."""


class Cached(NamedTuple):
    """An inode whose attributes nobody may change unasked, and the held group that they are in."""

    inode: Inode
    group: int


class NamespaceReader:
    """The reading half of a Volume. All of it is linearizable: asked of the store, or cached under a delegation."""

    def __init__(
        self, keys: Keys, transactor: Transactor, recollection: Recollection, delegations: Delegations
    ) -> None:
        self._keys = keys
        self._transactor = transactor
        self._recollection = recollection
        self.delegations = delegations
        self._groups = delegations.cache
        self._locations: dict[int, Location] = {}
        """As many as the kernel knows inodes: entries leave with `forget`."""
        self._body_memory = BodyMemory()
        self._walks = Walks()
        self.asked = 0
        """Requests for names, attributes, listings and bodies; everything else was answered from what is delegated."""

    def cached_lookup(self, parent: int, name: bytes) -> Cached | None:
        """As `lookup`, of what is delegated; None: ask. Raises NoSuchEntry where that is known."""
        known = self._groups.peek(parent, self._keys.dentry(parent, name))
        if known is None:
            return self._sealed_way(parent, name)
        if known[0] is None:
            check_name(name)
            raise NoSuchEntry("no such name")
        dentry = codec.decode_dentry(known[0].value, known[0].mod_revision)
        if dentry.inode is not None:
            self._locations[dentry.ino] = (parent, name)
            return Cached(dentry.inode, parent)
        inode = self._delegated_own(dentry.ino)
        return Cached(inode, dentry.ino) if inode is not None else None

    def place_of(self, ino: int) -> tuple[int, bytes] | None:
        """The directory and the name under which the kernel last saw a file, if any; it may have been moved since."""
        return self._locations.get(ino)

    def cached_getattr(self, ino: int) -> Cached | None:
        """As `getattr`, of what is delegated; None: ask."""
        inode = self._delegated_file(ino)
        if inode is not None:
            return Cached(inode, self._locations[ino][0])
        inode = self._delegated_own(ino) or self._waypoint(ino)
        return Cached(inode, ino) if inode is not None else None

    def cached_entry(self, directory: int, entry: DirectoryEntry) -> Cached | None:
        """What an entry of a listing, which may be old, is by now, of what is delegated; None: that is not known.

        Raises NoSuchEntry where its name is known to mean something else, or nothing."""
        known = self._groups.peek(directory, self._keys.dentry(directory, entry.name))
        if known is None:
            return None
        kv, inode = known[0], entry.inode
        if kv is None:
            raise NoSuchEntry("the name was taken away after it was listed")
        if kv is not entry.record:
            # their revisions would not tell: all that is queued at one time has the same
            dentry = codec.decode_dentry(kv.value, kv.mod_revision)
            if dentry.ino != entry.ino:
                raise NoSuchEntry("the name was given to something else after it was listed")
            inode = dentry.inode
        if inode is not None:
            return Cached(inode, directory)
        own = self._delegated_own(entry.ino)
        return Cached(own, entry.ino) if own is not None else None

    def group_of(self, ino: int) -> int:
        """The held group that the attributes of an inode are in; 0: none is, or it is not known."""
        cached = self.cached_getattr(ino)
        return cached.group if cached is not None else 0

    def _sealed_way(self, parent: int, name: bytes) -> Cached | None:
        """While this mount is cut off: where a name on the way to a sealed tree leads."""
        ino = 0 if self.delegations.is_proven else self.delegations.seals.waypoint(parent, name)
        return self.cached_getattr(ino) if ino else None

    def _waypoint(self, ino: int) -> Inode | None:
        """While this mount is cut off: what is certain of a directory on the way to a sealed tree."""
        inode = None if self.delegations.is_proven else self.delegations.seals.waypoint_inode(ino)
        return inode._replace(size_bytes=inspect.DIRECTORY_BYTES) if inode is not None else None

    def delegated_revision(self, parent: int, name: bytes) -> int | None:
        """The revision of what a name means, 0 if it means nothing, where that is known and nobody may change it
        unasked; otherwise None."""
        known = self._groups.peek(parent, self._keys.dentry(parent, name))
        if known is None:
            return None
        return known[0].mod_revision if known[0] is not None else 0

    async def lookup(self, parent: int, name: bytes) -> Inode:
        """The inode that a name means. No request for what is delegated; otherwise one, and for a directory, or a file
        with several names, at most two."""
        check_name(name)
        key = self._keys.dentry(parent, name)
        for _ in range(MOVES_MAX):
            dentry, ahead = await self._dentry(parent, key)
            if dentry is None:
                raise NoSuchEntry("no such name")
            if dentry.inode is not None:
                self._locations[dentry.ino] = (parent, name)
                return dentry.inode
            inode = ahead or self._delegated_own(dentry.ino) or await self._own(dentry.ino, parent)
            if inode is not None:
                return inode
        raise StaleInode("the name keeps changing")

    async def _dentry(self, parent: int, key: bytes) -> tuple[Dentry | None, Inode | None]:
        """What a name means, and the inode that it refers to if that came along."""
        known = self._groups.peek(parent, key)
        if known is None and await self.delegations.turns.have(parent):
            known = self._groups.peek(parent, key)
        if known is not None:
            kv = known[0]
            return (codec.decode_dentry(kv.value, kv.mod_revision) if kv is not None else None), None
        expected = self._expected_reference(key)
        ahead = inspect.own_questions(self._keys, expected) if expected else ()
        found = await self._read_group(parent, [Range(key), *ahead], (expected,) if expected else ())
        dentry = inspect.single_dentry(found[0])
        if dentry is None or dentry.ino != expected:
            return dentry, None
        return dentry, inspect.own_inode(*found[1:])

    def _expected_reference(self, key: bytes) -> int:
        """The inode that a name meant when it was last read, if it was a reference: worth asking for in advance."""
        dentry = self._remembered(key)
        return dentry.ino if dentry is not None and dentry.inode is None else 0

    async def _own(self, ino: int, parent: int) -> Inode | None:
        """The inode that a name in `parent` refers to; if `parent` was listed, the next subdirectories come with it."""
        asked = inspect.own_questions(self._keys, ino)
        siblings = self._walks.after(parent, ino, INODES_AHEAD)
        ahead = {each: inspect.own_questions(self._keys, each) for each in siblings if self.delegations.can_take(each)}
        if ahead and self.delegations.can_take(ino):
            return inspect.own_inode(*(await self._read_ahead({ino: asked, **ahead}))[ino])
        return inspect.own_inode(*await self._read_group(ino, asked))

    async def _read_group(self, group: int, asked: Sequence[Range], others: tuple[int, ...] = ()) -> list[RangeResult]:
        """Read what belongs to a group (and to `others`), and keep it as far as they are delegated.

        One request. Takes the group's delegation in passing, if it is time to.
        """
        self.asked += 1
        if self.delegations.wants(group):
            taken = await self.delegations.take({group: [*asked, *self._along(group, asked)]})
            if taken is not None:
                return taken[group][: len(asked)]
        revision, found = await self._transactor.read(asked)
        for number in (group, *others):
            self.delegations.learn(number, asked, found, revision)
        return found

    def _along(self, group: int, asked: Sequence[Range]) -> list[Range]:
        """What to ask for beside what is asked when a group is taken that was worth having before."""
        names = self.delegations.interest.names_of(group)
        if names is None:
            return []
        again = [*(Range(name) for name in names), *inspect.own_questions(self._keys, group)]
        return [each for each in again if each not in asked]

    async def _read_ahead(self, wanted: Mapping[int, Sequence[Range]]) -> dict[int, list[RangeResult]]:
        """Read what belongs to several groups, each of which is held or can be taken, and take those. One request."""
        self.asked += 1
        found = None
        queued = self.delegations.ahead.touches((), (), [range_ for asked in wanted.values() for range_ in asked])
        if not queued and not all(self._groups.usable(group) for group in wanted):
            found = await self.delegations.take(wanted)
        if found is None:
            revision, flat = await self._transactor.read([range_ for asked in wanted.values() for range_ in asked])
            answers = iter(flat)
            found = {group: [next(answers) for _ in asked] for group, asked in wanted.items()}
            for group, asked in wanted.items():
                self.delegations.learn(group, asked, found[group], revision)
        return found

    def _delegated_own(self, ino: int) -> Inode | None:
        """A directory, or a file with a key of its own, whose group is delegated; without a request."""
        own = self._groups.peek(ino, self._keys.inode(ino))
        if own is None or own[0] is None:
            return None
        inode = codec.decode_inode(own[0].value, own[0].mod_revision)
        if not inode.is_dir:
            return inode
        children = self._groups.children(ino)
        times = self._groups.peek(ino, self._keys.times(ino))
        held = self._groups.usable(ino)
        if children is None or times is None or held is None:
            return None
        known = (own[0], times[0], children)
        if held.attributes is None or held.attributes[0] != known:
            named = codec.decode_times(times[0].value) if times[0] is not None else None
            held.attributes = (known, inspect.with_directory(inode, named, children))
        return held.attributes[1]

    def _delegated_file(self, ino: int) -> Inode | None:
        """A file whose dentry is in a group that is delegated, without a request."""
        location = self._locations.get(ino)
        known = self._groups.peek(location[0], self._keys.dentry(*location)) if location else None
        if known is None or known[0] is None:
            return None
        dentry = codec.decode_dentry(known[0].value, known[0].mod_revision)
        return dentry.inode if dentry.ino == ino else None

    async def getattr(self, ino: int) -> Inode:
        """No request for what is delegated; otherwise one, unless another mount has moved the file."""
        cached = self.cached_getattr(ino)
        if cached is None and await self.delegations.turns.have(self._locations.get(ino, (ino, b""))[0]):
            cached = self.cached_getattr(ino)
        if cached is not None:
            return cached.inode
        inode, _ = await self._by_number(ino, ())
        return inode

    async def _by_number(self, ino: int, more: tuple[Range, ...]) -> tuple[Inode, list[RangeResult]]:
        """The inode, and the answers to `more`, as of one revision."""
        location = self._locations.get(ino)
        for _ in range(MOVES_MAX):
            questions = inspect.number_questions(self._keys, ino, location)
            group = location[0] if location is not None else ino
            found = await self._read_group(group, [*questions, *more])
            answer = inspect.number_answer(ino, location, found)
            if answer.inode is not None:
                if location is not None:
                    self._locations[ino] = location
                return answer.inode, found[len(questions) :]
            if answer.moved is None:
                break
            location = answer.moved
        raise StaleInode(f"inode {ino:#x} has no name any more")

    async def read_body(self, ino: int) -> Body:
        """The inode with all its extents, or with its inline bytes. One request; none if its inode is delegated, and
        its body in it or read before."""
        cached = self.cached_getattr(ino)
        known = self._body_memory.of(cached.inode) if cached is not None else None
        if known is not None:
            return known
        number = self._inline_number(ino, self._locations.get(ino))
        inode, (inline, pages) = await self._by_number(ino, inspect.body_questions(self._keys, ino, number))
        while inode.is_inline and inode.inline_number != number:
            number = inode.inline_number
            inode, (inline, pages) = await self._by_number(ino, inspect.body_questions(self._keys, ino, number))
        if inode.extent_pages:
            extents = tuple(extent for kv in pages.kvs for extent in codec.decode_extents(kv.value))
            inode = inode._replace(extents=extents)
        body = Body(inode, inline.kvs[0].value if inode.is_inline and inline.kvs else b"")
        self._body_memory.put(body)
        return body

    async def read_ahead(self, directory: int, files: Sequence[tuple[bytes, int]]) -> None:
        """Read the inline bodies of files that will probably be opened soon, (name, inode) of one directory: then
        `read_body` has them without a request while the directory is delegated. One request, of two reads for each: as
        many as fit one (`store.OPS_MAX`). What is not as it was said to be is left out."""
        numbers = [self._inline_number(ino, (directory, name)) for name, ino in files]
        asked = [
            Range(key)
            for (name, _), number in zip(files, numbers, strict=True)
            for key in (self._keys.dentry(directory, name), self._keys.inline(number))
        ]
        self.asked += 1
        _, found = await self._transactor.read(asked)
        for (_, ino), number, named, inline in zip(files, numbers, found[::2], found[1::2], strict=True):
            dentry = inspect.single_dentry(named)
            inode = dentry.inode if dentry is not None and dentry.ino == ino else None
            if inode is not None and inode.is_inline and inode.inline_number == number and inline.kvs:
                self._body_memory.put(Body(inode, inline.kvs[0].value))

    def _inline_number(self, ino: int, location: Location | None) -> int:
        """Where the inline body of a file is, if it has one, as its name was last seen."""
        seen = self._last_seen(location[0], self._keys.dentry(*location)) if location is not None else None
        return seen.inode.inline_number if seen is not None and seen.inode is not None and seen.ino == ino else ino

    def _last_seen(self, parent: int, key: bytes) -> Dentry | None:
        """What a name meant when it was last read: worth asking for in advance."""
        known = self._groups.peek(parent, key)
        if known is None or known[0] is None:
            return self._remembered(key)
        return codec.decode_dentry(known[0].value, known[0].mod_revision)

    def _remembered(self, key: bytes) -> Dentry | None:
        """What a name meant when the store last said it."""
        known = self._recollection.get(key)
        if known is None or known[0] is None:
            return None
        return codec.decode_dentry(known[0].value, known[0].mod_revision)

    async def readdir(self, directory: int, after: bytes, limit: int, revision: int = 0) -> DirectoryPage:
        """Up to `limit` names greater than `after` (b"": from the first), in byte order, without "." and "..".

        One request; none, and the whole directory at once, if it is delegated and completely known. `revision` 0: the
        newest state; otherwise the snapshot of an earlier page (Compacted if it is no longer kept). A directory that
        has been removed is empty.
        """
        first = not after and not revision
        listed = self.cached_listing(directory) if first else None
        if listed is not None:
            return listed
        if not first:
            prefix = self._keys.dentries_of(directory)
            start = prefix + after + b"\0" if after else prefix
            asked = Range(start, prefix_end(prefix), limit=limit, revision=revision)
            self.asked += 1
            _, (found,) = await self._transactor.read([asked])
            self.delegations.learn_page(directory, start, found, revision or found.revision)
            return self._page(directory, found.kvs, found.more, revision or found.revision)
        wanted = {directory: self._listing_questions(directory, limit)}
        if self.delegations.held_or_free(directory):
            ahead = self._listings_ahead(directory)
            wanted.update((each, self._listing_questions(each, ENTRIES_AHEAD)) for each in ahead)
            read = await self._read_ahead(wanted)
        else:
            read = {directory: await self._read_group(directory, wanted[directory])}
        for each, answers in read.items():
            self.delegations.learn_page(each, self._keys.dentries_of(each), answers[0], answers[0].revision)
        found = read[directory][0]
        return self._first_page(directory, found.kvs, found.more, found.revision)

    def cached_listing(self, directory: int) -> DirectoryPage | None:
        """As `readdir` from the first name on, of what is delegated and completely known; None: ask."""
        listed = self._groups.listing(directory, LISTING_MAX)
        return self._first_page(directory, listed, False, 0) if listed is not None else None

    def knows_all(self, directory: int, since: int = 0) -> bool:
        """Whether a directory is delegated and completely known, without a break since a revision (0: since any)."""
        held = self._groups.usable(directory)
        return held is not None and held.complete and (not since or held.taken_revision <= since)

    def _listing_questions(self, directory: int, limit: int) -> list[Range]:
        prefix = self._keys.dentries_of(directory)
        page = Range(prefix, prefix_end(prefix), limit=limit)
        return [page, *inspect.own_questions(self._keys, directory)]

    def _listings_ahead(self, directory: int) -> list[int]:
        """The directories that a walk will list after this one, if this looks like a walk: at the second sibling."""
        own = self._delegated_own(directory)
        if own is None or not self._walks.goes_on(own.parent, directory):
            return []
        siblings = self._walks.after(own.parent, directory, LISTINGS_AHEAD)
        delegations = self.delegations
        return [each for each in siblings if delegations.held_or_free(each) and not self.knows_all(each)]

    def _first_page(self, directory: int, kvs: Sequence[KeyValue], more: bool, revision: int) -> DirectoryPage:
        page = self._page(directory, kvs, more, revision)
        subdirectories = [entry.ino for entry in page.entries if entry.file_type == stat.S_IFDIR]
        self._walks.listed(directory, subdirectories)
        return page

    def _page(self, directory: int, kvs: Sequence[KeyValue], more: bool, revision: int) -> DirectoryPage:
        at = len(self._keys.dentries_of(directory))
        entries = []
        for kv in kvs:
            dentry = codec.decode_dentry(kv.value, kv.mod_revision)
            entries.append(DirectoryEntry(kv.key[at:], dentry.ino, dentry.file_type, dentry.inode, kv))
        return DirectoryPage(tuple(entries), more, revision)

    def remember(self, ino: int, parent: int, name: bytes) -> None:
        """The kernel learnt a file's number from a listing: remember where it is, as `lookup` does."""
        self._locations[ino] = (parent, name)

    def forget(self, ino: int) -> None:
        """The kernel has forgotten the number; what was remembered of where it is goes."""
        self._locations.pop(ino, None)
        self._body_memory.forget(ino)

    async def warm_up(self) -> None:
        """Read what nearly every operation takes part in: the root, and the line of directory moves. One request."""
        await self._by_number(ROOT_INO, (Range(self._keys.dirmove),))
