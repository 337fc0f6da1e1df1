"""EtcdConfig: where an etcd cluster is and how to talk to it; checked once, then passed by constructor."""

from __future__ import annotations

from dataclasses import dataclass, field

PORT_MAX = 65535


@dataclass(frozen=True, slots=True)
class EtcdConfig:
    """Raises ValueError where the parts don't fit together."""

    endpoints: tuple[tuple[str, int], ...]
    """(host, port) of members of one cluster; the first that serves is used. An IPv6 address has no brackets."""
    ca_path: str | None = None
    """PEM file with the authority that signed the servers' certificates; given, all connections are TLS."""
    cert_path: str | None = None
    """PEM file with the client's certificate, where the servers ask for one; needs `key_path` and `ca_path`."""
    key_path: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    connect_deadline_s: float = 3.0
    """How long one endpoint may take to connect and answer before the next is tried."""
    call_deadline_s: float = 8.0
    """How long one request may take, connecting included. etcd itself gives up on a request after 7 s, and says so."""
    ping_s: float = 6.0
    """Silence after which a connection in use is pinged; etcd bans clients that ping more often than every 5 s."""
    ping_deadline_s: float = 3.0
    """How long such a ping may take before the connection counts as dead."""

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("at least one etcd endpoint is needed")
        for host, port in self.endpoints:
            if not host or not 0 < port <= PORT_MAX:
                raise ValueError(f"not an etcd endpoint: {host}:{port}")
        if (self.cert_path is None) != (self.key_path is None):
            raise ValueError("a client certificate needs its key, and the key its certificate")
        if self.cert_path is not None and self.ca_path is None:
            raise ValueError("a client certificate needs the certificate of the servers' authority too")
        if (self.user is None) != (self.password is None):
            raise ValueError("an etcd user needs a password, and the password a user")
        for name in ("connect_deadline_s", "call_deadline_s", "ping_deadline_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        if self.ping_s < 5:
            raise ValueError("ping_s must be at least 5: etcd closes connections that ping more often")
