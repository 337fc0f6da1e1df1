"""What a mount serves that is frozen, cut off or dead: nothing older than its lease; with a guard no pages either."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.mount_faults import until, works
from tests.mounted.client import Client
from tests.mounted.clients import OPEN, errno_of, open_as, read
from tests.mounted.harness import LocalBodies, Mount, Namespace
from tests.support.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.faults, pytest.mark.mounted]
LEASE_S = 3
OLD, NEW = b"old" * 100_000, b"new" * 100_000
SEEN_S = 0.5
"""How long it is looked whether a reader, which must wait, does not."""
STATS = 200
MAPPED: dict[str, mmap.mmap] = {}


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    sites = [LocalBodies("west"), LocalBodies("east")]
    with Namespace.made(tmp_path, sites, format_options=("--block-size", "1M")) as namespace:
        yield namespace


@pytest.fixture
def proxy(namespace: Namespace) -> Iterator[TcpProxy]:
    """What leads the west mount to etcd, where the test wants it to."""
    with TcpProxy.started(namespace.cluster.endpoints[0]) as proxy:
        yield proxy
        # they need it to commit at their end
        for mount in namespace.mounts:
            if mount.is_mounted:
                mount.unmount()


def mounted(namespace: Namespace, site: str, *options: str, proxy: TcpProxy | None = None) -> Mount:
    url = f"etcd://{proxy.endpoint[0]}:{proxy.endpoint[1]}/{namespace.volume}" if proxy else ""
    mount = namespace.mount(site, "--lease-ttl", str(LEASE_S), *options, url=url)
    mount.expected_logs += [r"has lost its lease", r"no new session yet", r"session", r"does not renew its lease"]
    mount.expected_logs += [r"etcd", r"watch", r"unavailable"] if proxy else []
    return mount


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# -- what the clients do ----------------------------------------------------------------------------------------------


def map_as(name: str) -> bytes:
    """Map the open file `name`, and have its pages."""
    MAPPED[name] = mmap.mmap(OPEN[name], 0, prot=mmap.PROT_READ)
    return MAPPED[name][:]


def mapped(name: str) -> bytes:
    return MAPPED[name][:]


def map_at(name: str, offset: int) -> bytes:
    """As `map_as`, but of one page only, and what the kernel reads around it."""
    MAPPED[name] = mmap.mmap(OPEN[name], 0, prot=mmap.PROT_READ)
    MAPPED[name].madvise(mmap.MADV_RANDOM)
    return mapped_at(name, offset)


def mapped_at(name: str, offset: int) -> bytes:
    return MAPPED[name][offset : offset + 3]


@contextmanager
def readers(path: Path) -> Iterator[tuple[Client, Client]]:
    """One that reads an open file and one that has mapped it; both have read it, so its pages are cached."""
    with Client.started() as reader, Client.started() as mapper:
        for client in (reader, mapper):
            client.call(open_as, "file", path, os.O_RDONLY)
        assert reader.call(read, "file", len(OLD), 0) == OLD
        assert mapper.call(map_as, "file") == OLD
        yield reader, mapper


def delegated(mount: Mount, path: Path) -> None:
    """Have the mount take the file's directory, so that others must wait for its lease."""

    def answers_by_itself() -> bool:
        before = mount.status()["fuse"]["requests"]
        for _ in range(STATS):
            os.stat(path)
        return bool(mount.status()["fuse"]["requests"] - before < STATS)

    until(answers_by_itself, "the kernel answers by itself")


@pytest.fixture
def west(namespace: Namespace) -> Mount:
    mount = mounted(namespace, "west", "-o", "guard")
    (mount.path / "directory").mkdir()
    (mount.path / "directory" / "file").write_bytes(OLD)
    return mount


@pytest.fixture
def east(namespace: Namespace) -> Mount:
    return mounted(namespace, "east")


# -- frozen -----------------------------------------------------------------------------------------------------------


def test_pages_of_a_frozen_mount_end_with_its_lease(west: Mount, east: Mount) -> None:
    path, there = west.path / "directory" / "file", east.path / "directory" / "file"
    with readers(path) as (reader, mapper):
        delegated(west, path)
        west.signal(signal.SIGSTOP)
        try:
            there.write_bytes(NEW)  # waits for the end of the lease
            reading, mapping = reader.start(read, "file", len(NEW), 0), mapper.start(mapped, "file")
            assert not mapping.is_done(SEEN_S)
            assert not reading.is_done()
        finally:
            west.signal(signal.SIGCONT)
        assert reading.result() == NEW
        assert mapping.result() == NEW
        until(lambda: works(west.path / "after"), "the mount serves again")
        assert west.status()["guard"]["drops"] >= 1
        # armed again: the new session's lease is guarded too
        delegated(west, path)
        west.signal(signal.SIGSTOP)
        try:
            there.write_bytes(OLD)
            mapping = mapper.start(mapped, "file")
            assert not mapping.is_done(SEEN_S)
        finally:
            west.signal(signal.SIGCONT)
        assert mapping.result() == OLD


