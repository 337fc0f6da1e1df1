"""`apollofs gc` beside mounts: what one of them has open stays, whatever the others do; what nobody has open goes."""

from __future__ import annotations

import mmap
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from tests.faults.mount_faults import content, save_until_it_fails, saved, until
from tests.mounted.client import Client
from tests.mounted.harness import END_DEADLINE_S, ROOT, HarnessError, LocalBodies, Namespace

pytestmark = pytest.mark.mounted
BLOCK = 1 << 16
SIZE = 10 * BLOCK
LEASE_S = 3
TOGETHER = 30
OBJECT = re.compile("[0-9a-f]{8}")


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    sites = [LocalBodies("west"), LocalBodies("east")]
    with Namespace.made(tmp_path, sites, format_options=("--block-size", "64K")) as namespace:
        yield namespace


def collect(namespace: Namespace, *options: str) -> Any:
    return namespace.report("gc", namespace.url, "--grace", "0", *options)


def objects(namespace: Namespace) -> int:
    """How many objects all sites hold."""
    return sum(bool(OBJECT.fullmatch(path.name)) for path in namespace.directory.glob("blobs-*/**/*"))


@pytest.mark.parametrize("how", ["unlinked", "replaced"])
def test_what_is_open_and_mapped_elsewhere_stays(namespace: Namespace, how: str) -> None:
    west, east = namespace.mount("west"), namespace.mount("east")
    body = os.urandom(SIZE)
    (west.path / "file").write_bytes(body)
    with (east.path / "file").open("rb", buffering=0) as opened:
        mapped = mmap.mmap(opened.fileno(), SIZE, prot=mmap.PROT_READ)
        if how == "unlinked":
            (west.path / "file").unlink()
        else:
            (west.path / "new").write_bytes(b"new")
            os.rename(west.path / "new", west.path / "file")
        kept = collect(namespace)
        assert kept["kept_by_reason"] == {"in use": 1}
        assert str(east.path) in kept["kept"][0]["why"]
        assert objects(namespace) == 10
        # none of it was read before: it comes from the store
        assert mapped[:] == body
        assert os.pread(opened.fileno(), SIZE, 0) == body
        mapped.close()
    until(lambda: collect(namespace)["tombstones"] == 1, "the file is collected once it is closed")
    assert objects(namespace) == 0
    assert namespace.violations() == []


def test_what_clones_share_goes_with_the_last(namespace: Namespace) -> None:
    west, east = namespace.mount("west"), namespace.mount("east")
    body = os.urandom(SIZE)
    (west.path / "file").write_bytes(body)
    namespace.command("clone", str(west.path / "file"), str(west.path / "clone"))
    (west.path / "file").unlink()
    until(lambda: collect(namespace)["tombstones"] == 1, "the first is collected")
    assert (east.path / "clone").read_bytes() == body
    (east.path / "clone").unlink()
    until(lambda: collect(namespace)["tombstones"] == 1, "the last is collected")
    assert objects(namespace) == 0


def write_sharing(directory: Path, bodies: Mapping[str, bytes]) -> None:
    """TOGETHER files at a time are closed at the same moment: from the second time on, when the mount expects small
    files, they share objects."""
    left = list(bodies)
    while left:
        names, left = left[:TOGETHER], left[TOGETHER:]
        all_written = Barrier(len(names))

        def write(name: str, all_written: Barrier = all_written) -> None:
            with (directory / name).open("wb", buffering=0) as file:
                file.write(bodies[name])
                all_written.wait(END_DEADLINE_S)

        with ThreadPoolExecutor(len(names)) as writers:
            list(writers.map(write, names))


def test_what_small_files_share_goes_with_the_last(namespace: Namespace) -> None:
    west, east = namespace.mount("west"), namespace.mount("east")
    bodies = {f"{number}": os.urandom(20_000) for number in range(60)}
    write_sharing(west.path, bodies)
    assert objects(namespace) < len(bodies), "some share an object"
    kept = [name for name in bodies if int(name) % 3 == 0]
    for name in bodies.keys() - set(kept):
        (east.path / name).unlink()
    until(lambda: collect(namespace)["tombstones"] == len(bodies) - len(kept), "the others are collected")
    for name in kept:
        assert (east.path / name).read_bytes() == bodies[name]
        (west.path / name).unlink()
    until(lambda: collect(namespace)["tombstones"] == len(kept), "the rest is collected")
    assert objects(namespace) == 0


