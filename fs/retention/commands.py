"""Setting, reading and clearing retention policies from outside any mount."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.fs.command_volume import command_volume
from apollofs.fs.retention.names import Steps
from apollofs.fs.user_error import UserError
from apollofs.metadata import codec
from apollofs.metadata.errors import NotADirectory
from apollofs.metadata.keys import Keys
from apollofs.metadata.name_text import name_text
from apollofs.metadata.ops.retention import SetRetention
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.retention import RETENTIONS_MAX, Retention, read_retentions
from apollofs.metadata.session import retry
from apollofs.metadata.store import Range, Store
from apollofs.metadata.tree import Place, Tree

READ_S = 30.0
SECONDS_MAX = 100 * 366 * 86_400
NUMBER_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class PlacedRetention:
    """A policy and where it was set; `path` None: that directory is gone."""

    path: bytes | None
    retention: Retention


def check_retention(retention: Retention) -> None:
    """Raises UserError for what is no policy."""
    Steps(retention.patterns)
    bounds = {
        "--keep-last": (retention.last, 1, 1_000_000),
        "--keep-every": (retention.every, 0, NUMBER_MAX),
        "--keep-for": (retention.keep_for_s, 0, SECONDS_MAX),
        "--settle": (retention.settle_s, 0, SECONDS_MAX),
        "--min-free": (retention.min_free_bytes, 0, NUMBER_MAX),
        "--capacity": (retention.capacity_bytes, 0, NUMBER_MAX),
    }
    for name, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise UserError(f"{name} must be from {low} to {high}, not {value}")
    if bool(retention.min_free_bytes) != bool(retention.capacity_bytes):
        raise UserError("--min-free needs --capacity, and the other way round: a store does not tell how large it is")
    if retention.min_free_bytes > retention.capacity_bytes:
        raise UserError("--min-free is more than --capacity")
    if "/" in retention.marker or len(retention.marker.encode()) > 255:
        raise UserError(f"--marker is the name of a file in the checkpoint, not {retention.marker!r}")


class RetentionCommands:
    """Of one volume. Methods raise UserError, NoSuchEntry, NotADirectory, DeadlineExceeded, StoreError."""

    def __init__(self, store: Store, volume: str, version: str) -> None:
        self._store = store
        self._version = version
        self._keys = Keys(volume)
        self._tree = Tree(store, self._keys)

    async def set(self, path: bytes, retention: Retention) -> None:
        """Give a directory a policy of its own. One transaction, in a session of its own."""
        check_retention(retention)
        place = await self.directory(path)
        known = await read_retentions(self._store, self._keys)
        if place.ino not in known and len(known) >= RETENTIONS_MAX:
            raise UserError(
                f"the volume has {RETENTIONS_MAX} retention policies already: see `apollofs retention list`"
            )
        await self._change(place.ino, retention)

    async def clear(self, path: bytes) -> None:
        """Take a directory's own policy away. One transaction, in a session of its own."""
        place = await self.directory(path)
        if place.ino not in await read_retentions(self._store, self._keys):
            raise UserError(f"{name_text(path)} has no retention policy of its own")
        await self._change(place.ino, None)

    async def _change(self, directory: int, retention: Retention | None) -> None:
        async with command_volume(self._store, self._keys.volume, self._version) as volume:
            await volume.transact(lambda scope: SetRetention(scope, directory, retention))

    async def get(self, path: bytes) -> PlacedRetention | None:
        """The policy that applies in a directory: its own, or that of the nearest one above that holds below too."""
        directory = (await self.directory(path)).ino
        known = await read_retentions(self._store, self._keys)
        is_own = True
        while True:
            found = known.get(directory)
            if found is not None:
                # what is nearer is not overruled by what is farther
                applies = is_own or found.is_recursive
                return PlacedRetention(await self._tree.path_of(directory), found) if applies else None
            if directory == ROOT_INO:
                return None
            directory, is_own = await self._parent(directory), False

    async def list(self) -> list[PlacedRetention]:
        """All policies of the volume."""
        known = await read_retentions(self._store, self._keys)
        return [PlacedRetention(await self._tree.path_of(directory), found) for directory, found in known.items()]

    async def directory(self, path: bytes) -> Place:
        """What a path means, if that is a directory."""
        place = await self._tree.place(path)
        if not place.is_dir:
            raise NotADirectory(f"{name_text(path)} is no directory: retention policies are on directories")
        return place

    async def _parent(self, directory: int) -> int:
        found = await retry(lambda: self._store.range(Range(self._keys.inode(directory))), READ_S)
        return codec.decode_inode(found.kvs[0].value, 0).parent if found.kvs else ROOT_INO
