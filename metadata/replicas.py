"""Replicas: reading where blobs are, and saying that a site has begun with copies, or has them.

Rules
1. A copy is announced before its first object is put, in a transaction that compares that an inode still refers to the
   blob, as it was read. So no copy of a blob begins that nobody refers to any more, and the collector, which judges
   only such blobs, finds in `b/` every site where objects of it may be.
2. A copy counts when it was complete and its key had not changed meanwhile. If the key is gone the blob has been
   collected, and who has copied removes what it has put.
3. An announcement is never taken back while the blob lives: an object may be there. It ends with the copy's completion,
   or with the blob.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from apollofs.metadata.copies import Copies, decode_copies, encode_copies
from apollofs.metadata.keys import Keys
from apollofs.metadata.returns import NOTED
from apollofs.metadata.session import Committed, Session, retry
from apollofs.metadata.store import Compare, Delete, KeyValue, Put, Range, Relation, Store, Target, prefix_end

READ_S = 30.0
READS_IN_TRANSACTION = 100
BLOBS_IN_TRANSACTION = 40
"""Each takes two compares and a put."""
PAGE_KEYS = 1000


@dataclass(frozen=True, slots=True)
class Referent:
    """The key that holds an inode which refers to a blob, as it was read."""

    key: bytes
    revision: int


class Replicas:
    """The table `b/` of a volume. Methods raise DeadlineExceeded, StoreError, CorruptRecord."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    async def read(self, blobs: Iterable[int]) -> dict[int, Copies]:
        """Where each of these blobs is. A request for each hundred."""
        asked = list(blobs)
        found: dict[int, Copies] = {}
        for at in range(0, len(asked), READS_IN_TRANSACTION):
            part = asked[at : at + READS_IN_TRANSACTION]
            ranges = [Range(self._keys.copies(blob)) for blob in part]
            result = await retry(lambda ranges=ranges: self._store.txn((), ranges), READ_S)  # type: ignore[misc]
            for blob, answer in zip(part, result.ranges, strict=True):
                assert answer is not None
                found[blob] = decode_copies(answer.kvs[0] if answer.kvs else None)
        return found

    async def begin(
        self, session: Session, site: int, blobs: Mapping[int, tuple[Copies, Referent]]
    ) -> dict[int, Copies]:
        """Announce copies at `site`, each as it then is; a blob that has changed meanwhile is not among them.

        One transaction for forty, more where some have changed. Raises SessionLost too.
        """
        fresh = {blob: known for blob, known in blobs.items() if site not in known[0].sites}
        done = {blob: known[0] for blob, known in blobs.items() if blob not in fresh}
        for part in _portions(list(fresh)):
            writes = {blob: fresh[blob][0].with_begun(site) for blob in part}
            referents = {blob: fresh[blob][1] for blob in part}
            done.update(await self._put(session, writes, referents))
        return done

    async def finish(self, session: Session, site: int, blobs: Mapping[int, Copies]) -> dict[int, Copies]:
        """`site` has all of these blobs now. As `begin`."""
        done: dict[int, Copies] = {}
        for part in _portions(list(blobs)):
            done.update(await self._put(session, {blob: blobs[blob].with_complete(site) for blob in part}, {}))
        return done

    async def _put(
        self, session: Session, writes: Mapping[int, Copies], referents: Mapping[int, Referent]
    ) -> dict[int, Copies]:
        if not writes:
            return {}
        keys = self._keys
        compares = [_unchanged(keys.copies(blob), copies.revision) for blob, copies in writes.items()]
        compares += dict.fromkeys(_unchanged(each.key, each.revision) for each in referents.values())
        puts = [Put(keys.copies(blob), encode_copies(copies)) for blob, copies in writes.items()]
        outcome = await session.commit(compares, puts, NOTED, time_ns=time.time_ns())
        if isinstance(outcome, Committed):
            return {blob: Copies(copies.complete, copies.begun, outcome.revision) for blob, copies in writes.items()}
        if len(writes) == 1:
            return {}
        done: dict[int, Copies] = {}
        for blob, copies in writes.items():
            own = {blob: referents[blob]} if referents else {}
            done.update(await self._put(session, {blob: copies}, own))
        return done


async def forget_site(store: Store, keys: Keys, site: int) -> int:
    """Take a site that is removed out of all lists of copies; how many it was in. Its agent must not run any more."""
    prefix, count = keys.table(b"b"), 0
    start = prefix
    while True:
        found = await retry(
            lambda start=start: store.range(  # type: ignore[misc]
                Range(start, prefix_end(prefix), limit=PAGE_KEYS)
            ),
            READ_S,
        )
        for kv in found.kvs:
            count += await _forget_in(store, kv, site)
        if not found.more:
            return count
        start = found.kvs[-1].key + b"\0"


async def _forget_in(store: Store, kv: KeyValue, site: int) -> int:
    """1 if it was named there. A list that a mount or an agent has changed meanwhile is read again."""
    while site in (copies := decode_copies(kv)).sites:
        left = copies.without(site)
        write = Put(kv.key, encode_copies(left)) if left.sites else Delete(kv.key)
        if (await store.txn((_unchanged(kv.key, kv.mod_revision),), (write,))).succeeded:
            return 1
        found = await store.range(Range(kv.key))
        if not found.kvs:
            break
        kv = found.kvs[0]
    return 0


def _unchanged(key: bytes, revision: int) -> Compare:
    return Compare(key, Target.MOD, Relation.EQUAL, revision)


def _portions(blobs: Sequence[int]) -> Iterable[Sequence[int]]:
    return (blobs[at : at + BLOBS_IN_TRANSACTION] for at in range(0, len(blobs), BLOBS_IN_TRANSACTION))
