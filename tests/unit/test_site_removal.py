"""Removing a site beside others who begin to use it: whoever comes too late is refused, nothing is lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from apollofs.metadata.counting import CountingStore
from apollofs.metadata.errors import SiteInUse, SiteLeaving, StoreUnavailable, UnknownSite
from apollofs.metadata.format import add_site, list_sites, remove_site
from apollofs.metadata.policy import Policy
from apollofs.metadata.retired_sites import LEAVING, read_retired
from apollofs.metadata.store import Put, Range, RangeResult, Store
from apollofs.metadata.volume import open_volume
from tests.support.filesystems import LARGE, save
from tests.support.sites import KEYS, SITES, A, B, C, Sites, sites
from tests.support.volumes import OPTIONS, VOLUME, mount_record

__all__ = ["sites"]
NAME_B, NAME_C = SITES[B - 1], SITES[C - 1]


class AmidTheLook(CountingStore):
    """Calls `act` once, when the remover begins to look for bodies: it has found no mounts and no policies then."""

    def __init__(self, store: Store, act: Callable[[], Awaitable[None]]) -> None:
        super().__init__(store)
        self._act: Callable[[], Awaitable[None]] | None = act

    async def range(self, request: Range) -> RangeResult:
        if self._act is not None and request.key.startswith(KEYS.dentries):
            act, self._act = self._act, None
            await act()
        return await super().range(request)


async def test_who_mounts_while_it_is_removed_is_refused(sites: Sites) -> None:
    async def mount() -> None:
        with pytest.RaisesGroup(pytest.RaisesExc(SiteLeaving, match="is being removed"), flatten_subgroups=True):
            async with open_volume(sites.store, VOLUME, NAME_B, OPTIONS, mount_record()):
                raise AssertionError("mounted")

    await remove_site(AmidTheLook(sites.store, mount), VOLUME, NAME_B)
    assert [site.id for site in await list_sites(sites.store, VOLUME)] == [A, C]
    with pytest.raises(UnknownSite):
        async with open_volume(sites.store, VOLUME, NAME_B, OPTIONS, mount_record()):
            raise AssertionError("mounted")


async def test_a_session_of_a_mount_that_had_lost_its_own_is_refused(sites: Sites) -> None:
    """The remover has seen no mount; this one has known the site since before."""
    async with open_volume(sites.store, VOLUME, NAME_B, OPTIONS, mount_record()) as volume:
        record, site = volume.session.record, volume.site
    await remove_site(sites.store, VOLUME, NAME_B)
    with pytest.raises(UnknownSite, match="has been removed"):
        await volume._open_session(record, retry=True)
    assert site.id in await read_retired(sites.store, VOLUME)


async def test_no_policy_names_it_from_then_on(sites: Sites) -> None:
    async def name_it() -> None:
        with pytest.RaisesGroup(SiteLeaving, flatten_subgroups=True):
            await sites.set_policy(Policy(soon=(B,)))
        await sites.set_policy(Policy(soon=(C,)))

    await remove_site(AmidTheLook(sites.store, name_it), VOLUME, NAME_B)
    with pytest.RaisesGroup(UnknownSite, flatten_subgroups=True):
        await sites.set_policy(Policy(commit=(B,)))
    with pytest.raises(SiteInUse, match="policies"):
        await remove_site(sites.store, VOLUME, NAME_C)
    async with sites.mount(C) as (here, _):
        await save(here, b"f", LARGE)


async def test_what_is_refused_leaves_the_site_as_it_was(sites: Sites) -> None:
    async with sites.mount(B) as (here, _):
        await save(here, b"f", LARGE)
        with pytest.raises(SiteInUse, match="is mounted"):
            await remove_site(sites.store, VOLUME, NAME_B)
    with pytest.raises(SiteInUse, match="holds bodies"):
        await remove_site(sites.store, VOLUME, NAME_B)
    assert await read_retired(sites.store, VOLUME) == set()
    async with sites.mount(B):
        pass


async def test_an_interrupted_removal_is_ended_by_the_next(sites: Sites) -> None:
    await sites.store.txn((), (Put(KEYS.retired_site(B), LEAVING), Put(KEYS.retired_site(C), LEAVING)))
    async with sites.mount(A) as (here, _):
        await save(here, b"f", LARGE)
    with pytest.raises(SiteInUse):
        await remove_site(sites.store, VOLUME, SITES[A - 1])
    await remove_site(sites.store, VOLUME, NAME_B)
    assert await read_retired(sites.store, VOLUME) == {B, C}
    assert (await add_site(sites.store, VOLUME, NAME_B, (("kind", "memory"),))).id not in {A, B, C}


async def test_two_who_remove_the_same_site(sites: Sites) -> None:
    async def fail() -> None:
        async def lose_the_store() -> None:
            raise StoreUnavailable("gone")

        with pytest.raises(StoreUnavailable):
            await remove_site(AmidTheLook(sites.store, lose_the_store), VOLUME, NAME_B)

    with pytest.raises(SiteInUse, match="try again"):
        await remove_site(AmidTheLook(sites.store, fail), VOLUME, NAME_B)
    assert await read_retired(sites.store, VOLUME) == set()
    await remove_site(sites.store, VOLUME, NAME_B)


async def test_two_who_remove_the_last_two_sites(sites: Sites) -> None:
    await remove_site(sites.store, VOLUME, NAME_C)

    async def remove_the_other() -> None:
        await remove_site(sites.store, VOLUME, SITES[A - 1])

    with pytest.raises(SiteInUse, match="try again"):
        await remove_site(AmidTheLook(sites.store, remove_the_other), VOLUME, NAME_B)
    assert [site.id for site in await list_sites(sites.store, VOLUME)] == [B]
