"""The images of a mount: which are open, and how their blocks come from the store.

Rules
1. One Image for each body, counted. The last release leaves it idle, unlocked: its descriptors and what is verified are
   good for the next open, if nobody has changed or deleted the files meanwhile. So many stay, the oldest are closed.
2. At most `downloads_max` blocks are in memory on their way, over both caches.
3. A disk that is full, read-only or broken costs speed, never an error: `open` returns None, or a block stays in memory
   for a moment instead of in the file.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import trio

from apollofs.blobstore.footer import Footer
from apollofs.fs.blobs import BlobSource
from apollofs.fs.cache import BlockCache
from apollofs.fs.config import BodyConfig
from apollofs.fs.fetching import Fetch
from apollofs.fs.images.bring import BlockBringer
from apollofs.fs.images.files import FoundImage, ImageFile, ImageFiles
from apollofs.fs.images.image import Image
from apollofs.fs.images.naming import body_key, is_large
from apollofs.fs.images.recent import RecentBlocks
from apollofs.fs.room import Room
from apollofs.fs.seldom import SeldomWarning
from apollofs.metadata.records import Body

log = logging.getLogger(__name__)
T = TypeVar("T")

IDLE_MAX = 64
THREADS = 8
RESCAN_S = 60.0
"""How often, while images grow, it is looked what other mounts have added and deleted."""
ROOM_ATTEMPTS = 4
"""To make room for a block, where others take it meanwhile."""
MAP_BYTES = 4096
"""What a map and the files' inodes are counted as."""


