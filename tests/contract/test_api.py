"""What other programs import: opening a volume by its address, and how what goes wrong looks to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from apollofs.fs.api import (
    ClientOptions,
    NoSuchEntry,
    RevisionConflict,
    UserError,
    open_volume,
    open_volume_sync,
)
from apollofs.fs.config import ConfigError
from apollofs.fs.embedded import free_ports
from apollofs.metadata.errors import NotFormatted
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from tests.support.etcd_server import EtcdCluster
from tests.support.volumes import VOLUME, assert_sound, make_volume

pytestmark = pytest.mark.contract


@pytest.fixture
async def url(etcd: EtcdCluster) -> str:
    """The META_URL of the volume, which the first test makes."""
    store = EtcdStore(EtcdConfig(etcd.endpoints))
    try:
        try:
            await assert_sound(store)
        except NotFormatted:
            await make_volume(store)
    finally:
        await store.aclose()
    host, port = etcd.server.endpoint
    return f"etcd://{host}:{port}/{VOLUME}"


async def test_an_error_leaves_the_block_as_it_is(url: str) -> None:

    async def program() -> None:
        async with open_volume(url) as volume:
            kv = await volume.kv("/a", create=True)
            await kv.put("k", b"value")
            await kv.put_if_absent("k", b"other")

    with pytest.raises(RevisionConflict) as refused:
        await program()
    assert refused.value.revision


async def test_programs_without_trio(url: str) -> None:
    def program() -> bytes:
        with open_volume_sync(url) as volume:
            kv = volume.kv("/b", create=True)
            with kv.watch() as events:
                revision = kv.put("k", b"value")
                assert kv.transaction([kv.unchanged("k", revision), kv.change("l", b"1")]) > revision
                told = [next(events).key, next(events).key]
                assert events.next(timeout_s=0.01) is None
            assert told == ["k", "l"]
            with pytest.raises(NoSuchEntry):
                kv.get("none")
            assert kv.delete("l")
            return kv.get(b"k").data

    assert await trio.to_thread.run_sync(program) == b"value"


async def test_a_block_that_has_ended_answers_nothing(url: str) -> None:
    def program() -> Callable[[], object]:
        with open_volume_sync(url) as volume:
            kv = volume.kv("/c", create=True)
        return lambda: kv.get("k")

    late = await trio.to_thread.run_sync(program)
    with pytest.raises(RuntimeError, match="closed"):
        await trio.to_thread.run_sync(late)


async def test_what_cant_be_opened_says_why(url: str) -> None:
    nowhere = f"etcd://127.0.0.1:{free_ports(1)[0]}/{VOLUME}"
    for address, error in ((url.replace(VOLUME, "none"), NotFormatted), (nowhere, UserError), ("what", UserError)):
        with pytest.raises(error):
            async with open_volume(address):
                pass
    with pytest.raises(NotFormatted), open_volume_sync(url.replace(VOLUME, "none")):
        pass
    with pytest.raises(ConfigError):
        ClientOptions(slots=0)
