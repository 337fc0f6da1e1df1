"""The files of the block cache: blocking work, meant for threads, and the index of what is there.

    <directory>/<2 hex>/<blob>-<index>      a block's bytes and behind them the seal of `blobstore.footer`

A file is written elsewhere on the same disk and renamed into place, unsynced: what a crash has torn does not match its
checksums and counts as not there. Several mounts may use one directory; anybody may delete anything at any moment.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from apollofs.blobstore.errors import CorruptBlob
from apollofs.blobstore.footer import (
    CHUNK_BYTES,
    Footer,
    check_chunks,
    data_length_of,
    footer_length,
    footer_of,
    pack_footer,
    parse_footer,
    sealed_length,
)
from apollofs.blobstore.port import Buffer
from apollofs.fs.blobs import Block
from apollofs.fs.direct_io import write_past_cache
from apollofs.fs.local_io import read_at_once, read_fully, write_fully
from apollofs.fs.room import Room

LARGE_BYTES = 1 << 20
"""From here on a block is written past the page cache, as images are."""
_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{8})")
_PREFIX = re.compile(r"[0-9a-f]{2}")


class CacheFileCorrupt(Exception):
    """A file of the cache does not hold what was put into it."""


@dataclass(frozen=True, slots=True)
class Found:
    """Bytes from the cache, and the checksums of the file they are from, to be remembered."""

    data: memoryview
    footer: Footer


class CacheIndex:
    """Which blocks are on disk, and the checksums of those read last. Not for threads."""

    def __init__(self, room: Room, files: CacheFiles, footers_max: int = 4096) -> None:
        self._room = room
        self._files = files
        self._blocks: set[Block] = set()
        self._footers: OrderedDict[Block, Footer] = OrderedDict()
        self._footers_max = footers_max
        self.bytes = 0

    def __contains__(self, block: Block) -> bool:
        return block in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, block: Block) -> None:
        """The block is on disk, or will be in a moment; it is now the most recently used."""
        if block not in self._blocks:
            self._blocks.add(block)
            self.bytes += sealed_length(block.length)
        self._room.add(self, block, sealed_length(block.length))

    def drop(self, block: Block) -> None:
        """The block is not on disk any more."""
        self._room.drop(block)
        self.forget(block)

    def forget(self, block: Block) -> None:
        """As a shelf of the room: the block is about to leave."""
        if block in self._blocks:
            self._blocks.discard(block)
            self.bytes -= sealed_length(block.length)
        self._footers.pop(block, None)

    def came_back(self, block: Block, size_bytes: int) -> None:
        """As a shelf of the room: the block stays."""
        self.add(block)

    def remove(self, blocks: Sequence[Block]) -> Sequence[Block]:
        """As a shelf of the room: delete the files. Blocks; raises OSError."""
        self._files.remove(blocks)
        return ()

    def footer(self, block: Block) -> Footer | None:
        return self._footers.get(block)

    def remember(self, block: Block, footer: Footer) -> None:
        self._footers[block] = footer
        self._footers.move_to_end(block)
        while len(self._footers) > self._footers_max:
            self._footers.popitem(last=False)


class CacheFiles:
    """The directory. Holds no state but its names, so that its methods may run in threads side by side."""

    def __init__(self, directory: str, scratch: str, disk_free_bytes_min: int) -> None:
        self._directory = directory
        self._scratch = scratch
        self._disk_free_bytes_min = disk_free_bytes_min
        self._counter = itertools.count()

    def path(self, block: Block) -> str:
        prefix = block.name[:2]
        return os.path.join(self._directory, prefix, f"{block.blob:016x}-{block.index:08x}")

    def scan(self) -> list[Block]:
        """Every block there, least recently used first; makes the directory. Deletes what is no block's file."""
        os.makedirs(self._directory, exist_ok=True)
        found: list[tuple[float, Block]] = []
        for prefix in os.scandir(self._directory):
            if not _PREFIX.fullmatch(prefix.name) or not prefix.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(prefix.path):
                self._scan_file(entry, found)
        found.sort(key=lambda aged: aged[0])
        return [block for _, block in found]

    def _scan_file(self, entry: os.DirEntry[str], found: list[tuple[float, Block]]) -> None:
        try:
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                return
            match = _NAME.fullmatch(entry.name)
            length = data_length_of(status.st_size)
            if match is None or not length:
                os.unlink(entry.path)
                return
        except FileNotFoundError:
            return
        block = Block(int(match[1], 16), int(match[2], 16), length)
        found.append((max(status.st_atime, status.st_mtime), block))

    def read(self, block: Block, offset: int, length: int, footer: Footer | None, *, at_once: bool) -> Found | None:
        """Verified bytes `[offset, offset + length)`, or None: the block is not there.

        Raises CacheFileCorrupt, OSError; BlockingIOError if `at_once` and a disk would have to be waited for.
        """
        try:
            fd = os.open(self.path(block), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            if os.fstat(fd).st_size != sealed_length(block.length):
                raise CacheFileCorrupt("the file has another length")
            if footer is None:
                tail = self._pread(fd, block.length, footer_length(block.length), at_once)
                footer = parse_footer(block.name, block.length, tail)
            first = offset // CHUNK_BYTES
            start = first * CHUNK_BYTES
            stop = min(-(-(offset + length) // CHUNK_BYTES) * CHUNK_BYTES, block.length)
            data = self._pread(fd, start, stop - start, at_once)
            check_chunks(block.name, footer, first, data)
            return Found(memoryview(data)[offset - start : offset - start + length], footer)
        except CorruptBlob as exc:
            raise CacheFileCorrupt(str(exc)) from exc
        finally:
            os.close(fd)

    def _pread(self, fd: int, offset: int, length: int, at_once: bool) -> bytes | bytearray:
        if at_once:
            quick = read_at_once(fd, offset, length)
            if quick is None:
                raise BlockingIOError("not in the page cache")
            return quick
        data = read_fully(fd, offset, length)
        if len(data) != length:
            raise CacheFileCorrupt("the file was cut while it was read")
        return data

    def write(self, block: Block, data: Buffer, footer: Footer | None = None) -> int:
        """Store a block; `footer`: its checksums, if they are known. 0, or how many bytes the disk lacks; nothing is
        stored then.

        Raises OSError; nothing is left behind.
        """
        lacking = self._lacking(sealed_length(block.length))
        if lacking > 0:
            return lacking
        temporary = os.path.join(self._scratch, f"block-{next(self._counter)}")
        try:
            self._write_whole(temporary, block, data, footer or footer_of(data))
            self._place(temporary, self.path(block))
        except OSError as exc:
            self._unlink(temporary)
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                return sealed_length(block.length)
            raise
        return 0

    def _lacking(self, size: int) -> int:
        free = os.statvfs(self._directory)
        return size + self._disk_free_bytes_min - free.f_bavail * free.f_frsize

    def _write_whole(self, path: str, block: Block, data: Buffer, footer: Footer) -> None:
        os.makedirs(self._scratch, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if block.length >= LARGE_BYTES:
                write_past_cache(fd, 0, memoryview(data))
            else:
                write_fully(fd, 0, data)
            write_fully(fd, block.length, pack_footer(block.name, footer))
        finally:
            os.close(fd)

    def _place(self, temporary: str, path: str) -> None:
        try:
            os.rename(temporary, path)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.rename(temporary, path)

    def remove(self, blocks: Sequence[Block]) -> None:
        """Delete files; those that are not there are no error. Raises OSError."""
        for block in blocks:
            self._unlink(self.path(block))

    def _unlink(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            # Somebody else was quicker: another mount, or a person who emptied the cache.
            pass