def test_pages_behind_one_that_is_being_read_end_too(west: Mount, east: Mount) -> None:
    """The guard's call waits for the page that is being read, and would never come to those behind it."""
    path, there = west.path / "directory" / "large", east.path / "directory" / "large"
    path.write_bytes(10 * OLD)
    tail = 9 * len(OLD)
    with Client.started() as reader, Client.started() as mapper:
        for client in (reader, mapper):
            client.call(open_as, "file", path, os.O_RDONLY)
        assert mapper.call(map_at, "file", tail) == b"old"
        delegated(west, path)
        west.signal(signal.SIGSTOP)
        try:
            reading = reader.start(read, "file", 3, 0)
            there.write_bytes(10 * NEW)
            mapping = mapper.start(mapped_at, "file", tail)
            assert not mapping.is_done(SEEN_S)
            assert not reading.is_done()
        finally:
            west.signal(signal.SIGCONT)
        assert mapping.result() == b"new"
        assert reading.result() == b"new"


def test_pages_outlive_a_short_freeze(namespace: Namespace) -> None:
    west = mounted(namespace, "west", "-o", "guard", "--lease-ttl", "60")
    path = west.path / "file"
    path.write_bytes(OLD)
    with readers(path) as (_, mapper):
        drops = west.status()["guard"]["drops"]
        west.signal(signal.SIGSTOP)
        try:
            assert mapper.call(mapped, "file") == OLD
        finally:
            west.signal(signal.SIGCONT)
        assert west.status()["guard"]["drops"] == drops


# -- cut off ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("-o", "guard")], ids=["alone", "guarded"])
def test_a_mount_that_is_cut_off_serves_nothing_older_than_its_lease(
    namespace: Namespace, proxy: TcpProxy, east: Mount, options: tuple[str, ...]
) -> None:
    west = mounted(namespace, "west", *options, proxy=proxy)
    here, there = west.path / "directory", east.path / "directory"
    here.mkdir()
    (here / "file").write_bytes(OLD)
    (here / "gone").touch(0o600)
    (here / "changed").touch(0o600)
    with readers(here / "file") as (reader, mapper), Client.started() as names, Client.started() as attributes:
        for name in ("file", "gone", "changed"):
            delegated(west, here / name)
        proxy.blackhole()
        try:
            os.unlink(there / "gone")
            (there / "changed").chmod(0o640)
            (there / "file").write_bytes(NEW)
            reading = reader.start(read, "file", len(NEW), 0)
            gone, changed = names.start(errno_of, os.stat, here / "gone"), attributes.start(os.stat, here / "changed")
            mapping = mapper.start(mapped, "file")
            for waiting in (reading, gone, changed, mapping):
                assert not waiting.is_done(SEEN_S / 4)
        finally:
            proxy.heal()
        assert gone.result() == errno.ENOENT
        assert changed.result().st_mode & 0o777 == 0o640
        assert reading.result() == NEW
        assert mapping.result() == NEW


# -- the guard's own life ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["serving", "frozen"])
def test_nobody_waits_for_a_killed_daemon(west: Mount, frozen: bool) -> None:
    """Its guard lets the connection go, and leaves no pages behind."""
    path = west.path / "directory" / "file"
    guard = west.status()["guard"]["pid"]
    with readers(path) as (reader, mapper), Client.started() as other:
        if frozen:
            west.signal(signal.SIGSTOP)
            waiting = other.start(errno_of, os.stat, west.path / "directory" / "absent")
            assert not waiting.is_done(SEEN_S)
        west.kill()
        if frozen:
            assert waiting.result() in (errno.ENOTCONN, errno.ECONNABORTED)
        until(lambda: not is_running(guard), "the end of the guard")
        assert other.call(errno_of, os.stat, path) == errno.ENOTCONN
        assert reader.call(errno_of, read, "file", 10, 0) == errno.ENOTCONN
        mapping = mapper.start(mapped, "file")
        with pytest.raises(AssertionError, match="has died"):  # SIGBUS
            mapping.result()


def test_the_guard_ends_with_the_mount(west: Mount) -> None:
    facts = west.status()["guard"]
    assert facts["running"]
    assert is_running(facts["pid"])
    west.unmount()
    until(lambda: not is_running(facts["pid"]), "the end of the guard")


def test_a_guard_that_is_killed_is_replaced(west: Mount, east: Mount) -> None:
    west.expected_logs.append(r"the guard of .* ended with status -9")
    path, there = west.path / "directory" / "file", east.path / "directory" / "file"
    with readers(path) as (_, mapper):
        first = west.status()["guard"]["pid"]
        os.kill(first, signal.SIGKILL)
        until(lambda: west.status()["guard"]["pid"] not in (0, first), "another guard")
        delegated(west, path)
        west.signal(signal.SIGSTOP)
        try:
            there.write_bytes(NEW)
            mapping = mapper.start(mapped, "file")
            assert not mapping.is_done(SEEN_S)
        finally:
            west.signal(signal.SIGCONT)
        assert mapping.result() == NEW


def test_a_mount_says_that_it_has_no_guard(east: Mount) -> None:
    assert not east.status()["guard"]["running"]
