"""Which of some blobs nobody refers to, nor ever will: what sessions have uploaded and never committed.

Rules
1. The blobs are listed in the store first, the sessions are read after that. So the session of each of them had begun
   by then: it lives, or it has ended and can commit nothing any more (its transactions are fenced).
2. Then everything that names a blob is read as of one revision, that at which the sessions were read. A blob of an
   ended session that nothing named then is never named again: clones are made of what is named only.
3. Blobs of living sessions, and numbers that no session of this volume has had, are nobody's business here.
"""

from __future__ import annotations

from collections.abc import Iterable

from apollofs.metadata import codec
from apollofs.metadata.format import BLOBS_IN, pages
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import retry
from apollofs.metadata.store import Range, Store, prefix_end

READ_S = 30.0
SESSION_BITS = (1 << 24) - 1


def session_of(blob: int) -> int:
    """The session that has uploaded a blob."""
    return blob >> 32 & SESSION_BITS


async def unreferenced(store: Store, keys: Keys, blobs: Iterable[int]) -> set[int]:
    """Those of these blobs that ended sessions have left and nothing refers to. Reads every name, once, unless all
    blobs are of living sessions.

    Raises Compacted if the store forgets the revision meanwhile (try again), DeadlineExceeded, StoreError.
    """
    asked = (Range(keys.session_counter), Range(keys.mounts, prefix_end(keys.mounts), keys_only=True))
    result = await retry(lambda: store.txn((), asked), READ_S)
    counter, mounts = result.ranges
    assert counter is not None and mounts is not None
    last = codec.decode_counter(counter.kvs[0].value) if counter.kvs else 0
    living = {keys.parse_session(kv.key) for kv in mounts.kvs}
    left = {blob for blob in blobs if 0 < session_of(blob) <= last and session_of(blob) not in living}
    for letter, blobs_in in BLOBS_IN.items():
        if not left:
            return left
        async for kv in pages(store, keys.table(letter), revision=result.revision):
            left.difference_update(blobs_in(kv.value))
    if left:
        async for kv in pages(store, keys.table(b"r"), revision=result.revision, keys_only=True):
            left.discard(keys.parse_numbers(kv.key)[0])
    return left
