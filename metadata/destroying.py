"""Destroying a volume, in an order in which every step can be interrupted and gone on with.

1. *Condemned*: the superblock gets another key, in a transaction that nobody has the volume mounted. From then on
   nobody can mount it, work on it, or make one of its name.
2. Objects in the sites' stores are removed, if that is wanted (by the caller: this package knows no stores).
3. All other keys go, those that tell where the objects are, the sites and the superblock, last.
"""

from __future__ import annotations

from apollofs.metadata import codec
from apollofs.metadata.errors import NotFormatted, SiteInUse
from apollofs.metadata.format import list_mounts, read_sites
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import SiteRecord, Superblock
from apollofs.metadata.store import Compare, Delete, Put, Range, Relation, Store, Target, prefix_end

DELETE_KEYS = 10_000


async def sites_to_destroy(store: Store, volume: str) -> list[SiteRecord]:
    """The sites of a volume, condemned or not. Raises NotFormatted."""
    keys = Keys(volume)
    if (await _superblocks(store, keys)) == (None, None):
        raise NotFormatted(f"there is no volume {volume!r}")
    return await read_sites(store, keys)


async def condemn_volume(store: Store, volume: str) -> Superblock:
    """Let nobody use the volume any more; nothing if that is so. Raises SiteInUse while it is mounted, NotFormatted."""
    keys = Keys(volume)
    while True:
        standing, condemned = await _superblocks(store, keys)
        if standing is None:
            if condemned is None:
                raise NotFormatted(f"there is no volume {volume!r}")
            return codec.decode_superblock(condemned)
        compares = (
            Compare(keys.mounts, Target.VERSION, Relation.EQUAL, 0, prefix_end(keys.mounts)),
            Compare(keys.superblock, Target.VERSION, Relation.GREATER, 0),
        )
        writes = (Put(keys.condemned, standing), Delete(keys.superblock))
        if not (await store.txn(compares, writes)).succeeded:
            users = [f"{each.host}:{each.mountpoint or each.pid}" for each in await list_mounts(store, volume)]
            if users:
                raise SiteInUse(f"volume {volume!r} is mounted, or a command works on it: {', '.join(users)}")


async def remove_keys(store: Store, volume: str) -> int:
    """Remove every key of a condemned volume; how many there were. Begun again it goes on."""
    keys = Keys(volume)
    sites_end = prefix_end(keys.sites)
    removed = 0
    for start, end in ((keys.prefix, keys.condemned), (keys.condemned + b"\0", keys.sites), (sites_end, keys.end)):
        while True:
            found = await store.range(Range(start, end, limit=DELETE_KEYS, keys_only=True))
            if not found.kvs:
                break
            await store.txn((), (Delete(found.kvs[0].key, found.kvs[-1].key + b"\0"),))
            removed += len(found.kvs)
    sites = len(await read_sites(store, keys))
    await store.txn((), (Delete(keys.sites, sites_end), Delete(keys.condemned)))
    return removed + sites + 1


async def _superblocks(store: Store, keys: Keys) -> tuple[bytes | None, bytes | None]:
    """That of a volume that stands, and of one that is condemned: one at most."""
    asked = (Range(keys.superblock), Range(keys.condemned))
    standing, condemned = [found.kvs for found in (await store.txn((), asked)).ranges if found is not None]
    return standing[0].value if standing else None, condemned[0].value if condemned else None
