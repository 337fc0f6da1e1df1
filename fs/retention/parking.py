"""Removing names so that nobody sees half of it, and whoever has begun to read keeps all of it.

1. *Park*: the names are moved to `/.retired`, which only root may enter, in one transaction, if trackers and names are
   as they were looked at. From then on nobody finds them, on any mount, so nobody newly opens what is below.
2. Every mount is asked once more: whoever opened a file between the look and the parking gets all of it *back*.
3. *Condemn*: they get names there that say that they are being removed. They never come back from now on.
4. Files are unlinked (they are in the trash then, see docs/GC.md), directories removed.

What is interrupted is found in `/.retired`, whoever has parked it, and goes on from there.
"""

from __future__ import annotations

import re
import stat
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from apollofs.fs.pace import Pace
from apollofs.fs.retention.looking import PAGE_KEYS, Looking
from apollofs.fs.retention.report import RetentionReport
from apollofs.fs.retention.verdicts import Hold
from apollofs.metadata.errors import (
    DirectoryNotEmpty,
    EntryExists,
    MetadataError,
    NamespaceError,
    NoSuchEntry,
    StaleInode,
)
from apollofs.metadata.ops.move_names import MOVES_MAX, Move, MoveNames
from apollofs.metadata.records import ROOT_INO, DirectoryEntry, Inode, Owner
from apollofs.metadata.volume import Volume
from apollofs.metadata.workers import share_out

RETIRED = b".retired"
UNLINKS_AT_ONCE = 16
AGAIN_MAX = 100
"""How often directories are found not empty after all, in one tree."""
_PARKED = re.compile(rb"(gone-)?([0-9a-f]{16})-([0-9a-f]{16})-(.+)", re.DOTALL)


@dataclass(slots=True)
class _Group:
    """What was parked in one transaction."""

    entries: list[DirectoryEntry] = field(default_factory=list)
    is_condemned: bool = False


