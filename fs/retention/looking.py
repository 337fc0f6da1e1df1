"""Looking at all that some names mean: when it was last changed, how large it is, and whether anything holds it.

Everything is read as a mount reads it, so what others have answered and not yet written is seen too. Whether a file is
open (for reading or writing, mapped, locked, or with bytes that are not committed) every mount is asked: a lock needs
an open file, so that is the answer for locks as well.
"""

from __future__ import annotations

import stat
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from apollofs.fs.retention.names import is_unfinished
from apollofs.fs.retention.verdicts import Hold, Why
from apollofs.metadata.errors import StaleInode
from apollofs.metadata.listing import listed
from apollofs.metadata.name_text import name_text
from apollofs.metadata.records import DirectoryEntry, Inode, InodeFlag, MountRecord
from apollofs.metadata.use_questions import UseQuestions
from apollofs.metadata.volume import Volume

ASKED_MAX = 500
"""Inodes of one question to the mounts."""
TOP = 0
"""Instead of a directory: what was asked for itself."""
PART_OF_MANY = b".distcp"
END_OF_MANY = b".metadata"
"""torch.distributed.checkpoint writes it after all parts."""
PINNED = InodeFlag.IMMUTABLE | InodeFlag.APPEND_ONLY


@dataclass(slots=True)
class Looked:
    """What was found; with a hold, up to what holds it."""

    changed_ns: int = 0
    """The latest ctime."""
    size_bytes: int = 0
    """Stored, of files that have no other name."""
    files: int = 0
    hold: Hold | None = None
    _tops: set[int] = field(default_factory=set)
    _marked: set[int] = field(default_factory=set)
    _parted: set[int] = field(default_factory=set)
    _ended: set[int] = field(default_factory=set)

    def take(self, directory: int, name: bytes, inode: Inode, marker: bytes) -> None:
        """One of all that is there: `name` is in `directory`, or (TOP) was asked for itself."""
        self.changed_ns = max(self.changed_ns, inode.ctime_ns)
        if inode.is_dir and directory == TOP:
            self._tops.add(inode.ino)
        elif not inode.is_dir:
            self.files += 1
            self.size_bytes += inode.allocated_bytes if inode.is_file and inode.nlink == 1 else 0
        if name == marker:
            self._marked.add(directory)
        if name == END_OF_MANY:
            self._ended.add(directory)
        elif name.endswith(PART_OF_MANY):
            self._parted.add(directory)
        if inode.seal or inode.flags & InodeFlag.WAYPOINT:
            self.hold = Hold(Why.SEALED)
        elif inode.flags & PINNED:
            self.hold = Hold(Why.IMMUTABLE)
        elif is_unfinished(name):
            self.hold = Hold(Why.INCOMPLETE, f"{name_text(name)} is in it")

    def finish(self, marker: bytes) -> None:
        """All was taken."""
        if marker and self._tops - self._marked:
            self.hold = Hold(Why.INCOMPLETE, f"{name_text(marker)} is not in it")
        elif self._parted - self._ended:
            self.hold = Hold(Why.INCOMPLETE, f"{name_text(END_OF_MANY)} is not in it")


class Looking:
    """Looks through `volume`, and asks with `questions`, both of one session. Methods raise SessionLost,
    DeadlineExceeded, StoreError, CorruptRecord; they change nothing."""

    def __init__(self, volume: Volume, questions: UseQuestions) -> None:
        self._volume = volume
        self._questions = questions
        self._silent: Hold | None = None
        """A mount has not answered: every further question would wait for it as long."""

    async def look(self, entries: Sequence[DirectoryEntry], marker: bytes = b"") -> Looked:
        """At these names and all below, up to the first thing that holds them. `marker`: a name that is in each
        complete directory, or empty.

        A request for each thousand names, one for each directory, and a question for each 500 files.
        """
        found = Looked()
        asked: list[int] = []
        try:
            async with aclosing(self._all_of(entries)) as seen:
                async for directory, name, inode in seen:
                    found.take(directory, name, inode, marker)
                    if inode.is_file:
                        asked.append(inode.ino)
                    if found.hold is None and len(asked) == ASKED_MAX:
                        found.hold = await self._used(asked)
                    if found.hold is not None:
                        return found
            found.finish(marker)
            found.hold = found.hold or await self._used(asked)
        except StaleInode:
            found.hold = Hold(Why.CHANGING, "something in it was removed just now")
        return found

    async def used(self, entries: Sequence[DirectoryEntry]) -> Hold | None:
        """Whether a mount uses any of these files and all below, as of some moment after the call."""
        asked: list[int] = []
        async with aclosing(self._all_of(entries)) as seen:
            async for _, _, inode in seen:
                if inode.is_file:
                    asked.append(inode.ino)
                hold = await self._used(asked) if len(asked) == ASKED_MAX else None
                if hold is not None:
                    return hold
        return await self._used(asked)

    async def _used(self, asked: list[int]) -> Hold | None:
        """Of these inodes; the list is empty afterwards."""
        if not asked or self._silent is not None:
            return self._silent if asked else None
        uses = await self._questions.ask(sorted(set(asked)))
        asked.clear()
        if uses.silent:
            self._silent = Hold(Why.SILENT, _mount_text(uses.silent[0]))
            return self._silent
        user = next(iter(uses.users.values()), None)
        return Hold(Why.OPEN, f"on {_mount_text(user)}") if user is not None else None

    async def _all_of(self, entries: Sequence[DirectoryEntry]) -> AsyncGenerator[tuple[int, bytes, Inode]]:
        """(directory, name, inode) of these and all below. Raises StaleInode where something goes meanwhile."""
        below: list[int] = []
        for entry in entries:
            yield TOP, entry.name, await self._inode(entry, below)
        while below:
            directory = below.pop()
            async with aclosing(listed(self._volume, directory)) as pages:
                async for found in pages:
                    for entry in found:
                        yield directory, entry.name, await self._inode(entry, below)

    async def _inode(self, entry: DirectoryEntry, below: list[int]) -> Inode:
        if stat.S_ISDIR(entry.file_type):
            below.append(entry.ino)
        return entry.inode or await self._volume.getattr(entry.ino)


def _mount_text(mount: MountRecord) -> str:
    return f"{mount.host}:{mount.mountpoint}"
