"""Pins: which cached bodies a person wants to keep. Blocking work, meant for threads.

    <cache dir>/pins/<key>      one for each image or block; a line for each inode that it was pinned for:
                                <ino> [<parent> <name>]     in hex: where the file was then

A pin is of the bytes that the file had then. It lasts until it is taken back or the file is gone, over remounts and for
all mounts of the directory, or until what it keeps is deleted by somebody.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable

from apollofs.fs.blobs import Block

Key = str | Block
Place = tuple[int, bytes]
"""The directory and the name of a file."""
ANYWHERE: Place = (0, b"")
"""Of a file that has several names: it is found by its number."""
Owners = dict[int, Place | None]
"""The inodes that a key is pinned for; None: where it was is not known."""
FILE_BYTES_MAX = 1 << 20
UNFINISHED_S = 3600.0


def pin_name(key: Key) -> str:
    """The name of the pin of an image or of a block."""
    return key if isinstance(key, str) else f"b{key.blob:016x}-{key.index:x}-{key.length:x}"


def key_of(name: str) -> Key:
    """The inverse of `pin_name`."""
    if len(name.partition("-")[0]) != len(pin_name(Block(0, 0, 0)).partition("-")[0]):
        return name
    blob, index, length = (int(part, 16) for part in name[1:].split("-"))
    return Block(blob, index, length)


class Pins:
    """The directory. Methods raise OSError."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def load(self) -> dict[Key, Owners]:
        """All pins. Those that can't be read are deleted."""
        found: dict[Key, Owners] = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._directory):
                if entry.name.startswith("."):
                    self._clear(entry)
                    continue
                try:
                    found[key_of(entry.name)] = _read(entry.path)
                except FileNotFoundError:
                    continue
                except ValueError:
                    self._unlink(entry.name)
        return found

    def add(self, keys: Iterable[Key], ino: int, place: Place | None) -> None:
        """Pin them for one inode more."""
        os.makedirs(self._directory, exist_ok=True)
        for key in keys:
            self._write(key, self._owners(key) | {ino: place})

    def take(self, keys: Iterable[Key], ino: int) -> None:
        """They are not pinned for this inode any more."""
        for key in keys:
            owners = self._owners(key)
            owners.pop(ino, None)
            if owners:
                self._write(key, owners)
            else:
                self._unlink(pin_name(key))

    def remove(self, keys: Iterable[Key]) -> None:
        """They are not pinned any more."""
        for key in keys:
            self._unlink(pin_name(key))

    def has(self, key: Key) -> bool:
        return os.path.exists(os.path.join(self._directory, pin_name(key)))

    def _owners(self, key: Key) -> Owners:
        try:
            return _read(os.path.join(self._directory, pin_name(key)))
        except (FileNotFoundError, ValueError):
            return {}

    def _write(self, key: Key, owners: Owners) -> None:
        path = os.path.join(self._directory, pin_name(key))
        with open(os.path.join(self._directory, f".{os.getpid()}-{pin_name(key)}"), "w", encoding="ascii") as file:
            file.writelines(_line(ino, place) for ino, place in owners.items())
        os.rename(file.name, path)

    def _clear(self, entry: os.DirEntry[str]) -> None:
        """What is being written stays; what a process that was killed has left goes."""
        with contextlib.suppress(FileNotFoundError):
            if time.time() - entry.stat().st_mtime > UNFINISHED_S:
                os.unlink(entry.path)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._directory, name))


def _line(ino: int, place: Place | None) -> str:
    return f"{ino:016x}\n" if place is None else f"{ino:016x} {place[0]:016x} {place[1].hex()}\n"


def _read(path: str) -> Owners:
    """Raises OSError, and ValueError for what is no pin."""
    with open(path, encoding="ascii") as file:
        lines = file.read(FILE_BYTES_MAX).splitlines()
    owners: Owners = {}
    for line in lines:
        ino, *place = line.split(" ")
        owners[int(ino, 16)] = (int(place[0], 16), bytes.fromhex(place[1])) if len(place) == 2 else None
    if not owners:
        raise ValueError("a pin of nothing")
    return owners
