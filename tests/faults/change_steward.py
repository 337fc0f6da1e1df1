"""Who looks after a volume while its change log is followed: policies, seals, the trash, without a mount."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import trio

from apollofs.fs.command_volume import command_volume
from apollofs.metadata.changes.compaction import CompactionOptions, compact_behind_archive
from apollofs.metadata.errors import NamespaceError, NoSuchEntry
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.keys import Keys
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.retention import Retention
from apollofs.metadata.seal_records import TERM_S_MIN
from apollofs.metadata.sealing import Sealing, read_seals
from apollofs.metadata.store import Range, prefix_end
from apollofs.metadata.volume import Volume
from tests.faults.change_players import NAMES
from tests.mounted.harness import Namespace
from tests.support.retaining import set_retention

SITES = (1, 2)
STONES_MAX, STONES_TRIED = 500, 20


@asynccontextmanager
async def opened(namespace: Namespace) -> AsyncIterator[EtcdStore]:
    """The etcd of a namespace, as this process uses it."""
    store = EtcdStore(EtcdConfig(namespace.cluster.endpoints))
    try:
        yield store
    finally:
        await store.aclose()


def compact(namespace: Namespace, keep_s: float) -> int:
    """Have etcd forget what was archived so long ago, which may be less than an agent would allow; up to which
    revision it did."""

    async def work() -> int:
        async with opened(namespace) as store:
            return (await compact_behind_archive(store, CompactionOptions(keep_s))).revision

    return trio.run(work)


class Steward:
    """Takes a session for each thing that it does. `done`: how often it did each."""

    def __init__(self, namespace: Namespace, rng: random.Random) -> None:
        self._namespace = namespace
        self._rng = rng
        self._keys = Keys(namespace.volume)
        self.done: dict[str, int] = {}

    def act(self) -> None:
        """Unseal what is sealed, or do one thing at random; what makes no sense is refused."""
        trio.run(self._act)

    async def _act(self) -> None:
        async with opened(self._namespace) as store, command_volume(store, self._namespace.volume, "0") as volume:
            sealed = await read_seals(store, self._keys)
            for record in sealed:
                await Sealing(store, volume).unseal(record.number)
            if sealed:
                return
            deeds: list[Callable[[EtcdStore, Volume], Awaitable[None]]] = [
                self._policy,
                self._retention,
                self._seal,
                self._restore,
            ]
            deed = self._rng.choice(deeds)
            with suppress(NamespaceError):
                await deed(store, volume)
                self.done[deed.__name__] = self.done.get(deed.__name__, 0) + 1

    async def _policy(self, _: EtcdStore, volume: Volume) -> None:
        policy = self._rng.choice([None, Policy(soon=SITES), Policy(commit_any=2), Policy(read=SITES, bound_s=5)])
        await volume.placement.set_policy(self._rng.choice([ROOT_INO, await self._directory(volume)]), policy)

    async def _retention(self, _: EtcdStore, volume: Volume) -> None:
        policy = self._rng.choice([None, Retention(last=2), Retention(every=10, is_recursive=True)])
        await set_retention(volume, await self._directory(volume), policy)

    async def _seal(self, store: EtcdStore, volume: Volume) -> None:
        await Sealing(store, volume).seal(await self._directory(volume), TERM_S_MIN)

    async def _restore(self, store: EtcdStore, volume: Volume) -> None:
        stones = self._keys.table(b"g")
        found = await store.range(Range(stones, prefix_end(stones), limit=STONES_MAX, keys_only=True))
        for kv in self._rng.sample(found.kvs, min(len(found.kvs), STONES_TRIED)):
            with suppress(NamespaceError):  # it is of a body that was changed, or the name is in use
                await volume.restore(kv.key, await self._directory(volume), self._rng.choice(NAMES).encode())
                return
        raise NoSuchEntry("nothing can be restored")

    async def _directory(self, volume: Volume) -> int:
        """One or two levels deep. NoSuchEntry, NotADirectory."""
        ino = ROOT_INO
        for _ in range(self._rng.choice([1, 2])):
            ino = (await volume.lookup(ino, self._rng.choice(NAMES).encode())).ino
        return ino