class ImageStore:
    """Made by `Bodies`; `nursery` must outlive every reader."""

    def __init__(
        self,
        source: BlobSource,
        cache: BlockCache,
        room: Room,
        downloads: trio.CapacityLimiter,
        config: BodyConfig,
        nursery: trio.Nursery,
    ) -> None:
        self._block_bytes = source.block_bytes
        self._room = room
        self._downloads = downloads
        self._nursery = nursery
        self._files = ImageFiles(os.path.join(config.cache_dir, "images"), config.disk_free_bytes_min)
        self._open: dict[str, Image] = {}
        self._opening: dict[str, trio.Event] = {}
        self._counts: dict[Image, int] = {}
        self._idle: OrderedDict[str, Image] = OrderedDict()
        self.recent = RecentBlocks()
        self._threads = trio.CapacityLimiter(THREADS)
        self._scanned_s = -float("inf")
        self.warn = SeldomWarning(log, "images are not cached as they should be: %s")
        self._under_way = 0
        self._blocks = BlockBringer(source, cache, self._files, downloads, self._threads)

    async def start(self) -> None:
        """Take stock of what earlier mounts left; what is beyond the bound goes. Raises nothing."""
        await self._rescan()
        await self._make_room(0)

    @property
    def fetched_blocks(self) -> int:
        """From the store, since the start."""
        return self._blocks.fetched

    @property
    def count(self) -> int:
        """Images on the disk."""
        return len(self._room.keys_of(self))

    @property
    def bytes_used(self) -> int:
        """On the disk, by all images."""
        return sum(self._room.size_of(key) for key in self._room.keys_of(self))

    # -- open and release --------------------------------------------------------------------------------------------

    async def open(self, body: Body) -> Image | None:
        """The body's image, made sparse if there is none; `release` must follow. None: the disk can't be used.

        No checkpoint if it is open here. The body must have one (`is_large`).
        """
        assert is_large(body)
        key = body_key(body)
        while key in self._opening:
            await self._opening[key].wait()
        image = self._open.get(key) or self._take_idle(key)
        if image is None:
            image = await self._open_files(key, body)
        if image is not None:
            image.inos.add(body.inode.ino)
            self.hold(image)
        return image

    async def _open_files(self, key: str, body: Body) -> Image | None:
        opened = self._opening[key] = trio.Event()
        try:
            file = await self.in_thread(partial(self._files.open, key, body.inode.size_bytes, self._block_bytes))
        except OSError as exc:
            self.warn(f"an image can't be opened: {exc}")
            return None
        finally:
            del self._opening[key]
            opened.set()
        image = self._open[key] = Image(self, key, file, body.inode.extents)
        self._room.add(self, key, file.map.bytes_there + MAP_BYTES)
        return image

    def hold(self, image: Image) -> None:
        """Once more; for who uses one that somebody has open. No checkpoint."""
        count = self._counts.get(image, 0)
        if not count and not image.is_detached:
            self._room.hold(image.key)
        self._counts[image] = count + 1

    def release(self, image: Image) -> None:
        """Nobody may use it after as many releases as there were opens. No checkpoint."""
        self._counts[image] -= 1
        if self._counts[image]:
            return
        del self._counts[image]
        self.recent.forget(image)
        if image.is_detached:
            image.file.close()
            return
        del self._open[image.key]
        image.inos.clear()
        self._room.let_go(image.key)
        self._set_idle(image)

    def _set_idle(self, image: Image) -> None:
        try:
            image.idle_since = image.file.identity()
            image.file.unlock()
        except OSError:
            image.file.close()
            return
        self._idle[image.key] = image
        while len(self._idle) > IDLE_MAX:
            self._idle.popitem(last=False)[1].file.close()

    def _take_idle(self, key: str) -> Image | None:
        """An image that was released, if its files are still what they were."""
        image = self._idle.pop(key, None)
        if image is None:
            return None
        try:
            if image.file.lock() and image.file.has_name() and image.file.identity() == image.idle_since:
                self._open[key] = image
                self._room.add(self, key, image.file.map.bytes_there + MAP_BYTES)
                return image
        except OSError as exc:
            self.warn(f"an image can't be opened again: {exc}")
        image.file.close()
        return None

    # -- what is in the directory ------------------------------------------------------------------------------------

    def find(self, body: Body) -> bool:
        """Whether the body's image is complete, without opening it: a look at its map. No checkpoint."""
        if not is_large(body):
            return False
        key = body_key(body)
        image = self._open.get(key)
        if image is not None:
            return image.is_complete
        try:
            header = self._files.header(key)
        except OSError:
            return False
        return header is not None and header.complete

    async def drop(self, key: str) -> bool:
        """Delete an image; False if it stays because somebody has it open. Raises nothing."""
        if key in self._open or self._room.is_held(key):
            return False
        size = self._room.size_of(key)
        self._room.drop(key)
        self.forget(key)
        try:
            stayed = await self.in_thread(partial(self._files.remove, [key]))
        except OSError as exc:
            self.warn(f"files can't be deleted: {exc}")
            return False
        if stayed:
            self._room.add(self, key, size)
        return not stayed

    def detach(self, image: Image) -> None:
        """Take the image out of the shared directory for good: it is then private to who holds it, who may change it in
        place until the release of the last hold. From then on nothing is fetched into it.

        Raises BlockingIOError if something is on its way into it, or if it is open elsewhere: in another mount, or of
        another inode, whose clone has the same image; OSError. It is shared as before then.
        """
        if image.is_detached:
            return
        if len(image.inos) > 1 or image.is_busy or not image.file.lock_alone():
            raise BlockingIOError(errno.EAGAIN, "the image is in use elsewhere", image.path)
        try:
            self._files.unlink(image.key)
        except OSError:
            image.file.lock()
            raise
        image.is_detached = True
        self.recent.forget(image)
        del self._open[image.key]
        self._room.drop(image.key)

    def adopt(self, path: str, body: Body, footers: Sequence[Footer]) -> None:
        """A finished file of this mount, on the same disk, becomes the image of `body`, by a rename; trusted, since
        `footers` (one a block) were computed from it. Nobody may have it open for writing any more. Where somebody has
        the body's image open, here or in another mount, that stays, and nothing is done. Raises OSError.
        """
        key = body_key(body)
        assert len(footers) == -(-body.inode.size_bytes // self._block_bytes)
        if key in self._open or key in self._opening:
            return
        self.forget(key)
        taken = self._files.adopt(path, key, self._block_bytes, footers)
        if taken is None:
            return
        self._room.add(self, key, taken + MAP_BYTES)
        if self._room.bytes > self._room.bytes_max:
            self._nursery.start_soon(self._make_room, 0)

    # -- as a shelf of the room --------------------------------------------------------------------------------------

    def forget(self, key: str) -> None:
        idle = self._idle.pop(key, None)
        if idle is not None:
            idle.file.close()

    def came_back(self, key: str, size_bytes: int) -> None:
        self._room.add(self, key, size_bytes)

    def remove(self, keys: Sequence[str]) -> Sequence[str]:
        return self._files.remove(keys)

    def keys_there(self) -> list[str]:
        """Images that nobody has open here."""
        return [key for key in self._room.keys_of(self) if key not in self._open]

    async def open_file(self, key: str) -> ImageFile | None:
        """The files of an image that nobody has open here, to be closed again; None if there is none. OSError."""
        if key in self._open or key in self._opening:
            return None
        self.forget(key)
        header = await self.in_thread(partial(self._files.header, key))
        if header is None:
            return None
        return await self.in_thread(partial(self._files.open, key, header.size_bytes, header.block_bytes))

    async def _rescan(self) -> None:
        """See which images there are: other mounts add and delete some."""
        self._scanned_s = trio.current_time()
        try:
            found = await self.in_thread(self._files.scan)
        except OSError as exc:
            self.warn(f"its directory can't be used: {exc}")
            return
        self._note_found(found)

    def _note_found(self, found: Sequence[FoundImage]) -> None:
        there = {image.key for image in found}
        for key in self._room.keys_of(self):
            if key not in there and key not in self._open:
                self._room.drop(key)
        for image in found:
            if image.key not in self._room:
                self._room.add(self, image.key, image.size_bytes + MAP_BYTES)
            elif image.key not in self._open:
                self._room.grow(image.key, image.size_bytes + MAP_BYTES - self._room.size_of(image.key))

    async def _make_room(self, lacking: int) -> None:
        """Give up what is beyond the bound, and `lacking` bytes more. Raises nothing."""
        victims = self._room.give_up(min(self._room.bytes_max, self._room.bytes - max(0, lacking)))
        await self._room.clear_out(victims, self._threads, self.warn)

    # -- fetching ----------------------------------------------------------------------------------------------------

    def has_idle_downloads(self) -> bool:
        return self._under_way < self._downloads.total_tokens

    def start_fetch(self, image: Image, index: int, fetch: Fetch) -> None:
        self.hold(image)
        self._under_way += 1
        self._nursery.start_soon(self._run_fetch, image, index, fetch)

    async def _run_fetch(self, image: Image, index: int, fetch: Fetch) -> None:
        # An exception may not leave this task: the mount's nursery would end with it.
        length = image.file.map.length(index)
        stored = counted = False
        try:
            # a private one is its owner's, who may have changed it: nothing is ever written to it from here
            counted = not image.is_detached and await self._reserve(image, length)
            stored = await self._bring(image, index, fetch, takes=counted)
        except Exception as exc:  # handed to every waiter
            if fetch.data is None:
                fetch.error = exc
            else:
                log.exception("a fetched block could not be cached")
        finally:
            self._under_way -= 1
            if counted and not stored:
                self._room.grow(image.key, -length)
            if fetch.data is not None:
                self.recent.add(image, index, fetch.data)
            image.fetched(index, stored=stored)
            self.release(image)

    async def _reserve(self, image: Image, length: int) -> bool:
        """See that the bound has room for a block, and count it: others are on their way too. Raises nothing."""
        if trio.current_time() - self._scanned_s > RESCAN_S:
            await self._rescan()
        # counted before room is made: what is given up for one block must not be taken by another that comes meanwhile
        self._room.grow(image.key, length)
        for _ in range(ROOM_ATTEMPTS):
            if self._room.bytes > self._room.bytes_max:
                await self._make_room(0)
        fits = self._room.bytes <= self._room.bytes_max
        if not fits:
            self._room.grow(image.key, -length)
        return fits

    async def _bring(self, image: Image, index: int, fetch: Fetch, *, takes: bool) -> bool:
        """Get a block to who waits and into the file. Whether it is there. Raises BodyError."""
        done = await self._blocks.bring(image, index, fetch, takes=takes)
        if done.error is not None:
            self.warn(f"an image can't be written: {done.error}")
        if done.lacking > 0:
            await self._make_room(done.lacking)
            self.warn("the disk has no room for a block")
        return done.stored

    async def read_range(self, image: Image, offset: int, length: int) -> bytes:
        return await self._blocks.read_range(image.extents, offset, length)

    async def in_thread(self, call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(call, limiter=self._threads)

    def close(self) -> None:
        """Close all files; nobody may be reading."""
        for image in (*self._open.values(), *self._idle.values()):
            image.file.close()
        self._open.clear()
        self._idle.clear()
