"""Many files, walked by two mounts while a third changes them: is memory bounded, and is anything stale?

Each walk lists and stats everything again. After each operation of the third mount the other two are asked what they
see; and what the walks have listed is compared with the order of the completed operations. Memory is that of the
daemons (RSS), sampled all the time, beside the counters that have a bound. See scripts/bench.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench_fill import fill
from bench_mounts import SITE, namespace, resident_bytes, status
from bench_walks import Changer, Walker, walking

from apollofs.fs.kernel_cache import NAMES_MAX
from apollofs.fs.references import INODES_MAX
from apollofs.metadata.group_cache import GROUPS_MAX, KEYS_MAX
from tests.mounted.harness import Mount, Namespace

SAMPLE_EVERY_S = 1.0
SHOWN_MAX = 10
BOUNDS = {
    ("delegations", "held"): GROUPS_MAX,
    ("delegations", "cached_keys"): KEYS_MAX,
    ("kernel_cache", "names"): NAMES_MAX,
    ("fuse", "inodes"): INODES_MAX,
}
"""What status counts that takes up memory, and how many there may be."""


@dataclass(frozen=True)
class Sample:
    """A daemon at one moment. `counters` are in the order of BOUNDS."""

    at_s: float
    mount: str
    resident_bytes: int
    counters: tuple[float, ...]


@dataclass
class Findings:
    """What a run has shown."""

    files: int
    directories: int
    fill_s: float = 0.0
    etcd_bytes_filled: float = 0.0
    etcd_bytes_live: float = 0.0
    operations: int = 0
    operations_s: float = 0.0
    operation_ms: list[float] = field(default_factory=list)
    seen_wrong: list[str] = field(default_factory=list)
    walks: dict[str, int] = field(default_factory=dict)
    walk_s: dict[str, list[float]] = field(default_factory=dict)
    listings: int = 0
    delegations: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)


class Memory:
    """Samples of all daemons."""

    def __init__(self, mounts: dict[str, Mount], samples: list[Sample]) -> None:
        self._mounts = mounts
        self._samples = samples
        self._began = self._last = time.monotonic()

    def sample(self) -> None:
        """Now, unless it was just done."""
        now = time.monotonic()
        if self._samples and now - self._last < SAMPLE_EVERY_S:
            return
        self._last = now
        for name, mount in self._mounts.items():
            found = status(mount)
            counters = tuple(found[part][counter] for part, counter in BOUNDS)
            self._samples.append(Sample(now - self._began, name, resident_bytes(mount), counters))


def etcd_bytes(on: Namespace) -> float:
    return on.cluster.server.metric("etcd_mvcc_db_total_size_in_use_in_bytes")


def run(files: int, directories: int, seconds: float, seed: int) -> Findings:
    found = Findings(files, directories)
    with namespace() as on:
        mounts = {name: on.mount(SITE, name=name) for name in ("changer", "walker-1", "walker-2")}
        memory = Memory(mounts, found.samples)
        memory.sample()
        trees = {name: mount.path / "tree" for name, mount in mounts.items()}
        empty = etcd_bytes(on)
        found.fill_s = fill(on.cluster.endpoints, on.volume, SITE, directories, files // directories)
        found.etcd_bytes_filled = etcd_bytes(on) - empty
        changes = Changer(trees["changer"], directories, files // directories, random.Random(seed))
        watched = [trees["walker-1"], trees["walker-2"]]
        with walking([Walker(tree, changes.history.base) for tree in watched]) as walks:
            began = time.monotonic()
            while walks.fewest() < 1 or time.monotonic() - began < seconds:
                changes.one()
                found.seen_wrong += [line for tree in watched for line in changes.wrong_in(tree)]
                memory.sample()
            found.operations_s = time.monotonic() - began
            reports = walks.reports()
        found.delegations = {name: status(mount)["delegations"] for name, mount in mounts.items()}
        found.operations, found.operation_ms = changes.done, changes.history.took_ms()
        for name, report in zip(("walker-1", "walker-2"), reports, strict=True):
            found.walks[name], found.walk_s[name] = len(report.walk_s), report.walk_s
            found.listings += len(report.seen)
            found.seen_wrong += [f"{name}: {line}" for line in changes.history.stale(report.seen)]
        on.cluster.server.compact()
        found.etcd_bytes_live = etcd_bytes(on) - empty
        show(found)  # before the namespace is checked: what was found stays known if that fails
    return found


def show(found: Findings) -> None:
    rate = found.files / found.fill_s
    print(f"{found.files} files in {found.directories} directories, made in {found.fill_s:.0f} s ({rate:.0f} /s)")
    print(f"etcd: {found.etcd_bytes_filled / found.files:.0f} bytes a file with its history, ", end="")
    print(f"{found.etcd_bytes_live / found.files:.0f} after compaction")
    print(f"{found.operations} operations in {found.operations_s:.0f} s, each looked at on both walking mounts")
    print(f"an operation: {statistics.median(found.operation_ms):.1f} ms, {max(found.operation_ms):.0f} ms at most")
    for name, counts in found.delegations.items():
        waited_ms = 1000 * counts["recall_wait_s"] / max(1, counts["recalls_sent"])
        returned_ms = 1000 * counts["return_s"] / max(1, counts["returned"])
        print(f"{name}: recalled {counts['recalls_sent']} times, waiting {waited_ms:.1f} ms; ", end="")
        print(f"gave {counts['returned']} back, in {returned_ms:.1f} ms")
    for name, count in found.walks.items():
        took = ", ".join(f"{each:.1f}" for each in found.walk_s[name][:SHOWN_MAX])
        print(f"{name}: {count} whole walks, in s: {took}")
    print(f"{found.listings} listings compared with the operations; stale: {len(found.seen_wrong)}")
    print("\n".join(found.seen_wrong[:SHOWN_MAX]))
    for name in dict.fromkeys(one.mount for one in found.samples):
        show_memory(name, [one for one in found.samples if one.mount == name])


def show_memory(name: str, samples: Sequence[Sample]) -> None:
    over_time = "  ".join(f"{one.at_s:.0f}: {one.resident_bytes >> 20}" for one in evenly(samples))
    print(f"\n{name}: peak {max(one.resident_bytes for one in samples) >> 20} MiB; MiB after so many s: {over_time}")
    most = [max(values) for values in zip(*(one.counters for one in samples), strict=True)]
    for (part, counter), bound, value in zip(BOUNDS, BOUNDS.values(), most, strict=True):
        print(f"    {part}.{counter}: {value:.0f} at most, bound {bound}")


def evenly(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Some of them, from the first to the last."""
    step = max(1, (len(samples) - 1) // SHOWN_MAX)
    yield from samples[::step]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench scale", description=__doc__)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--directories", type=int, default=2_000)
    parser.add_argument("--seconds", type=float, default=120, help="how long is changed, and one walk at least")
    parser.add_argument("--seed", type=int, default=1, help="of the changes")
    parser.add_argument("--json", default="", help="write everything there")
    options = parser.parse_args()
    found = run(options.files, options.directories, options.seconds, options.seed)
    if options.json:
        Path(options.json).write_text(json.dumps(asdict(found), indent=1))
    return 1 if found.seen_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
