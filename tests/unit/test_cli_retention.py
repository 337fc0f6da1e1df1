"""`apollofs retention` without a mount: what it says, and the lines for mistakes."""

from __future__ import annotations

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
        yield world, url


def test_policies_are_set_told_and_cleared(world: tuple[World, str]) -> None:
    commands, url = world
    assert "no retention policy applies" in commands.run("retention", "get", url, "/")
    commands.run("retention", "set", url, "/", "--keep-for", "7d", "--pattern", "w{step}", "--recursive")
    found = commands.report("retention", "get", url, "/")
    assert (found["keep_last"], found["keep_every"], found["keep_for_s"]) == (1, 1, 7 * 86_400)
    assert (found["patterns"], found["recursive"], found["settle_s"]) == (["w{step}"], True, 600)
    assert "7d" in commands.run("retention", "get", url, "/")
    commands.run("retention", "set", url, "/", "--keep-last", "3", "--min-free", "10T", "--capacity", "100T")
    found = commands.report("retention", "get", url, "/")
    assert (found["keep_last"], found["keep_every"], found["capacity_bytes"]) == (3, 1, 100 << 40)
    assert commands.report("retention", "list", url) == [found]
    assert "the usual ones" in commands.run("retention", "list", url)
    report = commands.report("retention", "apply", url, "--dry-run")
    assert (report["dry_run"], report["checkpoints"], report["errors"]) == (True, [], [])
    assert "no checkpoints" in commands.run("retention", "apply", url)
    commands.run("retention", "clear", url, "/")
    assert commands.report("retention", "list", url) == []


def test_mistakes_are_one_line(world: tuple[World, str]) -> None:
    commands, url = world
    change = ("retention", "set", url, "/")
    assert "say what stays" in commands.fail(*change, status=2)
    assert "is no pattern" in commands.fail(*change, "--keep-last", "1", "--pattern", "step*")
    assert "--min-free needs --capacity" in commands.fail(*change, "--min-free", "1T")
    assert "more than --capacity" in commands.fail(*change, "--min-free", "2T", "--capacity", "1T")
    assert "--keep-last must be" in commands.fail(*change, "--keep-last", "0")
    assert "--marker is the name" in commands.fail(*change, "--keep-last", "1", "--marker", "a/b")
    assert "there is no nowhere" in commands.fail("retention", "set", url, "/nowhere", "--keep-last", "1")
    assert "no retention policy of its own" in commands.fail("retention", "clear", url, "/")
    assert "no retention policy of its own" in commands.fail("retention", "apply", url, "/")
