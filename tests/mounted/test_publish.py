"""`apollofs publish`: the rename comes when the other site has every body."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.harness import HarnessError, LocalBodies, Mount, Namespace

pytestmark = pytest.mark.mounted
SMALL = 12


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    sites = [LocalBodies("west"), LocalBodies("east")]
    with Namespace.made(tmp_path, sites, format_options=("--block-size", "64K")) as namespace:
        yield namespace


def objects(namespace: Namespace, site: str) -> dict[str, bytes]:
    """Every object of a site's store, by its name."""
    base = namespace.directory / f"blobs-{site}"
    files = [path for path in base.rglob("*") if path.is_file() and len(path.name) == 8]
    return {"/".join(path.parts[-3:]): path.read_bytes() for path in files}


def make_tree(mount: Mount) -> Path:
    tree = mount.path / ".weights"
    (tree / "shards").mkdir(parents=True)
    for number in range(SMALL):
        (tree / f"small{number}").write_bytes(random.Random(number).randbytes(9_000))
    (tree / "tiny").write_bytes(b"in etcd")
    (tree / "shards" / "large").write_bytes(random.Random(0).randbytes(1_000_000))
    os.link(tree / "shards" / "large", tree / "also")
    return tree


def test_a_published_tree_is_at_the_site_before_it_is_seen(namespace: Namespace) -> None:
    west, east = namespace.mount("west"), namespace.mount("east")
    tree = make_tree(west)
    assert not objects(namespace, "east")
    told = namespace.report("publish", str(tree), str(west.path / "weights"), "--sites", "east,west")
    assert told["copied_bytes"] >= 1_000_000 + SMALL * 9_000
    assert objects(namespace, "east") == objects(namespace, "west")
    assert not tree.exists()
    assert (east.path / "weights" / "also").read_bytes() == random.Random(0).randbytes(1_000_000)
    assert (east.path / "weights" / "small3").read_bytes() == random.Random(3).randbytes(9_000)


def test_what_fails_renames_nothing_and_goes_on(namespace: Namespace) -> None:
    west = namespace.mount("west")
    tree = make_tree(west)
    store, away = namespace.directory / "blobs-east", namespace.directory / "away"
    store.rename(away)
    command = ("publish", str(tree), str(west.path / "weights"), "--sites", "east")
    with pytest.raises(HarnessError, match="not published"):
        namespace.command(*command)
    assert (tree / "tiny").exists()
    away.rename(store)
    namespace.command(*command)
    assert (west.path / "weights" / "tiny").read_bytes() == b"in etcd"
    # all of it is there already, so a second tree that shares it copies nothing
    namespace.command("clone", str(west.path / "weights"), str(west.path / "again"))
    told = namespace.report("publish", str(west.path / "again"), str(west.path / "shown"), "--sites", "east")
    assert told["copied_bytes"] == 0


def test_errors_say_what_is_wrong(namespace: Namespace) -> None:
    west = namespace.mount("west")
    tree = make_tree(west)
    (west.path / "taken").mkdir()
    for target, sites, told in (
        (west.path / "new", "north", "no site 'north'"),
        (west.path / "taken", "east", "exists already"),
        (namespace.directory / "elsewhere", "east", "not on the mount"),
    ):
        with pytest.raises(HarnessError, match=told):
            namespace.command("publish", str(tree), str(target), "--sites", sites)
    assert (tree / "tiny").exists()
