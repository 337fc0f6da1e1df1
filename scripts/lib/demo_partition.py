"""The chapter of scripts/demo-sites in which a site is cut off from etcd: what it still reads, and what it must not."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from demo_timeline import WAIT_S, DemoError, Timeline, expect

from tests.mounted.harness import Mount
from tests.support.ways import Way

PAUSE_S = 0.05
OLD, NEW = b"old", b"new"


@dataclass(frozen=True)
class Look:
    """What one call was told: bytes, or an errno. Times by `monotonic`."""

    began_s: float
    ended_s: float
    found: bytes | int


class Watcher:
    """A thread that looks again and again until it is stopped."""

    def __init__(self, look: Callable[[], bytes]) -> None:
        self._look = look
        self._end = threading.Event()
        self._news = threading.Condition()
        self.looks: list[Look] = []
        self._thread = threading.Thread(target=self._watch)

    @classmethod
    @contextmanager
    def started(cls, look: Callable[[], bytes]) -> Iterator[Watcher]:
        watcher = cls(look)
        watcher._thread.start()
        try:
            yield watcher
        finally:
            watcher._end.set()
            watcher._thread.join()

    def wait_for(self, is_it: Callable[[Look], bool], what: str) -> Look:
        """The first look that is so. Raises DemoError after WAIT_S."""

        def first() -> Look | None:
            return next((look for look in self.looks if is_it(look)), None)

        with self._news:
            found = self._news.wait_for(first, WAIT_S)
        if found is None:
            raise DemoError(f"{what}: not within {WAIT_S:g} s")
        return found

    def _watch(self) -> None:
        while not self._end.wait(PAUSE_S):
            began_s = monotonic()
            found: bytes | int
            try:
                found = self._look()
            except OSError as exc:
                found = exc.errno or errno.EIO
            with self._news:
                self.looks.append(Look(began_s, monotonic(), found))
                self._news.notify_all()


def read_sealed(tree: Path) -> bytes:
    """A digest of the whole tree: names, sizes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(tree)):
        path = tree / name
        digest.update(f"{name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.digest()


def cut_off(writer: Path, mount: Mount, way: Way, timeline: Timeline, lease_s: float) -> None:
    """C (`mount`) loses its `way` to etcd. B (`writer`) changes an unsealed file that C has cached and open."""
    timeline.chapter("C is cut off from etcd; until the end")
    written, current = writer / "state" / "current", mount.path / "state" / "current"
    written.write_bytes(OLD)
    tree = mount.path / "datasets" / "set"
    sealed = read_sealed(tree)
    with (
        current.open("rb", buffering=0) as file,
        Watcher.started(current.read_bytes) as by_path,
        Watcher.started(lambda: os.pread(file.fileno(), len(OLD), 0)) as by_handle,
        Watcher.started(lambda: read_sealed(tree)) as reader,
    ):
        for watcher in (by_path, by_handle):
            watcher.wait_for(lambda look: look.found == OLD, "C reads the old value")
        way.blackhole()
        cut_s = monotonic()
        overwrite(written, NEW)
        changed_s = monotonic()
        took = timeline.measured("write beside a lost holder", changed_s - cut_s)
        timeline.tell("b", f"changed a file that C had cached: {took}, as C's lease of {lease_s:g} s had to end first")
        for name, watcher in (("by path", by_path), ("by an open file", by_handle)):
            failed = watcher.wait_for(lambda look: look.found == errno.EIO, f"what is not sealed fails {name} at C")
            told = timeline.measured(f"first EIO {name}", failed.ended_s - cut_s)
            timeline.tell("c", f"unsealed reads {name} fail with EIO, the first {told} after the cut")
        expect(errno_of_making(mount.path / "state" / "from-c") == errno.EIO, "C can't make a file")
        timeline.tell("c", "making a file fails with EIO")
        later_s = monotonic()
        reader.wait_for(lambda look: look.began_s > later_s, "sealed reads go on")
    judge(timeline, changed_s, [*by_path.looks, *by_handle.looks], reader.looks, sealed)


def judge(timeline: Timeline, changed_s: float, unsealed: list[Look], whole: list[Look], sealed: bytes) -> None:
    """Nothing that began after B's change returned has seen what was before; all reads of the dataset were right."""
    after = [look for look in unsealed if look.began_s > changed_s]
    stale = [look for look in after if look.found == OLD]
    expect(not stale, f"nothing old is read at C after B's change: {stale}")
    wrong = [look for look in whole if look.found != sealed]
    expect(not wrong, f"the sealed dataset is read whole each time: {wrong}")
    slowest_s = max(look.ended_s - look.began_s for look in whole)
    timeline.tell("c", f"read the sealed dataset {len(whole)} times meanwhile, at most {slowest_s:.2f} s each")
    timeline.tell("c", f"of {len(after)} unsealed reads after B's change none saw the old value")


def overwrite(path: Path, data: bytes) -> None:
    """In place."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)


def errno_of_making(path: Path) -> int:
    """The errno with which making a file fails; 0 if it does not."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except OSError as exc:
        return exc.errno or errno.EIO
    return 0
