"""What each status of etcd and gRPC is taken for; texts as the servers send them."""

from __future__ import annotations

import grpc
import pytest

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
from apollofs.metadata.etcd_config import EtcdConfig
from apollofs.metadata.etcd_errors import Verdict, classify, classify_status

Code = grpc.StatusCode
CONNECT = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "


@pytest.mark.parametrize(
    ("code", "details", "verdict", "kind"),
    [
        (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", Verdict.REFUSED, Compacted),
        (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision", Verdict.REFUSED, StoreMisuse),
        (Code.NOT_FOUND, "etcdserver: requested lease not found", Verdict.REFUSED, LeaseNotFound),
        (Code.INVALID_ARGUMENT, "etcdserver: request is too large", Verdict.REFUSED, RequestTooLarge),
        (Code.INVALID_ARGUMENT, "etcdserver: too many operations in txn request", Verdict.REFUSED, RequestTooLarge),
        (
            Code.RESOURCE_EXHAUSTED,
            "grpc: received message larger than max (2097186 vs. 2097152)",
            Verdict.REFUSED,
            RequestTooLarge,
        ),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", Verdict.REFUSED, StoreFull),
        (Code.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request", Verdict.REFUSED, StoreMisuse),
        (Code.PERMISSION_DENIED, "etcdserver: permission denied", Verdict.REFUSED, StoreAuthFailed),
        (
            Code.INVALID_ARGUMENT,
            "etcdserver: authentication failed, invalid user ID or password",
            Verdict.REFUSED,
            StoreAuthFailed,
        ),
        (Code.UNAUTHENTICATED, "etcdserver: invalid auth token", Verdict.STALE_TOKEN, StoreAuthFailed),
        (Code.INVALID_ARGUMENT, "etcdserver: revision of auth store is old", Verdict.STALE_TOKEN, StoreAuthFailed),
        (Code.UNAVAILABLE, "etcdserver: no leader", Verdict.NOT_APPLIED, StoreUnavailable),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Verdict.NOT_APPLIED, StoreUnavailable),
        (Code.UNAVAILABLE, CONNECT + "Connection refused (111)", Verdict.NOT_APPLIED, StoreUnavailable),
        (Code.UNAVAILABLE, "DNS resolution failed for nowhere:2379", Verdict.NOT_APPLIED, StoreUnavailable),
        (Code.UNAVAILABLE, CONNECT + "Ssl handshake failed", Verdict.NOT_APPLIED, StoreAuthFailed),
        (Code.UNIMPLEMENTED, "unknown service etcdserverpb.KV", Verdict.REFUSED, StoreMisuse),
    ],
)
def test_what_surely_changed_nothing(
    code: grpc.StatusCode, details: str, verdict: Verdict, kind: type[StoreError]
) -> None:
    failure = classify_status(code, details, "host:1")
    assert (failure.verdict, type(failure.error)) == (verdict, kind)
    assert "host:1" in str(failure.error)


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (Code.UNAVAILABLE, "etcdserver: request timed out"),
        (Code.UNAVAILABLE, "etcdserver: request timed out, possibly due to previous leader failure"),
        (Code.UNAVAILABLE, "etcdserver: request timed out, possibly due to connection lost"),
        (Code.UNAVAILABLE, "etcdserver: leader changed"),
        (Code.UNAVAILABLE, "etcdserver: server stopped"),
        (Code.UNAVAILABLE, "Socket closed"),
        (Code.UNAVAILABLE, "keepalive watchdog timeout"),
        (Code.UNAVAILABLE, "recvmsg:Connection reset by peer"),
        (Code.DEADLINE_EXCEEDED, "Deadline Exceeded"),
        (Code.CANCELLED, "Channel closed!"),
        (Code.INTERNAL, "stream terminated by RST_STREAM"),
        (Code.UNKNOWN, "raft proposal dropped"),
        (Code.ABORTED, "something new"),
    ],
)
def test_everything_else_may_have_been_applied(code: grpc.StatusCode, details: str) -> None:
    assert classify_status(code, details, "host:1").verdict is Verdict.UNKNOWN


def test_a_call_that_we_closed_ourselves() -> None:
    assert classify(grpc.FutureCancelledError(), "host:1").verdict is Verdict.UNKNOWN


def test_the_text_is_for_people() -> None:
    failure = classify_status(Code.UNAVAILABLE, CONNECT + "Failed to connect to remote host: refused", "host:1")
    assert failure.text == "etcd host:1: refused"
    assert classify_status(Code.DEADLINE_EXCEEDED, "Deadline Exceeded", "host:1").text.endswith("no answer in time")


ENDPOINTS = (("127.0.0.1", 2379),)


def test_a_password_is_never_shown() -> None:
    config = EtcdConfig(ENDPOINTS, user="me", password="not for logs")
    assert "not for logs" not in repr(config)


@pytest.mark.parametrize(
    "arguments",
    [
        {"endpoints": ()},
        {"endpoints": (("", 2379),)},
        {"endpoints": (("host", 0),)},
        {"endpoints": (("host", 65536),)},
        {"user": "me"},
        {"password": "x"},
        {"ca_path": "ca", "cert_path": "cert"},
        {"cert_path": "cert", "key_path": "key"},
        {"call_deadline_s": 0},
        {"ping_s": 1},
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        EtcdConfig(**{"endpoints": ENDPOINTS, **arguments})  # type: ignore[arg-type]
