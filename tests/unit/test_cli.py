"""The command without a mount: what it reports, and that every mistake is one clear line and the right status."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.fs.cli import main
from apollofs.fs.cli.app import COMMANDS
from apollofs.fs.cli.output import age_text
from apollofs.fs.embedded import EmbeddedEtcd


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("APOLLOFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("APOLLOFS_ETCD_PASSWORD", raising=False)

    def call(*words: object) -> Outcome:
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of an etcd of this module."""
    server = EmbeddedEtcd(str(tmp_path_factory.mktemp("etcd")), os.environ)
    with server.locked():
        state = server.start()
        yield f"127.0.0.1:{state.client_port}"
        server.stop()


@pytest.fixture
def url(server: str, request: pytest.FixtureRequest) -> str:
    """A META_URL of a volume of this test."""
    return f"etcd://{server}/{re.sub('[^a-z0-9]', '-', request.node.name)[:60]}"


@pytest.fixture
def formatted(run: Run, url: str, tmp_path: Path) -> str:
    done = run("format", url, "--site", "here", "--blobs", (tmp_path / "blobs").as_uri(), "--create-bucket")
    assert done.status == 0, done.err
    return url


def failed(done: Outcome, words: str, status: int = 1) -> None:
    """Exactly one line on standard error, nothing else, and this status."""
    assert (done.status, done.out) == (status, "")
    assert done.err.startswith("apollofs: ")
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1
    assert words in done.err


# -- volumes and sites ------------------------------------------------------------------------------------------------


def test_format_check_destroy(run: Run, url: str, tmp_path: Path) -> None:
    blobs = (tmp_path / "blobs").as_uri()
    words = ("format", url, "--site", "here", "--blobs", blobs, "--block-size", "1M", "--inline-max", "4096")
    failed(run(*words), "--create-bucket")
    done = run(*words, "--create-bucket", "--json")
    facts = json.loads(done.out)
    assert (facts["block_bytes"], facts["inline_bytes_max"], facts["site"]) == (1 << 20, 4096, "here")
    failed(run(*words), "exists already")
    done = run("check", url, "--json")
    assert done.status == 0
    assert json.loads(done.out)["violations"] == []
    assert "no violation in 1 inodes" in run("check", url).out
    done = run("destroy", url, "--yes", "--blobs", "--json")
    assert json.loads(done.out)["objects_removed"] == 0
    failed(run("check", url), "there is no volume")
    failed(run("destroy", url, "--yes"), "there is no volume")


