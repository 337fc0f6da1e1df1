"""S3 that answers badly, and a cache directory without space: retried or an error, never wrong bytes, never a hang."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.mount_faults import content, open_and_write, read_or_errno, until, works
from tests.mounted.client import Client
from tests.mounted.harness import GatewayBodies, LocalBodies, Mount, Namespace
from tests.support.radosgw_server import shared_gateway
from tests.support.s3_faults import Fault, FaultyS3

pytestmark = [
    pytest.mark.faults,
    pytest.mark.mounted,
]
MIB = 1 << 20
SIZE = 3 * MIB
COMMIT_DEADLINE_S = 4
READ_DEADLINE_S = 5
DISK_BYTES = 288 * MIB
READ_FAULTS = {
    "500": Fault("status", "GET", status=500),
    "503": Fault("status", "GET", status=503, code="SlowDown"),
    "reset": Fault("reset", "GET"),
    "truncate": Fault("truncate", "GET"),
    "reset_body": Fault("reset_body", "GET"),
    "flip": Fault("flip", "GET", position=1000),
    "flip at the end": Fault("flip", "GET", position=-1),
    "short": Fault("short", "GET"),
    "ignore_range": Fault("ignore_range", "GET"),
}
WRITE_FAULTS = {
    "500": Fault("status", "PUT", status=500),
    "503": Fault("status", "PUT", status=503, code="SlowDown"),
    "reset": Fault("reset", "PUT"),
    "lost_reply": Fault("lost_reply", "PUT"),
}


@dataclass(frozen=True)
class Faulty:
    """Two mounts at one site, each with a cache of its own, whose store is spoilt at will."""

    s3: FaultyS3
    here: Mount
    there: Mount


@pytest.fixture(scope="module")
def mounts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    gateway = shared_gateway(request.config)
    with FaultyS3.serving(gateway.endpoint) as s3:
        sites = [GatewayBodies("here", gateway, "faults", s3.endpoint)]
        with Namespace.made(tmp_path_factory.mktemp("s3"), sites, format_options=("--block-size", "1M")) as namespace:
            options = ("-o", f"commit_deadline={COMMIT_DEADLINE_S},read_deadline={READ_DEADLINE_S}")
            here, there = (namespace.mount("here", *options, name=name) for name in ("a", "b"))
            for mount in (here, there):
                # what goes wrong with the store is told; a traceback would be a bug
                mount.expected_logs.append(r"\A(?:(?!Traceback)[\s\S])*\Z")
            yield Faulty(s3, here, there)
            s3.clear()


@pytest.fixture
def faulty(mounts: Faulty) -> Iterator[Faulty]:
    mounts.s3.clear()
    yield mounts
    mounts.s3.clear()


def repeated(fault: Fault, times: int) -> Fault:
    return Fault(fault.kind, fault.method, "", times, fault.status, fault.code, fault.position)


@pytest.mark.parametrize("name", list(READ_FAULTS))
def test_a_read_that_fails_twice_is_repeated(faulty: Faulty, name: str) -> None:
    data = content(len(name), SIZE)
    assert open_and_write(faulty.here.path / name, data) == 0
    faulty.s3.add(repeated(READ_FAULTS[name], 2))
    assert read_or_errno(faulty.there.path / name) in (data, errno.EIO)
    faulty.s3.clear()
    assert (faulty.there.path / name).read_bytes() == data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["500", "flip"])
def test_a_read_that_always_fails_is_eio(faulty: Faulty, name: str) -> None:
    path = f"always {name}"
    data = content(len(name) + 100, SIZE)
    assert open_and_write(faulty.here.path / path, data) == 0
    faulty.s3.add(repeated(READ_FAULTS[name], 1_000_000))
    assert read_or_errno(faulty.there.path / path) == errno.EIO
    assert works(faulty.there.path / "works-inline")
    faulty.s3.clear()
    assert (faulty.there.path / path).read_bytes() == data


@pytest.mark.parametrize("name", list(WRITE_FAULTS))
def test_an_upload_that_fails_twice_is_repeated(faulty: Faulty, name: str) -> None:
    data = content(len(name) + 200, SIZE)
    faulty.s3.add(repeated(WRITE_FAULTS[name], 2))
    assert open_and_write(faulty.here.path / f"put {name}", data) == 0
    faulty.s3.clear()
    assert (faulty.there.path / f"put {name}").read_bytes() == data


@pytest.mark.parametrize("name", [name for name in WRITE_FAULTS if name != "lost_reply"])
def test_an_upload_that_always_fails_is_told_by_fsync(faulty: Faulty, name: str) -> None:
    path, data = f"never {name}", content(len(name) + 300, SIZE)
    faulty.s3.add(repeated(WRITE_FAULTS[name], 1_000_000))
    assert open_and_write(faulty.here.path / path, data) == errno.EIO
    assert (faulty.there.path / path).stat().st_size == 0
    faulty.s3.clear()
    assert open_and_write(faulty.here.path / f"{path} again", data) == 0
    assert (faulty.there.path / f"{path} again").read_bytes() == data


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "cache-full"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(disk)], check=True, timeout=30)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True, timeout=30)


def test_a_full_cache_directory(small_disk: Path, tmp_path: Path) -> None:
    """Writing is ENOSPC or goes through; reading goes through; and with space again all is well."""
    with Namespace.made(tmp_path, [LocalBodies("here")]) as namespace:
        full, other = namespace.mount("here", name="full"), namespace.mount("here", name="other")
        full.expected_logs.append(r"(?i)space|cache|disk")
        data = content(1, 16 * MIB)
        assert open_and_write(other.path / "big", data) == 0
        filler = small_disk / "filler"
        with Client.started() as client:
            client.call(_fill, filler)
            assert client.start(open_and_write, full.path / "new", data).result() in (0, errno.ENOSPC)
            assert client.start(read_or_errno, full.path / "big").result() == data
            assert client.call(open_and_write, full.path / "small", b"inline") in (0, errno.ENOSPC)
            filler.unlink()
            until(lambda: client.call(open_and_write, full.path / "later", data) == 0, "writing works again")
            assert client.call(read_or_errno, other.path / "later") == data


def _fill(path: Path) -> None:
    """Take all the space there is."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(MIB))
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
    os.sync()
