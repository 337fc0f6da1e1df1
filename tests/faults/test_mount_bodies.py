"""S3 that answers badly: retried or an error, never wrong bytes, never a hang."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from tests.faults.faulty_mounts import Faulty, faulty_mounts
from tests.faults.mount_faults import content, open_and_write, read_or_errno, works
from tests.support.radosgw_server import shared_gateway
from tests.support.s3_faults import Fault

pytestmark = [
    pytest.mark.faults,
    pytest.mark.mounted,
]
MIB = 1 << 20
SIZE = 3 * MIB
COMMIT_DEADLINE_S = 4
READ_DEADLINE_S = 5
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


@pytest.fixture(scope="module")
def mounts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    options = f"commit_deadline={COMMIT_DEADLINE_S},read_deadline={READ_DEADLINE_S}"
    with faulty_mounts(shared_gateway(request.config), tmp_path_factory.mktemp("s3"), options) as faulty:
        yield faulty


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
    faulty.go_down(READ_FAULTS[name])
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
    faulty.go_down(WRITE_FAULTS[name])
    assert open_and_write(faulty.here.path / path, data) == errno.EIO
    assert (faulty.there.path / path).stat().st_size == 0
    faulty.s3.clear()
    assert open_and_write(faulty.here.path / f"{path} again", data) == 0
    assert (faulty.there.path / f"{path} again").read_bytes() == data
