"""Which shared blobs are mostly dead, and who refers to what is left of them.

What an inode refers to stands in its record only, and keys `r/` give no more than its number. So this reads the keys
`r/` and every name, in pages and pinned to no revision, and once more where a blob was found. What is moved meanwhile
may not be counted: then a blob is found a run too early, which harms nobody. An unlinked file counts for as long as it
can be restored.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from apollofs.metadata import codec
from apollofs.metadata.format import pages
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.common import Location
from apollofs.metadata.records import Extent, Inode
from apollofs.metadata.store import KeyValue, Store


@dataclass(slots=True)
class Pack:
    """A blob that several inodes have shared."""

    length: int = 0
    _ranges: array[int] = field(default_factory=lambda: array("I"))
    """Where each range begins that somebody refers to, and where it ends; in order, none of them touch."""

    def use(self, start: int, end: int) -> None:
        """Somebody refers to these bytes; clones refer to the same ones."""
        start, end = min(start, self.length), min(end, self.length)
        if start >= end:
            return
        first, after = bisect_left(self._ranges, start), bisect_right(self._ranges, end)
        # at an odd place a range goes on
        edges = [start] if first % 2 == 0 else []
        edges += [end] if after % 2 == 0 else []
        self._ranges[first:after] = array("I", edges)

    @property
    def used_bytes(self) -> int:
        """How much of it is referred to, at least by one."""
        return sum(self._ranges[1::2]) - sum(self._ranges[::2])


async def shared_blobs(store: Store, keys: Keys, limit: int) -> AsyncGenerator[dict[int, Pack], None]:
    """Every blob that has a key `r/`, `limit` at a time. To be closed (`aclosing`). Raises StoreError."""
    found: dict[int, Pack] = {}
    async with aclosing(pages(store, keys.table(b"r"), keys_only=True)) as references:
        async for kv in references:
            blob = keys.parse_numbers(kv.key)[0]
            if blob not in found and len(found) >= limit:
                yield found
                found = {}
            found.setdefault(blob, Pack())
    if found:
        yield found


async def measure(store: Store, keys: Keys, packs: Mapping[int, Pack], length_max: int) -> None:
    """Note how much of each blob is referred to; of those longer than `length_max`, under 4 GiB, only how long they
    are. Reads every name once. Raises StoreError, CorruptRecord."""
    for letter, extents_of in _EXTENTS_IN.items():
        async for kv in pages(store, keys.table(letter)):
            for extent in extents_of(kv):
                pack = packs.get(extent.blob)
                if pack is not None:
                    pack.length = extent.blob_length
                    if pack.length <= length_max:
                        pack.use(extent.blob_offset, extent.blob_offset + extent.length)


async def referents(store: Store, keys: Keys, blobs: Collection[int]) -> dict[int, dict[int, Location | None]]:
    """Blob -> the inodes with a name that refer to it or have done so, each with where it is embedded. Reads every
    name once. Raises StoreError, CorruptRecord."""
    found: dict[int, dict[int, Location | None]] = {blob: {} for blob in blobs}
    blobs_of: dict[int, list[int]] = {}
    for blob in blobs:
        async for kv in pages(store, keys.references_of(blob), keys_only=True):
            blobs_of.setdefault(keys.parse_numbers(kv.key)[1], []).append(blob)
    async for kv in pages(store, keys.table(b"d")):
        inode = codec.decode_dentry(kv.value, 0).inode
        for blob in blobs_of.get(inode.ino, ()) if inode is not None else ():
            assert inode is not None
            found[blob][inode.ino] = keys.parse_dentry(kv.key)
    async for kv in pages(store, keys.table(b"i"), keys_only=True):
        (ino,) = keys.parse_numbers(kv.key)
        for blob in blobs_of.get(ino, ()):
            found[blob][ino] = None
    return found


def _embedded(kv: KeyValue) -> Iterable[Extent]:
    return _of(codec.decode_dentry(kv.value, 0).inode)


def _dead(kv: KeyValue) -> Iterable[Extent]:
    return _of(codec.decode_tombstone(kv.value, 0).inode)


def _of(inode: Inode | None) -> Iterable[Extent]:
    return inode.extents if inode is not None else ()


_EXTENTS_IN: Mapping[bytes, Callable[[KeyValue], Iterable[Extent]]] = {
    b"d": _embedded,
    b"i": lambda kv: codec.decode_inode(kv.value, 0).extents,
    b"e": lambda kv: codec.decode_extents(kv.value),
    b"g": _dead,
}
"""Table -> the extents that a value of it has: all places from which bytes can be read."""
