"""Random operations on one file, in every way that a file can be used, compared with a plain bytearray.

After fsx of the NeXT and Linux kernel testers, in spirit. On one mount every result must be right at once; on two, what
one has synced must be what the other reads. APOLLOFS_FSX_OPERATIONS=100000 plays more than every run does, on stores
that are directories and with garbage collected on the way, so that it needs some GB of disk whatever its length;
APOLLOFS_FSX_SEED=n plays other ones.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounted.conftest import CACHE_SIZE, Pair, Places
from tests.mounted.harness import LocalBodies, Namespace
from tests.mounted.watchdog import Watchdog

pytestmark = pytest.mark.mounted
OPERATIONS = int(os.environ.get("APOLLOFS_FSX_OPERATIONS", "600"))
SEED = int(os.environ.get("APOLLOFS_FSX_SEED", "1"))
LONG = 5000
"""Operations from which on a run collects garbage, each time so many were played."""
SIZE_MAX = 3 << 20
PIECE_MAX = 300_000
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
LIBC = ctypes.CDLL(None, use_errno=True)


class Fsx:
    """One file, through one or two paths, and what it must be."""

    def __init__(self, paths: list[Path], seed: int, alive: Callable[[], None]) -> None:
        """`alive` is called every now and then: as long as it goes on, nothing hangs."""
        self.alive = alive
        self.rng = random.Random(seed)
        self.paths = paths
        self.body = bytearray()
        self.done: list[str] = []
        paths[0].touch()
        self.fds = [os.open(path, os.O_RDWR) for path in paths]
        self.side = 0

    def play(self, operations: int) -> None:
        weights = {
            self.read: 12,
            self.read_mapped: 4,
            self.write: 12,
            self.write_mapped: 3,
            self.append: 4,
            self.truncate: 4,
            self.punch: 3,
            self.zero: 2,
            self.allocate: 2,
            self.copy: 3,
            self.sync: 3,
            self.reopen: 5,
            self.rewrite: 1,
            self.touch: 3,
            self.change_sides: 4 if len(self.paths) > 1 else 0,
        }
        for operation in self.rng.choices(list(weights), list(weights.values()), k=operations):
            if len(self.done) % 100 == 0:
                self.alive()
            self.done.append(operation.__name__)
            operation()
            assert os.fstat(self.fd).st_size == len(self.body), self.history()

    @property
    def fd(self) -> int:
        return self.fds[self.side]

    @property
    def path(self) -> Path:
        return self.paths[self.side]

    def history(self) -> str:
        return f"after {len(self.done)} operations: ... {' '.join(self.done[-12:])}"

    def place(self, limit: int = SIZE_MAX) -> tuple[int, int]:
        start = self.rng.randrange(max(1, limit))
        return start, self.rng.randrange(1, min(PIECE_MAX, SIZE_MAX - start) + 1)

    def lay(self, start: int, data: bytes) -> None:
        if len(self.body) < start:
            self.body.extend(bytes(start - len(self.body)))
        self.body[start : start + len(data)] = data

    # -- operations --------------------------------------------------------------------------------------------------

    def read(self) -> None:
        start, length = self.place()
        found = os.pread(self.fd, length, start)
        assert found == self.body[start : start + length], f"read at {start}: {self.history()}"

    def read_mapped(self) -> None:
        if not self.body:
            return
        start, length = self.place(len(self.body))
        with mmap.mmap(self.fd, len(self.body), prot=mmap.PROT_READ) as mapped:
            assert mapped[start : start + length] == self.body[start : start + length], self.history()

    def write(self) -> None:
        start, length = self.place()
        data = self.rng.randbytes(length)
        assert os.pwrite(self.fd, data, start) == length
        self.lay(start, data)

    def write_mapped(self) -> None:
        if not self.body:
            return
        start, length = self.place(len(self.body))
        length = min(length, len(self.body) - start)
        data = self.rng.randbytes(length)
        with mmap.mmap(self.fd, len(self.body)) as mapped:
            mapped[start : start + length] = data
            mapped.flush()
        self.lay(start, data)

    def append(self) -> None:
        if len(self.body) > SIZE_MAX - PIECE_MAX:
            return
        data = self.rng.randbytes(self.rng.randrange(1, 5000))
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        assert os.write(fd, data) == len(data)
        os.close(fd)
        self.lay(len(self.body), data)

    def truncate(self) -> None:
        size = self.rng.randrange(SIZE_MAX)
        if self.rng.random() < 0.5:
            os.ftruncate(self.fd, size)
        else:
            os.truncate(self.path, size)
        del self.body[size:]
        self.lay(size, b"")

    def fallocate(self, mode: int, start: int, length: int) -> None:
        offset, size = ctypes.c_int64(start), ctypes.c_int64(length)
        assert LIBC.fallocate(self.fd, mode, offset, size) == 0, os.strerror(ctypes.get_errno())

    def punch(self) -> None:
        start, length = self.place()
        self.fallocate(PUNCH_HOLE | KEEP_SIZE, start, length)
        end = min(start + length, len(self.body))
        if end > start:
            self.body[start:end] = bytes(end - start)

    def zero(self) -> None:
        start, length = self.place()
        self.fallocate(ZERO_RANGE, start, length)
        self.lay(start, bytes(length))

    def allocate(self) -> None:
        start, length = self.place()
        self.fallocate(0, start, length)
        self.lay(max(len(self.body), start + length), b"")

    def copy(self) -> None:
        start, length = self.place()
        length = min(length, len(self.body) - start)
        to = self.rng.randrange(SIZE_MAX - PIECE_MAX)
        if length <= 0 or abs(to - start) < length:
            return
        done = os.copy_file_range(self.fd, self.fd, length, start, to)
        self.lay(to, bytes(self.body[start : start + done]))

    def sync(self) -> None:
        os.fsync(self.fd)

    def touch(self) -> None:
        when = self.rng.randrange(1, 4 * 10**18)
        os.utime(self.rng.choice((self.fd, self.path)), ns=(when, when))
        assert os.stat(self.path).st_mtime_ns == when, self.history()

    def reopen(self) -> None:
        """Another way to have it open: several at once, or none but a new one."""
        for number, path in enumerate(self.paths):
            if number == self.side or self.rng.random() < 0.5:
                if self.rng.random() < 0.7:
                    os.close(self.fds[number])
                    if self.rng.random() < 0.5:
                        path.read_bytes()
                    self.fds[number] = os.open(path, os.O_RDWR)
                else:
                    former = self.fds[number]
                    self.fds[number] = os.open(path, os.O_RDWR)
                    os.close(former)

    def rewrite(self) -> None:
        """Written anew, while it may be open for reading too."""
        if self.rng.random() < 0.5:
            os.close(self.fd)
            self.fds[self.side] = -1
        data = self.rng.randbytes(self.rng.randrange(SIZE_MAX))
        fd = os.open(self.path, os.O_WRONLY | os.O_TRUNC)
        for start in range(0, len(data), 500_000):
            os.pwrite(fd, data[start : start + 500_000], start)
        self.body = bytearray(data)
        if self.fd < 0:
            self.fds[self.side] = os.open(self.path, os.O_RDWR)
        os.close(fd)

    def change_sides(self) -> None:
        os.fsync(self.fd)
        self.side = 1 - self.side
        assert os.pread(self.fd, SIZE_MAX, 0) == self.body, self.history()

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        for path in self.paths:
            assert path.read_bytes() == self.body, self.history()


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The mounts of all tests; a long run has its own, since a gateway gives back deleted bytes only hours later."""
    if OPERATIONS < LONG:
        yield request.getfixturevalue("pair")
        return
    sites = [LocalBodies("west"), LocalBodies("east")]
    with Namespace.made(tmp_path_factory.mktemp("fsx"), sites, format_options=("--block-size", "1M")) as namespace:
        yield Pair(namespace, *(namespace.mount(each.site, "--cache-size", CACHE_SIZE) for each in sites))


