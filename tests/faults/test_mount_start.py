"""What keeps a mount from beginning is one clear line and a status that is not zero, and nothing is left mounted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from apollofs.fs.embedded import free_ports
from tests.support.commands import World
from tests.support.etcd_server import ROOT_PASSWORD, EtcdCluster
from tests.support.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.faults, pytest.mark.mounted]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster.started(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    assert world.mounts() == []
    world.clean_up()


def url_of(address: tuple[str, int], volume: str = "test", user: str = "") -> str:
    return f"etcd://{user}{address[0]}:{address[1]}/{volume}"


def words(world: World, url: str, site: str = "here", mountpoint: str = "m") -> list[object]:
    return ["mount", url, world.directory / mountpoint, "--site", site, "--cache-dir", world.directory / "cache"]


@pytest.fixture
def url(world: World, cluster: EtcdCluster) -> str:
    (world.directory / "m").mkdir()
    url = url_of(cluster.server.endpoint, f"v{abs(hash(world.directory)) % 10**9}")
    world.format(url)
    return url


def test_a_volume_that_is_not_formatted(world: World, cluster: EtcdCluster, url: str) -> None:
    line = world.fail(*words(world, url_of(cluster.server.endpoint, "nothing-here")))
    assert "nothing-here" in line
    assert "format" in line


def test_a_site_that_is_not_there(world: World, url: str) -> None:
    assert "no site 'there'" in world.fail(*words(world, url, site="there"))


def test_a_server_that_is_not_there(world: World, url: str) -> None:
    address = ("127.0.0.1", free_ports(1)[0])
    assert f"etcd at {address[0]}:{address[1]} can't be reached" in world.fail(*words(world, url_of(address)))


def test_a_server_that_says_nothing(world: World, cluster: EtcdCluster, url: str) -> None:
    with TcpProxy.started(cluster.server.endpoint) as proxy:
        proxy.blackhole()
        assert "can't be reached" in world.fail(*words(world, url_of(proxy.endpoint)))


def test_mountpoints_that_can_not_be_used(world: World, url: str) -> None:
    (world.directory / "file").touch()
    for mountpoint in ("missing", "file"):
        assert mountpoint in world.fail(*words(world, url, mountpoint=mountpoint))


def test_a_mountpoint_that_is_a_mount_already(world: World, url: str) -> None:
    mountpoint = world.mount(url, "m")
    assert "m" in world.fail(*words(world, url))
    world.run("umount", mountpoint)


def test_a_blob_store_that_can_not_be_used(world: World, cluster: EtcdCluster, url: str) -> None:
    """The directory of the bodies is on a disk that is not there now."""
    (world.directory / "blobs-here").rename(world.directory / "elsewhere")
    line = world.fail(*words(world, url))
    assert "blob store of site 'here'" in line
    assert "blobs-here" in line


def test_a_wrong_password(world: World, tmp_path: Path) -> None:
    (world.directory / "m").mkdir()
    with EtcdCluster.started(tmp_path / "auth") as cluster:
        cluster.enable_auth(("stranger", "secret"))
        address = cluster.server.endpoint
        formatted = world.execute(
            "format", url_of(address, user="root@"), "--site", "here", "--blobs", world.blobs("here"),
            "--create-bucket", APOLLOFS_ETCD_PASSWORD=ROOT_PASSWORD,
        )  # fmt: skip
        assert formatted.returncode == 0, formatted.stderr
        line = world.fail(*words(world, url_of(address, user="root@")), APOLLOFS_ETCD_PASSWORD="guessed")
        assert "does not let us in" in line
        assert "guessed" not in line
        line = world.fail(*words(world, url_of(address, user="stranger@")), APOLLOFS_ETCD_PASSWORD="secret")
        assert "does not let us in" in line
        line = world.fail(*words(world, url_of(address)))
        assert "does not let us in" in line
