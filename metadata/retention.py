"""Retention policies: which checkpoints in a directory stay. `fs/retention` applies them.

`K/<ino>` holds the policy that was set on a directory. Nothing names it: who applies policies reads all of them, looks
where their directories are, and removes those whose directories are gone. What creates and writes pays nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from apollofs.metadata import codec
from apollofs.metadata.errors import CorruptRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import retry
from apollofs.metadata.store import Compare, Delete, Range, Relation, Store, Target, prefix_end

READ_S = 30.0
RETENTIONS_MAX = 1000
"""In a volume: who applies them holds all in memory."""
SETTLE_DEFAULT_S = 600


@dataclass(frozen=True, slots=True)
class Retention:
    """The newest `last` stay whatever else is said; of the others every number that `every` divides (0: none), for
    `keep_for_s` seconds (0: for ever) after its last change, as long as `min_free_bytes` are free."""

    last: int = 1
    every: int = 0
    keep_for_s: int = 0
    min_free_bytes: int = 0
    """0: space is no reason to remove anything."""
    capacity_bytes: int = 0
    """What all files of the volume may hold; what they don't is free. Stores do not tell how large they are."""
    patterns: tuple[str, ...] = ()
    """Names of checkpoints, with `{step}` for the number; none: the usual ones (`fs/retention/names.py`)."""
    marker: str = ""
    """A directory is complete if a file of this name is in it; empty: not asked for."""
    settle_s: int = SETTLE_DEFAULT_S
    """What was changed less than this ago may be incomplete still."""
    is_recursive: bool = False
    """It holds in the directories below too, in each for itself, but for those that have one of their own."""
    revision: int = field(default=0, compare=False)
    """Of the key that it was read from."""


def encode_retention(retention: Retention) -> bytes:
    return codec.encode_fields(
        [
            retention.last,
            retention.every,
            retention.keep_for_s,
            retention.min_free_bytes,
            retention.capacity_bytes,
            list(retention.patterns),
            retention.marker,
            retention.settle_s,
            retention.is_recursive,
        ]
    )


def decode_retention(value: bytes) -> Retention:
    """Raises CorruptRecord."""
    try:
        last, every, keep_for_s, min_free, capacity, patterns, marker, settle_s, recursive = codec.decode_fields(value)
    except ValueError as exc:
        raise CorruptRecord(f"a retention policy does not decode: {exc}") from exc
    return Retention(
        last, every, keep_for_s, min_free, capacity, tuple(patterns), marker, settle_s, is_recursive=recursive
    )


async def read_retentions(store: Store, keys: Keys) -> dict[int, Retention]:
    """All retention policies, by directory. One request. Raises DeadlineExceeded, StoreError, CorruptRecord."""
    found = await retry(lambda: store.range(Range(keys.retentions, prefix_end(keys.retentions))), READ_S)
    return {
        keys.parse_numbers(kv.key)[0]: replace(decode_retention(kv.value), revision=kv.mod_revision) for kv in found.kvs
    }


async def forget_retention(store: Store, keys: Keys, directory: int) -> None:
    """Remove the policy of a directory that is gone; numbers of directories are never used again. One request."""
    gone = Compare(keys.inode(directory), Target.CREATE, Relation.EQUAL, 0)
    await retry(lambda: store.txn((gone,), (Delete(keys.retention(directory)),)), READ_S)
