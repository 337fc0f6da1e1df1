"""What the daemon costs where bodies are saved and loaded, and whether it disturbs. See scripts/bench.

Processor time of the daemon beside that of a bare S3 client that moves as many bytes in the same run; its resident
memory while eight ranks save, and with a large directory listed and cached; and how long a stat of a name that this
mount does not hold takes another process, at rest and while a checkpoint is saved.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from bench_bodies import AT_ONCE, Bucket, Cost, load, other_process, raw_costs, save
from bench_fill import fill
from bench_mounts import SITE, forget_peak, namespace, processor_s, resident_bytes, resident_peak_bytes, status
from bench_processes import create, each, fan
from bench_systems import make_bucket

from tests.mounted.harness import ROOT, GatewayBodies, Mount, Namespace
from tests.support.radosgw_server import RadosGateway

RAW_BUCKET = "bench-raw"
FILE_BYTES = 512 << 20
LOOK_EVERY_S = 0.005
LOOKS_IDLE = 1000
LOOKS_MAX = 12_000
MAKERS = 4


@dataclass
class Findings:
    """What a run has shown. Costs by what was done; memory in bytes; times in ms."""

    gigabytes: float
    files: int
    costs: dict[str, Cost] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    stat_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    kills: str = ""


# -- (a) processor time -----------------------------------------------------------------------------------------------


def costs(writer: Mount, reader: Mount, bucket: Bucket, size: int) -> Iterator[tuple[str, Cost]]:
    """What the daemon of the mount that is used spends, beside a client that moves as much without one."""
    put, get = raw_costs(bucket, size)
    yield "S3 client alone, PUT", put
    yield "S3 client alone, GET", get
    share = min(size, FILE_BYTES)
    names = [f"cost{number}" for number in range(size // share)]
    yield "saved", cost_of(writer, partial(save_all, writer, names, share), size)
    for what in ("loaded cold on the other mount", "loaded again", "loaded once more"):
        yield what, cost_of(reader, partial(load_all, reader, names), size)


def cost_of(mount: Mount, work: partial[None], size: int) -> Cost:
    began, before = time.perf_counter(), processor_s(mount)
    work()
    return Cost.of(size, time.perf_counter() - began, processor_s(mount) - before)


def save_all(mount: Mount, names: list[str], size: int) -> None:
    for name in names:
        save(f"{mount.path}/{name}", size)


def load_all(mount: Mount, names: list[str]) -> None:
    for name in names:
        load(f"{mount.path}/{name}")


# -- (b) memory -------------------------------------------------------------------------------------------------------


def memory(on: Namespace, writer: Mount, size: int, files: int) -> Iterator[tuple[str, int]]:
    """Peaks, each of the daemon that does the work."""
    yield "at rest, after that", resident_bytes(writer)
    forget_peak(writer)
    fan(partial(save, size=size // AT_ONCE), [[f"{writer.path}/rank{rank}"] for rank in range(AT_ONCE)])
    yield f"{AT_ONCE} ranks save", resident_peak_bytes(writer)
    lister = on.mount(SITE, name="lister")
    yield "a new mount", resident_bytes(lister)
    directory = writer.path / "many"
    directory.mkdir()
    fan(create, [[f"{directory}/f{number}" for number in range(maker, files, MAKERS)] for maker in range(MAKERS)])
    for _ in range(3):
        assert len([entry.stat() for entry in os.scandir(lister.path / "many")]) == files
    yield f"{files} files listed and cached", resident_peak_bytes(lister)
    yield "keys cached for that", int(status(lister)["delegations"]["cached_keys"])


# -- (c) what else the mount is asked meanwhile -----------------------------------------------------------------------


class Looks:
    """Calls of stat, each for the only name in a directory that this mount has never touched: it must ask etcd."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._next = 0

    def while_(self, saving: Future[None] | None) -> dict[str, float]:
        """Until it is done, or a thousand; one every few milliseconds. In ms."""
        took_ms: list[float] = []
        requests = status(self._mount)["etcd"]["requests"]
        while self._next < LOOKS_MAX and (len(took_ms) < LOOKS_IDLE if saving is None else not saving.done()):
            path = f"{self._mount.path}/tree/d{self._next}/f0"
            took_ms.append(1000 * each(os.stat, [path]))
            self._next += 1
            time.sleep(LOOK_EVERY_S)
        asked = status(self._mount)["etcd"]["requests"] - requests
        cuts = statistics.quantiles(took_ms, n=100, method="inclusive")
        found = {"looks": len(took_ms), "p50": cuts[49], "p99": cuts[98], "max": max(took_ms)}
        return {**found, "etcd_requests_each": asked / len(took_ms)}


