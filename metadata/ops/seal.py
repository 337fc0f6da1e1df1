"""Seal: the transactions that make a seal, mark what it covers, change its phase, and take it away. See
`seal_records.py`; `sealing.py` puts them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from apollofs.metadata import codec
from apollofs.metadata.errors import NoSuchEntry, NotADirectory, SealRefused
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.ops.common import Home, Scope
from apollofs.metadata.records import ROOT_INO, Inode, InodeFlag
from apollofs.metadata.seal_records import (
    SEALS_MAX,
    Phase,
    SealCount,
    SealRecord,
    decode_count,
    decode_seal,
    encode_count,
    encode_seal,
)
from apollofs.metadata.store import Delete, Put, prefix_end
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View

DEPTH_MAX = 36
"""Directories above a sealed tree: each takes three compares of one transaction."""
NOTED = Change(Kind.NOTHING)
Writes = list[Put | Delete]


@dataclass(frozen=True, slots=True)
class BeginSeal:
    """Make the seal, in phase SEALING: the tree's root is marked, the directories above become waypoints.

    Replies the record; the standing one if the tree is being sealed or sealed already for the same term. SealRefused
    where another seal covers it or lies below, NotADirectory, NoSuchEntry.
    """

    scope: Scope
    root: int
    term_s: float

    def decide(self, view: View) -> Decision[SealRecord]:
        keys = self.scope.keys
        kv = view.get(keys.seal_counter)
        count = decode_count(kv.value) if kv is not None else SealCount()
        home = _directory(self.scope, view, self.root)
        if home.inode.seal:
            return self._standing(view, home.inode.seal)
        if home.inode.flags & InodeFlag.WAYPOINT:
            raise SealRefused("a tree below is sealed already")
        if count.standing >= SEALS_MAX:
            raise SealRefused(f"a volume has at most {SEALS_MAX} seals: remove old ones")
        above = self._above(view, home.inode)
        path = tuple((each.ino, name) for each, name in above)
        record = SealRecord(count.last + 1, self.root, self.term_s, Phase.SEALING, path, self.scope.now_ns)
        writes: Writes = [
            Put(keys.seal_counter, encode_count(SealCount(record.number, count.standing + 1))),
            Put(keys.seal(record.number), encode_seal(record)),
            self.scope.store(home, home.inode._replace(seal=record.number)),
        ]
        writes += [_with_waypoint(self.scope, each, True) for each, _ in above if not each.flags & InodeFlag.WAYPOINT]
        return Decision(lambda revision, _: replace(record, revision=revision), writes, NOTED)

    def _standing(self, view: View, number: int) -> Decision[SealRecord]:
        record = _record(self.scope, view, number)
        if record.root != self.root:
            raise SealRefused(f"it is part of {record.path_text}, which is sealed")
        if record.phase in (Phase.ENDING, Phase.OPENING):
            raise SealRefused("it is being unsealed: let `unseal` come to its end first")
        if record.term_s != self.term_s:
            raise SealRefused(f"it is sealed already, for a term of {record.term_s:g} s")
        return Decision(lambda _, __: record)

    def _above(self, view: View, inode: Inode) -> list[tuple[Inode, bytes]]:
        """The directories above, from the volume's root, each with the name that leads on to the tree."""
        found: list[tuple[Inode, bytes]] = []
        while inode.ino != ROOT_INO:
            if len(found) == DEPTH_MAX:
                raise SealRefused(f"more than {DEPTH_MAX} directories lie above it")
            parent = _directory(self.scope, view, inode.parent).inode
            if parent.seal:
                raise SealRefused("a directory above it is being sealed")
            found.append((parent, inode.name))
            inode = parent
        return found[::-1]


@dataclass(frozen=True, slots=True)
class Mark:
    """Give what these names of a directory mean the number `new` instead of `old`. One of both is 0. What has `new`
    already, and names that are gone, are passed over. Replies how many were marked. SealRefused for what has a number
    of its own: a file of which another name is in another sealed tree; and where somebody unseals the tree meanwhile,
    or nothing would ever take the number out again."""

    scope: Scope
    directory: int
    names: tuple[bytes, ...]
    old: int
    new: int

    def decide(self, view: View) -> Decision[int]:
        if self.new:
            _record_in(self.scope, view, self.new, Phase.SEALING)
        writes: dict[bytes, Put] = {}
        for name in self.names:
            location = (self.directory, name)
            dentry = self.scope.dentry(view, *location)
            if dentry is None:
                continue
            home = self.scope.home_of(view, location, dentry)
            if home.inode.seal == self.old:
                put = self.scope.store(home, home.inode._replace(seal=self.new))
                writes[put.key] = put
            elif home.inode.seal != self.new and self.new:
                raise SealRefused(f"{name!r} is a link to a file that another seal covers")
        return Decision(lambda _, __: len(writes), [*writes.values()], NOTED)


@dataclass(frozen=True, slots=True)
class Unmark:
    """Take the number out of a directory, after all that is in it. Replies how many had it: 1 or 0."""

    scope: Scope
    directory: int
    number: int

    def decide(self, view: View) -> Decision[int]:
        home = _directory(self.scope, view, self.directory)
        if home.inode.seal != self.number:
            return Decision(lambda _, __: 0)
        return Decision(lambda _, __: 1, [self.scope.store(home, home.inode._replace(seal=0))], NOTED)


