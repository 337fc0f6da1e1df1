"""One candidate for a site: waits to be elected, does the duties while it is, and begins again when it has lost that.

The one elected holds the key `l/<site>` under the lease of its session, and what it commits is fenced by the slots of
the same session. An agent that was frozen and wakes up commits nothing; objects that it still puts are the same that
its successor puts.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from apollofs.blobstore import BlobStoreOptions
from apollofs.fs.agent.context import AgentContext, AgentOptions
from apollofs.fs.agent.duties import DUTIES, Duty
from apollofs.fs.agent.rates import ByteRate, Progress
from apollofs.fs.agent.state import read_state
from apollofs.fs.blob_copies import CopyLimits
from apollofs.fs.blobs import OpenStore, open_blob_source
from apollofs.fs.known_copies import KnownCopies
from apollofs.fs.user_error import leaves
from apollofs.metadata.election import Election
from apollofs.metadata.errors import MetadataError, NotFormatted, UnknownSite
from apollofs.metadata.format import list_sites, read_superblock
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import MountRecord, SiteRecord
from apollofs.metadata.replicas import Replicas
from apollofs.metadata.session import Session, SessionOptions
from apollofs.metadata.session_opening import open_session
from apollofs.metadata.store import Store

log = logging.getLogger(__name__)
SLOTS = 16
BEGIN_AGAIN_FIRST_S, BEGIN_AGAIN_MAX_S = 1.0, 15.0

Elected = Callable[[AgentContext], None]


class Agent:
    """A candidate for one site of a volume; `record` names the process and the site."""

    def __init__(
        self,
        store: Store,
        volume: str,
        record: MountRecord,
        open_store: OpenStore,
        stores: BlobStoreOptions,
        options: AgentOptions,
    ) -> None:
        self._store = store
        self._keys = Keys(volume)
        self._record = record
        self._open_store = open_store
        self._stores = stores
        self._options = options

    async def run(self, elected: Elected = lambda _: None, duties: tuple[Duty, ...] = DUTIES) -> None:
        """Until cancelled. `elected` is told, without await, when a term of office begins.

        Raises NotFormatted, UnknownSite.
        """
        pause_s = BEGIN_AGAIN_FIRST_S
        while True:
            began_s = trio.current_time()
            try:
                await self._term(elected, duties)
            except (MetadataError, BaseExceptionGroup) as exc:
                rest = exc.split(MetadataError)[1] if isinstance(exc, BaseExceptionGroup) else None
                if rest is not None:
                    raise rest from None  # cancelled, or a bug
                fatal = next((each for each in leaves(exc) if isinstance(each, (NotFormatted, UnknownSite))), None)
                if fatal is not None:
                    raise fatal from exc
                log.warning("the agent begins again: %s", leaves(exc)[0])
            lasted = trio.current_time() - began_s > BEGIN_AGAIN_MAX_S
            pause_s = BEGIN_AGAIN_FIRST_S if lasted else min(2 * pause_s, BEGIN_AGAIN_MAX_S)
            await trio.sleep(pause_s)

    async def _term(self, elected: Elected, duties: tuple[Duty, ...]) -> None:
        """From a new session to its end. Raises MetadataError."""
        superblock = await read_superblock(self._store, self._keys.volume)
        async with self._session() as (session, site, sites):
            await Election(self._store, self._keys, session, self._keys.agent(site.id)).win()
            replicas = Replicas(self._store, self._keys)
            known_copies = KnownCopies(replicas)
            block_bytes = superblock.block_bytes
            blocks, rate = self._options.blocks_in_memory, ByteRate(self._options.bytes_per_s)
            async with open_blob_source(self._open_store, block_bytes, site.id, known_copies.of) as source:
                context = AgentContext(
                    store=self._store,
                    stores=self._stores,
                    keys=self._keys,
                    superblock=superblock,
                    site=site,
                    sites=sites,
                    session=session,
                    record=self._record,
                    source=source,
                    replicas=replicas,
                    known_copies=known_copies,
                    options=self._options,
                    state=await read_state(self._store, self._keys, site.id),
                    progress=Progress(),
                    limits=CopyLimits(trio.CapacityLimiter(blocks), rate.turn),
                    first_limits=CopyLimits(trio.CapacityLimiter(max(1, blocks // 4)), rate.first_turn),
                )
                log.info("session %d is the agent of site %s", session.number, site.name)
                elected(context)
                async with trio.open_nursery() as nursery:
                    for duty in duties:
                        nursery.start_soon(duty, context)

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[tuple[Session, SiteRecord, tuple[int, ...]]]:
        """Hold a session; the block ends with SessionLost when it has ended."""
        sites = await list_sites(self._store, self._keys.volume)
        site = next((each for each in sites if each.name == self._record.site), None)
        if site is None:
            raise UnknownSite(f"volume {self._keys.volume!r} has no site {self._record.site!r}")
        options = SessionOptions(lease_ttl_s=self._options.lease_ttl_s, slots=SLOTS)
        session = await open_session(self._store, self._keys, options, self._record, site.id)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.keep_alive)
                with session.bound():
                    yield session, site, tuple(each.id for each in sites)
                nursery.cancel_scope.cancel()
        finally:
            await session.close()


async def run_agent(
    store: Store,
    volume: str,
    record: MountRecord,
    open_store: OpenStore,
    stores: BlobStoreOptions,
    options: AgentOptions,
    elected: Elected = lambda _: None,
) -> None:
    """Be a candidate until cancelled. Raises NotFormatted, UnknownSite."""
    await Agent(store, volume, record, open_store, stores, options).run(elected)
