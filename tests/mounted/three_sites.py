"""One namespace over three sites on one machine: an etcd of three members that is 10, 40 and 80 ms away from them, and
a bucket of one gateway for each. Everything goes through proxies, so that each part can be slow, cut off or down.

    with ThreeSites.started(directory, gateway, "demo") as sites:
        mounts = [sites.mount(site) for site in SITES]
        sites.stores["a"].refuse()
        sites.ways["c"].blackhole()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.mounted.agents import AgentProcess, start_agent
from tests.mounted.harness import GatewayBodies, Mount, Namespace
from tests.support.etcd_server import EtcdServer
from tests.support.radosgw_server import RadosGateway
from tests.support.tcp_proxy import HOST, TcpProxy
from tests.support.ways import Way

ROUND_TRIPS_MS: Final = {"a": 10.0, "b": 40.0, "c": 80.0}
"""How far each site is from etcd."""
SITES: Final = tuple(ROUND_TRIPS_MS)
MEMBERS = 3


@dataclass(frozen=True)
class ThreeSites:
    """`ways`: how each site reaches etcd. `stores`: what is before each site's bucket, for everybody."""

    namespace: Namespace
    ways: Mapping[str, Way]
    stores: Mapping[str, TcpProxy]

    @classmethod
    @contextmanager
    def started(
        cls,
        directory: Path,
        gateway: RadosGateway,
        buckets: str,
        *,
        kind: type[Namespace] = Namespace,
        format_options: Sequence[str] = (),
    ) -> Iterator[ThreeSites]:
        """A new volume, gone at the end of the block, when `Namespace.made` says whether all was well. Its buckets are
        named `buckets`-a and so on."""
        with ExitStack() as stack:
            stores = {site: stack.enter_context(TcpProxy.started((HOST, gateway.port))) for site in SITES}
            bodies = [
                GatewayBodies(site, gateway, f"{buckets}-{site}", f"http://{HOST}:{store.endpoint[1]}")
                for site, store in stores.items()
            ]
            # the ways outlast the namespace, which unmounts through them
            outer = stack.enter_context(ExitStack())
            namespace = stack.enter_context(
                kind.made(directory, bodies, format_options=format_options, members=MEMBERS)
            )
            members = namespace.cluster.endpoints
            ways = {site: outer.enter_context(Way.started(members, ms)) for site, ms in ROUND_TRIPS_MS.items()}
            sites = cls(namespace, ways, stores)
            stack.callback(sites.heal)
            yield sites

    def url(self, site: str) -> str:
        """The META_URL at a site."""
        return f"etcd://{self.ways[site].address}/{self.namespace.volume}"

    def mount(self, site: str, *options: str, name: str = "") -> Mount:
        return self.namespace.mount(site, *options, name=name or site, url=self.url(site))

    def start_agent(self, site: str, *options: str) -> AgentProcess:
        return start_agent(self.namespace, site, *options, url=self.url(site))

    def leader(self) -> EtcdServer:
        """The member that leads now; all of them run. Raises StopIteration in an election."""
        told = {server: server.post("/v3/maintenance/status", {}) for server in self.namespace.cluster.servers}
        return next(server for server, status in told.items() if status["leader"] == status["header"]["member_id"])

    def heal(self) -> None:
        """Everything can be reached again; a member that was stopped is started elsewhere."""
        for way in self.ways.values():
            way.heal()
        for store in self.stores.values():
            store.heal()