def test_any_name_can_be_said(run: Run, tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\x1b[31m")
    failed(run("clone", tmp_path / odd, tmp_path / "clone"), "\\xff\\x1b[31m: No such file")
    failed(run("warm", "x" * 300), "is not on an apollofs mount")


def test_destroy_goes_on_where_a_store_was_away(
    run: Run, formatted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    south = tmp_path / "south"
    words = ("site", "add", formatted, "--site", "south", "--blobs", south.as_uri(), "--create-bucket")
    assert run(*words).status == 0
    south.rename(tmp_path / "away")
    failed(run("destroy", formatted, "--yes", "--blobs"), "site 'south'")
    assert run("check", formatted).status == 0
    (tmp_path / "away").rename(south)

    async def fails(*_: object) -> int:
        await trio.lowlevel.checkpoint()
        raise BlobStoreUnavailable("the disk is full of holes")

    with monkeypatch.context() as broken:
        broken.setattr("apollofs.fs.site_stores.remove_objects", fails)
        failed(run("destroy", formatted, "--yes", "--blobs"), "full of holes; run the command again to go on")
    failed(run("site", "list", formatted), "is being destroyed")
    failed(run("format", formatted, "--site", "here", "--blobs", south.as_uri()), "is being destroyed")
    assert json.loads(run("destroy", formatted, "--yes", "--blobs", "--json").out)["objects_removed"] == 0
    failed(run("destroy", formatted, "--yes"), "there is no volume")


def test_a_bad_name_makes_no_directories(run: Run, formatted: str, url: str, tmp_path: Path) -> None:
    words = ("--site", "bad name", "--blobs", (tmp_path / "new").as_uri(), "--create-bucket")
    failed(run("site", "add", formatted, *words), "bad site name")
    failed(run("format", url + "-2", *words), "bad site name")
    assert not (tmp_path / "new").exists()


def test_destroy_asks(run: Run, formatted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(words: str) -> None:
        monkeypatch.setattr("click.prompt", lambda *_, **__: words)

    answer("no")
    failed(run("destroy", formatted), "nothing was removed")
    assert run("check", formatted).status == 0
    answer(formatted.rpartition("/")[2])
    assert run("destroy", formatted).status == 0
    failed(run("check", formatted), "there is no volume")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--block-size", "3M", "power of two"),
        ("--block-size", "1", "power of two"),
        ("--block-size", "big", "'big' is no size"),
        ("--inline-max", "1G", "inline limit"),
        ("--site", "a b", "bad site name 'a b'"),
    ],
)
def test_format_refuses(run: Run, url: str, tmp_path: Path, option: str, value: str, said: str) -> None:
    blobs = (tmp_path / "blobs").as_uri()
    done = run("format", url, "--site", "x", "--blobs", blobs, "--create-bucket", option, value)
    failed(done, said)


@pytest.mark.parametrize(
    "blobs", ["/plain/path", "http://x", "s3://AB", "s3://key:secret@bucket/p", "s3://bucket/p?secret=hunter2"]
)
def test_format_refuses_bad_blob_urls(run: Run, url: str, blobs: str) -> None:
    done = run("format", url, "--site", "x", "--blobs", blobs)
    failed(done, "blob" if "AB" not in blobs else "bucket")
    assert "secret@" not in done.err
    assert "hunter2" not in done.err


def test_sites(run: Run, formatted: str, tmp_path: Path) -> None:
    east = (tmp_path / "east").as_uri()
    words = ("site", "add", formatted, "--site", "east", "--blobs", east, "--create-bucket")
    assert run(*words).status == 0
    failed(run(*words), "has a site 'east' already")
    listed = json.loads(run("site", "list", formatted, "--json").out)
    assert [(site["id"], site["name"]) for site in listed] == [(1, "here"), (2, "east")]
    assert listed[1]["blobs"] == east
    assert "east" in run("site", "list", formatted).out
    assert run("site", "remove", formatted, "--site", "east").status == 0
    failed(run("site", "remove", formatted, "--site", "east"), "has no site 'east'")
    failed(run("site", "remove", formatted, "--site", "here"), "only site")


def test_mounts_of_nobody(run: Run, formatted: str) -> None:
    assert json.loads(run("mounts", formatted, "--json").out) == []
    assert "is mounted nowhere" in run("mounts", formatted).out


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["check"], ["mounts"], ["site", "list"], ["destroy", "--yes"]])
def test_a_volume_that_is_not_there(run: Run, url: str, words: list[str]) -> None:
    failed(run(*words, url), "there is no volume")


@pytest.mark.parametrize("words", [["check"], ["mounts"], ["site", "list"], ["destroy", "--yes"]])
def test_a_server_that_is_not_there_is_named(run: Run, words: list[str]) -> None:
    failed(run(*words, "etcd://127.0.0.1:1/vol"), "etcd at 127.0.0.1:1 can't be reached")


def test_bad_metadata_urls(run: Run) -> None:
    failed(run("check", "nonsense"), "etcd://host1:2379,host2:2379/volume")
    done = run("check", "etcd://me:hunter2@host/vol")
    failed(done, "APOLLOFS_ETCD_PASSWORD")
    assert "hunter2" not in done.err
    failed(run("check", "etcd://me@host/vol"), "needs a password")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["check"], "Missing argument 'META_URL'"),
        (["format", "etcd://h/v"], "Missing option '--site'"),
        (["check", "etcd://h/v", "--bogus"], "No such option"),
        (["mount", "etcd://h/v", "/mnt"], "--site NAME"),
        (["mount", "etcd://h/v", "/mnt", "--site", "a"], "--cache-dir DIR"),
    ],
)
def test_a_wrong_use_has_status_2(run: Run, words: list[str], said: str) -> None:
    failed(run(*words), said, status=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "bogus=hunter2"], "unknown option 'bogus'"),
        (["--cache-size", "1"], "cache-size must be between"),
        (["--cache-size", "lots"], "option 'cache_size': 'lots' is no size"),
        (["--lease-ttl", "0"], "lease-ttl must be between"),
        (["--lease-ttl", "soon"], "'soon' is no whole number"),
        (["-o", "commit_interval=nan"], "'nan' is no number"),
        (["-o", "read_deadline=0"], "read-deadline must be between"),
        (["-o", "entry_cache=maybe"], "'maybe' is neither on nor off"),
        (["-o", "remount"], "can't be remounted"),
        (["--password-file", "/missing"], "needs a user"),
    ],
)
def test_mount_refuses_options(run: Run, tmp_path: Path, options: list[str], said: str) -> None:
    done = run("mount", "etcd://h/v", tmp_path, "--site", "a", "--cache-dir", tmp_path / "cache", *options)
    failed(done, said)
    assert "hunter2" not in done.err