def test_what_is_left_of_packs_is_rewritten(namespace: Namespace) -> None:
    """Beside a mount that has some of it open, some mapped, and all of it in its caches."""
    west, east = namespace.mount("west"), namespace.mount("east")
    bodies = {f"{number}": os.urandom(9_000) for number in range(120)}
    write_sharing(west.path, bodies)
    kept = [name for name in bodies if int(name) % 8 == 0]
    assert [(east.path / name).read_bytes() for name in bodies] == list(bodies.values())
    with (east.path / kept[0]).open("rb", buffering=0) as opened, (east.path / kept[1]).open("rb") as second:
        mapped = mmap.mmap(second.fileno(), 9_000, prot=mmap.PROT_READ)
        for name in bodies.keys() - set(kept):
            (west.path / name).unlink()
        until(lambda: collect(namespace, "--repack", "0")["tombstones"] > 0, "the others are collected")
        until(lambda: not collect(namespace, "--repack", "0")["kept_by_reason"], "none is open any more")
        would = collect(namespace, "--dry-run")["rewritten"]
        assert would["blobs"] > 0
        assert collect(namespace)["rewritten"]["blobs"] == would["blobs"]
        collect(namespace)
        namespace.command("cache", "drop", str(east.path))
        assert os.pread(opened.fileno(), 10_000, 0) == bodies[kept[0]]
        assert mapped[:] == bodies[kept[1]]
        mapped.close()
    until(lambda: not collect(namespace)["kept_by_reason"], "the old packs go")
    for name in kept:
        assert (east.path / name).read_bytes() == (west.path / name).read_bytes() == bodies[name]
    assert collect(namespace, "--dry-run")["rewritten"]["blobs"] == 0
    assert namespace.violations() == []


def test_a_body_that_was_overwritten_goes(namespace: Namespace) -> None:
    west, east = namespace.mount("west"), namespace.mount("east", "-o", "delegations=off")
    (west.path / "file").write_bytes(b"1" * SIZE)
    assert (east.path / "file").read_bytes() == b"1" * SIZE
    (west.path / "file").write_bytes(b"2" * SIZE)
    would = collect(namespace, "--dry-run")
    assert (would["tombstones"], would["dropped"]["bytes"]) == (1, SIZE)
    assert objects(namespace) == 20
    done = collect(namespace)
    assert (done["tombstones"], done["silent_mounts"], done["errors"]) == (1, [], [])
    assert objects(namespace) == 10
    assert (east.path / "file").read_bytes() == b"2" * SIZE


@pytest.mark.faults
def test_no_orphan_is_left_of_a_mount_that_was_killed_amid_uploads(namespace: Namespace, tmp_path: Path) -> None:
    west, east = namespace.mount("west", "--lease-ttl", str(LEASE_S)), namespace.mount("east")
    size = 300_000
    with Client.started() as client:
        writing = client.start(save_until_it_fails, west.path, tmp_path / "report", size)
        until(lambda: saved(tmp_path / "report") >= 10, "10 files saved")
        west.kill()
        assert writing.result() != 0
    until(lambda: len(namespace.report("mounts", namespace.url)) == 1, "the end of the killed mount's session")
    assert collect(namespace)["errors"] == []
    whole = [path for path in east.path.iterdir() if path.stat().st_size]
    assert len(whole) >= 10
    for path in whole:
        assert path.read_bytes() == content(int(path.name[1:]), size)
    assert objects(namespace) == 5 * len(whole)
    for path in list(east.path.iterdir()):
        path.unlink()
    until(lambda: collect(namespace)["kept_by_reason"] == {}, "no file is open any more")
    assert objects(namespace) == 0


def test_the_trash_gives_back_until_the_collector_was_there(namespace: Namespace) -> None:
    west, east = namespace.mount("west"), namespace.mount("east")
    body = os.urandom(SIZE)
    (west.path / "file").write_bytes(body)
    os.setxattr(west.path / "file", "user.a", b"value")
    (east.path / "file").unlink()
    os.sync()
    until(lambda: len(namespace.report("trash", "list", namespace.url)) == 1, "the tombstone is there")
    (found,) = namespace.report("trash", "list", namespace.url)
    assert (found["path"], found["size_bytes"]) == ("/file", SIZE)
    assert found["ino"] in namespace.command("trash", "list", namespace.url)
    assert "restored as /back" in namespace.command("trash", "restore", namespace.url, found["ino"], "--to", "/back")
    for path in (west.path / "back", east.path / "back"):
        assert path.read_bytes() == body
        assert os.getxattr(path, "user.a") == b"value"
    (west.path / "back").unlink()
    os.sync()
    until(lambda: collect(namespace)["tombstones"] == 1, "the file is collected")
    with pytest.raises(HarnessError, match="not in the trash"):
        namespace.command("trash", "restore", namespace.url, found["ino"])
    assert "tombstones removed" in namespace.command("gc", namespace.url)


