"""Destroying a volume, interrupted at each step: nobody uses what is half gone, and the next run ends it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from apollofs.metadata import destroying
from apollofs.metadata.check import CheckTotals, check_volume
from apollofs.metadata.counting import CountingStore
from apollofs.metadata.destroying import condemn_volume, remove_keys, sites_to_destroy
from apollofs.metadata.errors import AlreadyFormatted, NotFormatted, SiteInUse, StoreUnavailable
from apollofs.metadata.format import format_volume, list_mounts, read_superblock
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.store import Compare, Op, Range, Store, TxnResult
from apollofs.metadata.volume import open_volume
from tests.support.volumes import ME, OPTIONS, SITE, VOLUME, make_volume, mount_record, mounted

KEYS = Keys(VOLUME)


class DiesAfter(CountingStore):
    """Refuses every transaction after so many."""

    def __init__(self, store: Store, left: int) -> None:
        super().__init__(store)
        self._left = left

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], orelse: Sequence[Op] = ()) -> TxnResult:
        self._left -= not all(isinstance(each, Range) for each in then)
        if self._left < 0:
            raise StoreUnavailable("the command was killed")
        return await super().txn(compares, then, orelse)


async def filled() -> MemoryStore:
    store = MemoryStore()
    await make_volume(store)
    async with mounted(store) as volume:
        for number in range(20):
            await volume.mkdir(ROOT_INO, b"%d" % number, 0o755, ME)
    return store


async def all_keys(store: Store) -> list[bytes]:
    return [kv.key for kv in (await store.range(Range(KEYS.prefix, KEYS.end, keys_only=True))).kvs]


async def test_where_objects_are_is_known_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destroying, "DELETE_KEYS", 10)
    store = await filled()
    uuid = (await read_superblock(store, VOLUME)).uuid
    known = 0
    for steps in range(100):
        dying = DiesAfter(store, steps)
        try:
            assert (await condemn_volume(dying, VOLUME)).uuid == uuid
            await remove_keys(dying, VOLUME)
            break
        except StoreUnavailable:
            known += 1
            assert [site.name for site in await sites_to_destroy(store, VOLUME)] == [SITE]
    assert known > 3
    assert await all_keys(store) == []
    with pytest.raises(NotFormatted, match="there is no volume"):
        await sites_to_destroy(store, VOLUME)
    await make_volume(store)
    assert [each async for each in check_volume(store, VOLUME, CheckTotals())] == []


async def test_nobody_uses_a_condemned_volume() -> None:
    store = await filled()
    await condemn_volume(store, VOLUME)
    with pytest.raises(NotFormatted, match="is being destroyed"):
        await list_mounts(store, VOLUME)
    with pytest.raises(AlreadyFormatted, match="is being destroyed"):
        await format_volume(store, VOLUME, site_name=SITE, site_store=())
    with pytest.raises(NotFormatted, match="is being destroyed"):
        async with open_volume(store, VOLUME, SITE, OPTIONS, mount_record()):
            raise AssertionError("mounted")
    with pytest.raises(NotFormatted, match="is being destroyed"):
        await anext(check_volume(store, VOLUME))


async def test_a_mounted_volume_is_not_condemned() -> None:
    store = await filled()
    async with mounted(store):
        with pytest.raises(SiteInUse, match="is mounted"):
            await condemn_volume(store, VOLUME)
        await read_superblock(store, VOLUME)
