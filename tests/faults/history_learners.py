"""Who learns of files at a site, by the change log, the key-value store and the namespace, and looks whether the bytes
are there. Each also publishes files of its own: written, fsynced, renamed, and then named by a value.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TypeVar

import trio

from apollofs.blobstore import BlobStoreOptions
from apollofs.fs.api import KeyValues, KeyWatch, NoSuchEntry, open_volume
from apollofs.fs.changes import open_changes, records
from apollofs.fs.connect import connected_store
from apollofs.fs.meta_url import MetaAccess, parse_meta_url
from apollofs.metadata.changes.log import ChangeLog, within
from apollofs.metadata.journal import Kind
from tests.faults.history_client import GONE, HARMLESS

T = TypeVar("T")
PUBLISHED, LATEST = "pub", "latest"
BYTES_MAX = 100_000
PAUSE_S = 0.2
GRACE_S = 25.0
"""A file that can't be read for a fault's sake is tried again up to this long after the end."""


@dataclass(frozen=True)
class Lesson:
    """What one learner has to do. `url` leads to etcd by no proxy: it hears of files before its mount does."""

    url: str
    volume: str
    site: str
    place: str
    """A directory of the volume, with `pub` and `latest` in it; `root` is the same on the site's mount."""
    root: Path
    until_s: float
    environment: Mapping[str, str]
    """What lets it into the stores: its values are bodies, too."""


@dataclass
class Learned:
    """How many files were found good, by how it learnt of them; errors that were met on the way; and what was wrong."""

    host: str
    found: Counter[str] = field(default_factory=Counter)
    errors: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def content(name: str) -> bytes:
    """What a file of this name has."""
    rng = random.Random(name)
    return rng.randbytes(rng.randrange(1, BYTES_MAX))


def learn(lesson: Lesson) -> Learned:
    """Publish and look until it is time, or the mount is dead."""
    os.environ.update(lesson.environment)
    return trio.run(_Learner(lesson).run)


class _Gone(Exception):
    """The daemon of the mount is dead."""


class _Learner:
    def __init__(self, lesson: Lesson) -> None:
        self._lesson = lesson
        self._learned = Learned(lesson.root.parts[-3])
        self._scope = trio.CancelScope()

    async def run(self) -> Learned:
        lesson = self._lesson
        access = MetaAccess(parse_meta_url(lesson.url))
        async with (
            connected_store(access) as store,
            open_changes(store, lesson.volume, BlobStoreOptions()) as changes,
            open_volume(lesson.url, site=lesson.site) as client,
        ):
            latest = await client.kv(f"{lesson.place}/{LATEST}")
            with self._scope:
                async with latest.watch() as events, trio.open_nursery() as nursery:
                    nursery.start_soon(self._guarded, self._publish, latest)
                    nursery.start_soon(self._guarded, self._follow_log, changes)
                    nursery.start_soon(self._guarded, self._follow_values, latest, events)
                    nursery.start_soon(self._guarded, self._list)
                    await trio.sleep(max(0.0, lesson.until_s - monotonic()))
                    nursery.cancel_scope.cancel()
                await self._guarded(self._read_all, "end")
        return self._learned

    async def _guarded(self, work: Callable[..., Awaitable[object]], *arguments: object) -> None:
        try:
            await work(*arguments)
        except _Gone:
            self._scope.cancel()

    # -- publishing --------------------------------------------------------------------------------------------------

    async def _publish(self, latest: KeyValues) -> None:
        number = 0
        while True:
            name = f"{self._learned.host}-{number}"
            number += 1
            if await self._tried(lambda name=name: self._save(name)) is not None:  # type: ignore[misc]
                await latest.put(self._learned.host, name.encode())
            await trio.sleep(PAUSE_S)

    def _save(self, name: str) -> bool:
        directory = self._lesson.root / PUBLISHED
        beside = directory / f".{name}"
        with beside.open("wb", buffering=0) as file:
            file.write(content(name))
            os.fsync(file.fileno())
        os.rename(beside, directory / name)
        return True

    # -- learning ----------------------------------------------------------------------------------------------------

    async def _follow_log(self, changes: ChangeLog) -> None:
        place = f"{self._lesson.place}/{PUBLISHED}".encode()
        found = records(changes, await changes.now(), follow=True, selects=within(place))
        async with aclosing(found):
            async for record in found:
                name = record.change.name.decode()
                # until its own rename returns a host may not see it (docs/POSIX.md, exception 1)
                if record.change.kind is Kind.RENAME and not name.startswith(f"{self._learned.host}-"):
                    await self._look("log", name)

    async def _follow_values(self, latest: KeyValues, events: KeyWatch) -> None:
        async for event in events:
            try:
                value = await latest.get(event.key)
            except NoSuchEntry:
                continue
            await self._look("values", value.data.decode())

    async def _list(self) -> None:
        seen: set[str] = set()
        while True:
            seen |= await self._read_all("names", seen)
            await trio.sleep(PAUSE_S)

    async def _read_all(self, how: str, seen: Collection[str] = ()) -> set[str]:
        """Every file that is there and not in `seen`; their names."""
        names = await self._tried(lambda: os.listdir(self._lesson.root / PUBLISHED)) or []
        fresh = {name for name in names if not name.startswith(".") and name not in seen}
        for name in sorted(fresh):
            await self._look(how, name)
        return fresh

    async def _look(self, how: str, name: str) -> None:
        """Read it, again while a fault of its own mount, or of a store, keeps it from that."""
        while monotonic() < self._lesson.until_s + GRACE_S:
            try:
                data = await self._tried((self._lesson.root / PUBLISHED / name).read_bytes)
            except FileNotFoundError:
                self._learned.wrong.append(f"{how}: {name} is not there")
                return
            if data is None:
                await trio.sleep(PAUSE_S)
                continue
            if data != content(name):
                self._learned.wrong.append(f"{how}: {name} has {len(data)} other bytes")
            self._learned.found[how] += 1
            return
        self._learned.wrong.append(f"{how}: {name} could not be read")

    async def _tried(self, call: Callable[[], T]) -> T | None:
        """What it returns, or None after an error that a fault may give. Raises other OSErrors, and _Gone."""
        try:
            return await trio.to_thread.run_sync(call)
        except OSError as exc:
            if exc.errno in GONE:
                raise _Gone from None
            if exc.errno not in HARMLESS:
                raise
            self._learned.errors[exc.errno or 0] += 1
            return None
