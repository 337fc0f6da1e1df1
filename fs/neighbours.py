"""Neighbours: small files that will probably be opened next, fetched before they are.

A program that opens files of one directory one after the other will open more of them: a loader of training data, a
copy, a search. At the third open the directory is read, once, if it is not cached already (then no name in it costs a
request any more). From then on an open that follows another one in name order has the next ones fetched, more each
time; those that are inline in etcd many with one request. Numbers in names count as numbers: 9 is before 10.

Bounds: `DIRECTORIES_MAX` directories, of at most `ENTRIES_MAX` names each; `FETCHES_MAX` files on their way.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from apollofs.fs.errors import BodyError
from apollofs.fs.reader import Reader
from apollofs.metadata.errors import MetadataError
from apollofs.metadata.records import Body, DirectoryPage, Inode

log = logging.getLogger(__name__)

DIRECTORIES_MAX = 16
ENTRIES_MAX = 4000
OPENS_BEFORE_LISTING = 3
ORDER_TTL_S = 30.0
"""The order of a directory's names is made anew after so long; it may be old, since it is only a guess."""
STRANGER_TTL_S = 1.0
"""After so long already where a file is opened that was not there then."""
AHEAD_MAX = 32
FETCHES_MAX = 32
STREAKS_MAX = 64
"""Places of one directory that are read on at once."""
_DIGITS = re.compile(rb"(\d+)")


class NeighbourVolume(Protocol):
    """What is asked of `metadata.volume.Volume`."""

    def place_of(self, ino: int) -> tuple[int, bytes] | None: ...
    def cached_listing(self, directory: int) -> DirectoryPage | None: ...
    async def readdir(self, directory: int, after: bytes, limit: int, revision: int = 0) -> DirectoryPage: ...
    async def read_ahead(self, directory: int, files: Sequence[tuple[bytes, int]]) -> None: ...


@dataclass(slots=True)
class _Run:
    """What was opened of one directory."""

    opens: int = 0
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=OPENS_BEFORE_LISTING))
    """Inodes, as they were opened."""
    ordered_s: float = -float("inf")
    listed: frozenset[int] = frozenset()
    """Inodes of all names that were there then."""
    order: tuple[tuple[bytes, Inode], ...] = ()
    """Names and inodes of those that can be fetched ahead."""
    place: dict[int, int] = field(default_factory=dict)
    streaks: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """By place in the order: how many opens in a row led there."""
    fetched: set[int] = field(default_factory=set)
    """Places that were fetched ahead since the order was made."""


class Neighbours:
    """Told of every open for reading; `nursery` must outlive every reader."""

    def __init__(self, volume: NeighbourVolume, reader: Reader, nursery: trio.Nursery) -> None:
        self._volume = volume
        self._reader = reader
        self._nursery = nursery
        self._runs: OrderedDict[int, _Run] = OrderedDict()
        self._under_way = 0
        self.fetched = 0

    def opened(self, ino: int) -> None:
        """A small file is opened for reading. No checkpoint; raises nothing."""
        place = self._volume.place_of(ino)
        if place is None:
            return
        directory = place[0]
        run = self._runs.pop(directory, None) or _Run()
        self._runs[directory] = run
        if len(self._runs) > DIRECTORIES_MAX:
            self._runs.popitem(last=False)
        run.opens += 1
        run.recent.append(ino)
        if run.opens < OPENS_BEFORE_LISTING:
            return
        at = run.place.get(ino)
        if trio.current_time() - run.ordered_s > (ORDER_TTL_S if ino in run.listed else STRANGER_TTL_S):
            run.ordered_s = trio.current_time()
            self._nursery.start_soon(self._list, directory, run)
        elif at is not None:
            self._go_on(directory, run, at)

    def _go_on(self, directory: int, run: _Run, at: int) -> None:
        # the one before may have been passed over, or be opened a moment later by another process
        streak = 1 + max(run.streaks.pop(at - 1, 0), run.streaks.pop(at - 2, 0))
        run.streaks[at] = streak
        if len(run.streaks) > STREAKS_MAX:
            run.streaks.popitem(last=False)
        if streak < 2:
            return
        window = min(2**streak, AHEAD_MAX)
        inline = []
        for next_ in range(at + 1, min(at + 1 + window, len(run.order))):
            if next_ in run.fetched or self._under_way >= FETCHES_MAX:
                continue
            if run.order[next_][1].is_inline:
                inline.append(next_)
            else:
                self._start(run, [next_], self._fetch, run.order[next_][1])
        if inline and inline[0] <= at + 1 + window // 2 and self._under_way < FETCHES_MAX:
            files = [(run.order[next_][0], run.order[next_][1].ino) for next_ in inline]
            self._start(run, inline, self._volume.read_ahead, directory, files)

    def _start(self, run: _Run, places: Sequence[int], fetch: Callable[..., Awaitable[None]], *what: object) -> None:
        run.fetched.update(places)
        self._under_way += 1
        self._nursery.start_soon(self._guarded, len(places), fetch, *what)

    async def _list(self, directory: int, run: _Run) -> None:
        # An exception may not leave this task: the mount's nursery would end with it.
        try:
            page = self._volume.cached_listing(directory) or await self._volume.readdir(directory, b"", ENTRIES_MAX)
        except MetadataError as exc:
            log.debug("a directory could not be read ahead: %s", exc)
            return
        except Exception:
            log.exception("reading a directory ahead failed")
            return
        if page.more or len(page.entries) > ENTRIES_MAX:
            return
        files = [(entry.name, entry.inode) for entry in page.entries if entry.inode is not None]
        files = [(name, inode) for name, inode in files if _can_be_fetched(inode)]
        files.sort(key=lambda found: natural(found[0]))
        run.listed = frozenset(entry.inode.ino for entry in page.entries if entry.inode is not None)
        run.order = tuple(files)
        run.place = {inode.ino: at for at, (_, inode) in enumerate(files)}
        run.streaks.clear()
        run.fetched.clear()
        for ino in run.recent:
            if ino in run.place:
                self._go_on(directory, run, run.place[ino])

    async def _fetch(self, inode: Inode) -> None:
        await self._reader.fetch_small(Body(inode))

    async def _guarded(self, files: int, fetch: Callable[..., Awaitable[None]], *what: object) -> None:
        # An exception may not leave this task: the mount's nursery would end with it.
        try:
            await fetch(*what)
            self.fetched += files
        except (BodyError, MetadataError) as exc:
            log.debug("a file could not be read ahead: %s", exc)  # who opens it hears of it
        except Exception:
            log.exception("reading ahead failed")
        finally:
            self._under_way -= 1


def _can_be_fetched(inode: Inode) -> bool:
    """Larger files read ahead by themselves, and very small ones come with their names."""
    if inode.is_inline:
        return not inode.copy
    return inode.is_file and bool(inode.extents) and not inode.extent_pages


def natural(name: bytes) -> tuple[bytes | int, ...]:
    """A key that sorts numbers in names as numbers."""
    return tuple(int(part) if index % 2 else part for index, part in enumerate(_DIGITS.split(name)))
