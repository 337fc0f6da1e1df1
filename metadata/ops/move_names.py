"""MoveNames: give several names other places, all of them in one transaction or none."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata.journal import Change
from apollofs.metadata.ops.common import Location, Scope
from apollofs.metadata.ops.rename import Rename
from apollofs.metadata.records import RenameFlag
from apollofs.metadata.store import Delete, Put
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View

MOVES_MAX = 16
UNCHANGED_MAX = 24
"""A directory that moves takes five of a transaction's 128 compares."""


@dataclass(frozen=True, slots=True)
class Move:
    """The inode `ino`, which has the name `source`, is to have the name `target`, which nothing has."""

    source: Location
    ino: int
    target: Location


@dataclass(frozen=True, slots=True)
class MoveNames:
    """Up to MOVES_MAX renames with RENAME_NOREPLACE at once. `unchanged`: keys, each with the mod_revision that it must
    still have (0: it must not exist).

    Replies False, and nothing is moved, if one of these has changed or a source means another inode by now. Raises what
    `Rename` does.
    """

    scope: Scope
    moves: tuple[Move, ...]
    unchanged: tuple[tuple[bytes, int], ...] = ()

    def decide(self, view: View) -> Decision[bool]:
        assert 0 < len(self.moves) <= MOVES_MAX and len(self.unchanged) <= UNCHANGED_MAX
        if not self._is_as_expected(view):
            return Decision(lambda _, __: False)
        writes: dict[bytes, Put | Delete] = {}
        changes: list[Change] = []
        for move in self.moves:
            # they don't overlap: what two of them write twice is the same (times of a directory, the line of moves)
            done = Rename(self.scope, move.source, move.target, RenameFlag.NOREPLACE).decide(view)
            writes.update((write.key, write) for write in done.writes)
            assert done.change is not None
            changes.append(done.change)
        first, *rest = changes
        return Decision(lambda _, __: True, [*writes.values()], first, rests_elsewhere=True, further=tuple(rest))

    def _is_as_expected(self, view: View) -> bool:
        for key, revision in self.unchanged:
            kv = view.get(key, likely_absent=not revision)
            if (kv.mod_revision if kv is not None else 0) != revision:
                return False
        for move in self.moves:
            dentry = self.scope.dentry(view, *move.source)
            if dentry is None or dentry.ino != move.ino:
                return False
        return True