def test_check_data_names_files_and_blocks(namespace: Namespace) -> None:
    west = namespace.mount("west")
    (west.path / "directory").mkdir()
    for name in ("sound", "damaged", "missing"):
        (west.path / "directory" / name).write_bytes(os.urandom(SIZE))
    assert namespace.report("check", namespace.url, "/", "--data")["blocks"] == 30
    for name, block in (("damaged", 3), ("missing", 4)):
        extent = namespace.report("info", str(west.path / "directory" / name))["extents"][0]
        (path,) = namespace.directory.glob(f"blobs-west/**/{int(extent['blob'], 16):016x}+/{block:08x}")
        if name == "missing":
            path.unlink()
        else:
            data = path.read_bytes()
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(HarnessError, match="status 1") as caught:
        namespace.command("check", namespace.url, "/directory", "--data")
    assert "/directory/damaged: block 3 is damaged" in str(caught.value)
    assert "/directory/missing: block 4 is missing" in str(caught.value)
    assert "2 bad blocks: 3 files" in str(caught.value)
    assert "every block" in namespace.command("check", namespace.url, "/directory/sound", "--data")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_collector_that_was_stopped_goes_on_with_the_next_run(namespace: Namespace, number: signal.Signals) -> None:
    west = namespace.mount("west")
    for index in range(20):
        (west.path / f"f{index}").write_bytes(b"%02d" % index * (SIZE // 2))
    (west.path / "kept").write_bytes(os.urandom(SIZE))
    for index in range(20):
        (west.path / f"f{index}").unlink()
    os.sync()
    # so slow that it is at work for most of a minute: what is done meanwhile takes seconds where the machine is busy
    words = [sys.executable, "-m", "apollofs.fs.cli", "gc", namespace.url, "--grace", "0", "--rate", "5"]
    environment = namespace.environment()
    with subprocess.Popen(words, env=environment, cwd=ROOT, stderr=subprocess.PIPE) as process:
        until(lambda: objects(namespace) < 200, "a part is collected")
        with pytest.raises(HarnessError, match="garbage is being collected already"):
            collect(namespace)
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    if number == signal.SIGINT:
        assert (process.returncode, told.lstrip(b"\n")) == (130, b"apollofs: interrupted; nothing more was done\n")
    assert objects(namespace) > 10

    def goes_on() -> bool:
        """Not before the lease of a collector that was killed has ended."""
        try:
            return bool(collect(namespace)["errors"] == [])
        except HarnessError:
            if number == signal.SIGINT:
                raise
            return False

    until(goes_on, "the next run")
    assert objects(namespace) == 10
    assert len((west.path / "kept").read_bytes()) == SIZE
    assert namespace.violations() == []


def write_copy_and_unlink(directory: Path, seed: int) -> dict[str, bytes]:
    """Write small files, copy and unlink some of them, each as chance wants; what is there in the end."""
    rng = random.Random(seed)
    there: dict[str, bytes] = {}
    for number in range(30):
        name = f"{seed}-{number}"
        if there and rng.random() < 0.4:
            source = rng.choice(sorted(there))
            body = there[source]
            with (directory / source).open("rb") as reading, (directory / name).open("wb") as writing:
                assert os.copy_file_range(reading.fileno(), writing.fileno(), len(body)) == len(body)
        else:
            body = rng.randbytes(rng.randrange(9_000, 40_000))
            (directory / name).write_bytes(body)
        there[name] = body
        if rng.random() < 0.5:
            gone = rng.choice(sorted(there))
            (directory / gone).unlink()
            del there[gone]
    return there


@pytest.mark.slow
def test_small_files_and_copies_beside_a_collector_that_never_rests(namespace: Namespace) -> None:
    west, east = namespace.mount("west"), namespace.mount("east")
    with ThreadPoolExecutor(12) as pool:
        working = [pool.submit(write_copy_and_unlink, (west, east)[seed % 2].path, seed) for seed in range(12)]
        while not all(each.done() for each in working):
            assert collect(namespace)["errors"] == []
        there = {name: body for each in working for name, body in each.result().items()}
    for mount in (west, east):
        assert sorted(os.listdir(mount.path)) == sorted(there)
        for name, body in there.items():
            assert (mount.path / name).read_bytes() == body
    assert namespace.report("check", namespace.url, "/", "--data")["flaw_count"] == 0
    assert namespace.violations() == []
    for name in there:
        (west.path / name).unlink()
    os.sync()
    until(lambda: collect(namespace)["kept_by_reason"] == {}, "no file is open any more")
    until(lambda: collect(namespace)["tombstones"] == 0, "everything is collected")
    assert objects(namespace) == 0
