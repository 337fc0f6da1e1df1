"""`apollofs kv` without a mount: where a watch goes on, keys that are no UTF-8, and long listings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from apollofs.fs.api import SyncKeyValues, open_volume_sync
from apollofs.fs.cli import kv as kv_commands
from tests.support.commands import World, etcd_server

NO_UTF8 = os.fsdecode(b"a\xff")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[tuple[World, str, SyncKeyValues]]:
    commands = World(tmp_path)
    with etcd_server(tmp_path / "etcd") as server:
        url = f"etcd://{server}/values"
        commands.format(url)
        with open_volume_sync(url) as volume:
            yield commands, url, volume.kv("/d", create=True)


def test_a_watch_goes_on_where_a_line_says(world: tuple[World, str, SyncKeyValues]) -> None:
    """In the middle of a transaction, too: none of its keys is left out."""
    commands, url, kv = world
    revision = kv.transaction([kv.change(key, b"1") for key in ("k1", "k2", "k3")])
    kv.put("k4", b"1")

    def watched(start: int, count: int) -> list[dict[str, object]]:
        words = ("kv", "watch", url, "/d", "--json", "--from", start, "--count", count)
        return [json.loads(line) for line in commands.run(*words).splitlines()]

    first = watched(revision, 2)
    assert [(each["key"], each["position"]) for each in first] == [("k1", revision), ("k2", revision)]
    position = first[-1]["position"]
    assert isinstance(position, int)
    again = watched(position, 4)
    assert [each["key"] for each in again] == ["k1", "k2", "k3", "k4"]
    assert [each["position"] for each in again[2:]] == [revision + 1, revision + 2]


def test_keys_that_are_no_utf8(world: tuple[World, str, SyncKeyValues]) -> None:
    commands, url, kv = world
    revision = int(commands.run("kv", "put", url, f"/d/{NO_UTF8}", "1"))
    assert commands.report("kv", "get", url, f"/d/{NO_UTF8}")["path"] == r"/d/a\xff"
    assert commands.report("kv", "put", url, f"/d/{NO_UTF8}", "2")["path"] == r"/d/a\xff"
    assert r"a\xff" in commands.run("kv", "ls", url, "/d")
    assert [each["key"] for each in commands.report("kv", "ls", url, "/d")["entries"]] == [r"a\xff"]
    for options in ((), ("--json",)):
        told = commands.run("kv", "watch", url, "/d", "--from", revision, "--count", 1, *options)
        assert "xff" in told
    commands.run("kv", "rm", url, f"/d/{NO_UTF8}")
    assert kv.list().entries == ()


def test_removing_what_must_not_be_there(world: tuple[World, str, SyncKeyValues]) -> None:
    commands, url, kv = world
    assert "there is no '/d/k'" in commands.fail("kv", "rm", url, "/d/k")
    commands.run("kv", "rm", url, "/d/k", "--if-revision", 0)
    revision = kv.put("k", b"1")
    assert f"is at revision {revision}" in commands.fail("kv", "rm", url, "/d/k", "--if-revision", 0)
    commands.run("kv", "rm", url, "/d/k", "--if-revision", revision)


def test_a_listing_says_that_there_is_more(
    world: tuple[World, str, SyncKeyValues], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url, kv = world
    keys = [f"k{number:04}" for number in range(1005)]
    for at in range(0, len(keys), 16):
        kv.transaction([kv.change(key, b"") for key in keys[at : at + 16]])
    monkeypatch.setattr(kv_commands, "LISTED_MAX", 1000)

    def listed(*words: str) -> str:
        done = CliRunner().invoke(kv_commands.kv, ["ls", url, "/d", *words], catch_exceptions=False)
        return done.stdout

    first = json.loads(listed("--json"))
    assert (len(first["entries"]), first["after"]) == (1000, "k0999")
    assert listed().splitlines()[-1] == "there are more: --after k0999"
    rest = json.loads(listed("--json", "--after", first["after"]))
    assert ([each["key"] for each in rest["entries"]], rest["after"]) == (keys[1000:], None)