def test_mount_refuses_places(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for mountpoint, cache, said in (
        (tmp_path / "missing", tmp_path / "cache", "does not exist"),
        (tmp_path / "file", tmp_path / "cache", "is not a directory"),
        (Path("/proc"), tmp_path / "cache", "is busy: proc is mounted there"),
        (tmp_path, tmp_path / "file" / "cache", "cache directory"),
    ):
        failed(run("mount", "etcd://h/v", mountpoint, "--site", "a", "--cache-dir", cache), said)


def test_what_is_not_mounted(run: Run, tmp_path: Path) -> None:
    failed(run("umount", tmp_path), "is not mounted")
    failed(run("umount", "/proc"), "is no apollofs mount but proc")
    failed(run("status", tmp_path), "is not mounted")
    failed(run("info", tmp_path), "is not on an apollofs mount")
    failed(run("down", tmp_path), "was never brought up")
    (tmp_path / "interrupted" / "etcd").mkdir(parents=True)
    assert run("down", tmp_path / "interrupted").out.endswith("was down already\n")
    failed(run("down", tmp_path / "missing"), "does not exist")


def test_up_refuses(run: Run, tmp_path: Path) -> None:
    failed(run("up", tmp_path / "vol", tmp_path / "missing"), "does not exist")
    failed(run("up", tmp_path / "vol", tmp_path, "--site", "a/b"), "bad site name")
    assert not (tmp_path / "vol").exists()


# -- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(run: Run, name: str) -> None:
    if name.endswith("mount-helper") and name != "install-mount-helper":
        return
    done = run(name, "--help")
    assert done.status == 0
    assert "Usage: apollofs" in done.out


def test_no_command_shows_the_commands(run: Run) -> None:
    done = run()
    assert done.status == 2
    assert "mount-helper" in done.err
    assert "\n  umount-helper" not in done.err


def test_version(run: Run) -> None:
    assert set(json.loads(run("version", "--json").out)) == {"apollofs", "python", "kernel"}
    assert run("version").out.startswith("apollofs ")


def test_a_bug_is_one_line_and_a_traceback_only_on_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("division")

    monkeypatch.setattr("apollofs.fs.cli.reports.read_mounts", broken)
    failed(run("status"), "internal error: ZeroDivisionError: division")
    assert "Traceback" in run("--debug", "status").err


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (0, "0s"), (59, "59s"), (61, "1m 1s"), (3600, "1h"), (90_061, "1d 1h")]
)
def test_ages(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


def test_the_mount_helper_is_installed_and_removed(run: Run, tmp_path: Path) -> None:
    sbin, units = tmp_path / "sbin", tmp_path / "units"
    sbin.mkdir()
    units.mkdir()
    words = ("install-mount-helper", "--sbin", sbin, "--systemd", units)
    done = run(*words)
    assert done.status == 0, done.err
    assert {path.name for path in sbin.iterdir()} == {
        "mount.apollofs",
        "mount.fuse.apollofs",
        "umount.apollofs",
        "umount.fuse.apollofs",
    }
    assert os.access(sbin / "mount.apollofs", os.X_OK)
    assert "Type=notify" in (units / "apollofs@.service").read_text()
    assert run(*words).status == 0, "again, over its own files"
    assert len(json.loads(run(*words, "--uninstall", "--json").out)["removed"]) == 5
    assert [*sbin.iterdir(), *units.iterdir()] == []
    (sbin / "mount.apollofs").write_text("somebody else's\n")
    failed(run(*words), "is not of apollofs")
    failed(run(*words, "--uninstall"), "is not of apollofs")


def test_helpers_fail_with_the_status_that_mount_expects(run: Run, tmp_path: Path) -> None:
    done = run("mount-helper", "etcd://h/v", tmp_path / "missing", "-o", f"rw,site=a,cache_dir={tmp_path}")
    assert done.status == 32
    assert done.err == f"mount.apollofs: the mountpoint {tmp_path}/missing does not exist\n"
    done = run("mount-helper", "etcd://h/v")
    assert done.status == 1
    done = run("umount-helper", tmp_path)
    assert (done.status, done.err) == (32, f"umount.apollofs: {tmp_path} is not mounted\n")
