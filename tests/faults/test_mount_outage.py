"""S3 is down amid a save: the save waits and ends well, or says EIO at its deadline and can be ended later.

APOLLOFS_OUTAGE_S=60 keeps it down that long; in every run it comes back as soon as the mount has tried a few times.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from tests.faults.faulty_mounts import Faulty, faulty_mounts
from tests.faults.mount_faults import content, read_or_errno, until
from tests.mounted.client import Client
from tests.mounted.clients import close, errno_of, fsync, open_as, write
from tests.mounted.harness import Mount
from tests.support.radosgw_server import shared_gateway
from tests.support.s3_faults import Fault

pytestmark = [pytest.mark.faults, pytest.mark.mounted]
OUTAGE_S = float(os.environ.get("APOLLOFS_OUTAGE_S", "0"))
MIB = 1 << 20
SIZE = 6 * MIB + 4321
TRIES = 6
SHORT_S = 3
DOWN = {
    "refusing": Fault("reset"),
    "answering 503": Fault("status", status=503, code="SlowDown"),
    "silent": Fault("hang"),
}
WAYS = {"passthrough": os.O_CREAT | os.O_WRONLY | os.O_TRUNC, "daemon": os.O_CREAT | os.O_RDWR}
CASES = [("refusing", "passthrough"), ("refusing", "daemon"), ("answering 503", "daemon")]
SILENT = pytest.param("silent", "passthrough", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def patient(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    options = f"commit_deadline={60 + int(2 * OUTAGE_S)}"
    with faulty_mounts(shared_gateway(request.config), tmp_path_factory.mktemp("patient"), options) as faulty:
        yield faulty


@pytest.fixture(scope="module")
def hasty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    options = f"commit_deadline={SHORT_S}"
    with faulty_mounts(shared_gateway(request.config), tmp_path_factory.mktemp("hasty"), options) as faulty:
        yield faulty


@pytest.fixture
def client() -> Iterator[Client]:
    with Client.started() as client:
        yield client


def passed(mount: Mount) -> int:
    return int(mount.status()["bodies"]["passthrough_opens"])


def begin(client: Client, mount: Mount, path: Path, way: str) -> None:
    """Open the file that is saved, in the way that the case is about."""
    before = passed(mount)
    client.call(open_as, "saved", path, WAYS[way])
    assert (passed(mount) > before) == (way == "passthrough")


@pytest.mark.parametrize(("down", "way"), [*CASES, SILENT])
def test_a_save_waits_until_s3_is_back(patient: Faulty, client: Client, down: str, way: str) -> None:
    name, data = f"{down} {way}", content(len(down + way), SIZE)
    begin(client, patient.here, patient.here.path / name, way)
    client.call(write, "saved", data[: 2 * MIB], 0)
    patient.s3.clear()
    began = monotonic()
    patient.go_down(DOWN[down])
    client.call(write, "saved", data[2 * MIB :], 2 * MIB)
    ending = client.start(fsync, "saved")
    until(lambda: patient.s3.count("PUT") >= TRIES and monotonic() > began + OUTAGE_S, "it is tried", 60 + OUTAGE_S)
    assert not ending.is_done()
    assert (patient.there.path / name).stat().st_size < SIZE
    patient.s3.clear()
    ending.result()
    assert (patient.there.path / name).read_bytes() == data
    client.call(close, "saved")
    assert (patient.here.path / name).read_bytes() == data


@pytest.mark.parametrize(("down", "way"), CASES)
def test_past_the_deadline_fsync_says_so_and_can_succeed_later(
    hasty: Faulty, client: Client, down: str, way: str
) -> None:
    name, data = f"{down} {way}", content(len(down + way), SIZE)
    begin(client, hasty.here, hasty.here.path / name, way)
    hasty.go_down(DOWN[down])
    client.call(write, "saved", data[: 4 * MIB], 0)
    assert client.call(errno_of, fsync, "saved") == errno.EIO
    assert (hasty.there.path / name).stat().st_size == 0
    client.call(write, "saved", data[4 * MIB :], 4 * MIB)
    assert client.call(errno_of, fsync, "saved") == errno.EIO
    hasty.s3.clear()
    client.call(fsync, "saved")
    assert (hasty.there.path / name).read_bytes() == data
    client.call(close, "saved")
    assert (hasty.here.path / name).read_bytes() == data


@pytest.mark.parametrize("way", list(WAYS))
def test_close_past_the_deadline_says_so(hasty: Faulty, client: Client, way: str) -> None:
    """And what it could not store is no half of a file elsewhere."""
    name = f"closed {way}"
    begin(client, hasty.here, hasty.here.path / name, way)
    hasty.go_down(DOWN["refusing"])
    client.call(write, "saved", content(1, SIZE), 0)
    assert client.call(errno_of, close, "saved") == errno.EIO
    assert read_or_errno(hasty.there.path / name) == b""
    hasty.s3.clear()
    (hasty.here.path / name).write_bytes(content(2, SIZE))
    assert (hasty.there.path / name).read_bytes() == content(2, SIZE)
