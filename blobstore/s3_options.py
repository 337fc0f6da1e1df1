"""How a host talks to S3, apart from the clients so that it can be built without importing one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class S3Options:
    """How a host talks to S3; nothing of it is kept in etcd."""

    threads: int = 16
    """Requests at once, 1 to 256."""
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0
    """Longest silence of the server."""
    call_deadline_s: float = 60.0
    """Longest duration of one call of the port, waiting for a free thread included."""
    ca_file: str | None = None
    """PEM file of the authority that signed the endpoint's certificate; None: the system's authorities."""

    def __post_init__(self) -> None:
        assert 1 <= self.threads <= 256
        assert 0 < self.connect_timeout_s <= self.call_deadline_s
        assert 0 < self.read_timeout_s <= self.call_deadline_s
