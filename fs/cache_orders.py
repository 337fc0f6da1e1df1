"""What a person asks of the cache: have a file here, keep it, drop it. For the control socket and for tests.

The numbers of inodes come from a process that has the files open (O_PATH), so that the kernel does not forget them.
"""

from __future__ import annotations

import os
from functools import partial

import trio

from apollofs.fs.blobs import Block, spans
from apollofs.fs.cache import BlockCache
from apollofs.fs.config import BodyConfig
from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.images import ImageStore, body_key, is_large
from apollofs.fs.pins import Pins
from apollofs.fs.room import Room
from apollofs.fs.user_error import UserError
from apollofs.metadata.records import Body

PINNED_SHARE = 0.8
"""Part of the cache's bound that pins may take; what is read besides needs room too."""


class CacheOrders:
    """Made by `Bodies`."""

    def __init__(self, cache: BlockCache, images: ImageStore, room: Room, config: BodyConfig, block_bytes: int) -> None:
        self._cache = cache
        self._images = images
        self._room = room
        self._block_bytes = block_bytes
        self._pins = Pins(os.path.join(config.cache_dir, "pins"))
        self._pinned: dict[str | Block, int] = {}
        self._pinning = trio.Lock()
        room.is_pinned = self._pins.has

    async def start(self) -> None:
        """Find what is pinned; a pin of what is not here any more goes. Raises nothing."""
        try:
            found = await trio.to_thread.run_sync(self._pins.load)
            gone = [key for key in found if key not in self._room]
            await trio.to_thread.run_sync(partial(self._pins.remove, gone))
        except OSError as exc:
            self._images.warn(f"pins can't be read: {exc}")
            return
        for key in found.keys() - set(gone):
            self._hold(key, found[key])

    def status(self) -> dict[str, float]:
        """Sizes in bytes, and counts."""
        return {
            "used_bytes": self._room.bytes,
            "bound_bytes": self._room.bytes_max,
            "image_bytes": self._images.bytes_used,
            "image_count": self._images.count,
            "block_bytes": self._cache.bytes_used,
            "block_count": self._cache.blocks,
            "pinned_bytes": self.pinned_bytes,
            "pinned_count": len(set(self._pinned.values())),
        }

    @property
    def pinned_bytes(self) -> int:
        return sum(self._room.size_of(key) for key in self._pinned)

    async def warm(self, body: Body, offset: int, length: int) -> None:
        """Have bytes `[offset, offset + length)` here, verified. Raises BodyUnavailable, CorruptBody, MissingBlob;
        UserError where the cache does not take them."""
        if not is_large(body):
            for block in self._blocks_of(body):
                await self._cache.fetch(block)
            return
        image = await self._images.open(body)
        if image is None:
            raise UserError("the disk of the cache can't be used; the mount's log says why")
        try:
            await image.ensure(offset, length)
            if not image.has(offset, length):
                raise UserError("the cache has no room for it")
        finally:
            self._images.release(image)

    async def drop(self, body: Body) -> bool:
        """Delete what is cached of a body; False if it stays, because it is open or pinned. Raises nothing."""
        if is_large(body):
            return await self._images.drop(body_key(body))
        free = [block for block in self._blocks_of(body) if block not in self._pinned]
        for block in free:
            await self._cache.discard(block)
        return len(free) == len(self._blocks_of(body))

    async def drop_all(self) -> None:
        """Delete all that is neither open nor pinned. Raises nothing."""
        await self._cache.settle()
        await self._cache.make_room(self._room.bytes)

    async def pin(self, body: Body) -> None:
        """Have all of a body here, and keep it until `unpin`. Raises as `warm`; UserError also if the pins would take
        more than their part of the cache."""
        async with self._pinning:
            keys = self._keys_of(body)
            more = 0 if all(key in self._pinned for key in keys) else body.inode.size_bytes
            bound = int(PINNED_SHARE * self._room.bytes_max)
            if self.pinned_bytes + more > bound:
                raise UserError(f"pins may take {bound} bytes of this cache: {self.pinned_bytes} are pinned already")
            await self.warm(body, 0, body.inode.size_bytes)
            try:
                await trio.to_thread.run_sync(partial(self._pins.add, keys, body.inode.ino))
            except OSError as exc:
                raise UserError(f"the pin could not be written: {exc.strerror}") from exc
            for key in keys:
                self._hold(key, body.inode.ino)

    async def unpin(self, ino: int) -> bool:
        """Take back what is pinned of an inode; whether anything was. Raises BodyUnavailable."""
        async with self._pinning:
            keys = [key for key, pinned in self._pinned.items() if pinned == ino]
            try:
                await trio.to_thread.run_sync(partial(self._pins.remove, keys))
            except OSError as exc:
                raise BodyUnavailable(f"a pin could not be removed: {exc}") from exc
            for key in keys:
                del self._pinned[key]
                self._room.let_go(key)
            return bool(keys)

    def _hold(self, key: str | Block, ino: int) -> None:
        if key not in self._pinned:
            self._room.hold(key)
        self._pinned[key] = ino

    def _keys_of(self, body: Body) -> list[str | Block]:
        return [body_key(body)] if is_large(body) else list(self._blocks_of(body))

    def _blocks_of(self, body: Body) -> list[Block]:
        found: dict[Block, None] = {}
        for one in body.inode.extents:
            for span in spans(one.blob, one.blob_length, one.blob_offset, one.length, self._block_bytes):
                found[span.block] = None
        return list(found)