def stat_ms(on: Namespace, writer: Mount, size: int) -> Iterator[tuple[str, dict[str, float]]]:
    fill(on.cluster.endpoints, on.volume, SITE, LOOKS_MAX, 1)
    looks = Looks(writer)
    with other_process() as pool:
        pool.submit(os.getpid).result()  # the process is there before anything is timed
        yield "at rest", looks.while_(None)
        yield "while a checkpoint is saved", looks.while_(pool.submit(save, f"{writer.path}/large", size))


# -- (d) kills --------------------------------------------------------------------------------------------------------


def kill_figures(kills: int) -> str:
    """What the test of saves under kill -9 prints. Raises RuntimeError if it fails."""
    words = (sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "tests/faults/test_mount_saves.py")
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "APOLLOFS_KILLS": str(kills)}, capture_output=True, text=True, check=False
    )
    found = re.search(r"^\d+ kills.*$", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        raise RuntimeError(f"the test of saves under kill -9 failed:\n{done.stdout}{done.stderr}")
    return found[0]


# -- all of it --------------------------------------------------------------------------------------------------------


def run(gigabytes: float, files: int, kills: int) -> Findings:
    size = int(gigabytes * (1 << 30)) // FILE_BYTES * FILE_BYTES or int(gigabytes * (1 << 30))
    found = Findings(gigabytes, files)
    with (
        tempfile.TemporaryDirectory(prefix="apollofs-bench-") as directory,
        RadosGateway.started(Path(directory) / "rgw", disk_bytes=5 * size + (8 << 30)) as gateway,
        namespace(GatewayBodies(SITE, gateway, "bench-apollofs")) as on,
    ):
        user = gateway.create_user("apollofs-tests")
        make_bucket(gateway, user, RAW_BUCKET)
        bucket = Bucket(gateway.endpoint, RAW_BUCKET, user.access_key, user.secret_key)
        writer, reader = (on.mount(SITE, name=name) for name in ("writer", "reader"))
        for name, cost in costs(writer, reader, bucket, size):
            found.costs[name] = cost
        found.memory_bytes |= memory(on, writer, size, files)
        found.stat_ms |= stat_ms(on, writer, size)
        show(found)  # before the namespace is checked: what was found stays known if that fails
    if kills:
        found.kills = kill_figures(kills)
        print(found.kills)
    return found


def show(found: Findings) -> None:
    print(f"{'':34}{'MB/s':>8}{'core-s/GB':>12}{'beside the client':>20}")
    for name, cost in found.costs.items():
        alone = found.costs["S3 client alone, PUT" if name == "saved" else "S3 client alone, GET"]
        beside = "" if "alone" in name else f"{cost.core_s_per_gb - alone.core_s_per_gb:+20.2f}"
        print(f"{name:34}{cost.mb_per_second:8.0f}{cost.core_s_per_gb:12.2f}{beside}")
    print("\nresident memory of the daemon, MiB")
    for name, value in found.memory_bytes.items():
        print(f"{name:40}" + (f"{value:>8}" if name.startswith("keys") else f"{value / (1 << 20):>8.0f}"))
    print(f"\nstat of a name that is not held, ms{'looks':>10}{'p50':>8}{'p99':>8}{'most':>8}{'requests':>10}")
    for name, times in found.stat_ms.items():
        row = "".join(f"{times[key]:8.2f}" for key in ("p50", "p99", "max"))
        print(f"{name:35}{times['looks']:10.0f}{row}{times['etcd_requests_each']:10.2f}")
    at_rest, saving = found.stat_ms.values()
    print(f"p99 while saving to p99 at rest: {saving['p99'] / at_rest['p99']:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench data", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4, help="GiB saved and loaded, for each figure")
    parser.add_argument("--files", type=int, default=100_000, help="of the directory that is listed")
    parser.add_argument("--kills", type=int, default=0, help="kill the daemon so often amid saves, too")
    parser.add_argument("--json", default="", help="write all figures there")
    options = parser.parse_args()
    found = run(options.gigabytes, options.files, options.kills)
    if options.json:
        Path(options.json).write_text(json.dumps(asdict(found), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
