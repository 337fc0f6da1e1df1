"""Volumes for tests: formatted on a store of the test's choice, opened as often as it wants mounts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from apollofs.metadata.check import check_volume
from apollofs.metadata.format import format_volume
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.records import MountRecord, Owner
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Store
from apollofs.metadata.volume import Volume, open_volume

VOLUME = "test"
SITE = "here"
ME = Owner(1000, 1000)
OPTIONS = SessionOptions(lease_ttl_s=10, operation_deadline_s=10, slots=8)


def mount_record(name: str = "/mnt") -> MountRecord:
    return MountRecord(0, "host", 1, name, SITE, "0", 0)


async def make_volume(store: Store, *, inline_bytes_max: int = 4096, block_bytes: int = 1 << 16) -> None:
    """Format the volume VOLUME with one site."""
    await format_volume(
        store,
        VOLUME,
        site_name=SITE,
        site_store=(("kind", "memory"),),
        inline_bytes_max=inline_bytes_max,
        block_bytes=block_bytes,
    )


Pair = tuple[Volume, Volume]


@contextlib.asynccontextmanager
async def mounted(store: Store, options: SessionOptions = OPTIONS) -> AsyncIterator[Volume]:
    """One more mount of VOLUME."""
    async with open_volume(store, VOLUME, SITE, options, mount_record()) as volume:
        yield volume


async def assert_sound(store: Store) -> None:
    """The whole-namespace checker finds nothing."""
    violations = [violation async for violation in check_volume(store, VOLUME)]
    assert violations == [], violations


@pytest.fixture
async def volumes() -> AsyncIterator[Pair]:
    """Two mounts of one volume."""
    store = MemoryStore()
    await make_volume(store)
    async with mounted(store) as a, mounted(store) as b:
        yield a, b
    await assert_sound(store)
