"""EtcdStore: the Store port on an etcd cluster, version 3.4 or newer.

    store = EtcdStore(EtcdConfig((("127.0.0.1", 2379),)))
    await store.check()

Its parts: `etcd_config` what the cluster is; `etcd_connection` one channel and a call from trio; `etcd_client`
failover, tokens and deadlines; `etcd_errors` what a failure means; `etcd_codec` messages; `etcd_watch` the watches.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager

from apollofs.metadata.errors import LeaseNotFound
from apollofs.metadata.etcd_client import Effect, EtcdClient
from apollofs.metadata.etcd_codec import decode_range, decode_txn, encode_range, encode_txn
from apollofs.metadata.etcd_config import EtcdConfig
from apollofs.metadata.etcd_watch import WatchHub
from apollofs.metadata.etcdrpc import rpc_pb2 as rpc
from apollofs.metadata.store import Compare, Lease, Op, Range, RangeResult, TxnResult, WatchBatch

__all__ = ["EtcdConfig", "EtcdStore"]


class EtcdStore:
    """See the port for what every method promises. To be used in one trio run; connects when first asked.

    The constructor reads the TLS files and raises StoreAuthFailed if it can't.
    """

    def __init__(self, config: EtcdConfig) -> None:
        self._client = EtcdClient(config)
        self._watches = WatchHub(self._client)

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], orelse: Sequence[Op] = ()) -> TxnResult:
        """See the port. Repeated on another endpoint only if it writes nothing, or surely was not applied."""
        request = encode_txn(compares, then, orelse)
        writes = any(type(op) is not Range for op in then) or any(type(op) is not Range for op in orelse)
        effect = Effect.ONCE if writes else Effect.READ
        return decode_txn(await self._client.call("txn", request, effect))

    async def range(self, request: Range) -> RangeResult:
        """See the port."""
        answer = await self._client.call("range", encode_range(request), Effect.READ)
        return decode_range(answer, answer.header.revision)

    def watch(
        self, key: bytes, range_end: bytes = b"", *, start_revision: int, last_revision: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchBatch]]:
        """See the port. The iterator raises Compacted or StoreAuthFailed; while no server answers, it waits."""
        return self._watches.watch(key, range_end, start_revision, last_revision)

    async def lease_grant(self, ttl_s: int) -> Lease:
        """See the port. The server may grant more than was asked: its least is about two seconds."""
        answer = await self._client.call("lease_grant", rpc.LeaseGrantRequest(TTL=ttl_s), Effect.ONCE)
        return Lease(answer.ID, answer.TTL)

    async def lease_keepalive(self, lease_id: int) -> int:
        """See the port. The time to live counts from some moment after this was called."""
        request = rpc.LeaseKeepAliveRequest(ID=lease_id)
        answer = await self._client.call("lease_keepalive", request, Effect.REPEATABLE)
        ttl_s: int = answer.TTL
        return max(0, ttl_s)

    async def lease_revoke(self, lease_id: int) -> None:
        """See the port."""
        try:
            await self._client.call("lease_revoke", rpc.LeaseRevokeRequest(ID=lease_id), Effect.REPEATABLE)
        except LeaseNotFound:
            return

    async def compact(self, revision: int) -> None:
        """Forget states before `revision`. Raises Compacted if they are forgotten, StoreMisuse past the newest."""
        await self._client.call("compact", rpc.CompactionRequest(revision=revision), Effect.ONCE)

    async def server_version(self) -> str:
        """The version of the server in use, as 3.4.23. Raises StoreUnavailable, StoreAuthFailed."""
        answer = await self._client.call("status", rpc.StatusRequest(), Effect.READ)
        version: str = answer.version
        return version

    async def check(self) -> None:
        """See that an endpoint answers and knows our user.

        Raises StoreUnavailable or StoreAuthFailed with one line that names each endpoint and what is wrong with it,
        within the deadline of a call.
        """
        await self._client.serving()

    async def aclose(self) -> None:
        """End watches and connections. Calls in flight end as unavailable or unknown; later ones are refused."""
        await self._watches.aclose()
        self._client.close()
