"""How one place reaches an etcd cluster: a proxy before each member, all near, far, deaf or gone together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tests.support.tcp_proxy import TcpProxy


class Way:
    """See the module, and TcpProxy for what its methods do. `round_trip_ms`: what a request takes longer on it."""

    def __init__(self, proxies: Sequence[TcpProxy], round_trip_ms: float) -> None:
        self._proxies = proxies
        self._round_trip_ms = round_trip_ms
        self.heal()

    @classmethod
    @contextmanager
    def started(cls, members: Sequence[tuple[str, int]], round_trip_ms: float = 0.0) -> Iterator[Way]:
        """To these members; gone at the end of the block."""
        with ExitStack() as stack:
            yield cls([stack.enter_context(TcpProxy.started(member)) for member in members], round_trip_ms)

    @property
    def address(self) -> str:
        """HOST:PORT of each proxy, as in a META_URL."""
        return ",".join(f"{host}:{port}" for host, port in (proxy.endpoint for proxy in self._proxies))

    def blackhole(self) -> None:
        for proxy in self._proxies:
            proxy.blackhole()

    def refuse(self) -> None:
        for proxy in self._proxies:
            proxy.refuse()

    def swallow_replies(self, times: int) -> None:
        """Of each member."""
        for proxy in self._proxies:
            proxy.swallow_replies(times)

    def slow_down(self, milliseconds: float) -> None:
        """A round trip takes so much longer than usual."""
        for proxy in self._proxies:
            proxy.delay_ms((self._round_trip_ms + milliseconds) / 2)

    def heal(self) -> None:
        """Back to what it was: as far as ever, and open."""
        for proxy in self._proxies:
            proxy.heal()
        self.slow_down(0)
