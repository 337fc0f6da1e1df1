"""Open directories: what READDIR is answered, and which listings the kernel may keep.

Rules (fs/readdir.c in the kernel; it keeps names, numbers and types, no attributes)
1. What a handle reads goes into the kernel's cache, and OPENDIR says whether what is there stays (`keep`): only while
   the directory is held without a break since it was handed out. Changes of this mount the kernel sees by itself.
2. Whoever asks for more has taken in what came before. If that must not be kept, it is dropped before the answer; so
   nothing that was handed out before a recall can end up in a listing that is kept after it.
3. Positions are of one listing (`listings.py`): the kernel never puts two together.
4. The attributes that come along with a listing are given for a time; when it is over the listing is read anew with
   them, rather than each name be looked up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from apollofs.fs import listings
from apollofs.fs.directory import DOTS, PAGE_ENTRIES, DirectoryHandle
from apollofs.fs.handles import HandleTable
from apollofs.fs.kernel_cache import KernelCache
from apollofs.fs.listings import Listings
from apollofs.metadata.records import DirectoryEntry
from apollofs.metadata.volume import Volume

Entries = list[tuple[int, DirectoryEntry]]
"""Each with the position after it."""


@dataclass(frozen=True, slots=True)
class OpenedDirectory:
    """How an opened directory is to be served: what the reply of OPENDIR says."""

    fh: int
    cache: bool
    """The kernel may answer from its own listing, and make one."""
    keep: bool
    """The listing that it has is good."""


class Directories:
    """Those of one mount. `parent_of` says what ".." is."""

    def __init__(self, volume: Volume, kernel: KernelCache, parent_of: Callable[[int], Awaitable[int]]) -> None:
        self._volume = volume
        self._kernel = kernel
        self._parent_of = parent_of
        self._handles: HandleTable[DirectoryHandle] = HandleTable()
        self._listings = Listings()

    def open(self, ino: int) -> OpenedDirectory:
        """No request; the first read takes the snapshot."""
        cache = self._kernel.takes_listings
        kept = None
        if cache and self._kernel.keeps_listing(ino) and self._volume.knows_all(ino):
            kept = self._listings.newest(ino)
        fh = self._handles.add(DirectoryHandle(ino, self._volume.losses, cache, kept))
        return OpenedDirectory(fh, cache, kept is not None)

    def get(self, fh: int) -> DirectoryHandle:
        """Raises BadHandle."""
        return self._handles.get(fh)

    def release(self, fh: int) -> None:
        self._handles.pop(fh)

    def read_now(self, fh: int, at: int, limit: int, parent: int | None) -> Entries | None:
        """As `read`, where nobody need be asked; None: call that. `parent` is what ".." is, if known."""
        handle = self._handles.get(fh)
        number, index = listings.split(at)
        if not at:
            found = self._volume.cached_listing(handle.ino) if parent is not None else None
            if found is None or parent is None:
                return None
            handle.parent = parent
            handle.begin(found)
            self._hand_out(handle)
        elif number == 0 or not self._shows(handle, number) or not self._is_current(handle):
            return None
        return self._positioned(handle, handle.shown(index), index, limit)

    async def read(self, fh: int, at: int, limit: int) -> Entries:
        """Entries from position `at` (0: the start, a new snapshot). Empty at the end."""
        handle = self._handles.get(fh)
        number, index = listings.split(at)
        if not at:
            handle.parent = await self._parent_of(handle.ino)
            handle.begin(await self._volume.readdir(handle.ino, b"", PAGE_ENTRIES))
            self._hand_out(handle)
        elif not self._is_current(handle):
            await self._kernel.drop_listing(handle.ino)
        if number and not self._shows(handle, number):
            self._resume(handle, number, index)
        return self._positioned(handle, await handle.read(self._volume, index), index, limit)

    def _hand_out(self, handle: DirectoryHandle) -> None:
        """The first page of a snapshot is about to be handed out: may the kernel keep it?"""
        handle.listing, handle.epoch = None, 0
        if not handle.cached or handle.more or not self._volume.knows_all(handle.ino, handle.revision):
            return
        handle.epoch = self._kernel.gives_listing(handle.ino)
        if handle.epoch:
            handle.listing = self._listings.add(handle.ino, tuple(entry.name for entry in handle.page))

    def _is_current(self, handle: DirectoryHandle) -> bool:
        """Whether the kernel may have what it was told on this handle."""
        return not handle.cached or self._kernel.holds_listing(handle.ino, handle.epoch)

    @staticmethod
    def _shows(handle: DirectoryHandle, number: int) -> bool:
        return bool(handle.starts) and handle.listing is not None and handle.listing.number == number

    def _resume(self, handle: DirectoryHandle, number: int, index: int) -> None:
        """The handle has read up to here from the kernel's cache."""
        kept = handle.listing if handle.listing is not None and handle.listing.number == number else None
        listing = kept or self._listings.find(number)
        passed = index - DOTS
        after = listing.names[passed - 1] if listing is not None and 0 < passed <= len(listing.names) else b""
        handle.resume(index if after else DOTS, after)
        handle.listing, handle.epoch = None, 0

    @staticmethod
    def _positioned(handle: DirectoryHandle, found: list[DirectoryEntry], index: int, limit: int) -> Entries:
        first = listings.position(handle.listing.number if handle.listing is not None else 0, index)
        return list(enumerate(found[:limit], first + 1))
