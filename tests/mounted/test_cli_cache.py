"""`cache`, `warm`, `pin` and `unpin` on real mounts."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path

import pytest

from tests.support.commands import World, await_end

pytestmark = pytest.mark.mounted

LARGE = bytes(range(251)) * 12_000
"""Three MB: an image."""
SMALL = b"small" * 20_000


@pytest.fixture
def mounts(world: World, url: str) -> tuple[Path, Path]:
    """Two mounts of a volume with a tree in it that the second has not read."""
    writer, reader = world.mount(url, "writer"), world.mount(url, "reader")
    (writer / "tree" / "below").mkdir(parents=True)
    (writer / "tree" / "large").write_bytes(LARGE)
    (writer / "tree" / "below" / "small").write_bytes(SMALL)
    (writer / "tree" / "below" / "link").symlink_to("small")
    (writer / "tree" / "below" / "empty").touch()
    return writer, reader


def status(world: World, mountpoint: Path) -> dict[str, int]:
    (found,) = world.report("cache", "status", mountpoint)
    assert found.pop("mountpoint") == str(mountpoint)
    return dict(found)


def requests(world: World, mountpoint: Path) -> int:
    """What the mount has asked of its blob store so far."""
    return int(world.report("status", mountpoint)["blob_store"]["calls"])


def read_tree(mountpoint: Path) -> None:
    assert (mountpoint / "tree" / "large").read_bytes() == LARGE
    assert (mountpoint / "tree" / "below" / "small").read_bytes() == SMALL


def test_warm_fetches_a_tree_and_drop_lets_it_go(world: World, mounts: tuple[Path, Path]) -> None:
    _, reader = mounts
    assert status(world, reader)["used_bytes"] == 0
    world.run("warm", reader / "tree")
    assert status(world, reader)["used_bytes"] > len(LARGE) + len(SMALL)
    before = requests(world, reader)
    world.run("warm", reader / "tree")
    read_tree(reader)
    assert requests(world, reader) == before
    world.run("cache", "drop", reader / "tree" / "below")
    assert status(world, reader)["block_count"] == 0
    world.run("cache", "drop")
    assert status(world, reader)["used_bytes"] == 0
    assert "bound" in world.run("cache", "status")


def test_a_pin_keeps_what_is_dropped(world: World, mounts: tuple[Path, Path]) -> None:
    _, reader = mounts
    world.run("pin", reader / "tree" / "large")
    assert status(world, reader)["pinned_count"] == 1
    refused = world.execute("cache", "drop", reader / "tree" / "large")
    assert refused.returncode == 1
    assert "pinned" in refused.stderr
    world.run("cache", "drop", reader)
    assert status(world, reader)["image_bytes"] >= len(LARGE)
    world.run("unpin", reader / "tree" / "large")
    world.run("cache", "drop", reader / "tree" / "large")
    assert status(world, reader)["used_bytes"] == 0


def test_what_is_not_there_is_named(world: World, mounts: tuple[Path, Path], tmp_path: Path) -> None:
    _, reader = mounts
    done = world.execute("warm", reader / "absent", reader / "tree")
    assert done.returncode == 1
    assert "absent: No such file" in done.stderr
    assert "4 files" not in done.stderr
    assert status(world, reader)["image_count"] == 1
    assert "not on an apollofs mount" in world.fail("warm", tmp_path)


def test_the_cache_may_be_deleted_below_a_reader(world: World, mounts: tuple[Path, Path]) -> None:
    _, reader = mounts
    read_tree(reader)
    for directory, _, names in os.walk(world.directory / "cache-reader"):
        for name in names:
            if "staging" not in directory:
                os.unlink(os.path.join(directory, name))
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("1")
    read_tree(reader)


def test_a_killed_daemon_leaves_no_torn_image(world: World, url: str, mounts: tuple[Path, Path]) -> None:
    writer, reader = mounts
    data = random.Random(5).randbytes(40 << 20)
    (writer / "data").write_bytes(data)
    for read_bytes in (1 << 20, 12 << 20, 30 << 20):
        fd = os.open(reader / "data", os.O_RDONLY)
        assert os.read(fd, read_bytes) == data[:read_bytes]
        # blocks that are read ahead are on their way
        pid = world.pid(reader)
        os.kill(pid, signal.SIGKILL)
        assert await_end(pid)
        with contextlib.suppress(OSError):  # the flush finds nobody
            os.close(fd)
        world.run("umount", reader)
        world.mount(url, "reader")
        assert (reader / "data").read_bytes() == data
        world.run("cache", "drop", reader / "data")


def test_pins_of_removed_files_are_taken_back(world: World, mounts: tuple[Path, Path]) -> None:
    writer, reader = mounts
    world.run("pin", reader / "tree")
    assert status(world, reader)["pinned_count"] == 2
    (writer / "tree" / "large").unlink()
    assert "No such file" in world.execute("unpin", reader / "tree" / "large").stderr
    assert "say which" in world.execute("unpin").stderr
    assert "2 files" in world.execute("unpin", "--all", reader).stderr
    assert status(world, reader)["pinned_bytes"] == 0
    world.run("unpin", "--all")
