"""Copies that move no byte: cp of coreutils, and `apollofs clone`, on real mounts with an S3 store."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounted.conftest import Pair
from tests.mounted.harness import HarnessError, Mount

pytestmark = pytest.mark.mounted

MIB = 1 << 20
LARGE = random.Random(5).randbytes(5 * MIB + 77)


def moved(mount: Mount) -> tuple[int, int]:
    """Bytes that a mount has read from its stores, and written to them."""
    found = mount.status()["blob_store"]
    return int(found["read_bytes"]), int(found["written_bytes"])


def test_cp_moves_no_byte(pair: Pair, here: Path, there: Path) -> None:
    (here / "source").write_bytes(LARGE)
    before = moved(pair.west)
    subprocess.run(["cp", here / "source", here / "copy"], check=True, timeout=60)
    assert moved(pair.west) == before
    assert (there / "copy").read_bytes() == LARGE
    assert (here / "copy").read_bytes() == LARGE


def test_neither_changes_the_other(here: Path, there: Path) -> None:
    (here / "source").write_bytes(LARGE)
    subprocess.run(["cp", here / "source", here / "copy"], check=True, timeout=60)
    with (here / "copy").open("r+b") as copy:
        copy.seek(MIB)
        copy.write(b"copy")
    with (there / "source").open("r+b") as source:
        source.seek(2 * MIB)
        source.write(b"source")
    in_copy = LARGE[:MIB] + b"copy" + LARGE[MIB + 4 :]
    in_source = LARGE[: 2 * MIB] + b"source" + LARGE[2 * MIB + 6 :]
    for place in (here, there):
        assert (place / "copy").read_bytes() == in_copy
        assert (place / "source").read_bytes() == in_source
    (there / "source").unlink()
    assert (here / "copy").read_bytes() == in_copy


def test_a_copy_that_is_written_further_by_the_same_process(here: Path, there: Path) -> None:
    """The kernel may write it by passthrough: before, amid and behind what was shared."""
    (here / "source").write_bytes(LARGE)
    source = os.open(here / "source", os.O_RDONLY)
    target = os.open(here / "copy", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.pwrite(target, b"head", 0)
    assert os.copy_file_range(source, target, 1 << 30, 0, 1000) == len(LARGE)
    os.pwrite(target, b"amid", MIB + 5)
    os.pwrite(target, b"tail", 1000 + len(LARGE) + 9000)
    os.close(target)
    os.close(source)
    wanted = bytearray(b"head" + bytes(996) + LARGE + bytes(9000) + b"tail")
    wanted[MIB + 5 : MIB + 9] = b"amid"
    for place in (there, here):
        assert (place / "copy").read_bytes() == wanted
        assert (place / "source").read_bytes() == LARGE


def test_a_copy_is_seen_by_who_has_it_open(here: Path, there: Path) -> None:
    (here / "source").write_bytes(LARGE)
    source = os.open(here / "source", os.O_RDONLY)
    target = os.open(here / "copy", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with (here / "copy").open("rb") as reader, (there / "copy").open("rb") as far:
        assert os.copy_file_range(source, target, len(LARGE), 0, 0) == len(LARGE)
        assert os.fstat(target).st_size == len(LARGE)
        assert reader.read() == LARGE
        assert far.read() == LARGE
    os.close(target)
    os.close(source)


def made_tree(top: Path) -> None:
    """Some of everything that a tree can hold."""
    (top / "deep" / "er").mkdir(parents=True)
    (top / "large").write_bytes(LARGE)
    (top / "deep" / "small").write_bytes(b"small")
    (top / "deep" / "er" / "middle").write_bytes(LARGE[:100_000])
    (top / "deep" / "empty").touch()
    with (top / "sparse").open("wb") as sparse:
        sparse.seek(3 * MIB)
        sparse.write(LARGE[:50_000])
        sparse.truncate(8 * MIB)
    (top / "link").symlink_to("deep/small")
    os.mkfifo(top / "fifo")
    os.link(top / "large", top / "deep" / "other name")
    os.setxattr(top / "large", "user.kind", b"weights")
    os.setxattr(top / "deep", "user.kind", b"directory")
    (top / "deep" / "small").chmod(0o640)
    os.chown(top / "deep" / "small", 12, 34)
    (top / "deep" / "er").chmod(0o500)
    for path in [*top.rglob("*"), top]:
        os.utime(path, ns=(10**18 + len(str(path)), 10**18 + 7), follow_symlinks=False)


def described(top: Path) -> dict[str, tuple[object, ...]]:
    """All that a clone keeps, by name within the tree."""
    found: dict[str, tuple[object, ...]] = {}
    names: dict[int, int] = {}
    for path in [top, *sorted(top.rglob("*"))]:
        status = path.lstat()
        content: object = b""
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif path.is_symlink():
            content = path.readlink()
        xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)} if not path.is_symlink() else {}
        found[str(path.relative_to(top))] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            status.st_nlink,
            names.setdefault(status.st_ino, len(names)),
            status.st_size if not stat.S_ISDIR(status.st_mode) else 0,
            xattrs,
            content,
        )
    return found


def test_a_tree_is_cloned_with_all_it_has(pair: Pair, here: Path, there: Path) -> None:
    made_tree(here / "tree")
    wanted = described(here / "tree")
    before = moved(pair.west)
    facts = pair.namespace.report("clone", str(here / "tree"), str(here / "clone"))
    assert moved(pair.west) == before
    assert described(here / "clone") == wanted
    assert described(there / "clone") == wanted
    assert (facts["files"], facts["directories"], facts["others"]) == (5, 3, 2)
    assert os.listdir(here) == os.listdir(there)
    assert sorted(os.listdir(here)) == ["clone", "tree"]
    (here / "clone" / "large").write_bytes(b"other")
    assert (there / "tree" / "large").read_bytes() == LARGE
    assert described(here / "tree") == wanted


def test_a_file_is_cloned(pair: Pair, here: Path, there: Path) -> None:
    (here / "file").write_bytes(LARGE)
    pair.namespace.command("clone", str(here / "file"), str(here / "clone"))
    assert (there / "clone").read_bytes() == LARGE


def refused(pair: Pair, *words: str | Path) -> str:
    with pytest.raises(HarnessError) as caught:
        pair.namespace.command("clone", *map(str, words))
    return str(caught.value)


def test_what_a_clone_refuses(pair: Pair, here: Path, there: Path, tmp_path: Path) -> None:
    (here / "tree").mkdir()
    (here / "tree" / "file").write_bytes(b"text")
    assert "exists already" in refused(pair, here / "tree" / "file", here / "tree")
    assert "into itself" in refused(pair, here / "tree", here / "tree" / "below")
    assert "within one only" in refused(pair, here / "tree" / "file", there / "clone")
    assert "No such file" in refused(pair, here / "missing", here / "clone")
    (tmp_path / "file").touch()
    assert "not on an apollofs mount" in refused(pair, tmp_path / "file", tmp_path / "clone")
    assert sorted(os.listdir(here)) == ["tree"]
    assert os.listdir(here / "tree") == ["file"]


def test_a_clone_that_fails_leaves_nothing(pair: Pair, here: Path, tmp_path: Path) -> None:
    (here / "tree" / "a").mkdir(parents=True)
    (here / "tree" / "file").write_bytes(b"text")
    subprocess.run(["mount", "-t", "tmpfs", "none", here / "tree" / "a"], check=True, timeout=30)
    try:
        assert "another filesystem" in refused(pair, here / "tree", here / "clone")
    finally:
        subprocess.run(["umount", here / "tree" / "a"], check=True, timeout=30)
    assert os.listdir(here) == ["tree"]


def test_a_name_of_any_script_can_be_cloned(pair: Pair, here: Path) -> None:
    (here / "file").write_bytes(b"text")
    name = "\u6743" * 85
    pair.namespace.command("clone", str(here / "file"), str(here / name))
    assert (here / name).read_bytes() == b"text"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_clone_that_is_ended_leaves_nothing(pair: Pair, here: Path, number: signal.Signals) -> None:
    (here / "tree").mkdir()
    for each in range(300):
        (here / "tree" / str(each)).write_bytes(b"text")
    clone = subprocess.Popen(
        [sys.executable, "-m", "apollofs.fs.cli", "clone", here / "tree", here / "clone"], stderr=subprocess.DEVNULL
    )
    while len(os.listdir(here)) == 1:
        assert clone.poll() is None
    clone.send_signal(number)
    assert clone.wait(60) == 130
    assert os.listdir(here) == ["tree"]
