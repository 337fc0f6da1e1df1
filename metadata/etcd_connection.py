"""One gRPC channel to one etcd endpoint, and a call on it from trio.

The channel, its credentials and the stubs come from the library etcd3. Calls go through the stubs' `.future()`: gRPC's
own thread completes it and wakes the trio task, so no thread is used a call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc
import trio

from apollofs.metadata import etcdrpc
from apollofs.metadata.errors import StoreAuthFailed
from apollofs.metadata.etcd_config import EtcdConfig
from apollofs.metadata.etcdrpc import rpc_pb2 as rpc

# etcd3's own stubs load under no current protobuf; with ours under their name they are never looked for.
sys.modules.setdefault("etcd3.etcdrpc", etcdrpc)

from etcd3.client import Etcd3Client  # noqa: E402

GrpcFailure = (grpc.RpcError, grpc.FutureCancelledError)
Metadata: TypeAlias = tuple[tuple[str, str], ...]
Method: TypeAlias = Any
"""A gRPC multi-callable; gRPC has no types."""


class Connection:
    """A channel and what is called on it. `proven` says that the endpoint answered and nothing has failed since.

    Raises StoreAuthFailed if the files of the certificates can't be read. Nothing is sent before the first call.
    """

    def __init__(self, config: EtcdConfig, host: str, port: int) -> None:
        try:
            self._client = Etcd3Client(
                host=f"[{host}]" if ":" in host else host,
                port=port,
                ca_cert=config.ca_path,
                cert_cert=config.cert_path,
                cert_key=config.key_path,
                grpc_options=_channel_options(config),
            )
        except OSError as exc:
            raise StoreAuthFailed(f"cannot read a TLS certificate or key: {exc}") from exc
        channel = self._client.channel
        self.proven = False
        self.txn: Method = self._client.kvstub.Txn
        self.range: Method = self._client.kvstub.Range
        self.compact: Method = self._client.kvstub.Compact
        self.lease_grant: Method = self._client.leasestub.LeaseGrant
        self.lease_revoke: Method = self._client.leasestub.LeaseRevoke
        # One request and its answer: on the wire that is the stream of one that closes, without a thread to feed it.
        self.lease_keepalive: Method = channel.unary_unary(
            "/etcdserverpb.Lease/LeaseKeepAlive",
            request_serializer=rpc.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=rpc.LeaseKeepAliveResponse.FromString,
        )
        self.status: Method = self._client.maintenancestub.Status
        self.authenticate: Method = etcdrpc.AuthStub(channel).Authenticate  # type: ignore[no-untyped-call]
        self.watch: Method = etcdrpc.WatchStub(channel).Watch  # type: ignore[no-untyped-call]
        self._lifeline_method: Method = channel.unary_stream(
            "/etcdserverpb.Watch/Watch",
            request_serializer=rpc.WatchRequest.SerializeToString,
            response_deserializer=rpc.WatchResponse.FromString,
        )
        self._lifeline: Any = None
        self._closed = False

    def hold(self, metadata: Metadata, lost: Callable[[grpc.RpcError], None]) -> None:
        """Keep one quiet stream open; `lost` is called in the trio thread if it ends by itself.

        It tells within seconds that the peer has died or its member has lost its leader, also while nothing is asked.
        And it keeps gRPC's thread of this channel alive, which would otherwise be started anew for every single call.
        """
        if self._lifeline is not None and self._lifeline.is_active():
            return
        token = trio.lowlevel.current_trio_token()
        progress = rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())
        lifeline = self._lifeline_method(progress, metadata=metadata)

        def ended() -> None:
            """Runs in gRPC's thread."""
            try:
                token.run_sync_soon(report)
            except trio.RunFinishedError:
                pass  # nobody is left to be told

        def report() -> None:
            if not self._closed and isinstance(lifeline, grpc.RpcError):
                lost(lifeline)

        self._lifeline = lifeline
        if not lifeline.add_callback(ended):
            ended()

    def close(self) -> None:
        """End the channel; calls in flight fail as cancelled."""
        self.proven = False
        self._closed = True
        self._client.close()


def _channel_options(config: EtcdConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        # Nothing is ever sent twice behind our back.
        ("grpc.enable_retries", 0),
        ("grpc.service_config_disable_resolution", 1),
        # Channels of other stores to the same server must not share our connection's fate, nor we theirs.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", int(config.ping_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(config.ping_deadline_s * 1000)),
        # A keepalive takes the place of any ping that is under way, and that one's deadline; gRPC's own is a minute.
        ("grpc.http2.ping_timeout_ms", int(config.ping_deadline_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.min_reconnect_backoff_ms", int(config.connect_deadline_s * 1000)),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # A proxy of the environment would see the metadata, and sites don't have one between them.
        ("grpc.enable_http_proxy", 0),
    ]


async def unary(method: Method, request: Any, timeout_s: float, metadata: Metadata) -> Any:
    """Call `method` and wait for its answer. Raises one of GrpcFailure.

    Cancellation gives the call up: whether it was applied is then not known.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task = trio.lowlevel.current_task()
    token = trio.lowlevel.current_trio_token()
    waiting = True

    def wake() -> None:
        if waiting:
            trio.lowlevel.reschedule(task)

    def answered(_: object) -> None:
        """Runs in gRPC's thread."""
        try:
            token.run_sync_soon(wake)
        except trio.RunFinishedError:
            pass  # the run that asked is over; nobody waits

    future = method.future(request, timeout=max(timeout_s, 0.001), metadata=metadata)
    future.add_done_callback(answered)

    def abort(_: object) -> trio.lowlevel.Abort:
        nonlocal waiting
        waiting = False
        future.cancel()
        return trio.lowlevel.Abort.SUCCEEDED

    await trio.lowlevel.wait_task_rescheduled(abort)
    return future.result()
