"""What an operation costs the daemon: processor time, requests of the kernel, requests of etcd. See scripts/bench."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_mounts import SITE, namespace, processor_s, status
from bench_processes import create, each

from tests.mounted.harness import Mount

SMALL = bytes(2048)
LOOKS = 5
"""Times that each file is looked at."""


@dataclass(frozen=True)
class Cost:
    """Of one operation, as means over many."""

    name: str
    per_second: float
    daemon_us: float
    etcd: float
    fuse: float


class Meter:
    """Reads the daemon's counters before and after."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount

    def measure(self, name: str, paths: Sequence[str], call: Callable[[str], object]) -> Cost:
        """`call` on each path, one after the other."""
        before, began = self._read(), time.perf_counter()
        each(call, paths)
        spent_s = time.perf_counter() - began
        cpu_s, etcd, fuse = (after - was for after, was in zip(self._read(), before, strict=True))
        count = len(paths)
        return Cost(name, count / spent_s, cpu_s / count * 1e6, etcd / count, fuse / count)

    def _read(self) -> tuple[float, float, float]:
        """Seconds of the daemon's processor time; requests of etcd, of the kernel."""
        counters = status(self._mount)
        return processor_s(self._mount), counters["etcd"]["requests"], counters["fuse"]["requests"]


def write_small(path: str) -> None:
    """A new file of 2 KiB."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(fd, SMALL)
    os.close(fd)


def list_with_attributes(path: str) -> None:
    """As ls -l."""
    for entry in os.scandir(path):
        entry.stat(follow_symlinks=False)


def costs(mount: Mount, files: int) -> list[Cost]:
    """All operations, on files of one new directory."""
    directory = f"{mount.path}/directory"
    os.mkdir(directory)
    paths = [f"{directory}/{number}" for number in range(files)]
    few = [f"{directory}/few{number}" for number in range(files // 10)]
    meter = Meter(mount)
    return [
        meter.measure("create, close", paths, create),
        meter.measure("stat", paths * LOOKS, os.stat),
        meter.measure("open, close", paths, lambda path: os.close(os.open(path, os.O_RDONLY))),
        meter.measure("chmod", paths, lambda path: os.chmod(path, 0o600)),
        meter.measure(f"ls -l of {files}", [directory], list_with_attributes),
        meter.measure("the same again", [directory], list_with_attributes),
        meter.measure("write 2 KiB, close", few, write_small),
        meter.measure("open, read 2 KiB, close", few, lambda path: Path(path).read_bytes()),
        meter.measure("rename", few, lambda path: os.rename(path, f"{path}.r")),
        meter.measure("mkdir", [f"{directory}/d{number}" for number in range(files // 10)], os.mkdir),
        meter.measure("unlink", paths, os.unlink),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench cost", description=__doc__)
    parser.add_argument("--files", type=int, default=3000, help="files of the directory")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    with namespace() as made:
        found = costs(made.mount(SITE), arguments.files)
    print(f"{'':28}{'a second':>10}{'daemon us':>11}{'etcd':>7}{'kernel':>8}")
    for cost in found:
        row = f"{cost.per_second:10.0f}{cost.daemon_us:11.0f}{cost.etcd:7.2f}{cost.fuse:8.2f}"
        print(f"{cost.name:28}{row}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in found], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
