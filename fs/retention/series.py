"""Series: the checkpoints in a directory, found by listing it, and what there says which of them is the newest."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from apollofs.blobstore import BlobStoreError
from apollofs.fs.errors import BodyError
from apollofs.fs.retention.names import Steps, is_tracker, is_unfinished, means
from apollofs.fs.retention.verdicts import Hold, Why
from apollofs.fs.user_error import UserError
from apollofs.fs.value_bodies import ValueBodies
from apollofs.metadata.errors import FileTooLarge, StaleInode
from apollofs.metadata.keys import Keys
from apollofs.metadata.listing import listed
from apollofs.metadata.name_text import name_text
from apollofs.metadata.ops.move_names import MOVES_MAX, unchanged_max
from apollofs.metadata.records import DirectoryEntry, Inode
from apollofs.metadata.retention import READ_S
from apollofs.metadata.session import retry
from apollofs.metadata.store import Range, Store
from apollofs.metadata.volume import Volume

NAMES_MAX = 100_000
"""Names of checkpoints, and links, in one directory."""
TRACKER_BYTES_MAX = 64 << 10


class TooManyNames(Exception):
    """A directory has more names of checkpoints than are held in memory."""


@dataclass(frozen=True, slots=True)
class Reach:
    """A directory that a policy holds in, as it was found."""

    path: bytes
    """Empty for the root."""
    directories: tuple[int, ...]
    """From the one that has the policy down to this one."""
    policy: int
    """The policy's revision."""
    moves: int
    """The revision of the volume's line of directory moves, read before any of these directories was looked for."""

    def below(self, entry: DirectoryEntry) -> Reach:
        return replace(self, path=self.path + b"/" + entry.name, directories=(*self.directories, entry.ino))


@dataclass(frozen=True, slots=True)
class Tracker:
    """A file or link that names a checkpoint. `text`: what it says; None: that can't be read."""

    name: bytes
    text: bytes | None
    is_latest: bool
    """What has a higher step than the one that it means is not complete yet."""


@dataclass(slots=True)
class Found:
    """The names of one step."""

    step: int
    entries: list[DirectoryEntry] = field(default_factory=list)
    kinds: Counter[bytes] = field(default_factory=Counter)
    hold: Hold | None = None

    @property
    def names(self) -> list[bytes]:
        return [entry.name for entry in self.entries]

    @property
    def inodes(self) -> frozenset[tuple[bytes, int]]:
        """Its names and what they mean."""
        return frozenset((entry.name, entry.ino) for entry in self.entries)


@dataclass(slots=True)
class Series:
    """What a directory has told."""

    reach: Reach
    found: dict[int, Found] = field(default_factory=dict)
    """By step."""
    trackers: list[Tracker] = field(default_factory=list)
    unchanged: dict[bytes, int] = field(default_factory=dict)
    """Keys that all this rests on (see `carrying`), and their mod_revisions; 0: there was none."""
    below: list[DirectoryEntry] = field(default_factory=list)
    """Directories that are no checkpoints."""

    @property
    def directory(self) -> int:
        return self.reach.directories[-1]


