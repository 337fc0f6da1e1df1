"""One rank of the quickstart: a process that saves its part of a checkpoint, or loads one and verifies it.

    quickstart_rank.py save PATH MEGABYTES SEED
    quickstart_rank.py load PATH

Prints one line of JSON: the bytes, their SHA-256, the seconds, and whether torch wrote or read the file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import sys
import time
from typing import BinaryIO

MIB = 1 << 20
HAS_TORCH = importlib.util.find_spec("torch") is not None


class HashingWriter:
    """A file to write to that knows the SHA-256 and the number of the bytes that went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.size_bytes += len(view)
        self._file.write(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_body(out: HashingWriter, megabytes: int, seed: int) -> None:
    """A state dict by torch.save where torch is installed, else as many random bytes."""
    if HAS_TORCH:
        import torch

        torch.manual_seed(seed)
        layers = {f"layer{index}.weight": torch.randn(512, 512) for index in range(megabytes)}
        torch.save({"step": seed, "model": layers}, out)
        return
    source = random.Random(seed)
    for _ in range(megabytes):
        out.write(source.randbytes(MIB))


def save(path: str, megabytes: int, seed: int) -> dict[str, object]:
    """As checkpoints ought to be written: a temporary name, fsync, rename, fsync of the directory."""
    start = time.monotonic()
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        out = HashingWriter(file)
        write_body(out, megabytes, seed)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return {"bytes": out.size_bytes, "sha256": out.hexdigest(), "seconds": time.monotonic() - start}


def load(path: str) -> dict[str, object]:
    """Reads every byte; with torch the state dict is loaded as training code would load it, too."""
    start = time.monotonic()
    size_bytes = 0
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(4 * MIB):
            digest.update(data)
            size_bytes += len(data)
    seconds = time.monotonic() - start
    if HAS_TORCH:
        import torch

        assert torch.load(path, mmap=True, weights_only=True)["model"], "a checkpoint without a model"
    return {"bytes": size_bytes, "sha256": digest.hexdigest(), "seconds": seconds}


def main(arguments: list[str]) -> None:
    match arguments:
        case ["save", path, megabytes, seed]:
            result = save(path, int(megabytes), int(seed))
        case ["load", path]:
            result = load(path)
        case _:
            raise SystemExit(__doc__)
    print(json.dumps({**result, "torch": HAS_TORCH}))


if __name__ == "__main__":
    main(sys.argv[1:])
