"""Removing names so that nobody sees half of it, and whoever has begun to read keeps all of it.

Everything happens in `/.retired`, which only root may enter, in a directory for each checkpoint. Its name says how far
it is:

1. `<time>-<directory>`: *parked*. The names were moved there in one transaction, if all that the verdict rests on was
   as it had been read (`carrying`). From then on nobody finds them, on any mount, so nobody newly opens what is below.
   Every mount is asked once more: whoever opened a file between the look and the parking gets all of it *back*.
2. `gone-...`: what is in it never comes back; its files are unlinked (they are in the trash then, see docs/GC.md).
3. `trash-...`: only directories are left, so that the trash can say where its files were and put them there. They go
   after a week, but for those in which there is something again.

What is interrupted is found by the next run, whoever has begun it, and gone on with.
"""

from __future__ import annotations

import re
import stat
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from apollofs.fs.pace import Pace
from apollofs.fs.retention.looking import Looking
from apollofs.fs.retention.report import RetentionReport
from apollofs.fs.retention.verdicts import Hold
from apollofs.metadata.errors import DirectoryNotEmpty, EntryExists, MetadataError, NamespaceError, NoSuchEntry
from apollofs.metadata.listing import PAGE_KEYS, listed
from apollofs.metadata.name_text import name_text
from apollofs.metadata.ops.common import Location
from apollofs.metadata.ops.move_names import Move, MoveNames
from apollofs.metadata.records import ROOT_INO, DirectoryEntry, Owner, RenameFlag
from apollofs.metadata.volume import Volume
from apollofs.metadata.workers import share_out

RETIRED = b".retired"
GONE, TRASH = b"gone-", b"trash-"
EMPTIED_S = 7 * 86_400.0
UNLINKS_AT_ONCE = 16
_GROUP = re.compile(rb"(gone-|trash-)?([0-9a-f]{16})-([0-9a-f]{16})")
ROOT = Owner(0, 0)


@dataclass(frozen=True, slots=True)
class _Group:
    """A checkpoint's directory in `/.retired`."""

    place: int
    """That of `/.retired`."""
    name: bytes
    ino: int
    phase: bytes
    """GONE, TRASH, or nothing: parked."""
    time_s: float
    directory: int
    """Where its names were."""


