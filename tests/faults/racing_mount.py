"""The command on a mount that is always too late, run as `apollofs` is.

Before the first create of a name that begins with `raced`, a private file of that name is there, as if another mount
had been faster.
"""

from __future__ import annotations

import stat
import sys

from apollofs.fs.attributes import Attributes, Caller, OpenFlags
from apollofs.fs.cli.app import main
from apollofs.fs.filesystem import Filesystem

SOMEBODY = 1000
"""Whose the private files are."""
_create = Filesystem.create
_made: set[bytes] = set()


async def late_create(
    self: Filesystem, parent: int, name: bytes, mode: int, flags: int, caller: Caller
) -> tuple[Attributes, OpenFlags]:
    """See the module."""
    if name.startswith(b"raced") and name not in _made:
        _made.add(name)
        await self.mknod(parent, name, stat.S_IFREG | 0o600, 0, Caller(SOMEBODY, SOMEBODY, 0))
    return await _create(self, parent, name, mode, flags, caller)


if __name__ == "__main__":
    Filesystem.create = late_create  # type: ignore[method-assign]
    sys.exit(main())
