"""-o options, sizes, and the calling convention of mount(8)'s helpers."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from apollofs.fs.assembly import store_options
from apollofs.fs.cli.helper import HelperCall, parse_helper_call
from apollofs.fs.config import BodyConfig, ConfigError, SessionConfig, default_deadline_s
from apollofs.fs.mount_options import MountOptions, parse_options, parse_size
from apollofs.fs.user_error import UserError


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], MountOptions()),
        (["defaults,_netdev,nofail,x-systemd.automount,comment=hi,,"], MountOptions()),
        (["site=a,cache_dir=/x"], MountOptions({"site": "a", "cache_dir": "/x"})),
        (["cache-size=1G", "cache_size=2G"], MountOptions({"cache_size": "2G"})),
        (["ro"], MountOptions(flags=frozenset({"ro"}))),
        (["ro,rw"], MountOptions(flags=frozenset({"rw"}))),
        (["rw,ro"], MountOptions(flags=frozenset({"ro"}))),
        (["noallow_other,allow_other"], MountOptions(flags=frozenset({"allow_other"}))),
        (["allow_other", "noallow_other"], MountOptions(flags=frozenset({"noallow_other"}))),
        (["ro,debug"], MountOptions(flags=frozenset({"ro", "debug"}))),
        (["suid,nosuid,dev,noatime,sync,async"], MountOptions(kernel=("nosuid", "dev", "noatime", "async"))),
    ],
)
def test_options(texts: list[str], expected: MountOptions) -> None:
    assert parse_options(texts) == expected


@pytest.mark.parametrize("text", ["bogus", "bogus=1", "site", "site=", "remount", "=x", "password=hunter2"])
def test_options_that_are_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_options([text])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("8K", 8192),
        ("1.5M", 3 << 19),
        ("10G", 10 << 30),
        ("10 GiB", 10 << 30),
        ("1tb", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1 2", "1e3", "0x10"])
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["src", "/mnt"], HelperCall(("src", "/mnt"))),
        (["src", "/mnt", "-o", "rw,site=a"], HelperCall(("src", "/mnt"), ("rw,site=a",))),
        (["src", "/mnt", "-sv", "-orw", "-t", "fuse.apollofs"], HelperCall(("src", "/mnt"), ("rw",))),
        (["src", "/mnt", "-fn"], HelperCall(("src", "/mnt"), fake=True)),
        (["src", "/mnt", "-r"], HelperCall(("src", "/mnt"), ("ro",))),
        (["/mnt", "-l"], HelperCall(("/mnt",), lazy=True)),
    ],
)
def test_helper_calls(words: list[str], expected: HelperCall) -> None:
    assert parse_helper_call(words) == expected


def test_helper_calls_that_are_refused() -> None:
    with pytest.raises(click.UsageError, match="-z"):
        parse_helper_call(["src", "/mnt", "-z"])
    with pytest.raises(UserError, match="namespace"):
        parse_helper_call(["src", "/mnt", "-N", "/proc/1/ns/mnt"])


@pytest.mark.parametrize(("commit_s", "read_s"), [(600.0, 60.0), (1.0, 90.0)])
def test_no_store_gives_up_before_a_commit_or_a_reader_does(commit_s: float, read_s: float) -> None:
    config = BodyConfig(Path("/cache"), commit_deadline_s=commit_s, read_deadline_s=read_s)
    assert store_options(config, "/ca").retry.deadline_s == max(commit_s, read_s)


def test_an_operation_may_wait_for_the_lease_of_a_mount_that_has_died() -> None:
    with pytest.raises(ConfigError, match=r"more than lease-ttl \(60 s\)"):
        SessionConfig(lease_ttl_s=60, operation_deadline_s=60)
    for lease_s in (2, 15, 60, 600):
        SessionConfig(lease_ttl_s=lease_s, operation_deadline_s=default_deadline_s(lease_s))
