"""Values: how long a get and a put take beside a bare get and put of the same etcd. See scripts/bench."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import trio
from bench_mounts import SITE, namespace

from apollofs.fs.api import ClientOptions, open_volume, open_volume_sync
from apollofs.fs.kv import KeyValues
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.store import Put, Range

Call = Callable[[int], Awaitable[object]]
BARE = b"bench/key"


@dataclass(frozen=True)
class Figure:
    """The median of one kind of call, and how it relates to what it stands beside."""

    name: str
    p50_us: float
    beside: str
    ratio: float


@dataclass(frozen=True)
class Kind:
    """A kind of call; `before` is not measured. `beside`: the kind that it is compared with."""

    name: str
    call: Call
    beside: str
    before: Call | None = None
    several: int = 1
    """Calls that are timed together, where one is too short."""


@dataclass(frozen=True)
class Clients:
    """A bare client of etcd, and two of the volume that know of each other's changes at once."""

    bare: EtcdStore
    plain: KeyValues
    """Caches nothing."""
    cached: KeyValues
    """Of a directory that only it uses."""


@asynccontextmanager
async def clients(url: str, endpoints: tuple[tuple[str, int], ...]) -> AsyncIterator[Clients]:
    bare = EtcdStore(EtcdConfig(endpoints))
    try:
        async with (
            open_volume(url, site=SITE, options=ClientOptions(delegations=False)) as plain,
            open_volume(url, site=SITE) as cached,
        ):
            yield Clients(bare, await plain.kv("/plain", create=True), await cached.kv("/cached", create=True))
    finally:
        await bare.aclose()


def kinds(on: Clients, size: int, other: KeyValues) -> list[Kind]:
    """What is measured, for values of one size. `other` is a second client's view of the plain one's directory."""
    value = bytes(size)
    get, put = f"etcd get {size}", f"etcd put {size}"

    async def put_if(number: int) -> None:
        found = revisions[-1]
        revisions[-1] = await on.plain.put_if("counter", value, found)

    revisions = [0]
    return [
        Kind(get, lambda _: on.bare.range(Range(BARE)), get, lambda _: on.bare.txn((), (Put(BARE, value),))),
        Kind(f"get {size}", lambda _: on.plain.get("k"), get),
        Kind(f"get {size}, changed elsewhere", lambda _: on.plain.get("o"), get, lambda n: other.put("o", value)),
        Kind(f"get {size}, delegated", lambda _: on.cached.get("k"), get, several=20),
        Kind(put, lambda _: on.bare.txn((), (Put(BARE, value),)), put),
        Kind(f"put {size}", lambda _: on.plain.put("k", value), put),
        Kind(f"put_if {size}", put_if, put),
        Kind(f"put_if_absent {size}", lambda n: on.plain.put_if_absent(f"n{size}.{n}", value), put),
        Kind(f"put {size}, delegated", lambda _: on.cached.put("k", value), put),
    ]


async def measure(measured: list[Kind], count: int) -> list[Figure]:
    """Each kind in turn, `count` times over: what else the machine does hits them alike."""
    took: dict[str, list[float]] = {kind.name: [] for kind in measured}
    for number in range(count):
        for kind in measured:
            if kind.before is not None:
                await kind.before(number)
            began = time.perf_counter()
            for _ in range(kind.several):
                await kind.call(number)
            took[kind.name].append((time.perf_counter() - began) / kind.several)
    medians = {name: statistics.median(times) * 1e6 for name, times in took.items()}
    return [Figure(k.name, medians[k.name], k.beside, medians[k.name] / medians[k.beside]) for k in measured]


async def run(url: str, endpoints: tuple[tuple[str, int], ...], sizes: list[int], count: int) -> list[Figure]:
    figures: list[Figure] = []
    async with (
        clients(url, endpoints) as on,
        open_volume(url, site=SITE, options=ClientOptions(delegations=False)) as second,
    ):
        other = await second.kv("/plain")
        for size in sizes:
            for kv in (on.plain, on.cached):
                await kv.put("k", bytes(size))
                await kv.get("k")
            await other.put("o", bytes(size))
            await on.plain.delete("counter")
            figures += await measure(kinds(on, size, other), count)
    return figures


def run_sync(url: str, count: int) -> float:
    """The median of a delegated get of a program without trio, in microseconds."""
    times = []
    with open_volume_sync(url, site=SITE) as volume:
        kv = volume.kv("/cached")
        for _ in range(count):
            began = time.perf_counter()
            kv.get("k")
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench kv", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="calls of each kind")
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 4096], help="sizes of values, in bytes")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    with namespace() as made:
        figures = trio.run(run, made.url, made.cluster.endpoints, arguments.sizes, arguments.count)
        sync_us = run_sync(made.url, arguments.count)
    print(f"{'':32}{'p50 us':>10}{'ratio':>8}  beside")
    for figure in figures:
        print(f"{figure.name:32}{figure.p50_us:10.1f}{figure.ratio:8.2f}  {figure.beside}")
    print(f"{'delegated get, without trio':32}{sync_us:10.1f}")
    if arguments.json:
        facts = {"figures": [asdict(figure) for figure in figures], "sync_get_us": sync_us}
        arguments.json.write_text(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
