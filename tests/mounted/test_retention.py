"""Checkpoint retention by an agent, on real mounts of two sites, while a run saves and others read."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.mount_faults import content, until
from tests.mounted.agents import start_agent, status_of
from tests.mounted.harness import END_DEADLINE_S, LocalBodies, Namespace

pytestmark = pytest.mark.mounted
SIZE = 300_000
FILES = ("model.bin", "optimizer.bin")


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    sites = [LocalBodies("west"), LocalBodies("east")]
    with Namespace.made(tmp_path, sites, format_options=("--block-size", "64K")) as namespace:
        yield namespace


@contextmanager
def agents(namespace: Namespace) -> Iterator[None]:
    """One at each site, both of which want to apply retention every second; none has anything to complain about."""
    every = ("--retention-every", "1s")
    started = [start_agent(namespace, site, *every) for site in ("west", "east")]
    try:
        yield
    finally:
        for agent in started:
            agent.process.send_signal(signal.SIGTERM)
        ended = [agent.process.wait(END_DEADLINE_S) for agent in started]
        assert ended == [0, 0]
    assert [agent.log.news() for agent in started] == [[], []]


def save(run: Path, step: int) -> None:
    """As careful programs do: under another name first."""
    directory = run / f"step{step}.tmp"
    directory.mkdir()
    for number, name in enumerate(FILES):
        (directory / name).write_bytes(content(2 * step + number, SIZE))
    directory.rename(run / f"step{step}")


def steps(run: Path) -> set[int]:
    return {int(path.name.removeprefix("step")) for path in run.iterdir() if path.name.startswith("step")}


def check(run: Path, step: int) -> None:
    for number, name in enumerate(FILES):
        assert (run / f"step{step}" / name).read_bytes() == content(2 * step + number, SIZE)


def bring_back(namespace: Namespace, top: Path, step: int) -> None:
    """As docs/RETENTION.md says."""
    for each in namespace.report("trash", "list", namespace.url):
        if f"/step{step}/" in each["path"]:
            path = namespace.report("trash", "restore", namespace.url, each["ino"])["path"]
    (top / path[1:]).parent.rename(top / "run" / f"step{step}")


def test_what_anybody_needs_stays_and_the_rest_goes(namespace: Namespace) -> None:
    west, east = namespace.mount("west"), namespace.mount("east")
    (west.path / "run").mkdir()
    run, there = west.path / "run", east.path / "run"
    for step in range(1, 7):
        save(run, step)
    assert steps(there) == set(range(1, 7))
    (run / "best").symlink_to("step3")
    (run / "latest").write_text("step6")
    namespace.command("seal", str(run / "step4"), "--term", "10s")
    with (there / "step1" / FILES[0]).open("rb") as reader, (there / "step2" / FILES[1]).open("rb") as locked:
        assert reader.read(1000) == content(2, SIZE)[:1000]
        fcntl.flock(locked, fcntl.LOCK_SH)
        namespace.command("retention", "set", namespace.url, "/run", "--keep-last", "2", "--settle", "0")
        planned = namespace.report("retention", "apply", namespace.url, "/run", "--dry-run")
        assert {each["step"]: each["why"] for each in planned["checkpoints"]} == {
            1: "open",
            2: "open",
            3: "named",
            4: "sealed",
            5: "among the last",
            6: "named",
        }
        with agents(namespace):
            for step in range(7, 13):
                save(run, step)
                (run / "latest.new").write_text(f"step{step}")
                (run / "latest.new").rename(run / "latest")
            until(lambda: steps(run) == {1, 2, 3, 4, 11, 12}, "the others are gone")
            assert steps(there) == steps(run)
            for step in steps(there):
                check(there, step)
            reader.seek(0)
            assert reader.read() == content(2, SIZE)
            assert os.fstat(reader.fileno()).st_nlink == 1
            until(lambda: status_of(namespace, "west")["retired"] + status_of(namespace, "east")["retired"] > 0, "told")
            reader.close()
            fcntl.flock(locked, fcntl.LOCK_UN)
            locked.close()
            until(lambda: steps(there) == {3, 4, 11, 12}, "what was open goes when it is closed")
    assert namespace.report("retention", "apply", namespace.url)["errors"] == []  # goes on with what agents have begun
    trashed = namespace.report("trash", "list", namespace.url)
    assert len([each for each in trashed if each["path"].endswith(FILES)]) == 8 * len(FILES)
    bring_back(namespace, west.path, 5)
    check(there, 5)
    namespace.command("unseal", str(run / "step4"))


def test_by_hand(namespace: Namespace) -> None:
    mount = namespace.mount("west")
    for step in (10, 20, 30, 40):
        (mount.path / f"epoch=1-step={step}.ckpt").write_bytes(content(step, SIZE))
    (mount.path / "last.ckpt").symlink_to("epoch=1-step=40.ckpt")
    with pytest.raises(Exception, match="no retention policy of its own"):
        namespace.command("retention", "apply", namespace.url, "/")
    namespace.command("retention", "set", namespace.url, "/", "--keep-last", "1", "--keep-every", "20", "--settle", "0")
    report = namespace.report("retention", "apply", namespace.url)
    assert (report["removed"], report["removed_bytes"], report["errors"]) == (2, 2 * SIZE, [])
    assert sorted(os.listdir(mount.path)) == [
        *(".retired", "epoch=1-step=20.ckpt", "epoch=1-step=40.ckpt", "last.ckpt")
    ]