def told(watchdog: Watchdog, places: Places) -> Callable[[], None]:
    """What is called every hundred operations."""
    namespace, calls = places.pair.namespace, itertools.count(1)

    def alive() -> None:
        watchdog.watch(mount.pid for mount in places.pair.mounts)
        if next(calls) % (LONG // 100) == 0:
            report = namespace.report("gc", namespace.url, "--grace", "0")
            assert (report["errors"], report["silent_mounts"]) == ([], [])

    return alive


def test_one_mount(places: Places, watchdog: Watchdog) -> None:
    fsx = Fsx([places.here / "file"], SEED, told(watchdog, places))
    fsx.play(OPERATIONS)
    fsx.close()
    assert (places.there / "file").read_bytes() == fsx.body


def test_two_mounts_in_turn(places: Places, watchdog: Watchdog) -> None:
    fsx = Fsx([places.here / "file", places.there / "file"], SEED + 1, told(watchdog, places))
    fsx.play(OPERATIONS)
    fsx.close()


def test_without_passthrough(places: Places, watchdog: Watchdog) -> None:
    """As where the daemon may not, or the kernel can't."""
    plain = places.pair.namespace.mount("west", "-o", "passthrough=off", name="plain")
    try:
        assert plain.status()["passthrough"] != "in use"
        fsx = Fsx([plain.path / places.here.name / "file", places.there / "file"], SEED + 2, told(watchdog, places))
        fsx.play(OPERATIONS // 2)
        fsx.close()
        assert plain.status()["bodies"]["passthrough_opens"] == 0
    finally:
        plain.unmount()
