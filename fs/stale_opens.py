"""Opening names that other mounts replace again and again.

open(2) is at least two requests: LOOKUP tells which inode a name means, OPEN opens that. If another mount replaces the
file in between, we answer ESTALE, and the kernel walks the path anew; the second time it gives the error to the
caller, who has done nothing wrong. So for a moment after a refusal, what is looked up in that directory is held open:
OPEN finds it, and goes on with it as with any file that loses its name while it is open. That is what the name meant
while the call was under way, and it is refreshed as any open file is.
"""

from __future__ import annotations

import trio

from apollofs.fs.bodies import Bodies
from apollofs.fs.open_file import OpenFile
from apollofs.metadata.errors import StaleInode
from apollofs.metadata.records import Inode
from apollofs.metadata.volume import Volume

HOLD_S = 1.0
"""For how long what was looked up is held, and for how long after a refusal."""
HELD_MAX = 256
DIRECTORIES_MAX = 256
ATTEMPTS_MAX = 64


class StaleOpens:
    """Of one mount."""

    def __init__(self, volume: Volume, bodies: Bodies) -> None:
        self._volume = volume
        self._bodies = bodies
        self._until: dict[int, float] = {}
        """Directories in which something was refused, and until when (trio's clock) what is looked up there is held."""
        self._held = 0

    def refused(self, ino: int) -> None:
        """The kernel is answered ESTALE for an inode that was looked up a moment ago."""
        place = self._volume.place_of(ino)
        if place is None:
            return
        self._until.pop(place[0], None)
        self._until[place[0]] = trio.current_time() + HOLD_S
        if len(self._until) > DIRECTORIES_MAX:
            self._until.pop(next(iter(self._until)))

    def concerns(self, parent: int) -> bool:
        """Whether a name in this directory is to be looked up by `lookup`."""
        until = self._until.get(parent)
        if until is None:
            return False
        if trio.current_time() > until:
            del self._until[parent]
            return False
        return True

    async def lookup(self, parent: int, name: bytes) -> Inode:
        """As `Volume.lookup`; a file is held open for a moment. One request more."""
        for _ in range(ATTEMPTS_MAX):
            inode = await self._volume.lookup(parent, name)
            if not inode.is_file or self._held >= HELD_MAX:
                return inode
            try:
                file = await self._bodies.open(inode.ino)
            except StaleInode:
                continue
            self._held += 1
            self._bodies.spawn(self._let_go, file)
            return inode
        raise StaleInode("the name is replaced faster than it can be opened")

    async def _let_go(self, file: OpenFile) -> None:
        try:
            await trio.sleep(HOLD_S)
        finally:
            self._held -= 1
            self._bodies.release(self._bodies.find(file.ino) or file)
