"""Blobs as files of a local directory.

    DIRECTORY/objects/<component>+/<component>+/<component>     a blob; every directory is marked by a plus sign
    DIRECTORY/incoming/<random>                                 a put under way, locked by who writes it

The mark, which no name can hold, lets `a` and `a/b` both be blobs, as in S3. A put writes and syncs a file in
`incoming`, renames it to its name and syncs the directory: whole or not at all, also across a power cut. Several
processes may use one directory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat as stat_module
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from itertools import islice
from typing import Final, TypeVar

import trio

from .errors import (
    BlobStoreError,
    BlobStoreFull,
    BlobStoreRefused,
    BlobStoreUnavailable,
    NoSuchBlob,
    RangeUnavailable,
)
from .names import check_name, check_prefix, check_range
from .port import BlobStat, BlobStore, Buffer
from .threads import run_blocking

T = TypeVar("T")

LEFTOVER_AGE_S: Final = 3600.0
"""A file in `incoming` that nobody has locked and that is older than this belongs to a process that died."""

_MARK: Final = "+"
_PAGE: Final = 1000
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP})


class LocalStore(BlobStore):
    """See `port.BlobStore`. `threads` bounds the blocking calls at once; a call may take `deadline_s` seconds."""

    def __init__(self, directory: str, *, threads: int = 16, deadline_s: float = 60.0) -> None:
        self._root = directory
        self._objects = os.path.join(directory, "objects")
        self._incoming = os.path.join(directory, "incoming")
        self._deadline_s = deadline_s
        self._limiter = trio.CapacityLimiter(threads)

    async def prepare(self, create: bool) -> None:
        """Check that the directory holds a blob store, made now if `create`, and remove what dead processes left.

        Raises `BlobStoreRefused` if it isn't there or not ours to write, `BlobStoreFull`.
        """
        await self._run(partial(self._prepare, create), self._root)

    async def put(self, name: str, data: Buffer) -> None:
        path = self._path(name)
        # A thread left behind must not see a buffer that the caller already fills anew.
        await self._run(partial(self._put, path, data), name, abandon=isinstance(data, bytes))

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        check_range(offset, length)
        return await self._run(partial(_read, self._path(name), name, offset, length), name)

    async def read_into(self, name: str, length: int, then: Callable[[Buffer], T]) -> T:
        path = self._path(name)
        return await self._run(lambda: then(_read(path, name, 0, length)), name)

    async def stat(self, name: str) -> BlobStat:
        found = await self._run(partial(os.stat, self._path(name)), name)
        return BlobStat(name, found.st_size, found.st_mtime)

    async def delete(self, name: str) -> None:
        await self._run(partial(self._delete, self._path(name)), name)

    async def list(self, prefix: str = "", start_after: str = "") -> AsyncIterator[BlobStat]:
        """As the port says. Memory: the names of one directory at each level of the path."""
        check_prefix(prefix)
        walk = _walk(self._objects, "", prefix, start_after)
        while True:
            page = await self._run(lambda: list(islice(walk, _PAGE)), prefix)
            for found in page:
                yield found
            if len(page) < _PAGE:
                return

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def _path(self, name: str) -> str:
        *directories, leaf = check_name(name).split("/")
        return os.path.join(self._objects, *(part + _MARK for part in directories), leaf)

    async def _run(self, call: Callable[[], T], name: str, abandon: bool = True) -> T:
        what = f"{name!r} in {self._root!r}"

        def translated() -> T:
            try:
                return call()
            except OSError as exc:
                raise self._translate(exc, what) from exc

        return await run_blocking(
            translated, limiter=self._limiter, deadline_s=self._deadline_s, what=what, abandon=abandon
        )

    def _translate(self, exc: OSError, what: str) -> BlobStoreError:
        text = f"{what}: {exc.strerror}"
        if exc.errno in _FULL:
            return BlobStoreFull(text)
        if exc.errno in _REFUSED:
            return BlobStoreRefused(text)
        # A directory that is gone (unmounted, say) must not look like blobs that are gone.
        if exc.errno in (errno.ENOENT, errno.ENOTDIR) and os.path.isdir(self._objects):
            return NoSuchBlob(text)
        return BlobStoreUnavailable(text)

    def _prepare(self, create: bool) -> None:
        if create:
            os.makedirs(self._incoming, mode=0o700, exist_ok=True)
            os.makedirs(self._objects, mode=0o700, exist_ok=True)
            _sync_directory(self._root)
        if not (os.path.isdir(self._objects) and os.path.isdir(self._incoming)):
            raise BlobStoreRefused(f"directory {self._root!r} holds no blob store; make it with `apollofs format`")
        if not os.access(self._objects, os.R_OK | os.W_OK | os.X_OK):
            raise BlobStoreRefused(f"directory {self._root!r} may not be read and written by this user")
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        with os.scandir(self._incoming) as entries:
            for entry in entries:
                try:
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFTOVER_AGE_S:
                        _remove_if_unlocked(entry.path)
                except FileNotFoundError:
                    continue  # renamed or removed by its writer meanwhile

    def _put(self, path: str, data: Buffer) -> None:
        incoming = os.path.join(self._incoming, secrets.token_hex(16))
        try:
            fd = os.open(incoming, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as exc:
            raise BlobStoreUnavailable(f"the store's directory {self._incoming!r} is gone") from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            rest = memoryview(data).cast("B")
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
            self._make_directories(os.path.dirname(path))
            os.rename(incoming, path)
        except BaseException:
            os.unlink(incoming)
            raise
        finally:
            os.close(fd)
        _sync_directory(os.path.dirname(path))

    def _make_directories(self, path: str) -> None:
        """Like makedirs, below `objects` only, and durable."""
        if os.path.isdir(path):
            return
        parent = os.path.dirname(path)
        if path == self._objects:
            raise FileNotFoundError(errno.ENOENT, "the store's directory is gone", path)
        self._make_directories(parent)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass  # another put made it
        _sync_directory(parent)

    def _delete(self, path: str) -> None:
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            if not os.path.isdir(self._objects):
                raise


def _read(path: str, name: str, offset: int, length: int | None) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        end = max(offset, size) if length is None else offset + length
        if end > size:
            raise RangeUnavailable(f"{name!r} has {size} bytes, not the range [{offset}, {end})")
        # One pread is the common case and copies nothing; large reads may come in pieces.
        data = os.pread(fd, end - offset, offset)
        while len(data) < end - offset:
            more = os.pread(fd, end - offset - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, "the file became shorter while it was read")
            data += more
        return data
    finally:
        os.close(fd)


def _walk(path: str, base: str, prefix: str, start_after: str) -> Iterator[BlobStat]:
    """Every blob below `path` in name order. `base` is the name of `path`, empty or with a slash at its end."""
    with os.scandir(path) as entries:
        # A directory sorts as its name and a slash: so the order is that of whole names.
        keys = sorted(base + _key(entry.name) for entry in entries)
    for key in keys:
        if key.endswith("/"):
            shared = min(len(key), len(prefix))
            if key[:shared] == prefix[:shared] and (key > start_after or start_after.startswith(key)):
                yield from _walk(os.path.join(path, key[len(base) : -1] + _MARK), key, prefix, start_after)
        elif key > start_after and key.startswith(prefix):
            try:
                found = os.stat(os.path.join(path, key[len(base) :]))
            except FileNotFoundError:
                continue  # deleted meanwhile
            if stat_module.S_ISREG(found.st_mode):
                yield BlobStat(key, found.st_size, found.st_mtime)


def _key(entry_name: str) -> str:
    return entry_name[:-1] + "/" if entry_name.endswith(_MARK) else entry_name


def _remove_if_unlocked(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        pass  # a slow writer, still alive
    finally:
        os.close(fd)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
