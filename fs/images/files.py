"""The files of the images: blocking work, meant for threads.

    <cache dir>/images/.lock                     held while an image is made
    <cache dir>/images/<2 digits>/<key>          the image: offset in file = offset in body, holes as holes
    <cache dir>/images/<2 digits>/<key>.map      which blocks are there (`map_file.py`)

Several mounts may use one directory, and anybody may delete anything at any moment. Who has an image open holds a
shared flock on it; who evicts it needs the exclusive one, so nobody's descriptor loses its name by that. A descriptor
without a name is of an image that a person deleted: it goes on working, and the next open makes a new one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from apollofs.blobstore.footer import Footer
from apollofs.fs.direct_io import write_past_cache
from apollofs.fs.images.map_file import (
    HEADER_BYTES,
    BadMap,
    Header,
    MapFile,
    Trust,
    parse_header,
)
from apollofs.fs.images.naming import MAP_SUFFIX, NAME
from apollofs.fs.local_io import write_fully

OPEN_ATTEMPTS = 16
"""An image can be deleted between its open and its lock so often before the cache counts as unusable."""
LEFTOVER_AGE_S = 60.0
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class ImageFile:
    """An image and its map, open, under a shared lock.

    `store` may still run in a thread that was left behind, hence the count of users: the descriptors are closed when
    the last one has ended, and a number that the system has given to another file is never written to.
    """

    def __init__(self, path: str, fd: int, map_: MapFile) -> None:
        self.path = path
        self.fd = fd
        self.map = map_
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._writing: set[int] = set()

    def store(self, index: int, data: memoryview | None, footer: Footer) -> bool:
        """Put a block that is not there: the data (None: it is a hole), then its record. Whether this call did.

        Raises OSError.
        """
        with self._lock:
            if self._closed or index in self._writing or self.map.has(index):
                return False
            self._writing.add(index)
            self._users += 1
        try:
            if data is not None:
                write_past_cache(self.fd, index * self.map.header.block_bytes, data)
            self.map.put(index, footer)
            return True
        finally:
            self._leave(index)

    def identity(self) -> Trust:
        """The file as it is now. Raises OSError."""
        found = os.fstat(self.fd)
        return Trust(found.st_ino, found.st_size, found.st_ctime_ns)

    def has_name(self) -> bool:
        """Whether it is still what the next open will find. Raises OSError."""
        return os.fstat(self.fd).st_nlink > 0

    def lock(self) -> bool:
        """Take the shared lock again after `unlock`; False if somebody is about to delete the file. Raises OSError."""
        return _try_lock(self.fd, fcntl.LOCK_SH)

    def lock_alone(self) -> bool:
        """Take the exclusive lock; False, and the shared one as before, if it is open elsewhere. Raises OSError."""
        # a conversion that fails gives up the lock that was held
        return _try_lock(self.fd, fcntl.LOCK_EX) or (self.lock() and False)

    def unlock(self) -> None:
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def close(self) -> None:
        with self._lock:
            self._closed, closed = True, self._closed
            if closed or self._users:
                return
        self._close()

    def _leave(self, index: int) -> None:
        with self._lock:
            self._writing.discard(index)
            self._users -= 1
            if not self._closed or self._users:
                return
        self._close()

    def _close(self) -> None:
        os.close(self.fd)
        self.map.close()


@dataclass(frozen=True, slots=True)
class FoundImage:
    key: str
    size_bytes: int
    """That it takes on the disk, its map included."""
    used_s: float


class ImageFiles:
    """The directory. Holds no state but its names, so that its methods may run in threads side by side."""

    def __init__(self, directory: str, disk_free_bytes_min: int) -> None:
        self._directory = directory
        self._disk_free_bytes_min = disk_free_bytes_min
        self._counter = itertools.count()

    def path(self, key: str) -> str:
        # the last digits of the number: those that count
        return os.path.join(self._directory, key[14:16], key)

    def lacking(self, size_bytes: int) -> int:
        """How many bytes the disk lacks for so many more and its reserve; not positive if none. Raises OSError."""
        free = os.statvfs(self._directory)
        return size_bytes + self._disk_free_bytes_min - free.f_bavail * free.f_frsize

    def open(self, key: str, size_bytes: int, block_bytes: int) -> ImageFile:
        """Open the image, made sparse if there is none. Raises OSError."""
        path = self.path(key)
        for _ in range(OPEN_ATTEMPTS):
            found = self._open_there(key, path, size_bytes, block_bytes)
            if found is not None:
                return found
            with self._making(path):
                found = self._open_there(key, path, size_bytes, block_bytes)
                if found is None:
                    self._make(key, path, size_bytes, block_bytes)
        raise OSError(errno.EBUSY, "an image is deleted as often as it is made", path)

    def _open_there(self, key: str, path: str, size_bytes: int, block_bytes: int) -> ImageFile | None:
        with contextlib.ExitStack() as opened:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                opened.callback(os.close, fd)
                map_fd = os.open(path + MAP_SUFFIX, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                opened.callback(os.close, map_fd)
            except FileNotFoundError:
                return None
            found = os.fstat(fd)
            if not _try_lock(fd, fcntl.LOCK_SH) or not os.fstat(fd).st_nlink or found.st_size != size_bytes:
                return None
            try:
                header = parse_header(key, os.pread(map_fd, HEADER_BYTES, 0))
            except BadMap:
                return None
            if (header.image_ino, header.size_bytes, header.block_bytes) != (found.st_ino, size_bytes, block_bytes):
                return None
            os.utime(map_fd)
            map_ = MapFile(key, map_fd, header)
            opened.pop_all()
            return ImageFile(path, fd, map_)

    @contextlib.contextmanager
    def _making(self, path: str) -> Iterator[None]:
        """One maker at a time, over all mounts."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(os.path.join(self._directory, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _make(self, key: str, path: str, size_bytes: int, block_bytes: int) -> None:
        """A new image of nothing, in place of what can't be one."""
        for name in (path, path + MAP_SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size_bytes)
            header = Header(block_bytes, size_bytes, os.fstat(fd).st_ino)
        finally:
            os.close(fd)
        self._make_map(key, path, header, ())

    def _make_map(self, key: str, path: str, header: Header, footers: Sequence[Footer]) -> None:
        temporary = f"{path}{MAP_SUFFIX}.{os.getpid()}-{next(self._counter)}"
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_fully(fd, 0, header.pack(key))
            map_ = MapFile(key, fd, header)
            for index, footer in enumerate(footers):
                map_.put(index, footer)
            os.rename(temporary, path + MAP_SUFFIX)
        except OSError:
            os.unlink(temporary)
            raise
        finally:
            os.close(fd)

    def adopt(self, path: str, key: str, block_bytes: int, footers: Sequence[Footer]) -> int | None:
        """The finished file at `path`, on this disk, becomes the image, whole and trusted. Bytes that it takes; None if
        there is an image that somebody has open: a kernel may write to that, when it is to be changed in place.

        Nobody may write to it any more. Raises OSError; the file is then where it was, or is an image without a map.
        """
        target = self.path(key)
        with self._making(target), _alone(target) as is_free:
            if not is_free:
                return None
            os.rename(path, target)
            status = os.stat(target)
            trust = Trust(status.st_ino, status.st_size, status.st_ctime_ns)
            header = Header(block_bytes, status.st_size, status.st_ino, complete=True, trust=trust)
            self._make_map(key, target, header, footers)
            return status.st_blocks * 512

    def header(self, key: str) -> Header | None:
        """What the map says of an image that is there, without opening that; None if there is none. Raises OSError."""
        path = self.path(key)
        try:
            with open(path + MAP_SUFFIX, "rb", buffering=0) as file:
                found = parse_header(key, file.read(HEADER_BYTES))
            status = os.stat(path)
        except (FileNotFoundError, BadMap):
            return None
        return found if (found.image_ino, found.size_bytes) == (status.st_ino, status.st_size) else None

    def scan(self) -> list[FoundImage]:
        """Every image there, least recently used first. Makes the directory; deletes what is none. Raises OSError."""
        os.makedirs(self._directory, exist_ok=True)
        found: list[FoundImage] = []
        for part in os.scandir(self._directory):
            if part.is_dir(follow_symlinks=False):
                for entry in os.scandir(part.path):
                    self._scan_file(entry, found)
        found.sort(key=lambda image: image.used_s)
        return found

    def _scan_file(self, entry: os.DirEntry[str], found: list[FoundImage]) -> None:
        if entry.name.endswith(MAP_SUFFIX):
            return
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                return
            if not NAME.fullmatch(entry.name):
                # a map that is being made has such a name for a moment
                if time.time() - status.st_mtime > LEFTOVER_AGE_S:
                    os.unlink(entry.path)
                return
            try:
                used_s = os.stat(entry.path + MAP_SUFFIX).st_mtime
            except FileNotFoundError:
                used_s = 0.0
            found.append(FoundImage(entry.name, status.st_blocks * 512, used_s))

    def remove(self, keys: Sequence[str]) -> list[str]:
        """Delete images; those that some mount has open stay, and are returned. Raises OSError."""
        stayed = []
        for key in keys:
            path = self.path(key)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                self.unlink(key)
                continue
            try:
                if _try_lock(fd, fcntl.LOCK_EX):
                    self._unlink_same(fd, key)
                else:
                    stayed.append(key)
            finally:
                os.close(fd)
        return stayed

    def _unlink_same(self, fd: int, key: str) -> None:
        """Unlink the names, unless another file has taken them meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(self.path(key), follow_symlinks=False)):
                self.unlink(key)

    def unlink(self, key: str) -> None:
        """Take the names out of the directory, whoever has the files open. Raises OSError."""
        path = self.path(key)
        for name in (path, path + MAP_SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def is_full(exc: OSError) -> bool:
    """Whether the disk has no room, rather than a fault."""
    return exc.errno in _FULL


@contextlib.contextmanager
def _alone(path: str) -> Iterator[bool]:
    """Whether nobody else has the file at `path` open, if there is one; nobody opens it before the end of the block."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield True
        return
    try:
        yield _try_lock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
