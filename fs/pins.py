"""Pins: which cached bodies a person wants to keep. Blocking work, meant for threads.

    <cache dir>/pins/<key>      one for each image or block; the number of the inode that it was pinned for

A pin is of the bytes that the file had then. It lasts until it is taken back, over remounts and for all mounts of the
directory, or until what it keeps is deleted by somebody.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from apollofs.fs.blobs import Block


def pin_name(key: str | Block) -> str:
    """The name of the pin of an image or of a block."""
    return key if isinstance(key, str) else f"b{key.blob:016x}-{key.index:x}-{key.length:x}"


def key_of(name: str) -> str | Block:
    """The inverse of `pin_name`."""
    if not name.startswith("b"):
        return name
    blob, index, length = (int(part, 16) for part in name[1:].split("-"))
    return Block(blob, index, length)


class Pins:
    """The directory. Methods raise OSError."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def load(self) -> dict[str | Block, int]:
        """All pins, each with the inode that it is of. Those that can't be read are deleted."""
        found: dict[str | Block, int] = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._directory):
                try:
                    with open(entry.path) as file:
                        found[key_of(entry.name)] = int(file.read(32), 16)
                except FileNotFoundError:
                    continue
                except ValueError:
                    self._unlink(entry.name)
        return found

    def add(self, keys: Iterable[str | Block], ino: int) -> None:
        os.makedirs(self._directory, exist_ok=True)
        for key in keys:
            path = os.path.join(self._directory, pin_name(key))
            with open(f"{path}.{os.getpid()}", "w") as file:
                file.write(f"{ino:016x}")
            os.rename(file.name, path)

    def remove(self, keys: Iterable[str | Block]) -> None:
        for key in keys:
            self._unlink(pin_name(key))

    def has(self, key: str | Block) -> bool:
        return os.path.exists(os.path.join(self._directory, pin_name(key)))

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._directory, name))
