"""The record of where blobs are: announced before, complete after, and never of what nobody refers to."""

from __future__ import annotations

import pytest

from apollofs.metadata.check import check_volume
from apollofs.metadata.copies import Copies, decode_copies, encode_copies
from apollofs.metadata.format import add_site, list_sites, remove_site
from apollofs.metadata.policy import Policy, decode_policy, encode_policy
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.replicas import Referent, Replicas, forget_site
from apollofs.metadata.store import Put, Range
from tests.support.filesystems import LARGE, save
from tests.support.sites import KEYS, A, B, C, Sites, sites
from tests.support.volumes import VOLUME

__all__ = ["sites"]


async def test_a_copy_of_what_has_changed_is_not_begun(sites: Sites) -> None:
    async with sites.mount(A) as (here, volume):
        ino = await save(here, b"f", LARGE)
        blob = (await volume.read_body(ino)).inode.extents[0].blob
        (kv,) = (await sites.store.range(Range(KEYS.dentry(ROOT_INO, b"f")))).kvs
        replicas, session = Replicas(sites.store, KEYS), volume.session
        old = Referent(kv.key, kv.mod_revision - 1)
        assert await replicas.begin(session, B, {blob: (Copies(), old)}) == {}
        begun = await replicas.begin(session, B, {blob: (Copies(), Referent(kv.key, kv.mod_revision))})
        assert begun[blob].begun == (B,)
        assert (await replicas.read([blob]))[blob] == begun[blob]
        done = await replicas.finish(session, B, begun)
        assert (done[blob].complete, done[blob].begun) == ((B,), ())
        assert await replicas.finish(session, C, begun) == {}, "the key has changed since"
        assert await forget_site(sites.store, KEYS, B) == 1
        assert (await replicas.read([blob]))[blob] == Copies()


async def test_the_checker_names_copies_of_nothing(sites: Sites) -> None:
    key = KEYS.copies(A << 56 | 77)
    await sites.store.txn((), [Put(key, encode_copies(Copies((B,))))])
    found = [each.message async for each in check_volume(sites.store, VOLUME)]
    assert len(found) == 1 and "to which nothing refers" in found[0]
    await forget_site(sites.store, KEYS, B)


def test_copies_and_policies_come_back_as_they_were() -> None:
    assert decode_copies(None) == Copies()
    copies = Copies().with_begun(C).with_complete(B, 200).with_begun(A)
    assert copies == Copies((B, 200), (A, C))
    assert copies.with_complete(C).without(200) == Copies((B, C), (A,))
    policy = Policy((1, 2), 3, (200,), 90, (4,))
    assert decode_policy(encode_policy(policy)) == policy


@pytest.mark.parametrize(("home", "wanting"), [(1, {2, 3}), (2, {3, 1}), (3, {1, 2})])
def test_of_any_n_each_site_knows_its_turn(home: int, wanting: set[int]) -> None:
    every = (1, 2, 3)
    assert {site for site in every if Policy(commit_any=3).wants_copy(site, home, every)} == wanting
    one = {site for site in every if Policy(commit_any=2).wants_copy(site, home, every)}
    assert len(one) == 1 and one < wanting


async def test_an_id_of_a_site_is_given_once(sites: Sites) -> None:
    """Mounts and agents have the store of the site that was removed open by it."""
    store = (("kind", "memory"),)
    first = await add_site(sites.store, VOLUME, "d", store)
    await remove_site(sites.store, VOLUME, "d")
    again = await add_site(sites.store, VOLUME, "d", store)
    assert first.id < again.id
    assert [site.id for site in await list_sites(sites.store, VOLUME)] == [A, B, C, again.id]
    await remove_site(sites.store, VOLUME, "d")
