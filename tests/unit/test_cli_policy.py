"""`apollofs policy` and `apollofs agent status` without a mount: what they say, and the lines for mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import World, etcd_server


@pytest.fixture
def world(tmp_path: Path) -> Iterator[tuple[World, str]]:
    world = World(tmp_path)
    with etcd_server(tmp_path / "etcd") as server:
        url = f"etcd://{server}/policies"
        world.format(url)
        for site in ("east", "south"):
            world.run("site", "add", url, "--site", site, "--blobs", world.blobs(site), "--create-bucket")
        yield world, url


def test_policies_are_set_told_and_cleared(world: tuple[World, str]) -> None:
    commands, url = world
    assert "no policy applies" in commands.run("policy", "get", url, "/")
    commands.run("policy", "set", url, "/", "--async", "south,east", "--bound", "5m", "--read", "here")
    found = commands.report("policy", "get", url, "/")
    assert (found["async"], found["bound_s"], found["read"]) == (["east", "south"], 300, ["here"])
    assert found["progress"] == {"east": "waits for the site's agent", "south": "waits for the site's agent"}
    assert commands.report("policy", "list", url) == [found]
    status = commands.report("agent", "status", url)
    assert [(each["site"], each["agent"]) for each in status] == [("here", ""), ("east", ""), ("south", "")]
    assert all((each["given_up"], each["sites_away"]) == (0, 0) for each in status)
    shown = commands.run("agent", "status", url)
    assert "never" in shown
    assert "given up" in shown
    commands.run("policy", "clear", url, "/")
    assert commands.report("policy", "get", url, "/") == {}
    told = [json.loads(line) for line in commands.run("changes", url, "--json").splitlines()]
    assert [(each["kind"], each["path"]) for each in told[1:]] == [("policy", "/")] * 2
    assert told[1]["policy"] == {name: found[name] for name in ("commit", "commit_any", "async", "bound_s", "read")}
    assert told[2]["policy"] is None
    assert commands.run("changes", url).splitlines()[-1].endswith("policy       /  cleared")


def test_mistakes_are_one_line(world: tuple[World, str]) -> None:
    commands, url = world
    assert "no site 'mars'" in commands.fail("policy", "set", url, "/", "--async", "mars")
    assert "has 3 sites, not 4" in commands.fail("policy", "set", url, "/", "--commit-any", "4")
    assert "name sites with" in commands.fail("policy", "set", url, "/", status=2)
    assert "--bound must be" in commands.fail("policy", "set", url, "/", "--async", "east", "--bound", "0")
    assert "there is no nowhere" in commands.fail("policy", "set", url, "/nowhere", "--async", "east")
    assert "no policy of its own" in commands.fail("policy", "clear", url, "/")
    assert "no site 'mars'" in commands.fail("agent", url, "--site", "mars")
