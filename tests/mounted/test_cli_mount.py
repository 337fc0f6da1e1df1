"""The command with real mounts: how a mount begins, tells of itself, and ends, however that comes."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from apollofs.fs.embedded import free_ports
from apollofs.fs.mountinfo import mount_at
from tests.support.commands import DEADLINE_S, World, await_end

pytestmark = pytest.mark.mounted


def held_open(mountpoint: Path) -> subprocess.Popen[bytes]:
    """A process that stands in the mount until its standard input ends."""
    busy = subprocess.Popen(
        ["sh", "-c", "echo; read line"], cwd=mountpoint, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert busy.stdout is not None
    assert busy.stdout.readline() == b"\n"
    return busy


def scraped(port: int) -> dict[str, float]:
    """The counters that a mount serves, without their labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE_S) as reply:
        lines = reply.read().decode().splitlines()
    return {re.split("[{ ]", line)[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


# -- beginning and telling --------------------------------------------------------------------------------------------


def test_counters_for_prometheus(world: World, url: str) -> None:
    (port,) = free_ports(1)
    mountpoint = world.mount(url, "m", "-o", f"metrics={port}")
    before = scraped(port)
    (mountpoint / "directory").mkdir()
    after = scraped(port)
    assert after["apollofs_fuse_requests_mkdir_total"] == 1
    assert after["apollofs_etcd_transactions_total"] > before["apollofs_etcd_transactions_total"]
    second = world.directory / "second"
    second.mkdir()
    words = ("mount", url, second, "--site", "here", "--cache-dir", world.directory / "cache-second")
    error = world.fail(*words, "--log-file", world.log("second"), "-o", f"metrics={port}")
    assert f"metrics can't be served at 127.0.0.1:{port}" in error
    assert mount_at(str(second)) is None


def test_a_mount_answers_when_the_command_returns(world: World, url: str) -> None:
    mountpoint = world.mount(url, "m")
    assert os.listdir(mountpoint) == []
    entry = mount_at(str(mountpoint))
    assert entry is not None
    assert (entry.fstype, entry.source) == ("fuse.apollofs", f"apollofs:{url.rpartition('/')[2]}")
    (found,) = world.report("mounts", url)
    assert found["mountpoint"] == str(mountpoint)
    assert (found["site"], found["alive"], found["pid"]) == ("here", True, world.pid(mountpoint))
    assert world.report("umount", mountpoint)["committed"] is True
    assert world.report("mounts", url) == []
    assert world.report("check", url)["violations"] == []


def test_status_and_info(world: World, url: str) -> None:
    mountpoint = world.mount(url, "m")
    (mountpoint / "directory").mkdir()
    (mountpoint / "directory" / "file").write_bytes(b"inline")
    status = world.report("status", mountpoint)
    assert (status["volume"], status["site"], status["session_alive"]) == (url.rpartition("/")[2], "here", True)
    assert [one["mountpoint"] for one in world.report("status") if one["answers"]].count(str(mountpoint)) == 1
    info = world.report("info", mountpoint / "directory" / "file")
    assert (info["type"], info["size_bytes"], info["ino"]) == (
        "file",
        6,
        os.stat(mountpoint / "directory" / "file").st_ino,
    )
    assert info["key"].endswith("/file")
    assert "/d/" in info["key"]
    assert "/i/" in world.report("info", mountpoint / "directory")["key"]
    assert world.report("info", mountpoint)["ino"] == 1
    assert "No such file" in world.fail("info", mountpoint / "missing")
    world.run("umount", mountpoint)


def test_the_extents_of_a_large_file(world: World, url: str) -> None:
    mountpoint = world.mount(url, "m")
    (mountpoint / "large").write_bytes(os.urandom(6 << 20))
    info = world.report("info", mountpoint / "large")
    assert sum(extent["length"] for extent in info["extents"]) == 6 << 20
    assert {site for extent in info["extents"] for site in extent["sites"]} == {"here"}
    world.run("umount", mountpoint)
    assert world.report("destroy", url, "--yes", "--blobs")["objects_removed"] >= 2


def test_two_mounts_of_one_volume_and_what_stays(world: World, url: str) -> None:
    first, second = world.mount(url, "first"), world.mount(url, "second")
    (first / "file").write_bytes(b"from the first")
    assert (second / "file").read_bytes() == b"from the first"
    assert {one["mountpoint"] for one in world.report("mounts", url)} == {str(first), str(second)}
    assert "is mounted" in world.fail("destroy", url, "--yes")
    for mountpoint in (first, second):
        world.run("umount", mountpoint)
    again = world.mount(url, "again")
    assert (again / "file").read_bytes() == b"from the first"
    world.run("umount", again)


def test_a_read_only_mount(world: World, url: str) -> None:
    mountpoint = world.mount(url, "m", "--ro", "-o", "noatime")
    with pytest.raises(OSError, match="Read-only") as caught:
        (mountpoint / "x").mkdir()
    assert caught.value.errno == errno.EROFS
    world.run("umount", mountpoint)


# -- not beginning ----------------------------------------------------------------------------------------------------


def test_what_stands_in_the_way_is_one_line(world: World, url: str, server: str) -> None:
    mountpoint = world.directory / "m"
    mountpoint.mkdir()

    def mount(target: str, site: str = "here") -> str:
        words = ("mount", target, mountpoint, "--site", site, "--cache-dir", world.directory / "cache")
        return world.fail(*words, "--log-file", world.log("m"))

    assert "has no site 'nowhere'" in mount(url, "nowhere")
    assert "there is no volume 'unformatted'" in mount(f"etcd://{server}/unformatted")
    assert "etcd at 127.0.0.1:1 can't be reached" in mount("etcd://127.0.0.1:1/v")
    (world.directory / "blobs-here").rename(world.directory / "gone")
    assert "blob store of site 'here'" in mount(url)
    (world.directory / "gone").rename(world.directory / "blobs-here")
    assert world.mounts() == []
    assert world.report("mounts", url) == []
    world.mount(url, "m")
    assert "is busy: apollofs volume" in mount(url)
    world.run("umount", mountpoint)


# -- ending -----------------------------------------------------------------------------------------------------------


def test_a_busy_mount_stays_unless_it_is_lazy(world: World, url: str) -> None:
    mountpoint = world.mount(url, "m")
    pid = world.pid(mountpoint)
    with held_open(mountpoint) as busy:
        assert "is busy" in world.fail("umount", mountpoint)
        assert mount_at(str(mountpoint)) is not None
        assert world.report("umount", mountpoint, "--lazy")["ended"] is False
        assert mount_at(str(mountpoint)) is None
        busy.communicate(timeout=DEADLINE_S)
    assert await_end(pid)
    assert world.report("mounts", url) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", [False, True])
def test_a_signal_ends_it_with_everything_committed(world: World, url: str, number: signal.Signals, busy: bool) -> None:
    mountpoint = world.mount(url, "m")
    pid = world.pid(mountpoint)
    fd = os.open(mountpoint / "written", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"not yet synced")
    if not busy:
        os.close(fd)
    os.kill(pid, number)
    assert await_end(pid)
    if busy:
        # the descriptor of a mount that has gone: the kernel may still write to the local file by itself
        with pytest.raises(OSError, match="not connected"):
            os.fsync(fd)
        with pytest.raises(OSError, match="not connected"):
            os.close(fd)
    assert mount_at(str(mountpoint)) is None
    assert world.report("mounts", url) == []
    again = world.mount(url, "again")
    assert (again / "written").read_bytes() == b"not yet synced"
    world.run("umount", again)


def test_umount_from_outside_ends_it(world: World, url: str) -> None:
    mountpoint = world.mount(url, "m")
    pid = world.pid(mountpoint)
    subprocess.run(["umount", "-i", mountpoint], check=True, timeout=DEADLINE_S)
    assert await_end(pid)
    assert world.report("mounts", url) == []
    assert "everything is committed" in world.log("m").read_text()


def test_a_signal_spares_what_is_mounted_there_by_now(world: World, url: str) -> None:
    """A bind mount, as a container has it, keeps the old mount alive when it has left its place to a new one."""
    mountpoint, elsewhere = world.mount(url, "m"), world.directory / "elsewhere"
    pid = world.pid(mountpoint)
    elsewhere.mkdir()
    subprocess.run(["mount", "--bind", mountpoint, elsewhere], check=True, timeout=DEADLINE_S)
    try:
        subprocess.run(["umount", "-i", mountpoint], check=True, timeout=DEADLINE_S)
        (elsewhere / "written").write_bytes(b"by the other way")
        subprocess.run(["mount", "-t", "tmpfs", "other", mountpoint], check=True, timeout=DEADLINE_S)
        try:
            os.kill(pid, signal.SIGTERM)
            assert await_end(pid)
            entry = mount_at(str(mountpoint))
            assert entry is not None
            assert entry.fstype == "tmpfs"
        finally:
            subprocess.run(["umount", mountpoint], check=False, timeout=DEADLINE_S)
    finally:
        subprocess.run(["umount", "--lazy", elsewhere], check=True, timeout=DEADLINE_S)
    world.mount(url, "m")
    assert (mountpoint / "written").read_bytes() == b"by the other way"
    world.run("umount", mountpoint)


def test_a_killed_mount_can_be_taken_away_and_mounted_over(world: World, url: str) -> None:
    mountpoint = world.mount(url, "m")
    for _ in range(2):
        pid = world.pid(mountpoint)
        os.kill(pid, signal.SIGKILL)
        assert await_end(pid)
        assert "does not run" in world.fail("status", mountpoint)
        (silent,) = [one for one in world.report("status") if one["mountpoint"] == str(mountpoint)]
        assert silent["answers"] is False
        world.mount(url, "m")
        assert os.listdir(mountpoint) == []
    pid = world.pid(mountpoint)
    os.kill(pid, signal.SIGKILL)
    assert await_end(pid)
    assert world.report("umount", mountpoint)["committed"] is False
    assert mount_at(str(mountpoint)) is None


def test_foreground(world: World, url: str) -> None:
    mountpoint = world.directory / "m"
    mountpoint.mkdir()
    words = ["mount", url, mountpoint, "--site", "here", "--cache-dir", world.directory / "cache", "--foreground"]
    process = subprocess.Popen(
        [sys.executable, "-m", "apollofs.fs.cli", *map(str, words)],
        stderr=subprocess.PIPE,
        env=world.environment,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "ready" in line:
            break
    assert world.pid(mountpoint) == process.pid
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert "everything is committed" in errors


# -- mount(8), and the embedded volume --------------------------------------------------------------------------------


def test_the_helper_of_mount(world: World, url: str) -> None:
    mountpoint = world.directory / "m"
    mountpoint.mkdir()
    options = f"rw,_netdev,site=here,cache_dir={world.directory}/cache,log_file={world.log('m')}"
    world.run("mount-helper", url, mountpoint, "-s", "-o", options)
    (mountpoint / "x").mkdir()
    assert "is mounted there already" in world.fail("mount-helper", url, mountpoint, "-o", options, status=32)
    world.run("umount-helper", mountpoint)
    assert mount_at(str(mountpoint)) is None


def test_up_and_down_keep_the_data(world: World) -> None:
    directory, first, second = (world.directory / name for name in ("volume", "first", "second"))
    for mountpoint in (first, second):
        mountpoint.mkdir()
    report = world.report("up", directory, first)
    try:
        (first / "file").write_bytes(b"kept")
        assert "is busy" in world.fail("up", directory, first)
        world.run("up", directory, second, "--site", "other")
        assert (second / "file").read_bytes() == b"kept"
        assert [site["name"] for site in world.report("site", "list", report["meta_url"])] == ["local", "other"]
        down = world.report("down", directory)
        assert (sorted(down["unmounted"]), down["etcd_stopped"]) == (sorted(map(str, (first, second))), True)
        assert json.loads(world.run("down", directory, "--json"))["etcd_stopped"] is False
        assert "can't be reached" in world.fail("mounts", report["meta_url"])
        world.run("up", directory, first)
        assert (first / "file").read_bytes() == b"kept"
    finally:
        world.run("down", directory, "--lazy")
    assert world.mounts() == []
