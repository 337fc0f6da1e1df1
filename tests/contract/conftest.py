"""Fixtures of the Store's contract: a fresh memory store, or a part of a real etcd that nobody else uses."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.memory import MemoryStore
from tests.support.etcd_server import EtcdCluster

_NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Place:
    """A store and the keys of it that belong to one test."""

    store: EtcdStore | MemoryStore
    prefix: bytes

    def key(self, name: bytes | str) -> bytes:
        return self.prefix + (name.encode() if isinstance(name, str) else name)

    @property
    def all(self) -> tuple[bytes, bytes]:
        """The range of all its keys."""
        return self.prefix, self.prefix[:-1] + b"0"


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """One member, without TLS or users, for the whole run."""
    with EtcdCluster.started(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture(params=["memory", "etcd"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Each implementation in turn."""
    prefix = b"contract/%d/" % next(_NUMBERS)
    store: EtcdStore | MemoryStore
    if request.param == "memory":
        store = MemoryStore()
    else:
        cluster: EtcdCluster = request.getfixturevalue("etcd")
        store = EtcdStore(EtcdConfig(cluster.endpoints))
    try:
        yield Place(store, prefix)
    finally:
        await store.aclose()
