"""Scrub: images on the disk are hashed again from time to time, for what has decayed beneath the filesystem.

A block that is not what was verified when it came is forgotten, and fetched again by who reads it. Only those that this
mount does not have open: those are verified as they are read. It reads slowly, so that nobody notices.
"""

from __future__ import annotations

import logging
import os
from functools import partial

import trio

from apollofs.blobstore.footer import footer_of
from apollofs.fs.images.files import ImageFile
from apollofs.fs.images.store import ImageStore

log = logging.getLogger(__name__)
BYTES_A_SECOND = 32 << 20
EVERY_S = 86400.0
"""How often each image is looked at, by each mount; the first time so long after the mount's start."""
PAUSE_S = 60.0


class Scrub:
    """That of one mount."""

    def __init__(self, images: ImageStore) -> None:
        self._images = images
        self.damaged = 0
        """Blocks that were found to be."""

    async def serve(self) -> None:
        """Until cancelled."""
        while True:
            await trio.sleep(EVERY_S)
            await self.run()

    async def run(self, pause_s: float = PAUSE_S) -> None:
        """Look once at all images that are there. Raises nothing."""
        for key in self._images.keys_there():
            try:
                await self._look(key)
            except OSError as exc:
                log.info("an image could not be scrubbed: %s", exc)
            await trio.sleep(pause_s)

    async def _look(self, key: str) -> None:
        file = await self._images.open_file(key)
        if file is None:
            return
        try:
            for index in range(file.map.blocks):
                if not await self._images.in_thread(partial(_is_sound, file, index)):
                    self.damaged += 1
                    log.warning("block %d of %s has decayed on the disk, and will be fetched again", index, file.path)
                await trio.sleep(file.map.length(index) / BYTES_A_SECOND)
        finally:
            await self._images.in_thread(file.close)


def _is_sound(file: ImageFile, index: int) -> bool:
    """In a thread. Whether a block is what it was; if not it is taken off the map."""
    footer = file.map.footer(index)
    if footer is None:
        return True
    data = os.pread(file.fd, footer.data_length, index * file.map.header.block_bytes)
    if len(data) == footer.data_length and footer_of(data) == footer:
        return True
    file.map.drop(index)
    file.map.set_state(complete=False, trust=file.map.header.trust)
    return False
