"""One pair of mounts for the whole run: two sites of one namespace, one on a radosgw, one on plain files."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounted.client import Client
from tests.mounted.harness import Bodies, GatewayBodies, LocalBodies, Mount, Namespace
from tests.mounted.watchdog import Watchdog
from tests.support.commands import World, etcd_server
from tests.support.radosgw_server import shared_gateway

_NUMBERS = itertools.count(1)
NOBODY = 65534
CACHE_SIZE = "1G"
"""Of each mount: what is made in a long run must not fill the disk."""


@dataclass(frozen=True)
class Pair:
    """Two mounts of one namespace."""

    namespace: Namespace
    west: Mount
    east: Mount

    @property
    def mounts(self) -> tuple[Mount, Mount]:
        return self.west, self.east


@dataclass(frozen=True)
class Places:
    """One directory of the namespace, on one mount and on the other."""

    here: Path
    there: Path
    pair: Pair


@pytest.fixture(scope="session")
def watchdog() -> Iterator[Watchdog]:
    with Watchdog.started() as watchdog:
        yield watchdog


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Mounted once: mounting for each test would take most of the time."""
    sites: list[Bodies] = [GatewayBodies("west", shared_gateway(request.config), "posix"), LocalBodies("east")]
    with Namespace.made(tmp_path_factory.mktemp("pair"), sites, format_options=("--block-size", "1M")) as namespace:
        west, east = (namespace.mount(site, "--cache-size", CACHE_SIZE) for site in ("west", "east"))
        yield Pair(namespace, west, east)


@pytest.fixture
def places(request: pytest.FixtureRequest, pair: Pair, watchdog: Watchdog) -> Iterator[Places]:
    """A new directory. After the test it is removed through the mounts, the whole namespace is checked, and the
    daemons must not have logged anything unexpected.
    """
    for mount in pair.mounts:
        mount.alarms()
        mount.expected_logs[:] = [
            pattern for marker in request.node.iter_markers("expects_log") for pattern in marker.args
        ]
    watchdog.watch(mount.pid for mount in pair.mounts)
    name = f"test-{next(_NUMBERS)}"
    here, there = (mount.path / name for mount in pair.mounts)
    here.mkdir()
    here.chmod(0o777)
    try:
        yield Places(here, there, pair)
        shutil.rmtree(there)
    finally:
        watchdog.calm()
        alarms = [line for mount in pair.mounts for line in mount.alarms()]
        print("\n".join(alarms))
    if alarms:
        pytest.fail("the daemons have logged:\n" + "\n".join(alarms), pytrace=False)
    violations = pair.namespace.violations()
    assert violations == []


@pytest.fixture
def here(places: Places) -> Path:
    """The test's directory on one mount."""
    return places.here


@pytest.fixture
def there(places: Places) -> Path:
    """The same directory on the other mount, at another site."""
    return places.there


@pytest.fixture
def client() -> Iterator[Client]:
    with Client.started() as client:
        yield client


@pytest.fixture
def other_client() -> Iterator[Client]:
    with Client.started() as client:
        yield client


@pytest.fixture
def nobody(here: Path) -> Iterator[Client]:
    """A process of an ordinary user that stands in the test's directory: name files relative to it."""
    with Client.started(uid=NOBODY, directory=here) as client:
        yield client


# -- the command, on mounts of one test alone -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with etcd_server(tmp_path_factory.mktemp("etcd")) as address:
        yield address


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.clean_up()


@pytest.fixture
def url(world: World, server: str, request: pytest.FixtureRequest) -> str:
    """A formatted volume of this test."""
    url = f"etcd://{server}/{re.sub('[^a-z0-9]', '-', request.node.name)[:60]}"
    world.format(url)
    return url
