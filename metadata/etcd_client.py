"""EtcdClient: calls to a cluster, with failover between its endpoints and a token for its user.

Rules
1. One endpoint is used until it fails; then the next. An endpoint is asked something harmless before it gets a request
   that matters, so a write is sent only where a server was there a moment ago.
2. A call that may have been applied is repeated only if its Effect allows that. What surely changed nothing is tried
   once on every endpoint. There is no waiting between attempts: whoever calls decides how long to go on.
3. `hasleader` makes a member that has lost its quorum refuse at once, instead of keeping the request until it times
   out.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import trio

from apollofs.metadata.errors import OutcomeUnknown, StoreAuthFailed, StoreUnavailable
from apollofs.metadata.etcd_config import EtcdConfig
from apollofs.metadata.etcd_connection import Connection, GrpcFailure, Metadata, unary
from apollofs.metadata.etcd_errors import Failure, Verdict, classify
from apollofs.metadata.etcdrpc import rpc_pb2 as rpc

LOG = logging.getLogger(__name__)
ATTEMPTS_MIN = 3
"""With one endpoint: the call that fails, one that finds its connection closed behind that, and one on a new one."""
REQUIRE_LEADER: Metadata = (("hasleader", "true"),)
TOKEN_REFRESHES_MAX = 2


class Effect(enum.Enum):
    """What a request does to the store, and so whether it may be sent again when its outcome is not known."""

    READ = enum.auto()
    REPEATABLE = enum.auto()
    """It changes something, but twice is as good as once."""
    ONCE = enum.auto()


class EndpointFailed(Exception):
    """An endpoint does not serve; another may. Never leaves the adapter."""

    def __init__(self, text: str, tls: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.tls = tls


@dataclass
class Endpoint:
    """A member of the cluster as we know it. `connection` is replaced when it has died without saying so."""

    host: str
    port: int
    connection: Connection
    proving: trio.Lock = field(default_factory=trio.Lock)
    proofs_failed: int = 0
    last_failure: EndpointFailed | None = None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(slots=True)
class _Attempts:
    """How one call has fared so far."""

    effect: Effect
    left: int
    deadline: float
    doubted: bool = False
    refreshes: int = 0
    texts: list[str] = field(default_factory=list)
    tls_only: bool = True


class EtcdClient:
    """See the module. Raises StoreAuthFailed at once if the files of a certificate can't be read."""

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        self._endpoints = [Endpoint(host, port, Connection(config, host, port)) for host, port in config.endpoints]
        self._current = 0
        self._metadata = REQUIRE_LEADER
        self._authenticated = config.user is None
        self._authenticating = trio.Lock()
        self._closed = False
        self.on_leave: Callable[[Connection], None] = lambda connection: None
        """Called when a connection is no longer trusted, so that a stream on it can move too."""

    @property
    def metadata(self) -> Metadata:
        """What goes with every call: the demand for a leader, and our token."""
        return self._metadata

    async def call(self, method: str, request: Any, effect: Effect) -> Any:
        """Call `method` of Connection on an endpoint that serves; ends within the configured deadline.

        Raises OutcomeUnknown if it may have been applied, StoreUnavailable if no endpoint took it, StoreAuthFailed, or
        what the server refused it with.
        """
        deadline = trio.current_time() + self._config.call_deadline_s
        attempts = _Attempts(effect, max(ATTEMPTS_MIN, len(self._endpoints)), deadline)
        while True:
            endpoint = self._endpoints[self._current]
            if not (endpoint.connection.proven and self._authenticated):
                await self._prepare(endpoint, attempts)
                if not endpoint.connection.proven:
                    continue
            connection = endpoint.connection
            metadata = self._metadata
            remaining_s = attempts.deadline - trio.current_time()
            try:
                return await unary(getattr(connection, method), request, remaining_s, metadata)
            except GrpcFailure as exc:
                failure = classify(exc, str(endpoint))
                if failure.verdict is Verdict.REFUSED:
                    raise failure.error from exc
                if failure.verdict is Verdict.STALE_TOKEN:
                    await self._refresh(endpoint, connection, metadata, failure, attempts)
                    continue
                self.leave(endpoint, connection, failure.text)
                self._count(attempts, failure, exc)

    async def serving(self) -> Endpoint:
        """An endpoint that has answered, for a stream. Raises StoreUnavailable or StoreAuthFailed."""
        deadline = trio.current_time() + self._config.call_deadline_s
        attempts = _Attempts(Effect.READ, len(self._endpoints), deadline)
        while True:
            endpoint = self._endpoints[self._current]
            if endpoint.connection.proven and self._authenticated:
                return endpoint
            await self._prepare(endpoint, attempts)

    async def renew_token(self, stale: Metadata) -> None:
        """Get a new token, unless somebody has since `stale` was used. Raises StoreUnavailable, StoreAuthFailed."""
        if self._metadata is stale:
            self._authenticated = self._config.user is None
        await self.serving()

    def leave(self, endpoint: Endpoint, connection: Connection, text: str) -> None:
        """A call or stream on this connection has failed: trust it no more, and use the next endpoint."""
        if not connection.proven:
            return  # somebody else has seen it fail before
        connection.proven = False
        LOG.info("%s", text)
        self._turn_from(endpoint)
        self.on_leave(connection)

    def close(self) -> None:
        """End all channels. Calls in flight end as unknown or unavailable; later ones are refused."""
        self._closed = True
        for endpoint in self._endpoints:
            endpoint.connection.close()

    # -- failures ----------------------------------------------------------------------------------------------------

    def _count(self, attempts: _Attempts, failure: Failure, exc: Exception) -> None:
        """Raise, unless the call may be tried once more."""
        if failure.verdict is Verdict.UNKNOWN:
            attempts.doubted = attempts.effect is not Effect.READ
            if attempts.effect is Effect.ONCE:
                raise OutcomeUnknown(failure.text) from exc
        self._note(attempts, failure.text, failure.tls, exc)

    def _note(self, attempts: _Attempts, text: str, tls: bool, exc: Exception) -> None:
        attempts.left -= 1
        attempts.tls_only = attempts.tls_only and tls
        if text not in attempts.texts:
            attempts.texts.append(text)
        if attempts.left > 0 and trio.current_time() < attempts.deadline and not self._closed:
            return
        message = "; ".join(attempts.texts)
        if attempts.doubted:
            raise OutcomeUnknown(message) from exc
        raise (StoreAuthFailed if attempts.tls_only else StoreUnavailable)(message) from exc

    def _turn_from(self, endpoint: Endpoint) -> None:
        if self._endpoints[self._current] is endpoint:
            self._current = (self._current + 1) % len(self._endpoints)

    async def _refresh(
        self, endpoint: Endpoint, connection: Connection, stale: Metadata, failure: Failure, attempts: _Attempts
    ) -> None:
        attempts.refreshes += 1
        if self._config.user is None or attempts.refreshes > TOKEN_REFRESHES_MAX:
            raise failure.error
        if self._metadata is stale:
            self._authenticated = False
        try:
            await self._authenticate(endpoint, connection, attempts.deadline)
        except EndpointFailed as exc:
            self.leave(endpoint, connection, exc.text)
            self._note(attempts, exc.text, exc.tls, exc)

    # -- getting to an endpoint --------------------------------------------------------------------------------------

    async def _prepare(self, endpoint: Endpoint, attempts: _Attempts) -> None:
        """Connect, or go to the next endpoint. Raises when there is none left to try."""
        if self._closed:
            raise StoreUnavailable("the store has been closed")
        try:
            await self._prove(endpoint, attempts.deadline)
        except EndpointFailed as exc:
            self._turn_from(endpoint)
            self._note(attempts, exc.text, exc.tls, exc)

    async def _prove(self, endpoint: Endpoint, deadline: float) -> None:
        """See that the endpoint answers and knows us. Those who come meanwhile share the result."""
        failed_before = endpoint.proofs_failed
        deadline = min(deadline, trio.current_time() + self._config.connect_deadline_s)
        with trio.move_on_at(deadline):
            await endpoint.proving.acquire()
            try:
                if endpoint.proofs_failed != failed_before and endpoint.last_failure is not None:
                    raise endpoint.last_failure
                await self._prove_now(endpoint, deadline)
            finally:
                endpoint.proving.release()
            return
        raise EndpointFailed(f"etcd {endpoint}: no answer in time")

    async def _prove_now(self, endpoint: Endpoint, deadline: float) -> None:
        connection = endpoint.connection
        try:
            if not connection.proven:
                await self._ask_status(endpoint, connection, deadline)
            if not self._authenticated:
                await self._authenticate(endpoint, connection, deadline)
            connection.proven = True
            connection.hold(self._metadata, lambda error: self._on_lost(endpoint, connection, error))
        except EndpointFailed as exc:
            endpoint.proofs_failed += 1
            endpoint.last_failure = exc
            raise

    def _on_lost(self, endpoint: Endpoint, connection: Connection, error: grpc.RpcError) -> None:
        failure = classify(error, str(endpoint))
        if failure.verdict in (Verdict.UNKNOWN, Verdict.NOT_APPLIED):
            self.leave(endpoint, connection, failure.text)

    async def _ask_status(self, endpoint: Endpoint, connection: Connection, deadline: float) -> None:
        try:
            # Its own deadline comes a little before ours, so that we hear why.
            limit_s = max(0.9 * (deadline - trio.current_time()), 0.001)
            status = await unary(connection.status, rpc.StatusRequest(), limit_s, self._metadata)
        except GrpcFailure as exc:
            failure = classify(exc, str(endpoint))
            if failure.verdict in (Verdict.REFUSED, Verdict.STALE_TOKEN):
                return  # it is there, and says no to this user; the request that matters will say so better
            if failure.verdict is Verdict.UNKNOWN and not self._closed:
                # Connected, but dumb: perhaps a dead connection. The next proof starts with a new one.
                connection.close()
                endpoint.connection = Connection(self._config, endpoint.host, endpoint.port)
            raise EndpointFailed(failure.text, failure.tls) from exc
        if status.leader == 0:
            raise EndpointFailed(f"etcd {endpoint}: has no leader")

    async def _authenticate(self, endpoint: Endpoint, connection: Connection, deadline: float) -> None:
        """Get a token for our user. Raises StoreAuthFailed if user or password is wrong."""
        async with self._authenticating:
            if self._authenticated:
                return
            request = rpc.AuthenticateRequest(name=self._config.user, password=self._config.password)
            remaining_s = deadline - trio.current_time()
            try:
                answer = await unary(connection.authenticate, request, remaining_s, REQUIRE_LEADER)
            except GrpcFailure as exc:
                failure = classify(exc, str(endpoint))
                if "authentication is not enabled" in failure.text:
                    # A cluster that asks nobody for a password takes everybody, as with etcd's own clients.
                    self._authenticated = True
                    self._metadata = REQUIRE_LEADER
                    return
                if failure.verdict is Verdict.REFUSED:
                    raise StoreAuthFailed(f"{failure.text} (user {self._config.user})") from exc
                raise EndpointFailed(failure.text, failure.tls) from exc
            self._metadata = (*REQUIRE_LEADER, ("token", answer.token))
            self._authenticated = True
