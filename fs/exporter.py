"""A mount's counters for Prometheus, over HTTP on an address of the administrator's choice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

import trio
from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from apollofs.fs.user_error import UserError

Counters = Mapping[str, Mapping[str, float]]
"""By what they are of, and name."""

GAUGES = frozenset(
    {
        ("fuse", "handlers_at_work"),
        ("delegations", "held"),
        ("delegations", "cached_keys"),
        ("delegations", "returning"),
        ("commits", "in_flight"),
        ("commits", "waiting"),
        ("kernel_cache", "directories"),
        ("kernel_cache", "names"),
        ("kernel_cache", "inodes"),
        ("bodies", "open_files"),
        ("bodies", "dirty_files"),
        ("bodies", "cache_bytes"),
        ("blob_store", "in_flight"),
        ("agent", "elected"),
        ("agent", "backlog"),
        ("agent", "sites_away"),
        ("agent", "lag_s"),
        ("agent", "rate"),
    }
)
"""What goes up and down; everything else only grows."""
SCRAPE_DEADLINE_S = 5.0


class MountCollector(Collector):
    """Reads the counters at each scrape, in the event loop's thread."""

    def __init__(self, read: Callable[[], Counters], labels: Mapping[str, str], token: trio.lowlevel.TrioToken) -> None:
        self._read = read
        self._labels = labels
        self._token = token

    def collect(self) -> Iterable[Metric]:
        """Called in the thread of a scrape."""
        try:
            counters = trio.from_thread.run_sync(self._read, trio_token=self._token)
        except trio.RunFinishedError:
            return
        for part, named in counters.items():
            for name, value in named.items():
                yield self._metric(part, name, value)

    def _metric(self, part: str, name: str, value: float) -> Metric:
        unit = {"s": "seconds", "bytes": "bytes"}.get(name.rpartition("_")[2])
        full = f"apollofs_{part}_{name.removesuffix('_s') + '_seconds' if unit == 'seconds' else name}"
        text = f"{part} {name}".replace("_", " ")
        family = GaugeMetricFamily if (part, name) in GAUGES else CounterMetricFamily
        metric: Metric = family(full, text, labels=tuple(self._labels))
        metric.add_metric(tuple(self._labels.values()), value)  # type: ignore[attr-defined]
        return metric


@asynccontextmanager
async def exported(
    address: tuple[str, int], read: Callable[[], Counters], labels: Mapping[str, str]
) -> AsyncIterator[int]:
    """Serve while the context lasts; the port (another one than asked for if that is 0). Raises UserError."""
    host, port = address
    registry = CollectorRegistry()
    registry.register(MountCollector(read, labels, trio.lowlevel.current_trio_token()))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as exc:
        raise UserError(f"metrics can't be served at {host}:{port}: {exc.strerror or exc}") from exc
    try:
        yield server.server_port
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(SCRAPE_DEADLINE_S):
            # the server's thread is a daemon: it holds up nothing when a scrape hangs
            await trio.to_thread.run_sync(server.shutdown, abandon_on_cancel=True)
            await trio.to_thread.run_sync(thread.join, abandon_on_cancel=True)
        server.server_close()
