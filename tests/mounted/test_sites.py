"""Policies and agents as processes on real mounts: copies, kills, a site's store that is gone, and nothing left over.

APOLLOFS_AGENT_KILLS=50 kills the agent more often than every run does.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from tests.faults.mount_faults import content, until
from tests.mounted.agents import objects, running, start_agent, status_of
from tests.mounted.harness import Bodies, GatewayBodies, LocalBodies, Namespace
from tests.support.radosgw_server import shared_gateway

pytestmark = pytest.mark.mounted
KILLS = int(os.environ.get("APOLLOFS_AGENT_KILLS", "3"))
SIZE = 300_000
SITES = ("west", "east", "south")


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    sites = [LocalBodies(site) for site in SITES]
    with Namespace.made(tmp_path, sites, format_options=("--block-size", "64K")) as namespace:
        yield namespace


def policy(namespace: Namespace, *options: str, path: str = "/") -> None:
    namespace.command("policy", "set", namespace.url, path, *options)


def save(directory: Path, number: int, size: int = SIZE) -> None:
    (directory / str(number)).write_bytes(content(number, size))


def wait_for_copies(namespace: Namespace, *sites: str) -> None:
    """Until these sites have all that west has, and say that nothing is left to do."""
    for site in sites:
        until(lambda site=site: objects(namespace, site) >= objects(namespace, "west"), f"{site} has all")  # type: ignore[misc]
        until(lambda site=site: status_of(namespace, site)["backlog"] == 0, f"{site} has no backlog")  # type: ignore[misc]


def test_reads_go_on_when_a_site_loses_its_store(namespace: Namespace) -> None:
    west, south = namespace.mount("west"), namespace.mount("south")
    with running(namespace, "east"):
        save(west.path, 0)
        policy(namespace, "--async", "east", "--bound", "30s")
        save(west.path, 1)
        wait_for_copies(namespace, "east")
        found = namespace.report("policy", "get", namespace.url, "/")
        until(
            lambda: namespace.report("policy", "get", namespace.url, "/")["progress"] == {"east": "done"}, "it is done"
        )
        assert (found["directory"], found["async"], found["bound_s"]) == ("/", ["east"], 30)
    (namespace.directory / "blobs-west").rename(namespace.directory / "gone")
    for number in (0, 1):
        assert (south.path / str(number)).read_bytes() == content(number, SIZE)
    (namespace.directory / "gone").rename(namespace.directory / "blobs-west")


def test_copies_in_s3_serve_when_a_directory_is_gone(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    sites: list[Bodies] = [
        LocalBodies("west"),
        GatewayBodies("east", shared_gateway(request.config), "copies"),
        LocalBodies("south"),
    ]
    with Namespace.made(tmp_path, sites, format_options=("--block-size", "1M")) as namespace:
        west, south = namespace.mount("west"), namespace.mount("south")
        for number in range(5):
            save(west.path, number, 700_000 * number + 20_000)
        policy(namespace, "--async", "east")
        with running(namespace, "east"):
            until(lambda: namespace.report("policy", "get", namespace.url, "/")["progress"] == {"east": "done"}, "done")
        (namespace.directory / "blobs-west").rename(namespace.directory / "gone")
        for number in range(5):
            assert (south.path / str(number)).read_bytes() == content(number, 700_000 * number + 20_000)
        (namespace.directory / "gone").rename(namespace.directory / "blobs-west")


def test_a_commit_is_at_the_named_site_when_fsync_returns(namespace: Namespace) -> None:
    policy(namespace, "--commit", "south")
    west = namespace.mount("west")
    for number in range(3):
        save(west.path, number, SIZE * 10 * number + 20_000)
        assert objects(namespace, "south") >= objects(namespace, "west")
        extents = namespace.report("info", str(west.path / str(number)))["extents"]
        assert {tuple(one["sites"]) for one in extents} == {("west", "south")}
    assert not objects(namespace, "east")


def test_kill_9_amid_copies(namespace: Namespace) -> None:
    rng, pause = random.Random(KILLS), Event()
    west = namespace.mount("west")
    policy(namespace, "--async", "east")
    number = 0
    for _ in range(KILLS):
        agent = start_agent(namespace, "east")
        for _ in range(10):
            save(west.path, number)
            number += 1
        pause.wait(rng.random() * 4)
        (west.path / str(rng.randrange(number))).unlink(missing_ok=True)
        agent.kill()
    with running(namespace, "east"):
        west.unmount()
        assert namespace.report("gc", namespace.url, "--grace", "0")["errors"] == []
        wait_for_copies(namespace, "east")
    assert namespace.report("gc", namespace.url, "--grace", "0")["errors"] == []
    assert objects(namespace, "east") == objects(namespace, "west")
    west = namespace.mount("west", name="again")
    for path in west.path.iterdir():
        path.unlink()
    west.unmount()
    assert namespace.report("gc", namespace.url, "--grace", "0")["errors"] == []
    assert [objects(namespace, site) for site in SITES] == [set(), set(), set()]


def test_agents_archive_the_change_log(namespace: Namespace) -> None:
    def segments() -> int:
        count: int = namespace.report("changes", "status", namespace.url)["segments"]
        return count

    west = namespace.mount("west")
    first = start_agent(namespace, "east", "--archive-every", "1s")
    save(west.path, 1)
    until(lambda: segments() > 0, "the first agent archives")
    before = segments()
    first.kill()
    second = start_agent(namespace, "south", "--archive-every", "1s")
    save(west.path, 2)
    until(lambda: segments() > before, "the second takes over")
    second.kill()
    west.unmount()
    lines = namespace.command("changes", namespace.url, "--from", "beginning", "--json").splitlines()
    assert {"1", "2"} <= {json.loads(line)["name"] for line in lines}


def test_a_site_that_a_policy_names_stays(namespace: Namespace) -> None:
    policy(namespace, "--async", "east")
    with pytest.raises(Exception, match="is named by 1 policies"):
        namespace.command("site", "remove", namespace.url, "--site", "east")
    namespace.command("policy", "clear", namespace.url, "/")
    namespace.command("site", "remove", namespace.url, "--site", "east")
    assert namespace.report("policy", "list", namespace.url) == []
