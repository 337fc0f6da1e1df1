"""`apollofs changes` beside mounts: what was done through them is told, in order, by path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.mounted.conftest import Places
from tests.mounted.harness import COMMAND_DEADLINE_S, ROOT, HarnessError, Namespace

pytestmark = pytest.mark.mounted


def told(namespace: Namespace, *words: str) -> list[dict[str, Any]]:
    """What `changes ... --json` prints."""
    return [json.loads(line) for line in namespace.command("changes", *words, "--json").splitlines()]


def short(found: list[dict[str, Any]], root: Path) -> list[tuple[str, str]]:
    """(kind, path below the test's directory)."""
    top = f"/{root.name}"
    return [(each["kind"], each["path"].removeprefix(top)) for each in found if each["path"] is not None]


def work(places: Places) -> None:
    """On both mounts, one thing after the other."""
    (places.here / "d").mkdir()
    (places.there / "d" / "f").write_bytes(b"text")
    os.rename(places.here / "d", places.here / "e")
    os.chmod(places.there / "e" / "f", 0o600)
    os.setxattr(places.here / "e" / "f", "user.a", b"value")
    os.unlink(places.there / "e" / "f")
    os.sync()


EXPECTED = [
    ("mkdir", "/d"),
    ("create", "/d/f"),
    ("commit", "/d/f"),
    ("rename", "/e"),
    ("setattr", "/e/f"),
    ("setxattr", "/e/f"),
    ("unlink", "/e/f"),
]


def settled(places: Places) -> None:
    """What was answered ahead of etcd is in it."""
    for root in (places.here, places.there):
        fd = os.open(root, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def test_what_happened_below_a_path_on_a_mount(places: Places) -> None:
    namespace = places.pair.namespace
    work(places)
    settled(places)
    found = told(namespace, str(places.here))
    assert [each for each in short(found, places.here) if each in EXPECTED] == EXPECTED
    rename = next(each for each in found if each["kind"] == "rename")
    assert (rename["path"], rename["old_path"]) == (f"/{places.here.name}/e", f"/{places.here.name}/d")
    assert {each["site"] for each in found} == {"west", "east"}
    # from the other mount, from the address, and from a position it is the same
    assert told(namespace, str(places.there)) == found
    assert told(namespace, namespace.url, f"/{places.here.name}") == found
    assert told(namespace, str(places.here), "--from", found[3]["position"]) == found[3:]
    assert told(namespace, str(places.here), "--since", "1h") == found
    assert told(namespace, str(places.here), "--from", "now") == []
    lines = namespace.command("changes", str(places.here / "e")).splitlines()
    # what has no path is told to every subtree, and other tests may have made such changes
    lines = [line for line in lines if f"/{places.here.name}/" in line]
    assert len(lines) == 4
    assert lines[0].startswith(rename["position"])
    assert f"/{places.here.name}/e  from /{places.here.name}/d" in lines[0]
    namespace.command("changes", "archive", namespace.url, "--once")
    assert told(namespace, str(places.here)) == found


def test_a_group_goes_on(places: Places) -> None:
    namespace, group = places.pair.namespace, f"g-{places.here.name}"
    work(places)
    settled(places)
    whole = told(namespace, str(places.here))
    assert told(namespace, str(places.here), "--group", group) == whole
    assert told(namespace, str(places.here), "--group", group) == []
    (places.here / "more").mkdir()
    settled(places)
    assert short(told(namespace, str(places.here), "--group", group), places.here) == [("mkdir", "/more")]
    groups = namespace.report("changes", "status", namespace.url)["groups"]
    assert [each["name"] for each in groups if each["name"] == group] == [group]
    namespace.command("changes", "forget", namespace.url, group)
    assert len(told(namespace, str(places.here), "--group", group)) == len(whole) + 1


@contextmanager
def following(namespace: Namespace, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`changes ... --follow --json` in the background."""
    process = subprocess.Popen(
        [sys.executable, "-m", "apollofs.fs.cli", "changes", *words, "--follow", "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=namespace.environment(),
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(COMMAND_DEADLINE_S)
        assert process.stdout is not None
        process.stdout.close()


def test_following_tells_while_it_happens(places: Places) -> None:
    (places.here / "first").mkdir()
    settled(places)
    with following(places.pair.namespace, str(places.here), "--from", "beginning") as process:
        assert process.stdout is not None
        for name in ("second", "third"):
            (places.there / name).mkdir()
            settled(places)
            while not (json.loads(process.stdout.readline())["path"] or "").endswith(f"/{name}"):
                pass  # what was before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--from", "x"), "no position"),
        (("--from", "1", "--since", "1h"), "exclude each other"),
        (("--group", "a/b"), "bad group name"),
    ],
)
def test_mistakes_are_one_line(places: Places, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(HarnessError, match=said):
        places.pair.namespace.command("changes", str(places.here), *words)


def test_a_path_that_is_on_no_mount(places: Places) -> None:
    with pytest.raises(HarnessError, match="not on an apollofs mount"):
        places.pair.namespace.command("changes", "/proc")
