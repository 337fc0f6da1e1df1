"""Two mounts at one site whose S3 goes wrong at will, and disks for caches that fill up or become read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounted.harness import GatewayBodies, Mount, Namespace
from tests.support.radosgw_server import RadosGateway
from tests.support.s3_faults import Fault, FaultyS3

FOR_EVER = 1_000_000
"""Requests that a fault spoils."""
COMMAND_S = 30.0


@dataclass(frozen=True)
class Faulty:
    """Two mounts at one site, each with a cache of its own, whose store is spoilt at will."""

    s3: FaultyS3
    here: Mount
    there: Mount

    def go_down(self, fault: Fault) -> None:
        """From now on every request is spoilt, until `s3.clear`."""
        self.s3.add(Fault(fault.kind, fault.method, "", FOR_EVER, fault.status, fault.code, fault.position))


@contextmanager
def faulty_mounts(gateway: RadosGateway, directory: Path, options: str) -> Iterator[Faulty]:
    """`options`: of both mounts, as after -o."""
    with FaultyS3.serving(gateway.endpoint) as s3:
        sites = [GatewayBodies("here", gateway, "faults", s3.endpoint)]
        with Namespace.made(directory, sites, format_options=("--block-size", "1M")) as namespace:
            here, there = (namespace.mount("here", "-o", options, name=name) for name in ("a", "b"))
            for mount in (here, there):
                # what goes wrong with the store is told; a traceback would be a bug
                mount.expected_logs.append(r"\A(?:(?!Traceback)[\s\S])*\Z")
            yield Faulty(s3, here, there)
            s3.clear()


@dataclass(frozen=True)
class Disk:
    """An ext4 filesystem in a file, for a mount's cache."""

    path: Path

    def turn_read_only(self) -> None:
        """As the kernel does it when it finds damage: at once, whoever has files open for writing."""
        device = _run("findmnt", "-n", "-o", "SOURCE", str(self.path)).strip()
        Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("1")
        with pytest.raises(OSError, match="Read-only"):
            (self.path / "probe").touch()


@contextmanager
def small_disk(directory: Path, name: str, size_bytes: int) -> Iterator[Disk]:
    """Mounted at `directory / name`."""
    image, path = directory / f"{name}.img", directory / name
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(size_bytes)
    _run("mkfs.ext4", "-q", "-F", str(image))
    _run("mount", "-o", "loop,errors=remount-ro", str(image), str(path))
    try:
        yield Disk(path)
    finally:
        _run("umount", "--lazy", str(path))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, timeout=COMMAND_S, capture_output=True, text=True).stdout
