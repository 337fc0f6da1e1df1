"""The key-value store beside mounts: the same files, the same freshness, one winner of each race, whoever runs."""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from apollofs.fs.api import NoSuchEntry, RevisionConflict, SyncClient, SyncKeyValues, open_volume_sync
from tests.mounted.harness import HarnessError, LocalBodies, Mount, Namespace

pytestmark = pytest.mark.mounted
LARGE = os.urandom(3 << 20)
ROUNDS = 40
WINS = 25


@dataclass(frozen=True)
class World:
    """Three mounts of one namespace, and two clients, each at one of its two sites."""

    namespace: Namespace
    mounts: Sequence[Mount]
    clients: Sequence[SyncClient]

    def kv(self, directory: str) -> list[SyncKeyValues]:
        return [client.kv(directory, create=True) for client in self.clients]

    def paths(self, directory: str) -> list[Path]:
        return [mount.path / directory for mount in self.mounts]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    sites = [LocalBodies("west"), LocalBodies("east")]
    directory = tmp_path_factory.mktemp("kv")
    with Namespace.made(directory, sites, format_options=("--block-size", "1M")) as namespace, ExitStack() as stack:
        mounts = [namespace.mount(site) for site in ("west", "east", "west")]
        clients = [stack.enter_context(open_volume_sync(namespace.url, site=site)) for site in ("west", "east")]
        yield World(namespace, mounts, clients)