class SeriesReader:
    """Reads through a mounted volume; `bodies` loads trackers that are not in etcd. Raises SessionLost,
    DeadlineExceeded, StoreError, CorruptRecord."""

    def __init__(self, volume: Volume, store: Store, keys: Keys, bodies: ValueBodies) -> None:
        self._volume = volume
        self._store = store
        self._keys = keys
        self._bodies = bodies

    async def read(self, reach: Reach, steps: Steps) -> Series:
        """A request for each thousand names, one for the directory, and one or two for each tracker. Raises
        TooManyNames."""
        series = Series(reach)
        top, *below = map(self._keys.retention, reach.directories)
        series.unchanged.update({top: reach.policy, **dict.fromkeys(below, 0), self._keys.dirmove: reach.moves})
        # before the listing: what is changed while that goes on is noticed as well
        times = self._keys.times(series.directory)
        series.unchanged[times] = await self.revision(times)
        names = 0
        async with aclosing(listed(self._volume, series.directory)) as pages:
            async for entries in pages:
                for entry in entries:
                    names += await self._take(series, entry, steps)
                if names > NAMES_MAX:
                    raise TooManyNames(f"more than {NAMES_MAX} names of checkpoints and links")
        hold_by_names(series)
        return series

    async def revision(self, key: bytes) -> int:
        """The mod_revision of a key; 0 if there is none. One request."""
        found = await retry(lambda: self._store.range(Range(key, keys_only=True)), READ_S)
        return found.kvs[0].mod_revision if found.kvs else 0

    async def _take(self, series: Series, entry: DirectoryEntry, steps: Steps) -> bool:
        """Whether it is kept in memory: part of a checkpoint, or a tracker."""
        is_link, is_dir = stat.S_ISLNK(entry.file_type), stat.S_ISDIR(entry.file_type)
        step = steps.find(entry.name) if is_dir or stat.S_ISREG(entry.file_type) else None
        if step is not None:
            found = series.found.setdefault(step[0], Found(step[0]))
            found.entries.append(entry)
            found.kinds[step[1] + (b"/" if is_dir else b"")] += 1
        elif is_dir:
            series.below.append(entry)
        elif is_link or is_tracker(entry.name):
            await self._track(series, entry)
            return True
        return step is not None

    async def _track(self, series: Series, entry: DirectoryEntry) -> None:
        try:
            inode = entry.inode or await self._volume.getattr(entry.ino)
        except StaleInode:
            return
        if not inode.is_symlink and (not inode.is_file or inode.size_bytes > TRACKER_BYTES_MAX):
            return
        series.trackers.append(
            Tracker(entry.name, await self._text(inode, series.directory, entry.name), is_tracker(entry.name))
        )
        if not inode.is_symlink:
            # a file with several names is in a key of its own
            dentry = self._keys.dentry(series.directory, entry.name)
            series.unchanged[dentry if entry.inode else self._keys.inode(entry.ino)] = inode.revision

    async def _text(self, inode: Inode, directory: int, name: bytes) -> bytes | None:
        if inode.is_symlink:
            return inode.target
        self._volume.remember(inode.ino, directory, name)
        try:
            return await self._bodies.load(await self._volume.read_body(inode.ino))
        except (BodyError, BlobStoreError, UserError, FileTooLarge, StaleInode):
            return None
        finally:
            self._volume.forget(inode.ino)


def hold_by_names(series: Series) -> None:
    """Find what names and trackers tell of each checkpoint. What comes first is the reason."""
    latest = _latest_of(series)
    before: Mapping[bytes, int] = {}
    for step in sorted(series.found):
        found = series.found[step]
        found.hold = _named(series, found) or _unfit(series, found) or _unfinished(found, before, latest)
        before = found.kinds


def _named(series: Series, found: Found) -> Hold | None:
    for tracker in series.trackers:
        if tracker.text is None:
            return Hold(Why.NAMED, f"perhaps: {name_text(tracker.name)} can't be read")
        if means(tracker.text, found.step, found.names):
            return Hold(Why.NAMED, f"by {name_text(tracker.name)}")
    return None


def _unfit(series: Series, found: Found) -> Hold | None:
    if len(found.entries) > MOVES_MAX:
        return Hold(Why.UNFIT, f"{len(found.entries)} names, at most {MOVES_MAX}: put them into a directory")
    most = unchanged_max(len(found.entries))
    if len(series.unchanged) > most:
        return Hold(Why.UNFIT, f"{len(series.unchanged)} trackers, and directories of the policy, at most {most}")
    return None


def _unfinished(found: Found, before: Mapping[bytes, int], latest: Mapping[str, int]) -> Hold | None:
    """`before`: how many names of each kind the step before has."""
    for name in found.names:
        if is_unfinished(name) or name.startswith(b"."):
            return Hold(Why.INCOMPLETE, f"by its name {name_text(name)}")
    for kind, count in found.kinds.items():
        if count < before.get(kind, 0):
            return Hold(Why.INCOMPLETE, f"{count} names of a kind of which the step before has {before[kind]}")
    for tracker, step in latest.items():
        if found.step > step:
            return Hold(Why.INCOMPLETE, f"{tracker} means step {step}")
    return None


def _latest_of(series: Series) -> dict[str, int]:
    """The highest step that each tracker of the newest means; none of one that means nothing that is here."""
    found: dict[str, int] = {}
    for tracker in series.trackers:
        if tracker.is_latest and tracker.text is not None:
            meant = [step for step, each in series.found.items() if means(tracker.text, step, each.names)]
            if meant:
                found[name_text(tracker.name)] = max(meant)
    return found
