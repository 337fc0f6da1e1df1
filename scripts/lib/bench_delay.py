"""Operations with a delay between mount and etcd, with the caches and without. See scripts/bench.

A proxy in a process of its own delays what passes by half the delay each way; it holds nothing up that comes behind.
Two mounts go through it, one of them with `-o delegations=off`, and a third that holds what they want in the last
figure. Each figure is the median of single calls in the working directory of the caller, so that no walk of a path is
in it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from bench_mounts import SITE, namespace, status
from bench_processes import create, fan

from tests.mounted.harness import Mount, Namespace
from tests.support.tcp_proxy import TcpProxy

DELAYS_MS = (0, 20, 50, 100)
PROCESSES = 16
HELD = "-held"
SMALL = b"a small file, which is kept in etcd\n"


@dataclass(frozen=True)
class Figure:
    """One operation, at one delay. `requests`: of etcd, a call."""

    name: str
    delay_ms: float
    caches: bool
    ms: float
    requests: float

    @property
    def round_trips(self) -> float:
        return self.ms / self.delay_ms if self.delay_ms else 0.0


@dataclass(frozen=True)
class Throughput:
    """Files made a second by so many processes, in so many directories; and how many went into one transaction."""

    processes: int
    directories: int
    delay_ms: float
    caches: bool
    per_second: float
    per_transaction: float


class Slow:
    """The way to etcd through a proxy."""

    def __init__(self, control: Connection, endpoint: tuple[str, int]) -> None:
        self._control = control
        self.endpoint = endpoint

    def delay_ms(self, milliseconds: float) -> None:
        """A round trip takes so much longer from now on."""
        self._control.send(milliseconds / 2)
        self._control.recv()


@contextmanager
def slow(target: tuple[str, int]) -> Iterator[Slow]:
    """In another process, as the one that measures must not share its interpreter."""
    context = multiprocessing.get_context("spawn")
    control, there = context.Pipe()
    process = context.Process(target=_proxy, args=(target, there))
    process.start()
    there.close()  # so that its end is heard of
    try:
        yield Slow(control, control.recv())
    finally:
        control.send(None)
        process.join()


def _proxy(target: tuple[str, int], control: Connection) -> None:
    with TcpProxy.started(target) as proxy:
        control.send(proxy.endpoint)
        while (each_way_ms := control.recv()) is not None:
            proxy.delay_ms(each_way_ms)
            control.send(None)


# -- the operations, on files f0, f1, ... of the working directory ---------------------------------------------------


def save(path: str) -> None:
    Path(path).write_bytes(SMALL)


def overwrite(path: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, SMALL, 0)
    finally:
        os.close(fd)


def read(path: str) -> None:
    assert Path(path).read_bytes() == SMALL, path


def look_for_nothing(path: str) -> None:
    assert not os.path.lexists(path), path


OPERATIONS: dict[str, Callable[[int], object]] = {
    "stat": lambda n: os.stat(f"f{n}"),
    "open, close": lambda n: os.close(os.open(f"f{n}", os.O_RDONLY)),
    "read a small file": lambda n: read(f"f{n}"),
    "list": lambda n: os.listdir("."),
    "look up an absent name": lambda n: look_for_nothing(f"absent{n}"),
    "chmod": lambda n: os.chmod(f"f{n}", 0o600),
    "overwrite, close": lambda n: overwrite(f"f{n}"),
    "create": lambda n: create(f"c{n}"),
    "rename": lambda n: os.rename(f"c{n}", f"r{n}"),
    "unlink": lambda n: os.unlink(f"r{n}"),
    "mkdir": lambda n: os.mkdir(f"d{n}"),
    "create, write, close": lambda n: save(f"s{n}"),
    "create after a recall": lambda n: create(f"{os.getcwd()}{HELD}/{n}/new"),
}
"""In this order: what the one makes the next ones use. Another mount holds what is in the directory beside it."""
MADE_BEFORE = ("stat", "open, close", "read a small file", "list")


def prepare(directory: Path, calls: int, other: Path) -> None:
    """Make the files, and touch them as the warm figures do. `other`: the directory on another mount."""
    beside = Path(f"{directory}{HELD}")
    beside.mkdir()
    for number in range(calls):
        (beside / f"{number}").mkdir()
        os.listdir(f"{other}{HELD}/{number}")
    directory.mkdir()
    for number in range(PROCESSES):
        (directory / f"w{number}").mkdir()
    with chdir(directory):
        for number in range(calls):
            save(f"f{number}")
        for name in MADE_BEFORE:
            for number in range(calls):
                OPERATIONS[name](number)


def figures(mount: Mount, directory: Path, calls: int, delay_ms: float, caches: bool) -> Iterator[Figure]:
    with chdir(directory):
        for name, call in OPERATIONS.items():
            requests = status(mount)["etcd"]["requests"]
            took_s = [_timed(call, number) for number in range(calls)]
            requests = status(mount)["etcd"]["requests"] - requests
            yield Figure(name, delay_ms, caches, statistics.median(took_s) * 1000, requests / calls)


def _timed(call: Callable[[int], object], number: int) -> float:
    began = time.perf_counter()
    call(number)
    return time.perf_counter() - began


def throughputs(mount: Mount, directory: Path, calls: int, delay_ms: float, caches: bool) -> Iterator[Throughput]:
    """One directory makes the kernel serve one process at a time; the ones of their own are made beforehand."""
    for processes, directories in ((1, 1), (PROCESSES, 1), (PROCESSES, PROCESSES)):
        count = calls if processes == directories else max(1, calls // 4)
        shares = [
            [
                str(directory / f"w{worker % directories}" / f"{processes}.{directories}.{worker}.{n}")
                for n in range(count)
            ]
            for worker in range(processes)
        ]
        before = status(mount)["etcd"]["transactions"]
        seconds = fan(create, shares)
        transactions = status(mount)["etcd"]["transactions"] - before
        made = processes * count
        yield Throughput(processes, directories, delay_ms, caches, made / seconds, made / max(1, transactions))


def mount_slowly(on: Namespace, way: Slow, caches: bool) -> Mount:
    host, port = way.endpoint
    options = () if caches else ("-o", "delegations=off")
    return on.mount(SITE, *options, url=f"etcd://{host}:{port}/{on.volume}")


def run(delays_ms: Sequence[float], calls: int) -> tuple[list[Figure], list[Throughput]]:
    single: list[Figure] = []
    many: list[Throughput] = []
    with namespace() as on, slow(on.cluster.server.endpoint) as way:
        mounts = {caches: mount_slowly(on, way, caches) for caches in (True, False)}
        other = mount_slowly(on, way, True)
        for delay_ms in delays_ms:
            for caches, mount in mounts.items():
                directory = mount.path / f"{delay_ms:g}-{'cached' if caches else 'uncached'}"
                prepare(directory, calls, other.path / directory.name)
                way.delay_ms(delay_ms)
                single += figures(mount, directory, calls, delay_ms, caches)
                many += throughputs(mount, directory, calls, delay_ms, caches)
                way.delay_ms(0)
    return single, many


def print_figures(single: Sequence[Figure], delays_ms: Sequence[float]) -> None:
    for delay_ms in delays_ms:
        print(f"\n{delay_ms:g} ms between mount and etcd")
        head = f"{'ms':>10}{'round trips':>13}{'requests':>10}"
        print(f"{'':<24}{'with the caches':>33}{'without':>33}\n{'':<24}{head}{head}")
        for name in OPERATIONS:
            row = [one for one in single if one.name == name and one.delay_ms == delay_ms]
            cells = (f"{one.ms:>10.3f}{one.round_trips:>13.2f}{one.requests:>10.2f}" for one in row)
            print(f"{name:<24}" + "".join(cells))


def print_throughputs(many: Sequence[Throughput], delays_ms: Sequence[float]) -> None:
    print("\nfiles made a second, and in one transaction")
    print(f"{'processes, directories':<24}" + "".join(f"{f'{delay_ms:g} ms':>18}" for delay_ms in delays_ms))
    for caches in (True, False):
        for place in dict.fromkeys((one.processes, one.directories) for one in many):
            row = [one for one in many if one.caches == caches and (one.processes, one.directories) == place]
            title = f"{place[0]}, {place[1]}{'' if caches else ', no caches'}"
            print(f"{title:<24}" + "".join(f"{one.per_second:>11.1f} /{one.per_transaction:>5.1f}" for one in row))


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench delay", description=__doc__)
    parser.add_argument("--calls", type=int, default=20, help="calls a figure, and files a process")
    parser.add_argument("--delays", type=float, nargs="+", default=DELAYS_MS, metavar="MS")
    parser.add_argument("--json", default="", help="write every figure there")
    options = parser.parse_args()
    single, many = run(options.delays, options.calls)
    print_figures(single, options.delays)
    print_throughputs(many, options.delays)
    if options.json:
        found = {"operations": [asdict(one) for one in single], "creates": [asdict(one) for one in many]}
        Path(options.json).write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
