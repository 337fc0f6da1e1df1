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
MOVE_COMPARES = 5
"""What a directory that moves takes of a transaction's 128 compares."""


def unchanged_max(moves: int) -> int:
    """How many other keys may be compared beside so many moves."""
    return 24 + (MOVES_MAX - moves) * MOVE_COMPARES


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

    Replies the revision at which it was done; 0, and nothing is moved, if one of these has changed or a source means
    another inode by now. Raises what `Rename` does.
    """

    scope: Scope
    moves: tuple[Move, ...]
    unchanged: tuple[tuple[bytes, int], ...] = ()

    def decide(self, view: View) -> Decision[int]:
        assert 0 < len(self.moves) <= MOVES_MAX and len(self.unchanged) <= unchanged_max(len(self.moves))
        if not self._is_as_expected(view):
            return Decision(lambda _, __: 0)
        writes: dict[bytes, Put | Delete] = {}
        changes: list[Change] = []
        for move in self.moves:
            # they don't overlap: what two of them write twice is the same (times of a directory, the line of moves)
            done = Rename(self.scope, move.source, move.target, RenameFlag.NOREPLACE).decide(view)
            writes.update((write.key, write) for write in done.writes)
            assert done.change is not None
            changes.append(done.change)
        first, *rest = changes
        return Decision(
            lambda revision, _: revision, [*writes.values()], first, rests_elsewhere=True, further=tuple(rest)
        )

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
