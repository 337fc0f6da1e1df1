"""Recalls delegations of a volume at random moments, as a writer on some other mount would.

    with RandomRecalls.started(namespace.cluster.endpoints, "test", seed=1) as recalls:
        ...
        print(recalls.end())

It is a session of its own: a process, since a test that waits in the kernel may hold the interpreter. Now and then it
picks some of the delegations that there are. Either it only puts notices into the holders' inboxes; or it is a whole
writer of the product, which says that it waits, sends the notices and waits until the keys are gone; then it does as if
its own transaction took a while, so that nobody may take the group meanwhile. It changes nothing of the namespace.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio

from apollofs.metadata.errors import SessionLost
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.groups import Claim
from apollofs.metadata.keys import Keys
from apollofs.metadata.patience import Patience
from apollofs.metadata.recalls import Recalls
from apollofs.metadata.records import MountRecord
from apollofs.metadata.returns import NOTED
from apollofs.metadata.session import Session, SessionOptions
from apollofs.metadata.session_opening import open_session
from apollofs.metadata.store import KeyValue, Op, Put, Range, RangeResult, Store, prefix_end

ROOT = Path(__file__).parents[2]
END_DEADLINE_S = 60.0
OPTIONS = SessionOptions(lease_ttl_s=15, slots=1)
PAUSE_MEAN_S = 0.015
HELD_BACK_MEAN_S = 0.02
"""For how long a writer goes on keeping others from taking what it has recalled."""
AT_ONCE_MAX = 8
WRITERS = 0.5
"""Which part of the recalls is that of a whole writer."""


class RecallsError(Exception):
    """The process has failed; the message has what it said."""


class RandomRecalls:
    """Made by `started`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @classmethod
    @contextmanager
    def started(cls, endpoints: Sequence[tuple[str, int]], volume: str, seed: int) -> Iterator[RandomRecalls]:
        """Recalls from now on, until `end` or the end of the block."""
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(endpoints), volume, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        with process:
            try:
                yield cls(process)
            finally:
                process.kill()

    def end(self) -> dict[str, int]:
        """How many notices it has sent, and how many times it was a whole writer.

        Raises RecallsError if it failed, as it does when a holder has not given back in time.
        """
        output, _ = self._process.communicate(timeout=END_DEADLINE_S)
        if self._process.returncode != 0:
            raise RecallsError(output)
        counts: dict[str, int] = json.loads(output)
        return counts


class Recaller:
    """What the process does, in one session."""

    def __init__(self, store: Store, keys: Keys, session: Session, seed: int) -> None:
        self._store = store
        self._keys = keys
        self._session = session
        self._rng = random.Random(seed)
        self._recalls = Recalls(store, keys, OPTIONS.operation_deadline_s, Patience())
        self._tickets = 0
        self.counts = Counter[str](notices=0, writers=0)

    async def run(self) -> None:
        """Until cancelled. Raises DeadlineExceeded if a holder keeps what it was asked for."""
        while True:
            await trio.sleep(self._rng.expovariate(1 / PAUSE_MEAN_S))
            table = self._keys.table(b"G")
            held = (await self._store.range(Range(table, prefix_end(table), keys_only=True))).kvs
            if not held:
                continue
            chosen = self._rng.sample(held, self._rng.randint(1, min(AT_ONCE_MAX, len(held))))
            if self._rng.random() < WRITERS:
                await self._write(chosen)
            else:
                await self._notify(chosen)

    async def _notify(self, delegations: Sequence[KeyValue]) -> None:
        numbers = [self._keys.parse_numbers(kv.key) for kv in delegations]
        notices = [Put(self._keys.recall(holder, group), b"", self._session.lease_id) for group, holder in numbers]
        await self._session.commit((), notices, NOTED, time_ns=time.time_ns())
        self.counts["notices"] += len(notices)

    async def _write(self, delegations: Sequence[KeyValue]) -> None:
        """As `transact.Transactor` does for an operation that found others' delegations in its way."""
        self._tickets += 1
        claim = Claim(self._tickets)
        before = self._recalls.sent
        found = RangeResult(tuple(delegations), more=False, count=len(delegations), revision=0)
        await self._recalls.recall(self._session, [found], claim)
        await trio.sleep(self._rng.expovariate(1 / HELD_BACK_MEAN_S))
        deletes: list[Op] = list(claim.waits.values())
        await self._session.commit((), deletes, NOTED, time_ns=time.time_ns())
        self.counts["notices"] += self._recalls.sent - before
        self.counts["writers"] += 1


async def recall_until_told(endpoints: Sequence[tuple[str, int]], volume: str, seed: int) -> dict[str, int]:
    """Until standard input ends; what was done."""
    store, keys = EtcdStore(EtcdConfig(tuple(endpoints))), Keys(volume)
    session = await open_session(store, keys, OPTIONS, MountRecord(0, "host", 1, "/recalls", "none", "0", 0), 1)
    recaller = Recaller(store, keys, session, seed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.keep_alive)
        nursery.start_soon(recaller.run)
        await trio.lowlevel.wait_readable(sys.stdin)
        nursery.cancel_scope.cancel()
    if not session.alive:
        raise SessionLost("the session has ended before it was told to")
    await session.close()
    await store.aclose()
    return dict(recaller.counts)


def main() -> None:
    endpoints = [(str(host), int(port)) for host, port in json.loads(sys.argv[1])]
    print(json.dumps(trio.run(recall_until_told, endpoints, sys.argv[2], int(sys.argv[3]))))


if __name__ == "__main__":
    main()
