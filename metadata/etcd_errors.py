"""What a failed gRPC call to etcd means: whether it may have been applied, and which error says so.

Pure: from status code and text to a Failure. The texts are those of etcd's `api/v3rpc/rpctypes/error.go`, and few of
gRPC's own. Whatever is not known for sure to have changed nothing counts as possibly applied.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from apollofs.metadata.errors import (
    Compacted,
    LeaseNotFound,
    RequestTooLarge,
    StoreAuthFailed,
    StoreError,
    StoreFull,
    StoreMisuse,
    StoreUnavailable,
)


class Verdict(enum.Enum):
    """What may be done about a failed call."""

    REFUSED = enum.auto()
    """The server looked at the request and changed nothing; no other server would take it either."""
    NOT_APPLIED = enum.auto()
    """It changed nothing, or never left; another endpoint may take it."""
    STALE_TOKEN = enum.auto()
    """It changed nothing, because the token of our user has expired."""
    UNKNOWN = enum.auto()
    """It may have been applied, or may still be."""


@dataclass(frozen=True, slots=True)
class Failure:
    """`error` is the error to raise when nothing else can be done; of UNKNOWN, when the request was only a read."""

    verdict: Verdict
    error: StoreError
    text: str
    tls: bool = False
    """The connection failed over certificates."""


_ErrorType: TypeAlias = type[StoreError]

_BY_TEXT: tuple[tuple[str, Verdict, _ErrorType], ...] = (
    ("required revision has been compacted", Verdict.REFUSED, Compacted),
    ("requested lease not found", Verdict.REFUSED, LeaseNotFound),
    ("request is too large", Verdict.REFUSED, RequestTooLarge),
    ("too many operations in txn request", Verdict.REFUSED, RequestTooLarge),
    ("grpc: received message larger than max", Verdict.REFUSED, RequestTooLarge),
    ("database space exceeded", Verdict.REFUSED, StoreFull),
    ("invalid auth token", Verdict.STALE_TOKEN, StoreAuthFailed),
    ("revision of auth store is old", Verdict.STALE_TOKEN, StoreAuthFailed),
    ("authentication failed", Verdict.REFUSED, StoreAuthFailed),
    ("permission denied", Verdict.REFUSED, StoreAuthFailed),
    ("user name is empty", Verdict.REFUSED, StoreAuthFailed),
    ("user name not found", Verdict.REFUSED, StoreAuthFailed),
    ("etcdserver: no leader", Verdict.NOT_APPLIED, StoreUnavailable),
    ("etcdserver: too many requests", Verdict.NOT_APPLIED, StoreUnavailable),
    ("etcdserver: not capable", Verdict.NOT_APPLIED, StoreUnavailable),
    ("etcdserver: corrupt cluster", Verdict.NOT_APPLIED, StoreUnavailable),
    ("rpc not supported for learner", Verdict.NOT_APPLIED, StoreUnavailable),
    ("failed to connect to all addresses", Verdict.NOT_APPLIED, StoreUnavailable),
    ("connections to all backends failing", Verdict.NOT_APPLIED, StoreUnavailable),
    ("DNS resolution failed", Verdict.NOT_APPLIED, StoreUnavailable),
)

_BY_CODE: dict[grpc.StatusCode, tuple[Verdict, _ErrorType]] = {
    grpc.StatusCode.UNAUTHENTICATED: (Verdict.STALE_TOKEN, StoreAuthFailed),
    grpc.StatusCode.PERMISSION_DENIED: (Verdict.REFUSED, StoreAuthFailed),
    grpc.StatusCode.INVALID_ARGUMENT: (Verdict.REFUSED, StoreMisuse),
    grpc.StatusCode.OUT_OF_RANGE: (Verdict.REFUSED, StoreMisuse),
    grpc.StatusCode.UNIMPLEMENTED: (Verdict.REFUSED, StoreMisuse),
}

_TLS_WORDS = ("handshake failed", "SSL_ERROR", "CERTIFICATE", "certificate")


def classify(error: grpc.RpcError | grpc.FutureCancelledError, endpoint: str) -> Failure:
    """What the failure of a call to `endpoint` means."""
    if isinstance(error, grpc.FutureCancelledError):
        return classify_status(grpc.StatusCode.CANCELLED, "the connection was closed", endpoint)
    return classify_status(error.code(), error.details() or "", endpoint)


def classify_status(code: grpc.StatusCode, details: str, endpoint: str) -> Failure:
    """The same from a status code and its text."""
    readable = "no answer in time" if code is grpc.StatusCode.DEADLINE_EXCEEDED else _readable(details) or code.name
    text = f"etcd {endpoint}: {readable}"
    for words, verdict, kind in _BY_TEXT:
        if words in details:
            tls = verdict is Verdict.NOT_APPLIED and any(word in details for word in _TLS_WORDS)
            return Failure(verdict, (StoreAuthFailed if tls else kind)(text), text, tls)
    verdict, kind = _BY_CODE.get(code, (Verdict.UNKNOWN, StoreUnavailable))
    return Failure(verdict, kind(text), text)


def _readable(details: str) -> str:
    """The part of gRPC's or etcd's text that tells a person something."""
    for lead in ("Failed to connect to remote host: ", "last error: "):
        _, found, rest = details.partition(lead)
        if found:
            return rest
    return details.removeprefix("etcdserver: ")
