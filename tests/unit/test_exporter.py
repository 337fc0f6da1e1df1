"""Counters for Prometheus."""

from __future__ import annotations

import urllib.request
from functools import partial

import pytest
import trio

from apollofs.fs.exporter import Counters, exported
from apollofs.fs.mount_options import parse_address
from apollofs.fs.user_error import UserError

LABELS = {"volume": "v", "mountpoint": "/data"}
LOOPBACK = "127.0.0.1"


def counters() -> Counters:
    trio.lowlevel.current_trio_token()  # only in the event loop's thread
    return {"etcd": {"requests": 7}, "delegations": {"held": 3, "recall_wait_s": 0.5}, "bodies": {"cache_bytes": 10}}


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=10) as reply:
        return str(reply.read().decode())


async def test_a_scrape() -> None:
    async with exported((LOOPBACK, 0), counters, LABELS) as port:
        text = await trio.to_thread.run_sync(partial(scrape, port))
    labels = 'mountpoint="/data",volume="v"'
    assert f"apollofs_etcd_requests_total{{{labels}}} 7.0" in text
    assert f"apollofs_delegations_held{{{labels}}} 3.0" in text
    assert f"apollofs_delegations_recall_wait_seconds_total{{{labels}}} 0.5" in text
    assert f"apollofs_bodies_cache_bytes{{{labels}}} 10.0" in text


async def test_a_port_that_is_taken() -> None:
    async with exported((LOOPBACK, 0), counters, LABELS) as port:
        with pytest.raises(UserError, match=f"can't be served at {LOOPBACK}:{port}"):
            async with exported((LOOPBACK, port), counters, LABELS):
                pytest.fail("two servers at one port")


@pytest.mark.parametrize(
    ("text", "address"),
    [("9410", (LOOPBACK, 9410)), ("10.0.0.5:9410", ("10.0.0.5", 9410)), ("[::]:9410", ("::", 9410))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", "99999", "::1:9410", ":-1", "9 410"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(UserError, match="is no address"):
        parse_address(text)
