"""`apollofs seal` and a mount that is cut off from etcd: what is sealed stays readable for its term, nothing else."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.mount_faults import until
from tests.mounted.client import Client
from tests.mounted.clients import errno_of
from tests.mounted.harness import HarnessError, LocalBodies, Mount, Namespace
from tests.support.tcp_proxy import TcpProxy

pytestmark = pytest.mark.mounted
LEASE_S = 3
SMALL, LARGE = b"small", random.Random(5).randbytes(300_000)
LONG = "1h"
SHORT_S = 12
FILES = 20


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    sites = [LocalBodies("west"), LocalBodies("east")]
    with Namespace.made(tmp_path, sites, format_options=("--block-size", "64K")) as namespace:
        yield namespace


@pytest.fixture
def proxy(namespace: Namespace) -> Iterator[TcpProxy]:
    """What leads the east mount to etcd."""
    with TcpProxy.started(namespace.cluster.endpoints[0]) as proxy:
        yield proxy
        for mount in namespace.mounts:
            if mount.is_mounted:
                mount.unmount()


@pytest.fixture
def west(namespace: Namespace) -> Mount:
    """Has made a dataset two directories down."""
    mount = namespace.mount("west", "--lease-ttl", str(LEASE_S))
    tree = mount.path / "data" / "set"
    (tree / "part").mkdir(parents=True)
    for number in range(FILES):
        (tree / f"file{number}").write_bytes(SMALL)
    (tree / "part" / "large").write_bytes(LARGE)
    os.symlink("part/large", tree / "link")
    (mount.path / "data" / "open").write_bytes(SMALL)
    return mount


@pytest.fixture
def east(namespace: Namespace, proxy: TcpProxy) -> Mount:
    url = f"etcd://{proxy.endpoint[0]}:{proxy.endpoint[1]}/{namespace.volume}"
    mount = namespace.mount("east", "--lease-ttl", str(LEASE_S), "-o", "operation_deadline=4", url=url)
    mount.expected_logs += [r"has lost its lease", r"no new session yet", r"etcd", r"watch", r"unavailable"]
    return mount


def seal(namespace: Namespace, west: Mount, term: str) -> Path:
    namespace.command("seal", str(west.path / "data" / "set"), "--term", term)
    return Path("data/set")


def read_all(tree: Path) -> None:
    """List, stat and read everything, and see that it is as it was made."""
    names = {f"file{number}" for number in range(FILES)}
    assert set(os.listdir(tree)) == {*names, "part", "link"}
    for name in names:
        assert (tree / name).stat().st_size == len(SMALL)
        assert (tree / name).read_bytes() == SMALL
    assert os.listdir(tree / "part") == ["large"]
    assert (tree / "link").read_bytes() == LARGE
    with pytest.raises(FileNotFoundError):
        (tree / "absent").stat()


def trusts(mount: Mount, tree: Path, groups: int) -> bool:
    """Whether a mount has cached so many directories of the tree under its seal, and has read it all since."""
    trusted = mount.status()["seals"]["groups"] >= groups
    read_all(tree)
    return bool(trusted)


def has_no_session(mount: Mount) -> bool:
    return "no new session yet" in mount.log.path.read_text()


def test_sealed_data_stays_readable_in_a_partition(
    namespace: Namespace, proxy: TcpProxy, west: Mount, east: Mount
) -> None:
    tree = east.path / seal(namespace, west, LONG)
    until(lambda: trusts(east, tree, 2), "the seal is trusted")
    (east.path / "data" / "open").read_bytes()
    proxy.blackhole()
    try:
        until(lambda: has_no_session(east), "the lease has ended")
        with Client.started() as client:
            client.start(read_all, tree).result()
            # what is not sealed fails, and is not answered from what was
            assert client.start(errno_of, os.stat, east.path / "data" / "open").result() == errno.EIO
            assert client.start(errno_of, os.listdir, east.path / "data").result() == errno.EIO
            assert client.start(errno_of, (tree / "new").touch).result() in (errno.EIO, errno.EROFS)
            way = client.start(os.stat, east.path / "data").result()
            assert way.st_nlink == 1, "how many subdirectories there are is not known"
    finally:
        proxy.heal()
    until(lambda: errno_of(os.stat, east.path / "data" / "open") == 0, "the mount is back")
    read_all(tree)


def refused(mount: Mount, tree: Path) -> list[Callable[[], object]]:
    """All that would change a sealed tree."""
    return [
        lambda: (tree / "new").touch(),
        lambda: os.mkdir(tree / "part" / "new"),
        lambda: os.unlink(tree / "file1"),
        lambda: os.rename(tree / "file1", tree / "other"),
        lambda: os.rename(tree / "file1", mount.path / "out"),
        lambda: os.rename(mount.path / "data" / "open", tree / "in"),
        lambda: os.link(tree / "file1", mount.path / "link"),
        lambda: os.truncate(tree / "file1", 0),
        lambda: os.chmod(tree / "file1", 0o600),
        lambda: os.utime(tree),
        lambda: os.setxattr(tree / "file1", "user.a", b"b"),
        lambda: os.close(os.open(tree / "file1", os.O_WRONLY)),
        lambda: os.rename(tree, mount.path / "moved"),
    ]


def test_what_is_sealed_can_not_be_changed_from_any_mount(namespace: Namespace, west: Mount, east: Mount) -> None:
    place = seal(namespace, west, LONG)
    for mount in (west, east):
        tree = mount.path / place
        for call in refused(mount, tree):
            assert errno_of(call) == errno.EROFS
        assert errno_of(os.rename, mount.path / "data", mount.path / "moved") == errno.EBUSY
        assert errno_of(os.chmod, mount.path / "data", 0o700) == errno.EBUSY
        (mount.path / "data" / f"beside-{mount.site}").touch()
        read_all(tree)
    listed = namespace.report("seals", namespace.url)
    assert [(one["path"], one["phase"], one["term_s"]) for one in listed] == [("/data/set", "sealed", 3600.0)]


def test_a_term_that_is_over_ends_what_a_mount_that_is_cut_off_answers(
    namespace: Namespace, proxy: TcpProxy, west: Mount, east: Mount
) -> None:
    """Unsealed meanwhile, after waiting for that mount's term; then the tree is changed. No old byte is read."""
    tree = east.path / seal(namespace, west, f"{SHORT_S}s")
    until(lambda: trusts(east, tree, 2), "the seal is trusted")
    proxy.blackhole()
    try:
        namespace.command("unseal", str(west.path / "data" / "set"))
        (west.path / "data" / "set" / "file1").write_bytes(b"new")
        with Client.started() as client:
            assert client.start(errno_of, (tree / "file1").read_bytes).result() == errno.EIO
    finally:
        proxy.heal()
    until(lambda: errno_of(os.stat, tree) == 0, "the mount is back")
    assert (tree / "file1").read_bytes() == b"new"


