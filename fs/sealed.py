"""Sealing and unsealing a tree from outside any mount: a session taken, everything given back."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from apollofs.fs.command_volume import command_volume
from apollofs.fs.user_error import UserError
from apollofs.metadata.keys import Keys
from apollofs.metadata.seal_records import SealRecord
from apollofs.metadata.sealing import Sealing, Tell, Trusting, read_seals, trusting
from apollofs.metadata.store import Store
from apollofs.metadata.volume import Volume

SLOTS = 12
"""A tree is marked by several transactions at a time."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A seal, and who trusts it."""

    record: SealRecord
    trusted_by: list[Trusting]


def _nobody(_: object) -> None:
    pass


class SealedTrees:
    """The seals of one volume. `version` is what the session says of itself; `tell` hears how far it is.

    Methods raise DeadlineExceeded, StoreError, SessionLost.
    """

    def __init__(self, store: Store, volume: str, version: str, tell: Tell = _nobody) -> None:
        self._store = store
        self._keys = Keys(volume)
        self._version = version
        self._tell = tell

    async def seal(self, directory: int, term_s: float) -> SealRecord:
        """Seal the tree below a directory (its inode). Errors as `Sealing.seal`; interrupted, again goes on."""
        async with self._volume() as volume:
            return await Sealing(self._store, volume, self._tell).seal(directory, term_s)

    async def unseal(self, directory: int) -> SealRecord:
        """Take the seal of this directory away; what it was. Waits for the mounts that trust it, at most its term.

        UserError if it has none of its own. Interrupted, the wait goes on by itself and the next call takes it up.
        """
        record = next((each for each in await read_seals(self._store, self._keys) if each.root == directory), None)
        if record is None:
            raise UserError("it is not the root of a sealed tree: see `apollofs seals`")
        async with self._volume() as volume:
            await Sealing(self._store, volume, self._tell).unseal(record.number)
        return record

    async def list(self) -> list[Standing]:
        """All standing seals, by number."""
        records = await read_seals(self._store, self._keys)
        return [Standing(each, await trusting(self._store, self._keys, each.number)) for each in records]

    def _volume(self) -> AbstractAsyncContextManager[Volume]:
        return command_volume(self._store, self._keys.volume, self._version, SLOTS)
