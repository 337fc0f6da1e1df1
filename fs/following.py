"""Following: files that the kernel reads from a local file by itself are brought up to date when others change them.

Nobody tells this mount of a commit elsewhere while it does not hold the file's group; so it looks, for as long as it
does not, about as often as a person would.
"""

from __future__ import annotations

import logging

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.fs.bodies import Bodies
from apollofs.fs.errors import BodyError
from apollofs.fs.passing import Passing
from apollofs.fs.workers import share_out
from apollofs.metadata.errors import MetadataError, StaleInode
from apollofs.metadata.volume import Volume

log = logging.getLogger(__name__)
POLL_S = 0.25
LOOKS_MAX = 16
"""Requests side by side."""


class Following:
    """Of one mount."""

    def __init__(self, volume: Volume, bodies: Bodies, passing: Passing) -> None:
        self._volume = volume
        self._bodies = bodies
        self._passing = passing

    async def serve(self) -> None:
        """Until cancelled."""
        while True:
            await trio.sleep(POLL_S)
            behind = [ino for ino in self._passing.read_inodes if self._may_be_behind(ino)]
            await share_out(self._look, behind, min(LOOKS_MAX, len(behind)))

    def _may_be_behind(self, ino: int) -> bool:
        file = self._bodies.find(ino)
        if file is None or file.orphaned:
            return False
        cached = self._volume.cached_getattr(ino)
        return cached is None or cached.inode.body_version > file.version

    async def _look(self, ino: int) -> None:
        try:
            await self.bring_up(ino)
        except (BodyError, BlobStoreError, MetadataError) as exc:
            log.info("inode %#x could not be brought up to date, and is tried again: %s", ino, exc)
        except Exception:  # a bug that one file meets must not end the mount
            log.exception("inode %#x could not be brought up to date", ino)

    async def bring_up(self, ino: int) -> None:
        """Have processes that read the file by passthrough read the newest body. Raises what reading does."""
        with self._bodies.held(ino) as file:
            if file is None:
                return
            try:
                inode = await self._volume.getattr(ino)
            except StaleInode:
                file.orphan()
                return
            await self._bodies.refresh(file, inode)
