"""The names of everything in the store. Only this module knows how a key is spelled.

Every key of a volume is `apollofs/<volume>/<table>/...`; integers are 8 bytes, big-endian, so that key order is
numeric order. See docs/ARCHITECTURE.md for what each table holds.
"""

from __future__ import annotations

import re
from struct import Struct

from apollofs.metadata.errors import InvalidArgument
from apollofs.metadata.store import prefix_end

_U64 = Struct(">Q")
_VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROOT = b"apollofs/"


def u64(number: int) -> bytes:
    return _U64.pack(number)


class Keys:
    """Key spelling for one volume."""

    def __init__(self, volume: str) -> None:
        """Raises InvalidArgument for a volume name that is not 1 to 64 of `A-Za-z0-9._-`, letter or digit first."""
        if not _VOLUME_NAME.fullmatch(volume):
            raise InvalidArgument(
                f"bad volume name {volume!r}: use 1 to 64 letters, digits, '.', '_' and '-', no sign first"
            )
        self.volume = volume
        self.prefix = _ROOT + volume.encode() + b"/"
        self.end = prefix_end(self.prefix)
        self.superblock = self.prefix + b"S"
        self.condemned = self.prefix + b"B"
        self.session_counter = self.prefix + b"N"
        self.dirmove = self.prefix + b"D"
        self.sites = self.prefix + b"P/"
        self.retired_sites = self.prefix + b"X/"
        self.mounts = self.prefix + b"m/"
        self.slots = self.prefix + b"s/"
        self.usages = self.prefix + b"u/"
        self.tombstones = self.prefix + b"g/"
        self._dentry = self.prefix + b"d/"
        self._inode = self.prefix + b"i/"
        self._moved = self.prefix + b"w/"
        self._times = self.prefix + b"t/"
        self._child = self.prefix + b"c/"
        self._inline = self.prefix + b"v/"
        self._xattr = self.prefix + b"x/"
        self._extents = self.prefix + b"e/"
        self._references = self.prefix + b"r/"
        self._locks = self.prefix + b"k/"
        self._delegations = self.prefix + b"G/"
        self._waiting = self.prefix + b"R/"
        self._inboxes = self.prefix + b"I/"
        self._exclusives = self.prefix + b"E/"
        self.collector = self.prefix + b"C"
        self.answers = self.prefix + b"A/"
        self._questions = self.prefix + b"Q/"
        self.archive_state = self.prefix + b"H"
        self.archiver = self.prefix + b"L"
        self.segments = self.prefix + b"a/"
        self.groups = self.prefix + b"f/"
        self._group_readers = self.prefix + b"F/"
        self.policies = self.prefix + b"p/"
        self._copies = self.prefix + b"b/"
        self._wanted = self.prefix + b"W/"
        self._agents = self.prefix + b"l/"
        self._agent_states = self.prefix + b"y/"
        self.seal_counter = self.prefix + b"Z"
        self.seals = self.prefix + b"Z/"
        self._trusts = self.prefix + b"z/"
        self._terms = self.prefix + b"Y/"
        self.retentions = self.prefix + b"K/"
        self.retainer = self.prefix + b"O"
        self._table_at = len(self.prefix)

    # -- volume-wide -------------------------------------------------------------------------------------------------

    def site(self, name: str) -> bytes:
        return self.sites + name.encode()

    def retired_site(self, site: int) -> bytes:
        """The site is being removed, or has been: no session begins there."""
        return self.retired_sites + _U64.pack(site)

    def mount(self, session: int) -> bytes:
        return self.mounts + _U64.pack(session)

    def slot(self, session: int, slot: int) -> bytes:
        return b"%s%s/%s" % (self.slots, _U64.pack(session), _U64.pack(slot))

    def usage(self, session: int) -> bytes:
        return self.usages + _U64.pack(session)

    def tombstone(self, time_ns: int, ino: int, body_version: int) -> bytes:
        """Unique: an inode dies once, and each change of a body has its own version."""
        return b"%s%s/%s/%s" % (self.tombstones, _U64.pack(max(time_ns, 0)), _U64.pack(ino), _U64.pack(body_version))

    # -- namespace ---------------------------------------------------------------------------------------------------

    @property
    def dentries(self) -> bytes:
        """Prefix of all dentries of the volume (the checker's walk)."""
        return self._dentry

    @property
    def inodes(self) -> bytes:
        return self._inode

    def table(self, letter: bytes) -> bytes:
        """Prefix of a whole table, for the checker."""
        return self.prefix + letter + b"/"

    def dentry(self, parent: int, name: bytes) -> bytes:
        return b"%s%s/%s" % (self._dentry, _U64.pack(parent), name)

    def dentries_of(self, parent: int) -> bytes:
        return b"%s%s/" % (self._dentry, _U64.pack(parent))

    def inode(self, ino: int) -> bytes:
        return self._inode + _U64.pack(ino)

    def moved(self, ino: int) -> bytes:
        return self._moved + _U64.pack(ino)

    def times(self, directory: int) -> bytes:
        return self._times + _U64.pack(directory)

    def child(self, parent: int, directory: int) -> bytes:
        return b"%s%s/%s" % (self._child, _U64.pack(parent), _U64.pack(directory))

    def children_of(self, parent: int) -> bytes:
        return b"%s%s/" % (self._child, _U64.pack(parent))

    def inline(self, ino: int) -> bytes:
        return self._inline + _U64.pack(ino)

    def xattr(self, ino: int, name: bytes) -> bytes:
        return b"%s%s/%s" % (self._xattr, _U64.pack(ino), name)

    def xattrs_of(self, ino: int) -> bytes:
        return b"%s%s/" % (self._xattr, _U64.pack(ino))

    def extents(self, ino: int, page: int) -> bytes:
        return b"%s%s/%s" % (self._extents, _U64.pack(ino), _U64.pack(page))

    def extents_of(self, ino: int) -> bytes:
        return b"%s%s/" % (self._extents, _U64.pack(ino))

    # -- shared blobs ------------------------------------------------------------------------------------------------

    def references_of(self, blob: int) -> bytes:
        return b"%s%s/" % (self._references, _U64.pack(blob))

    def reference(self, blob: int, ino: int) -> bytes:
        """`ino` refers to a blob that others may refer to as well; a blob without any such key is private."""
        return b"%s%s/%s" % (self._references, _U64.pack(blob), _U64.pack(ino))

    # -- locks -------------------------------------------------------------------------------------------------------

    def locks_of(self, ino: int, kind: int) -> bytes:
        return b"%s%s/%c/" % (self._locks, _U64.pack(ino), 0x30 + kind)

    def locks(self, ino: int, kind: int, session: int) -> bytes:
        """What one session holds on an inode."""
        return b"%sh/%s" % (self.locks_of(ino, kind), _U64.pack(session))

    def lock_waiter(self, ino: int, kind: int, session: int, ticket: int) -> bytes:
        """One request that waits; their order is that of create_revision."""
        return b"%sw/%s/%s" % (self.locks_of(ino, kind), _U64.pack(session), _U64.pack(ticket))

    # -- delegations -------------------------------------------------------------------------------------------------

    def delegations_on(self, directory: int) -> bytes:
        return b"%s%s/" % (self._delegations, _U64.pack(directory))

    def delegation(self, directory: int, session: int) -> bytes:
        return b"%s%s/%s" % (self._delegations, _U64.pack(directory), _U64.pack(session))

    def exclusives_on(self, directory: int) -> bytes:
        return b"%s%s/" % (self._exclusives, _U64.pack(directory))

    def exclusive(self, directory: int, session: int) -> bytes:
        """The delegation on `directory` is exclusive: what is in the store may be behind what its holder answers."""
        return b"%s%s/%s" % (self._exclusives, _U64.pack(directory), _U64.pack(session))

    def writers_on(self, directory: int) -> bytes:
        return b"%s%s/" % (self._waiting, _U64.pack(directory))

    def writer(self, directory: int, session: int, ticket: int) -> bytes:
        """An operation that waits for the delegations on `directory` to end; `ticket` is its own in the session."""
        return b"%s%s/%s/%s" % (self._waiting, _U64.pack(directory), _U64.pack(session), _U64.pack(ticket))

    def inbox(self, session: int) -> bytes:
        return b"%s%s/" % (self._inboxes, _U64.pack(session))

    def recall(self, session: int, directory: int) -> bytes:
        """A notice to `session` that its delegation on `directory` is wanted back."""
        return b"%s%s/%s" % (self._inboxes, _U64.pack(session), _U64.pack(directory))

    def lock_recall(self, session: int, ino: int, kind: int) -> bytes:
        """A notice to `session` that others want the locks on an inode, which it decides alone."""
        return b"%s%s/%s/%s" % (self._inboxes, _U64.pack(session), _U64.pack(ino), _U64.pack(kind))

    def group_of(self, key: bytes) -> int | None:
        """The directory whose group a key of tables d, i, t or c belongs to; None for the other tables."""
        at = self._table_at
        if key[at : at + 2] in (b"d/", b"i/", b"t/", b"c/"):
            group: int = _U64.unpack_from(key, at + 2)[0]
            return group
        return None

    def belongs_to_a_file(self, key: bytes) -> bool:
        """Whether only who may change a file's inode writes this key: where it is, its body, its references to shared
        blobs, its tombstones."""
        at = self._table_at
        return key[at : at + 2] in (b"w/", b"v/", b"e/", b"r/", b"g/")

    # -- collection --------------------------------------------------------------------------------------------------

    def question(self, collector: int, batch: int) -> bytes:
        """What the collector (its session) asks all mounts: who of them still uses these inodes."""
        return b"%s%s/%s" % (self._questions, _U64.pack(collector), _U64.pack(batch))

    def answers_to(self, collector: int, batch: int) -> bytes:
        return b"%s%s/%s/" % (self.answers, _U64.pack(collector), _U64.pack(batch))

    def answer(self, collector: int, batch: int, session: int) -> bytes:
        return self.answers_to(collector, batch) + _U64.pack(session)

    def collection_notice(self, session: int, collector: int, batch: int) -> bytes:
        """A notice to `session` that the collector has asked something; three numbers tell it from recalls."""
        return b"%s%s/%s/%s/%s" % (self._inboxes, *map(_U64.pack, (session, collector, batch, 0)))

    # -- change log --------------------------------------------------------------------------------------------------

    @property
    def log_beginning(self) -> bytes:
        """The record of the root's making; session 0 is nobody's."""
        return self.slot(0, 0)

    @property
    def log_mark(self) -> bytes:
        """Put by who wants to know where the log ends now."""
        return self.slot(0, 1)

    def segment(self, last_revision: int) -> bytes:
        """A segment of the archive; the first one not before a position's key holds that position."""
        return self.segments + _U64.pack(last_revision)

    def group(self, name: str) -> bytes:
        """How far a group of consumers has read."""
        return self.groups + name.encode()

    def group_reader(self, name: str) -> bytes:
        """Who reads for the group."""
        return self._group_readers + name.encode()

    # -- sites -------------------------------------------------------------------------------------------------------

    def policy(self, directory: int) -> bytes:
        """The policy that was set on `directory`; inodes below it name it by that number."""
        return self.policies + _U64.pack(directory)

    def copies(self, blob: int) -> bytes:
        """Which sites have copies of a blob besides its own, and which have begun with one."""
        return self._copies + _U64.pack(blob)

    def wanted_at(self, site: int) -> bytes:
        return b"%s%s/" % (self._wanted, _U64.pack(site))

    def wanted(self, site: int, ino: int) -> bytes:
        """Somebody waits for the body of `ino` to be at `site`."""
        return b"%s%s/%s" % (self._wanted, _U64.pack(site), _U64.pack(ino))

    def agent(self, site: int) -> bytes:
        """Who is the agent of a site."""
        return self._agents + _U64.pack(site)

    def agent_state(self, site: int) -> bytes:
        """How far a site's agents have come."""
        return self._agent_states + _U64.pack(site)

    def retention(self, directory: int) -> bytes:
        """The retention policy that was set on `directory`."""
        return self.retentions + _U64.pack(directory)

    # -- seals -------------------------------------------------------------------------------------------------------

    def seal(self, number: int) -> bytes:
        return self.seals + _U64.pack(number)

    def trusts_in(self, seal: int) -> bytes:
        return b"%s%s/" % (self._trusts, _U64.pack(seal))

    def trust(self, seal: int, session: int) -> bytes:
        """`session` caches what the seal covers, for a term after it last heard the seal confirmed; no lease."""
        return self.trusts_in(seal) + _U64.pack(session)

    def seal_term(self, seal: int) -> bytes:
        """Bound to a lease of the seal's term, which began when the seal had ended: until it is over mounts that were
        not heard of may trust the seal."""
        return self._terms + _U64.pack(seal)

    def seal_notice(self, session: int, seal: int) -> bytes:
        """A notice to `session` that a seal that it trusts has ended; four numbers tell it from other notices."""
        return b"%s%s/%s/%s/%s/%s" % (self._inboxes, *map(_U64.pack, (session, seal, 0, 0, 0)))

    # -- parsing -----------------------------------------------------------------------------------------------------

    def parse_dentry(self, key: bytes) -> tuple[int, bytes]:
        """(parent, name) of a dentry's key."""
        at = len(self._dentry)
        return _U64.unpack_from(key, at)[0], key[at + 9 :]

    def parse_numbers(self, key: bytes) -> tuple[int, ...]:
        """The integers of a key `<table>/<u64>[/<u64>...]`."""
        rest = key[len(self.prefix) + 2 :]
        return tuple(_U64.unpack_from(rest, at)[0] for at in range(0, len(rest), 9))

    def parse_slot(self, key: bytes) -> int:
        """The session of a journal slot's key."""
        session: int = _U64.unpack_from(key, len(self.slots))[0]
        return session

    def parse_xattr(self, key: bytes) -> tuple[int, bytes]:
        """(ino, attribute name) of an xattr's key."""
        at = len(self._xattr)
        return _U64.unpack_from(key, at)[0], key[at + 9 :]

    def parse_tombstone(self, key: bytes) -> tuple[int, int, int]:
        """(time in ns, ino, body_version) of a tombstone's key."""
        time_ns, ino, body_version = self.parse_numbers(key)
        return time_ns, ino, body_version

    def parse_session(self, key: bytes) -> int:
        """The session of a mount's key."""
        session: int = _U64.unpack_from(key, len(self.mounts))[0]
        return session


def volumes_prefix() -> bytes:
    """Prefix of all volumes in a store."""
    return _ROOT


def volume_of(key: bytes) -> str:
    """The volume that a key below `volumes_prefix` belongs to."""
    return key[len(_ROOT) : key.index(b"/", len(_ROOT))].decode()
