"""Two mounts of one namespace as a Hypothesis state machine, beside one plain model; played by `test_state_machine.py`.

Each example works in a directory of its own. After each step what it has touched is read on the mount that did not do
it and on the one that did, and now and then everything is read on both.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path as Directory

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.model import mounted_tree as calls
from tests.model.plain_locks import BYTES, PlainLocks
from tests.model.plain_tree import EXCHANGE, NOREPLACE, Node, Path, PlainTree
from tests.mounted import clients
from tests.mounted.client import Client
from tests.mounted.clients import errno_of

ALL_EVERY = 10
"""Steps after which everything is read on both mounts."""
HANDLES_MAX = 4
LOCK_FILE = "locks"

mounts = st.integers(0, 1)
paths = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(tuple)
# around the inline limit (4 KiB), the page and the block (64 KiB)
sizes = st.sampled_from([0, 1, 10, 4095, 4096, 4097, 20_000, 65_536, 150_000])
offsets = st.sampled_from([0, 1, 9, 4090, 4096, 12_345, 65_530, 131_072])
bodies = st.tuples(sizes, st.integers(0, 1 << 32)).map(lambda drawn: random.Random(drawn[1]).randbytes(drawn[0]))
modes = st.sampled_from([0o644, 0o600, 0o4755, 0o2711, 0o1777, 0])
names = st.sampled_from(["user.one", "user.two", "trusted.three"])
locks = st.sampled_from([fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN])


@dataclass(frozen=True)
class World:
    """What lasts over the examples."""

    roots: tuple[Directory, Directory]
    clients: tuple[Client, Client]
    numbers: Iterator[int]
    steps: list[int]


@dataclass
class Handle:
    """An open file: a descriptor on a mount, and the node that it means."""

    mount: int
    fd: int
    node: Node


def outcome(call: Callable[[], object]) -> tuple[int, object]:
    """(errno, None) or (0, what it returned)."""
    try:
        return 0, call()
    except OSError as exc:
        return exc.errno or -1, None


def without_waiting(lock: int) -> int:
    return lock if lock == fcntl.LOCK_UN else lock | fcntl.LOCK_NB


class TwoMounts(RuleBasedStateMachine):
    """One example."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.tree = PlainTree()
        self.locks = PlainLocks(2)
        self.handles: list[Handle] = []
        self.steps = 0
        name = f"example-{next(world.numbers)}"
        self.places = tuple(root / name for root in world.roots)
        self.places[0].mkdir(0o755)
        self.places[0].joinpath(LOCK_FILE).touch(0o644)
        self.tree.create((LOCK_FILE,), 0o644, exclusive=True)
        for client, place in zip(world.clients, self.places, strict=True):
            client.call(clients.open_as, "f", place / LOCK_FILE, os.O_RDWR)

    def count(self) -> None:
        self.steps += 1
        self.world.steps[0] += 1

    def at(self, mount: int, path: Path) -> Directory:
        return self.places[mount].joinpath(*path)

    def both(self, mount: int, model: Callable[[], object], real: Callable[[], object], *touched: Path) -> None:
        """Do it on a mount and in the model; compare the errors, and what the other mount then shows."""
        number, _ = outcome(model)
        seen, _ = outcome(real)
        assert errno.errorcode.get(seen, "0") == errno.errorcode.get(number, "0")
        self.count()
        if self.steps % ALL_EVERY == 0:
            self.compare_all()
            return
        for path in touched:
            self.compare(1 - mount, path[:-1])
            self.compare(1 - mount, path)
            self.compare(mount, path)

    def compare(self, mount: int, path: Path) -> None:
        number, node = outcome(lambda: self.tree.lstat(path) if path else self.tree.root)
        seen, found = outcome(lambda: calls.differences(self.at(mount, path), node) if isinstance(node, Node) else None)
        if number:
            seen, found = outcome(lambda: os.lstat(self.at(mount, path)))
            assert (seen, mount, path) == (number, mount, path)
            return
        assert (seen, mount, path, found) == (0, mount, path, [])

    def compare_all(self) -> None:
        for mount in (0, 1):
            self.compare(mount, ())
            numbers: dict[Node, int] = {}
            for path, node in self.tree.walk():
                self.compare(mount, path)
                number = os.lstat(self.at(mount, path)).st_ino
                assert numbers.setdefault(node, number) == number
            assert len(set(numbers.values())) == len(numbers)

    def teardown(self) -> None:
        try:
            self.compare_all()
        finally:
            for handle in self.handles:
                os.close(handle.fd)
            for client in self.world.clients:
                client.call(clients.close, "f")

    # -- files -------------------------------------------------------------------------------------------------------

    @rule(mount=mounts, path=paths, mode=modes, exclusive=st.booleans())
    def create(self, mount: int, path: Path, mode: int, exclusive: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (os.O_EXCL if exclusive else 0)
        self.both(
            mount,
            lambda: self.tree.create(path, mode, exclusive=exclusive),
            lambda: os.close(os.open(self.at(mount, path), flags, mode)),
            path,
        )

    @rule(mount=mounts, path=paths, offset=offsets, data=bodies)
    def write(self, mount: int, path: Path, offset: int, data: bytes) -> None:
        self.both(
            mount,
            lambda: self.tree.open(path).splice(offset, data),
            lambda: calls.write(self.at(mount, path), offset, data),
            path,
        )

    @rule(mount=mounts, path=paths, data=bodies)
    def append(self, mount: int, path: Path, data: bytes) -> None:
        def model() -> None:
            node = self.tree.open(path)
            node.splice(len(node.data), data)

        self.both(mount, model, lambda: calls.append(self.at(mount, path), data), path)

    @rule(mount=mounts, path=paths, size=st.one_of(sizes, offsets))
    def truncate(self, mount: int, path: Path, size: int) -> None:
        self.both(
            mount,
            lambda: self.tree.truncatable(path).resize(size),
            lambda: os.truncate(self.at(mount, path), size),
            path,
        )

    @rule(mount=mounts, path=paths, offset=offsets, length=sizes.filter(bool))
    def punch(self, mount: int, path: Path, offset: int, length: int) -> None:
        def real() -> None:
            with calls.opened(self.at(mount, path), os.O_RDWR) as fd:
                calls.punch(fd, offset, length)

        self.both(mount, lambda: self.tree.open(path).zero(offset, length), real, path)

    # -- names -------------------------------------------------------------------------------------------------------

    @rule(mount=mounts, path=paths, mode=modes)
    def mkdir(self, mount: int, path: Path, mode: int) -> None:
        mode &= 0o1777
        self.both(mount, lambda: self.tree.mkdir(path, mode), lambda: os.mkdir(self.at(mount, path), mode), path)

    @rule(mount=mounts, path=paths, number=st.integers(0, 9))
    def symlink(self, mount: int, path: Path, number: int) -> None:
        target = f"nowhere-{number}"
        self.both(
            mount, lambda: self.tree.symlink(path, target), lambda: os.symlink(target, self.at(mount, path)), path
        )

    @rule(mount=mounts, old=paths, new=paths)
    def link(self, mount: int, old: Path, new: Path) -> None:
        self.both(
            mount,
            lambda: self.tree.link(old, new),
            lambda: os.link(self.at(mount, old), self.at(mount, new), follow_symlinks=False),
            old,
            new,
        )

    @rule(mount=mounts, path=paths)
    def unlink(self, mount: int, path: Path) -> None:
        self.both(mount, lambda: self.lost(self.tree.unlink(path)), lambda: os.unlink(self.at(mount, path)), path)

    @rule(mount=mounts, path=paths)
    def rmdir(self, mount: int, path: Path) -> None:
        self.both(mount, lambda: self.tree.rmdir(path), lambda: os.rmdir(self.at(mount, path)), path)

    @rule(mount=mounts, old=paths, new=paths, flags=st.sampled_from([0, 0, NOREPLACE, EXCHANGE]))
    def rename(self, mount: int, old: Path, new: Path, flags: int) -> None:
        self.both(
            mount,
            lambda: self.lost(self.tree.rename(old, new, flags)),
            lambda: calls.renameat2(self.at(mount, old), self.at(mount, new), flags),
            old,
            new,
        )

    def lost(self, node: Node | None) -> None:
        """A node may have lost its last name: then it goes on as a file of each mount alone that has it open."""
        if node is None or node.nlink:
            return
        for mount in (0, 1):
            own = Node(node.mode, bytearray(node.data), nlink=0)
            for handle in self.handles:
                if handle.node is node and handle.mount == mount:
                    handle.node = own

    # -- attributes --------------------------------------------------------------------------------------------------

    @rule(mount=mounts, path=paths, mode=modes)
    def chmod(self, mount: int, path: Path, mode: int) -> None:
        def model() -> None:
            self.tree.stat(path).mode = mode

        self.both(mount, model, lambda: os.chmod(self.at(mount, path), mode), path)

    @rule(mount=mounts, path=paths, mtime_ns=st.integers(-(10**18), 10**19))
    def utimens(self, mount: int, path: Path, mtime_ns: int) -> None:
        def model() -> None:
            self.tree.lstat(path).mtime_ns = mtime_ns

        def real() -> None:
            os.utime(self.at(mount, path), ns=(0, mtime_ns), follow_symlinks=False)

        self.both(mount, model, real, path)

    @rule(mount=mounts, path=paths, name=names, value=st.binary(max_size=50), flags=st.integers(0, 2))
    def set_xattr(self, mount: int, path: Path, name: str, value: bytes, flags: int) -> None:
        self.both(
            mount,
            lambda: self.tree.set_xattr(path, name, value, flags),
            lambda: os.setxattr(self.at(mount, path), name, value, flags),
            path,
        )

    @rule(mount=mounts, path=paths, name=names)
    def remove_xattr(self, mount: int, path: Path, name: str) -> None:
        self.both(
            mount,
            lambda: self.tree.remove_xattr(path, name),
            lambda: os.removexattr(self.at(mount, path), name),
            path,
        )

    # -- open files --------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.handles) < HANDLES_MAX)
    @rule(mount=mounts, path=paths)
    def open(self, mount: int, path: Path) -> None:
        self.count()
        number, node = outcome(lambda: self.tree.open(path))
        seen, fd = outcome(lambda: os.open(self.at(mount, path), os.O_RDWR | os.O_NOFOLLOW))
        assert seen == number
        if isinstance(node, Node) and isinstance(fd, int):
            self.handles.append(Handle(mount, fd, node))

    @precondition(lambda self: self.handles)
    @rule(index=st.integers(0, HANDLES_MAX - 1))
    def close(self, index: int) -> None:
        self.count()
        os.close(self.handles.pop(index % len(self.handles)).fd)

    @precondition(lambda self: self.handles)
    @rule(index=st.integers(0, HANDLES_MAX - 1), offset=offsets, data=bodies)
    def write_handle(self, index: int, offset: int, data: bytes) -> None:
        handle = self.handles[index % len(self.handles)]
        assert os.pwrite(handle.fd, data, offset) == len(data)
        os.fsync(handle.fd)
        handle.node.splice(offset, data)
        self.read_handles()

    @precondition(lambda self: self.handles)
    @rule(index=st.integers(0, HANDLES_MAX - 1), size=sizes)
    def truncate_handle(self, index: int, size: int) -> None:
        handle = self.handles[index % len(self.handles)]
        os.ftruncate(handle.fd, size)
        handle.node.resize(size)
        self.read_handles()

    @precondition(lambda self: self.handles)
    @rule(index=st.integers(0, HANDLES_MAX - 1), offset=offsets, data=bodies)
    def map_handle(self, index: int, offset: int, data: bytes) -> None:
        handle = self.handles[index % len(self.handles)]
        room = len(handle.node.data) - offset
        if room <= 0 or not data:
            return
        calls.map_and_write(handle.fd, offset, data[:room])
        handle.node.splice(offset, data[:room])
        self.read_handles()

    def read_handles(self) -> None:
        for handle in self.handles:
            seen = os.pread(handle.fd, len(handle.node.data) + 10, 0)
            assert (calls.difference(seen, handle.node.data), handle.mount) == ("", handle.mount)
            assert os.fstat(handle.fd).st_size == len(handle.node.data)
            assert os.fstat(handle.fd).st_nlink == handle.node.nlink
        self.count()

    # -- locks -------------------------------------------------------------------------------------------------------

    @rule(holder=mounts, lock=locks, start=st.integers(0, BYTES - 1), length=st.integers(1, BYTES))
    def lock_record(self, holder: int, lock: int, start: int, length: int) -> None:
        length = min(length, BYTES - start)
        self.count()
        granted = self.locks.set_record(holder, lock, start, length)
        client = self.world.clients[holder]
        seen = client.call(errno_of, clients.lockf, "f", without_waiting(lock), length, start)
        assert seen == (0 if granted else errno.EAGAIN)

    @rule(holder=mounts, lock=locks)
    def lock_whole(self, holder: int, lock: int) -> None:
        self.count()
        granted = self.locks.set_whole(holder, lock)
        client = self.world.clients[holder]
        seen = client.call(errno_of, clients.flock, "f", without_waiting(lock))
        assert seen == (0 if granted else errno.EAGAIN)
        if not granted:
            client.call(clients.flock, "f", fcntl.LOCK_UN)