class Parking:
    """Works in the session of `volume`. Methods raise SessionLost, DeadlineExceeded, StoreError, CorruptRecord; what
    the namespace refuses is in the report. Cancelled, what was begun is found by the next `settle`."""

    def __init__(self, volume: Volume, looking: Looking, pace: Pace, report: RetentionReport) -> None:
        self._volume = volume
        self._looking = looking
        self._pace = pace
        self._report = report
        self._last_ns = 0

    async def park(self, directory: int, entries: Sequence[DirectoryEntry], unchanged: Mapping[bytes, int]) -> int:
        """Take names out of sight, all or none; 0 if they, or the keys `unchanged`, have changed, else the revision at
        which it was done. Two transactions, of which the second one does it.

        Raises NamespaceError: sealed or immutable by now.
        """
        self._last_ns = max(self._last_ns + 1, time.time_ns())
        place = await self._made(ROOT_INO, RETIRED)
        group = await self._made(place, b"%016x-%016x" % (self._last_ns, directory))
        moves = tuple(Move((directory, each.name), each.ino, (group, each.name)) for each in entries)
        return await self._volume.transact(lambda scope: MoveNames(scope, moves, tuple(unchanged.items())))

    async def settle(self) -> None:
        """Bring back what is in use, remove the rest, of all that is parked."""
        with suppress(NoSuchEntry):
            place = (await self._volume.lookup(ROOT_INO, RETIRED)).ino
            async with aclosing(self._groups(place)) as groups:
                async for group in groups:
                    try:
                        await self._advance(group)
                    except NamespaceError as exc:
                        self._report.fail(f"/{name_text(RETIRED)}/{name_text(group.name)} stays: {exc}")
            with suppress(DirectoryNotEmpty):
                await self._volume.rmdir(ROOT_INO, RETIRED)

    async def _made(self, directory: int, name: bytes) -> int:
        try:
            return (await self._volume.mkdir(directory, name, 0o700, ROOT)).ino
        except EntryExists:
            return (await self._volume.lookup(directory, name)).ino

    async def _groups(self, place: int) -> AsyncGenerator[_Group]:
        """All that is parked. What gets another name meanwhile may come once more, or not."""
        async with aclosing(listed(self._volume, place)) as pages:
            async for entries in pages:
                for entry in entries:
                    parsed = _GROUP.fullmatch(entry.name)
                    if parsed is not None and stat.S_ISDIR(entry.file_type):
                        phase, time_ns, directory = parsed[1] or b"", int(parsed[2], 16), int(parsed[3], 16)
                        yield _Group(place, entry.name, entry.ino, phase, time_ns / 1e9, directory)

    async def _advance(self, group: _Group) -> None:
        """To its end, or as far as it can."""
        name = group.name
        if group.phase == TRASH:
            if time.time() - group.time_s > EMPTIED_S:
                await self._remove_directories((group.place, name), group.ino)
            return
        if not group.phase:
            entries = list((await self._volume.readdir(group.ino, b"", PAGE_KEYS)).entries)
            hold = await self._looking.used(entries)
            if hold is not None or not entries:
                await self._bring_back(group, entries, hold)
                return
            name = GONE + name
            await self._rename(group.place, group.name, name)
        await self._unlink_all(group.ino)
        await self._rename(group.place, name, TRASH + name.removeprefix(GONE))

    async def _rename(self, place: int, name: bytes, new_name: bytes) -> None:
        await self._volume.rename(place, name, place, new_name, RenameFlag.NOREPLACE)

    async def _bring_back(self, group: _Group, entries: Sequence[DirectoryEntry], hold: Hold | None) -> None:
        moves = tuple(Move((group.ino, each.name), each.ino, (group.directory, each.name)) for each in entries)
        try:
            done = await self._volume.transact(lambda scope: MoveNames(scope, moves)) if moves else 0
            self._report.brought_back += bool(done)
        except (EntryExists, NoSuchEntry) as exc:
            # who has it open keeps it; it goes when that has ended
            why = f"{hold.why} {hold.detail}" if hold is not None else ""
            self._report.fail(f"{name_text(entries[0].name)} is {why}, and can't come back: {exc}")
            return
        await self._volume.rmdir(group.place, group.name)

    # -- trees -------------------------------------------------------------------------------------------------------

    async def _unlink_all(self, top: int) -> None:
        """All files below. Memory: the numbers of directories, and a page of names."""
        left = [top]
        while left:
            directory = left.pop()
            async with aclosing(listed(self._volume, directory)) as pages:
                async for entries in pages:
                    left += [entry.ino for entry in entries if stat.S_ISDIR(entry.file_type)]
                    files = [(directory, entry.name) for entry in entries if not stat.S_ISDIR(entry.file_type)]
                    await share_out(self._unlink, files, UNLINKS_AT_ONCE, (MetadataError,))

    async def _unlink(self, location: Location) -> None:
        await self._pace.step()
        with suppress(NoSuchEntry):
            gone = await self._volume.unlink(*location)
            self._report.removed_files += 1
            self._report.removed_bytes += gone.allocated_bytes if gone.is_file and gone.nlink == 0 else 0

    async def _remove_directories(self, location: Location, top: int) -> None:
        """Those below that are empty, leaves first, and the top one. Memory: where each of them is."""
        found: list[Location] = [location]
        left = [top]
        while left:
            directory = left.pop()
            async with aclosing(listed(self._volume, directory)) as pages:
                async for entries in pages:
                    below = [entry for entry in entries if stat.S_ISDIR(entry.file_type)]
                    found += [(directory, entry.name) for entry in below]
                    left += [entry.ino for entry in below]
        for each in reversed(found):
            await self._pace.step()
            with suppress(DirectoryNotEmpty, NoSuchEntry):
                await self._volume.rmdir(*each)
