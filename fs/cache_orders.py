"""What a person asks of the cache: have a file here, keep it, drop it. For the control socket and for tests.

The numbers of inodes come from a process that has the files open (O_PATH), so that the kernel does not forget them.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

import trio

from apollofs.fs.blobs import Block, spans
from apollofs.fs.cache import BlockCache
from apollofs.fs.config import BodyConfig
from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.images import ImageStore, body_key, is_large
from apollofs.fs.pins import ANYWHERE, Key, Owners, Pins, Place
from apollofs.fs.room import Room
from apollofs.fs.user_error import UserError
from apollofs.metadata.errors import MetadataError, NamespaceError, StaleInode
from apollofs.metadata.records import Body, Inode

log = logging.getLogger(__name__)
PINNED_SHARE = 0.8
"""Part of the cache's bound that pins may take; what is read besides needs room too."""
KEEP_UP_S = 86_400.0


class PinVolume(Protocol):
    """What is asked of `metadata.volume.Volume`."""

    def place_of(self, ino: int) -> tuple[int, bytes] | None: ...
    async def lookup(self, parent: int, name: bytes) -> Inode: ...
    async def getattr(self, ino: int) -> Inode: ...


class CacheOrders:
    """Made by `Bodies`."""

    def __init__(
        self,
        volume: PinVolume,
        cache: BlockCache,
        images: ImageStore,
        room: Room,
        config: BodyConfig,
        block_bytes: int,
    ) -> None:
        self._volume = volume
        self._cache = cache
        self._images = images
        self._room = room
        self._block_bytes = block_bytes
        self._pins = Pins(os.path.join(config.cache_dir, "pins"))
        self._pinned: dict[Key, Owners] = {}
        self._keys_of_ino: dict[int, set[Key]] = {}
        self._counted: dict[Key, int] = {}
        """How large each was when it was pinned; `_counted_bytes` is their sum, so that a pin costs the same however
        many there are."""
        self._counted_bytes = 0
        self._pinning = trio.Lock()
        room.is_pinned = self._pins.has

    async def start(self) -> None:
        """Find what is pinned; a pin of what is not here any more goes. Raises nothing."""
        try:
            found = await self._read_pins()
            gone = [key for key in found if key not in self._room]
            await trio.to_thread.run_sync(partial(self._pins.remove, gone))
        except OSError as exc:
            self._images.warn(f"pins can't be read: {exc}")

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
            "pinned_count": len(self._keys_of_ino),
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

    # -- pins --------------------------------------------------------------------------------------------------------

    async def pin(self, body: Body) -> None:
        """Have all of a body here, and keep it until `unpin`; what the file was before is kept no more, even if this
        fails. Raises as `warm`; UserError also if the pins would take more than their part of the cache."""
        ino = body.inode.ino
        async with self._pinning:
            keys = self._keys_of(body)
            await self._unpin(ino, [key for key in self._keys_pinned_for(ino) if key not in set(keys)])
            more = 0 if all(key in self._pinned for key in keys) else body.inode.size_bytes
            bound = int(PINNED_SHARE * self._room.bytes_max)
            if more and self._counted_bytes + more > bound:
                raise UserError(f"pins may take {bound} bytes of this cache: {self._counted_bytes} are pinned already")
            await self.warm(body, 0, body.inode.size_bytes)
            place = ANYWHERE if body.inode.nlink > 1 else self._volume.place_of(ino)
            try:
                await trio.to_thread.run_sync(partial(self._pins.add, keys, ino, place))
            except OSError as exc:
                raise UserError(f"the pin could not be written: {exc.strerror}") from exc
            for key in keys:
                self._hold(key, {ino: place})

    async def unpin(self, ino: int) -> bool:
        """Take back what is pinned of an inode; whether anything was. Raises BodyUnavailable."""
        async with self._pinning:
            keys = self._keys_pinned_for(ino)
            await self._unpin(ino, keys)
            return bool(keys)

    async def unpin_all(self) -> int:
        """Take back all pins of the cache directory, whichever mount has made them, and whether their files are there
        or not; of how many files they were. Raises BodyUnavailable."""
        async with self._pinning:
            try:
                found = await trio.to_thread.run_sync(self._pins.load)
                await trio.to_thread.run_sync(partial(self._pins.remove, found))
            except OSError as exc:
                raise BodyUnavailable(f"the pins could not be removed: {exc}") from exc
            inos = {ino for owners in (*found.values(), *self._pinned.values()) for ino in owners}
            for key in list(self._pinned):
                self._drop_hold(key)
            return len(inos)

    async def keep_up(self) -> None:
        """At once and then once a day: pins of files that are gone go, whoever has removed them. Until cancelled."""
        while True:
            await self.unpin_what_is_gone()
            await trio.sleep(KEEP_UP_S)

    async def unpin_what_is_gone(self) -> None:
        """Ask the volume for each file that is pinned: one or two requests. What other mounts of the cache directory
        have pinned or taken back is learnt too. Where the volume does not answer, or the disk, everything stays."""
        try:
            async with self._pinning:
                found = await self._read_pins()
            pins: defaultdict[int, dict[Key, Place | None]] = defaultdict(dict)
            for key, owners in found.items():
                for ino, place in owners.items():
                    pins[ino][key] = place
            for ino, places in pins.items():
                known = {place for place in places.values() if place is not None}
                if known and await self._is_gone(ino, known):
                    log.info("the pin of inode %#x goes: there is no such file any more", ino)
                    async with self._pinning:
                        await self._unpin(ino, list(places))
        except (MetadataError, BodyUnavailable, OSError) as exc:
            log.info("pins could not be looked after: %s", exc)

    async def _is_gone(self, ino: int, places: Iterable[Place]) -> bool:
        """Whether no name means it any more. `places`: all where it was when it was pinned."""
        for place in places:
            with suppress(NamespaceError):
                if place != ANYWHERE and (await self._volume.lookup(*place)).ino == ino:
                    return False
        try:
            # what has been moved since is found by its number
            await self._volume.getattr(ino)
        except StaleInode:
            return True
        return False

    async def _unpin(self, ino: int, keys: Sequence[Key]) -> None:
        try:
            await trio.to_thread.run_sync(partial(self._pins.take, keys, ino))
        except OSError as exc:
            raise BodyUnavailable(f"a pin could not be removed: {exc}") from exc
        for key in keys:
            self._let_go(key, ino)

    async def _read_pins(self) -> dict[Key, Owners]:
        """What is on the disk; it is taken over, as far as what it keeps is known here. Raises OSError."""
        found = await trio.to_thread.run_sync(self._pins.load)
        for key in self._pinned.keys() - found.keys():
            self._drop_hold(key)
        for key, owners in found.items():
            if key in self._room:
                self._hold(key, owners)
        return found

    def _keys_pinned_for(self, ino: int) -> list[Key]:
        return list(self._keys_of_ino.get(ino, ()))

    def _hold(self, key: Key, owners: Owners) -> None:
        if key not in self._pinned:
            self._room.hold(key)
            self._counted[key] = self._room.size_of(key)
            self._counted_bytes += self._counted[key]
        self._pinned[key] = self._pinned.get(key, {}) | owners
        for ino in owners:
            self._keys_of_ino.setdefault(ino, set()).add(key)

    def _let_go(self, key: Key, ino: int) -> None:
        owners = self._pinned.get(key, {})
        if ino in owners:
            del owners[ino]
            self._unlist(ino, key)
            if not owners:
                self._drop_hold(key)

    def _drop_hold(self, key: Key) -> None:
        for ino in self._pinned.pop(key):
            self._unlist(ino, key)
        self._counted_bytes -= self._counted.pop(key)
        self._room.let_go(key)

    def _unlist(self, ino: int, key: Key) -> None:
        keys = self._keys_of_ino[ino]
        keys.discard(key)
        if not keys:
            del self._keys_of_ino[ino]

    def _keys_of(self, body: Body) -> list[Key]:
        return [body_key(body)] if is_large(body) else list(self._blocks_of(body))

    def _blocks_of(self, body: Body) -> list[Block]:
        found: dict[Block, None] = {}
        for one in body.inode.extents:
            for span in spans(one.blob, one.blob_length, one.blob_offset, one.length, self._block_bytes):
                found[span.block] = None
        return list(found)