class Parking:
    """Works in the session of `volume`. Methods raise SessionLost, DeadlineExceeded, StoreError, CorruptRecord; what
    the namespace refuses is in the report. Cancelled, what was begun is found by the next `settle`."""

    def __init__(self, volume: Volume, looking: Looking, pace: Pace, report: RetentionReport) -> None:
        self._volume = volume
        self._looking = looking
        self._pace = pace
        self._report = report
        self._last_ns = 0

    async def park(self, directory: int, entries: Sequence[DirectoryEntry], unchanged: dict[bytes, int]) -> bool:
        """Take names out of sight, all or none; False if they, or the keys `unchanged`, have changed. One transaction.

        Raises NamespaceError: sealed or immutable by now.
        """
        place = (await self._place(make=True)).ino
        self._last_ns = max(self._last_ns + 1, time.time_ns())
        front = b"%016x-%016x-" % (self._last_ns, directory)
        moves = tuple(Move((directory, each.name), each.ino, (place, front + each.name)) for each in entries)
        return await self._move(moves, tuple(unchanged.items()))

    async def settle(self) -> None:
        """Bring back what is in use, remove the rest, of all that is parked."""
        try:
            place = await self._place(make=False)
        except NoSuchEntry:
            return
        for group in (await self._groups(place.ino)).values():
            try:
                hold = None if group.is_condemned else await self._looking.used(group.entries)
                if hold is not None:
                    await self._bring_back(place.ino, group.entries, hold)
                else:
                    await self._remove(place.ino, group)
            except NamespaceError as exc:
                self._report.fail(f"{_text(group.entries[0].name)} stays in /{_text(RETIRED)}: {exc}")
        with suppress(DirectoryNotEmpty, NoSuchEntry):
            await self._volume.rmdir(ROOT_INO, RETIRED)

    async def _place(self, *, make: bool) -> Inode:
        """The directory `/.retired`. Raises NoSuchEntry where there is none and none is to be made."""
        try:
            return await self._volume.lookup(ROOT_INO, RETIRED)
        except NoSuchEntry:
            if not make:
                raise
        try:
            return await self._volume.mkdir(ROOT_INO, RETIRED, 0o700, Owner(0, 0))
        except EntryExists:
            return await self._volume.lookup(ROOT_INO, RETIRED)

    async def _groups(self, place: int) -> dict[bytes, _Group]:
        """One page of what is parked, by when that was; more is there only after many interruptions."""
        found: defaultdict[bytes, _Group] = defaultdict(_Group)
        page = await self._volume.readdir(place, b"", PAGE_KEYS)
        for entry in page.entries:
            parsed = _PARKED.fullmatch(entry.name)
            if parsed is not None:
                group = found[parsed[2]]
                group.entries.append(entry)
                group.is_condemned = group.is_condemned or parsed[1] is not None
        if page.more and found:
            found.pop(max(found))  # the rest of it may be on the next page
        return found

    async def _bring_back(self, place: int, entries: Sequence[DirectoryEntry], hold: Hold) -> None:
        moves = []
        for entry in entries:
            parsed = _PARKED.fullmatch(entry.name)
            assert parsed is not None
            moves.append(Move((place, entry.name), entry.ino, (int(parsed[3], 16), parsed[4])))
        try:
            done = await self._move(moves)
        except (EntryExists, NoSuchEntry) as exc:
            # who has it open keeps it; it goes when that has ended
            self._report.fail(f"{_text(entries[0].name)} is {hold.why} {hold.detail}, and can't come back: {exc}")
            return
        if done:
            self._report.brought_back += 1

    async def _remove(self, place: int, group: _Group) -> None:
        entries = group.entries
        if not group.is_condemned:
            moves = [Move((place, each.name), each.ino, (place, b"gone-" + each.name)) for each in entries]
            if not await self._move(moves):
                return
            entries = [DirectoryEntry(b"gone-" + each.name, each.ino, each.file_type) for each in entries]
        for entry in entries:
            if stat.S_ISDIR(entry.file_type):
                await self._remove_tree(place, entry)
            else:
                await self._unlink(place, entry.name)

    async def _remove_tree(self, parent: int, top: DirectoryEntry) -> None:
        """Leaves first. Memory: the subdirectories of those on the way to where it is, and a page of names."""
        way: list[tuple[int, DirectoryEntry]] = [(parent, top)]
        again = 0
        while way:
            above, entry = way[-1]
            below = await self._empty(entry.ino)
            if below:
                way += [(entry.ino, each) for each in below]
                continue
            await self._pace.step()
            try:
                await self._volume.rmdir(above, entry.name)
            except DirectoryNotEmpty:
                again += 1  # somebody stands in it, and makes something there
                if again > AGAIN_MAX:
                    raise
                continue
            except NoSuchEntry:
                pass
            way.pop()

    async def _empty(self, directory: int) -> list[DirectoryEntry]:
        """Unlink all files of a directory; its subdirectories, some at a time."""
        after, more = b"", True
        below: list[DirectoryEntry] = []
        while more and len(below) < PAGE_KEYS:
            page = await self._volume.readdir(directory, after, PAGE_KEYS)
            files = [entry.name for entry in page.entries if not stat.S_ISDIR(entry.file_type)]
            below += [entry for entry in page.entries if stat.S_ISDIR(entry.file_type)]
            await share_out(lambda name: self._unlink(directory, name), files, UNLINKS_AT_ONCE, (MetadataError,))
            after = page.entries[-1].name if page.entries else after
            more = page.more
        return below

    async def _unlink(self, directory: int, name: bytes) -> None:
        await self._pace.step()
        try:
            gone = await self._volume.unlink(directory, name)
        except (NoSuchEntry, StaleInode):
            return
        self._report.removed_files += 1
        self._report.removed_bytes += gone.allocated_bytes if gone.is_file and gone.nlink == 0 else 0

    async def _move(self, moves: Sequence[Move], unchanged: tuple[tuple[bytes, int], ...] = ()) -> bool:
        assert len(moves) <= MOVES_MAX
        return await self._volume.transact(lambda scope: MoveNames(scope, tuple(moves), unchanged))


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