def test_unsealing_waits_for_mounts_that_answer_and_no_longer(namespace: Namespace, west: Mount, east: Mount) -> None:
    """The term is an hour: it is not waited for."""
    place = seal(namespace, west, LONG)
    for mount in (west, east):
        until(lambda mount=mount: trusts(mount, mount.path / place, 2), "the seal is trusted")  # type: ignore[misc]
    trusting = namespace.report("seals", str(west.path))[0]["trusted_by"]
    assert sorted(one.split(":")[1] for one in trusting) == sorted((str(west.path), str(east.path)))
    namespace.command("unseal", str(west.path / place))
    assert namespace.report("seals", namespace.url) == []
    (west.path / place / "file1").write_bytes(b"new")
    assert (east.path / place / "file1").read_bytes() == b"new"
    os.rename(east.path / place, east.path / "moved")
    assert (west.path / "moved" / "link").read_bytes() == LARGE


def test_a_frozen_mount_serves_nothing_old_after_the_term(namespace: Namespace, west: Mount, east: Mount) -> None:
    tree = east.path / seal(namespace, west, f"{SHORT_S}s")
    until(lambda: trusts(east, tree, 2), "the seal is trusted")
    east.signal(signal.SIGSTOP)
    try:
        namespace.command("unseal", str(west.path / "data" / "set"))
        os.unlink(west.path / "data" / "set" / "file1")
        with Client.started() as client:
            gone = client.start(errno_of, os.stat, tree / "file1")
            assert not gone.is_done(0.2), "the kernel asks the daemon"
            east.signal(signal.SIGCONT)
            assert gone.result() == errno.ENOENT
    finally:
        east.signal(signal.SIGCONT)


def test_errors_name_what_is_in_the_way(namespace: Namespace, west: Mount) -> None:
    seal(namespace, west, LONG)
    for words, told in (
        (("seal", str(west.path / "data" / "set" / "part")), r"part of /data/set, which is sealed"),
        (("seal", str(west.path / "data")), r"below is sealed already"),
        (("seal", str(west.path / "data" / "set"), "--term", "2h"), r"sealed already, for a term of 3600 s"),
        (("unseal", str(west.path / "data")), r"not the root of a sealed tree"),
    ):
        with pytest.raises(HarnessError) as told_as:
            namespace.command(*words)
        assert re.search(told, str(told_as.value))
    namespace.command("seal", str(west.path / "data" / "set"), "--term", LONG)