@dataclass(frozen=True, slots=True)
class Advance:
    """Bring a seal from one of some phases to another one. Replies the record, as it is if it is there already.

    `lease`: of a term that begins now, for mounts that are silent. SealRefused if it is in another phase.
    """

    scope: Scope
    number: int
    since: tuple[Phase, ...]
    phase: Phase
    lease: int = 0

    def decide(self, view: View) -> Decision[SealRecord]:
        keys = self.scope.keys
        record = _record(self.scope, view, self.number)
        if record.phase is self.phase and bool(self.lease) <= record.has_term:
            return Decision(lambda _, __: record)
        if record.phase not in self.since:
            raise SealRefused(f"{record.path_text} is {record.phase.name.lower()} by now")
        after = replace(record, phase=self.phase, has_term=record.has_term or bool(self.lease))
        writes: Writes = [Put(keys.seal(self.number), encode_seal(after))]
        if self.lease:
            writes.append(Put(keys.seal_term(self.number), b"", self.lease))
        change = NOTED
        if self.phase is Phase.SEALED:
            change = _change(self.scope, view, Kind.SEAL, record)._replace(term_s=record.term_s)
        return Decision(lambda revision, _: replace(after, revision=revision), writes, change)


@dataclass(frozen=True, slots=True)
class Release:
    """From ENDING to OPENING: nobody trusts the seal, or the term of those who are silent is over. This is what the
    promise of a seal rests on, so the transaction compares it. Replies None as long as it does not hold.

    The change log says here that the tree is unsealed, and in `Advance` that it is sealed: between the two comes no
    change below."""

    scope: Scope
    number: int

    def decide(self, view: View) -> Decision[SealRecord | None]:
        keys = self.scope.keys
        record = _record(self.scope, view, self.number)
        if record.phase is Phase.OPENING:
            return Decision(lambda _, __: record)
        if record.phase is not Phase.ENDING:
            raise SealRefused(f"{record.path_text} is {record.phase.name.lower()}")
        trusts = keys.trusts_in(self.number)
        if record.has_term and view.get(keys.seal_term(self.number)) is None:
            silent: Writes = [Delete(trusts, prefix_end(trusts))]
        elif view.is_empty(trusts):
            silent = [Delete(keys.seal_term(self.number))]
        else:
            return Decision(lambda _, __: None)
        after = record.in_phase(Phase.OPENING)
        writes = [*silent, Put(keys.seal(self.number), encode_seal(after))]
        change = _change(self.scope, view, Kind.UNSEAL, record)
        return Decision(lambda revision, _: replace(after, revision=revision), writes, change)


@dataclass(frozen=True, slots=True)
class EndSeal:
    """Take the seal away when nothing has its number but the root, and the flag of waypoints that lead nowhere else.

    `others`: the directories above other standing seals, as of revision `as_of` of the counter. Replies whether it was
    done; if not, seals have come or gone since: read `others` again.
    """

    scope: Scope
    number: int
    others: frozenset[int]
    as_of: int

    def decide(self, view: View) -> Decision[bool]:
        keys = self.scope.keys
        counter = view.get(keys.seal_counter)
        if counter is None or counter.mod_revision != self.as_of:
            return Decision(lambda _, __: False)
        record = _record_in(self.scope, view, self.number, Phase.OPENING)
        count = decode_count(counter.value)
        writes: Writes = [
            Put(keys.seal_counter, encode_count(replace(count, standing=count.standing - 1))),
            Delete(keys.seal(self.number)),
        ]
        root = _directory(self.scope, view, record.root)
        if root.inode.seal == self.number:
            writes.append(self.scope.store(root, root.inode._replace(seal=0)))
        gone = [ino for ino, _ in record.path if ino not in self.others]
        writes += [_with_waypoint(self.scope, _directory(self.scope, view, ino).inode, False) for ino in gone]
        return Decision(lambda _, __: True, writes, NOTED)


def _directory(scope: Scope, view: View, ino: int) -> Home:
    kv = view.get(scope.keys.inode(ino))
    if kv is None:
        raise NoSuchEntry("the directory has been removed")
    inode = codec.decode_inode(kv.value, kv.mod_revision)
    if not inode.is_dir:
        raise NotADirectory("only a directory, with all below it, can be sealed")
    return Home(inode, None)


def _record(scope: Scope, view: View, number: int) -> SealRecord:
    kv = view.get(scope.keys.seal(number))
    if kv is None:
        raise SealRefused("it is not sealed any more")
    return decode_seal(kv.value, kv.mod_revision)


def _record_in(scope: Scope, view: View, number: int, phase: Phase) -> SealRecord:
    record = _record(scope, view, number)
    if record.phase is not phase:
        raise SealRefused(f"{record.path_text} is {record.phase.name.lower()} by now")
    return record


def _change(scope: Scope, view: View, kind: Kind, record: SealRecord) -> Change:
    """For the change log; a compare more, of what hardly ever changes then."""
    return scope.change(kind, _directory(scope, view, record.root))


def _with_waypoint(scope: Scope, inode: Inode, is_waypoint: bool) -> Put:
    flags = inode.flags | InodeFlag.WAYPOINT if is_waypoint else inode.flags & ~InodeFlag.WAYPOINT
    return scope.store(Home(inode, None), inode._replace(flags=flags))


def paths_of(records: Sequence[SealRecord]) -> frozenset[int]:
    """The directories above these seals."""
    return frozenset(ino for record in records for ino, _ in record.path)
