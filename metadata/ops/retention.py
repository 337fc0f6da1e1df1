"""Retention: set or clear the retention policy of a directory."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata.errors import NotADirectory
from apollofs.metadata.journal import Kind
from apollofs.metadata.ops.common import Scope
from apollofs.metadata.retention import Retention, encode_retention
from apollofs.metadata.store import Delete, Put
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View


@dataclass(frozen=True, slots=True)
class SetRetention:
    """Gives a directory a retention policy of its own, or (None) takes it away. NotADirectory, StaleInode."""

    scope: Scope
    directory: int
    retention: Retention | None

    def decide(self, view: View) -> Decision[None]:
        home = self.scope.find(view, self.directory, None)
        if not home.inode.is_dir:
            raise NotADirectory("only a directory has a retention policy")
        key = self.scope.keys.retention(self.directory)
        value = b"" if self.retention is None else encode_retention(self.retention)
        change = self.scope.change(Kind.RETENTION, home)._replace(value=value)
        return Decision(lambda _, __: None, [Put(key, value) if value else Delete(key)], change)
