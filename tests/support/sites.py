"""A volume over three sites in memory: filesystems at each, agents, and stores that can be stopped."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from apollofs.blobstore import BlobStoreOptions, BlobStoreUnavailable, BlockStore
from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.agent import AgentOptions
from apollofs.fs.agent.agent import Agent
from apollofs.fs.agent.context import AgentContext
from apollofs.fs.agent.duties import DUTIES, Duty
from apollofs.fs.blobs import block_named, open_blob_source, site_of
from apollofs.fs.collection import CollectReport
from apollofs.fs.collector import Collection
from apollofs.fs.command_volume import command_record
from apollofs.fs.config import BodyConfig
from apollofs.fs.filesystem import Filesystem, open_filesystem
from apollofs.metadata.collector import open_collector
from apollofs.metadata.format import add_site, list_sites, read_superblock
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.policy import Policy, read_policies
from apollofs.metadata.records import ROOT_INO, MountRecord
from apollofs.metadata.replicas import Replicas
from apollofs.metadata.store import Range, Store, prefix_end
from apollofs.metadata.volume import Volume, open_volume
from tests.support.bodies import BrokenBlobs
from tests.support.collecting import AT_ONCE
from tests.support.volumes import OPTIONS, SITE, VOLUME, assert_sound, make_volume

SITES = (SITE, "b", "c")
A, B, C = 1, 2, 3
KEYS = Keys(VOLUME)
OPTIONS_OF_AGENTS = AgentOptions(gc_every_s=0, workers=2, lease_ttl_s=5)


@dataclass
class Sites:
    """`store` is what mounts and agents use; `blobs` the stores by the site's id."""

    store: Store
    directory: Path
    blobs: dict[int, BrokenBlobs] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)
    """Sites whose stores can't be reached."""
    unopened: dict[int, Exception] = field(default_factory=dict)
    """Sites whose stores can't be opened, and why; one that is open stays so."""
    mounts: int = 0

    async def open_store(self, site: int) -> BlockStore:
        await trio.lowlevel.checkpoint()
        if site in self.unopened:
            raise self.unopened[site]
        return self.blobs[site]

    def stop(self, site: int) -> None:
        """From now on every read and put there fails."""
        self.stopped.add(site)

        async def refuse() -> None:
            await trio.lowlevel.checkpoint()
            if site in self.stopped:
                raise BlobStoreUnavailable("stopped by the test")

        self.blobs[site].before_read = self.blobs[site].before_put = refuse

    @contextlib.asynccontextmanager
    async def mount(self, site: int) -> AsyncIterator[tuple[Filesystem, Volume]]:
        """One more mount at a site."""
        name = SITES[site - 1]
        record = MountRecord(0, "host", 1, f"/mnt/{name}", name, "0", 0)
        self.mounts += 1
        config = BodyConfig(self.directory / f"{name}-{self.mounts}", disk_free_bytes_min=0, commit_interval_s=3600)
        async with open_volume(self.store, VOLUME, name, OPTIONS, record) as volume:
            config.cache_dir.mkdir(parents=True)
            async with open_filesystem(volume, self.open_store, config) as filesystem:
                yield filesystem, volume

    @contextlib.asynccontextmanager
    async def agent(
        self,
        site: int,
        options: AgentOptions = OPTIONS_OF_AGENTS,
        *,
        store: Store | None = None,
        duties: tuple[Duty, ...] = DUTIES,
    ) -> AsyncIterator[AgentContext]:
        """An agent of a site, once it is elected; it ends with the context."""
        record = MountRecord(0, "host", 1, "", SITES[site - 1], "0", 0)
        stores = BlobStoreOptions()
        found: list[AgentContext] = []
        elected = trio.Event()

        def tell(context: AgentContext) -> None:
            found.append(context)
            elected.set()

        async with trio.open_nursery() as nursery:
            agent = Agent(store or self.store, VOLUME, record, self.open_store, stores, options)
            nursery.start_soon(agent.run, tell, duties)
            await elected.wait()
            yield found[-1]
            nursery.cancel_scope.cancel()

    async def set_policy(self, policy: Policy | None, directory: int = ROOT_INO) -> None:
        async with open_volume(self.store, VOLUME, SITE, OPTIONS, command_record("0")) as volume:
            await volume.placement.set_policy(directory, policy)

    async def collect(self) -> CollectReport:
        """One run of the collector, without grace."""
        superblock = await read_superblock(self.store, VOLUME)
        async with (
            open_blob_source(self.open_store, superblock.block_bytes) as source,
            open_collector(self.store, VOLUME, command_record("0"), OPTIONS, AT_ONCE.answer_wait_s) as collector,
        ):
            run = Collection(self.store, KEYS, collector, source, AT_ONCE)
            return await run.run(await list_sites(self.store, VOLUME))

    async def objects(self, site: int) -> set[str]:
        """The names of all objects at a site."""
        return {entry.name async for entry in self.blobs[site].list()}

    async def copied_to(self, site: int, volume: Volume, ino: int) -> bool:
        """Whether a site has all objects of a file's body, and is said to have them."""
        body = await volume.read_body(ino)
        blobs = {extent.blob for extent in body.inode.extents}
        known = await Replicas(self.store, KEYS).read(blobs)
        there, home = await self.objects(site), set().union(*[await self.objects(site_of(blob)) for blob in blobs])
        mine = {name for name in home if (block := block_named(name, 0)) is not None and block.blob in blobs}
        return bool(mine) and mine <= there and all(site in copies.complete for copies in known.values())


async def until_done(context: AgentContext, store: Store | None = None) -> None:
    """Wait until everything that has been committed by now is done by an agent: no job is open, no tree is due."""
    store = store or context.store
    slots = await store.range(Range(KEYS.slots, prefix_end(KEYS.slots)))
    policies, _ = await read_policies(store, KEYS)
    newest = max(kv.mod_revision for kv in slots.kvs)
    with trio.fail_after(60):
        while True:
            walked = all(context.state.walked.get(number) == kv.mod_revision for number, kv in policies.items())
            if walked and not len(context.backlog) and context.backlog.heard >= newest:
                return
            await trio.testing.wait_all_tasks_blocked(0.001)


@pytest.fixture
async def sites(tmp_path: Path) -> AsyncIterator[Sites]:
    """Three sites, nothing in them; the namespace is sound at the end."""
    store = MemoryStore()
    await make_volume(store, inline_bytes_max=64)
    for name in SITES[1:]:
        await add_site(store, VOLUME, name, (("kind", "memory"),))
    world = Sites(store, tmp_path, {site: BrokenBlobs(MemoryBlobs()) for site in (A, B, C)})
    yield world
    await assert_sound(store)
