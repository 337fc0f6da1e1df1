"""The process of an agent: signals, readiness, metrics."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

import trio

from apollofs.blobstore import BlobStoreOptions
from apollofs.fs.agent.agent import run_agent
from apollofs.fs.agent.context import AgentContext, AgentOptions
from apollofs.fs.daemon import Readiness
from apollofs.fs.exporter import exported
from apollofs.fs.site_stores import SiteStores, UnmountedVolume
from apollofs.fs.user_error import UserError
from apollofs.metadata.format import list_sites, read_superblock
from apollofs.metadata.records import MountRecord
from apollofs.metadata.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Serving:
    """What the command line asks for."""

    volume: str
    record: MountRecord
    stores: BlobStoreOptions
    options: AgentOptions
    metrics: tuple[str, int] | None


class _Terms:
    """The term of office that the process has now, for metrics."""

    def __init__(self) -> None:
        self.current: AgentContext | None = None

    def begin(self, context: AgentContext) -> None:
        self.current = context

    def counters(self) -> Mapping[str, Mapping[str, float]]:
        elected = float(self.current is not None and self.current.session.alive)
        if self.current is None:
            return {"agent": {"elected": elected}}
        return {"agent": {**self.current.counters()["agent"], "elected": elected}}


async def serve_agent(store: Store, serving: Serving, readiness: Readiness) -> None:
    """Be a candidate until SIGTERM or SIGINT. Raises UserError where the volume or the site does not exist, or the
    site's store can't be used."""
    superblock = await read_superblock(store, serving.volume)
    stores = SiteStores(UnmountedVolume(store, superblock), serving.stores)
    site = next((each for each in await list_sites(store, serving.volume) if each.name == serving.record.site), None)
    if site is None:
        raise UserError(f"volume {serving.volume!r} has no site {serving.record.site!r}: see `apollofs site list`")
    await stores.check_site(site)
    terms = _Terms()
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        if serving.metrics is not None:
            labels = {"volume": serving.volume, "site": serving.record.site}
            await stack.enter_async_context(exported(serving.metrics, terms.counters, labels))
        await nursery.start(_obey, nursery.cancel_scope)
        readiness.ready({"site": serving.record.site, "pid": serving.record.pid})
        await run_agent(
            store, serving.volume, serving.record, stores.open, serving.stores, serving.options, terms.begin
        )


async def _obey(scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
    """End everything at the first signal: nothing has to be finished, the next agent goes on."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: ending", signal.Signals(number).name)
            scope.cancel()