def in_threads(*work: Callable[[], object]) -> list[object]:
    """All of it at once; the first error is raised."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(each) for each in work]]


@pytest.mark.parametrize("size", [0, 100, 8192, 8193, len(LARGE)])
def test_each_reads_at_once_what_the_other_has_written(world: World, size: int) -> None:
    (one, two), paths = world.kv(f"fresh-{size}"), world.paths(f"fresh-{size}")
    for number in range(6):
        value = bytes([number]) * min(size, 1) + LARGE[: max(size - 1, 0)]
        revision = one.put("f", value)
        for path in paths:
            assert (path / "f").read_bytes() == value
        assert two.get("f") == one.get("f")
        assert two.get("f").revision == revision
        paths[number % 3].joinpath("f").write_bytes(value[::-1])
        assert one.get("f").data == two.get("f").data == value[::-1]
        paths[number % 3].joinpath("new").write_bytes(value)
        os.rename(paths[number % 3] / "new", paths[number % 3] / "f")
        assert one.get("f").data == two.get("f").data == value
    os.unlink(paths[0] / "f")
    for kv in (one, two):
        with pytest.raises(NoSuchEntry):
            kv.get("f")


def test_who_has_a_small_value_open_keeps_it(world: World) -> None:
    (kv, _), paths = world.kv("open-small"), world.paths("open-small")
    for number in range(ROUNDS):
        before, after = b"value %d" % number, b"another %d" % number
        kv.put("f", before)
        with ExitStack() as stack:
            opened = [stack.enter_context((path / "f").open("rb", buffering=0)) for path in paths]
            assert [file.read(3) for file in opened] == [before[:3]] * 3
            kv.put("f", after)
            assert [(path / "f").read_bytes() for path in paths] == [after] * 3
            assert [file.readall() for file in opened] == [before[3:]] * 3
            assert [os.fstat(file.fileno()).st_size for file in opened] == [len(before)] * 3


def test_who_maps_a_large_value_keeps_it_whole(world: World) -> None:
    (kv, _), paths = world.kv("open-large"), world.paths("open-large")
    kv.put("f", LARGE)
    with (paths[0] / "f").open("rb") as opened, (paths[1] / "f").open("rb", buffering=0) as other:
        mapped = mmap.mmap(opened.fileno(), len(LARGE), prot=mmap.PROT_READ)
        assert other.read(1000) == LARGE[:1000]
        kv.put("f", LARGE[::-1])
        assert [(path / "f").read_bytes() == LARGE[::-1] for path in paths] == [True] * 3
        assert mapped[:] == LARGE
        assert other.readall() == LARGE[1000:]
        mapped.close()


def test_the_next_number_is_won_once(world: World) -> None:
    """Eight writers on three mounts and two clients: link(2) and put_if_absent are one race."""
    kvs, paths = world.kv("race"), world.paths("race")

    def by_link(writer: int) -> list[int]:
        directory = paths[writer % 3]
        own = directory / f"own-{writer}"
        own.write_bytes(b"%d" % writer)
        return win(lambda number: os.link(own, directory / f"n-{number:06d}"), FileExistsError)

    def by_put(writer: int) -> list[int]:
        kv = kvs[writer % 2]
        return win(lambda number: kv.put_if_absent(f"n-{number:06d}", b"%d" % writer), RevisionConflict)

    def win(take: Callable[[int], object], refused: type[Exception]) -> list[int]:
        won: list[int] = []
        number = 0
        while len(won) < WINS:
            try:
                take(number)
                won.append(number)
            except refused:
                pass
            number += 1
        return won

    calls = [lambda writer=writer: by_link(writer) for writer in range(5)]
    calls += [lambda writer=writer: by_put(writer) for writer in range(5, 8)]
    won = in_threads(*calls)
    winner = {number: writer for writer, numbers in enumerate(won) for number in numbers}  # type: ignore[attr-defined]
    assert sorted(winner) == list(range(8 * WINS))
    assert len(kvs[0].list("n-").entries) == 8 * WINS
    for number, writer in winner.items():
        assert kvs[0].get(f"n-{number:06d}").data == (paths[2] / f"n-{number:06d}").read_bytes() == b"%d" % writer


def test_exact_counts_of_eight_writers_under_the_eyes_of_three_mounts(world: World) -> None:
    kvs, paths = world.kv("count"), world.paths("count")
    kvs[0].put("count", b"0")
    ended = threading.Event()

    def count(kv: SyncKeyValues) -> None:
        for _ in range(WINS):
            while True:
                found = kv.get("count")
                try:
                    kv.put_if("count", b"%d" % (int(found.data) + 1), found.revision)
                    break
                except RevisionConflict:
                    pass

    def look_on(path: Path) -> int:
        last = 0
        while not ended.is_set():
            now = int((path / "count").read_bytes())
            assert now >= last
            last = now
        return last

    with ThreadPoolExecutor(3) as pool:
        lookers = [pool.submit(look_on, path) for path in paths]
        try:
            in_threads(*[lambda kv=kvs[writer % 2]: count(kv) for writer in range(8)])
        finally:
            ended.set()
        assert max(looker.result() for looker in lookers) <= 8 * WINS
    assert [(path / "count").read_bytes() for path in paths] == [b"%d" % (8 * WINS)] * 3


def test_a_watch_hears_of_what_mounts_do(world: World) -> None:
    (kv, other), paths = world.kv("watch"), world.paths("watch")
    start = kv.list().revision + 1
    with kv.watch("k", from_revision=start) as events:
        (paths[0] / "k").write_bytes(b"one")
        os.rename(paths[0] / "k", paths[0] / "k2")
        revision = other.put("k2", b"three")
        os.unlink(paths[1] / "k2")
        found = [next(events)]
        while not (found[-1].key == "k2" and found[-1].deleted):
            found.append(next(events))
    told = [(event.key, event.deleted, event.size_bytes) for event in found]
    # the two halves of the rename are of one revision
    assert sorted(told[-4:-2]) == [("k", True, None), ("k2", False, 3)]
    assert told[-2:] == [("k2", False, 5), ("k2", True, None)]
    assert ("k", False, 3) in told[:-4]
    assert found[-2].revision == revision
    assert [event.revision for event in found] == sorted(event.revision for event in found)


def test_a_transaction_is_seen_whole(world: World) -> None:
    (kv, _), paths = world.kv("whole"), world.paths("whole")
    below = world.clients[1].kv("whole/below", create=True)
    kv.transaction([kv.change("a", b"0"), below.change("b", b"0"), below.change("large", LARGE)])
    for number in range(1, ROUNDS):
        text = b"%d" % number
        world.clients[number % 2].transaction([kv.change("a", text), below.change("b", text)])
        for path in paths:
            assert (path / "a").read_bytes() == (path / "below" / "b").read_bytes() == text
    assert (paths[2] / "below" / "large").read_bytes() == LARGE


def test_a_forked_child_is_told_and_its_parent_undisturbed(world: World) -> None:
    kv, _ = world.kv("fork")
    kv.put("f", b"value")
    child = os.fork()
    if not child:
        status = 1
        try:
            kv.get("f")
        except RuntimeError as exc:
            status = 0 if "forked" in str(exc) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kv.get("f").data == b"value"


def test_the_command(world: World) -> None:
    namespace, url = world.namespace, world.namespace.url
    directory = world.paths("command")[0]
    directory.mkdir()
    first = int(namespace.command("kv", "put", url, "/command/f", "value one", "--site", "west"))
    assert (directory / "f").read_bytes() == b"value one"
    assert namespace.command("kv", "get", url, "command/f") == "value one"
    assert namespace.report("kv", "get", url, "/command/f")["revision"] == first
    with pytest.raises(HarnessError, match=rf"'f' is at revision {first}"):
        namespace.command("kv", "put", url, "/command/f", "x", "--if-revision", "0", "--site", "west")
    words = ("kv", "put", url, "/command/f", "two", "--if-revision", str(first), "--site", "east")
    second = namespace.report(*words)["revision"]
    assert namespace.command("kv", "get", url, "/command/f", "--at", str(first)) == "value one"
    listed = namespace.report("kv", "ls", url, "/command")
    assert listed["entries"] == [{"key": "f", "revision": second, "size_bytes": 3}]
    namespace.command("kv", "rm", url, "/command/f")
    with pytest.raises(HarnessError, match="no such name"):
        namespace.command("kv", "get", url, "/command/f")
    with pytest.raises(HarnessError, match="has 2 sites"):
        namespace.command("kv", "put", url, "/command/f", "x")
    words = ("kv", "watch", url, "/command", "--from", str(first), "--count", "3", "--json")
    told = [json.loads(line) for line in namespace.command(*words).splitlines()]
    assert [(event["key"], event["deleted"]) for event in told] == [("f", False), ("f", False), ("f", True)]
    assert [event["revision"] for event in told[:2]] == [first, second]
    assert [event["position"] for event in told[:2]] == [first + 1, second + 1]
