"""Large values whose put is refused leave nothing in the store, and reads outlive the session they were made in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import pytest
import trio

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.kv import Change, Client, KeyValues
from apollofs.metadata.errors import (
    FileTooLarge,
    InvalidArgument,
    IsADirectory,
    NameTooLong,
    OutcomeUnknown,
    RevisionConflict,
)
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.store import Op, Put
from tests.support.bodies import BrokenBlobs
from tests.support.values import VALUE_BYTES_MAX, kv_client
from tests.support.volumes import VOLUME, make_volume

LARGE = bytes(range(256)) * 1000
KEYS = Keys(VOLUME)


@dataclass
class World:
    """A volume in memory, a client with the directory /d, and what its requests do."""

    store: MemoryStore
    blobs: BrokenBlobs
    client: Client
    kv: KeyValues
    requests: list[Request]

    async def objects(self) -> int:
        return len([entry async for entry in self.blobs.raw.list()])


@pytest.fixture
async def world() -> AsyncIterator[World]:
    store, blobs = MemoryStore(), BrokenBlobs(MemoryBlobs())
    await make_volume(store)
    requests: list[Request] = []

    async def note(moment: Moment, request: Request) -> None:
        await trio.lowlevel.checkpoint()
        if moment is Moment.BEFORE and request.method in ("txn", "range"):
            requests.append(request)

    async with kv_client(store.another(note), blobs) as client:
        yield World(store, blobs, client, await client.kv("/d", create=True), requests)


async def test_a_condition_is_compared_before_anything_is_uploaded(world: World) -> None:
    revision = await world.kv.put("k", LARGE)
    objects, puts = await world.objects(), len(world.blobs.puts)
    world.requests.clear()
    with pytest.raises(RevisionConflict) as caught:
        await world.kv.put_if("k", LARGE, revision - 1)
    assert caught.value.revision == revision
    with pytest.raises(RevisionConflict):
        await world.kv.transaction([world.kv.unchanged("other", 1), world.kv.change("new", LARGE)])
    with pytest.raises(RevisionConflict):
        await world.kv.put_if_absent("k", LARGE)
    assert len(world.requests) == 3
    assert (await world.objects(), len(world.blobs.puts)) == (objects, puts)
    assert await world.kv.put_if("k", LARGE, revision) > revision
    assert await world.kv.put_if_absent("new", LARGE) > revision


async def test_a_small_value_is_compared_where_it_is_put(world: World) -> None:
    revision = await world.kv.put("k", b"1")
    world.requests.clear()
    await world.kv.put_if("k", b"2", revision)
    assert len(world.requests) == 1


def too_many(kv: KeyValues) -> Iterable[Change]:
    return [kv.change(f"k{number}", LARGE) for number in range(17)]


def twice(kv: KeyValues) -> Iterable[Change]:
    return [kv.change("k", LARGE), kv.change("k", LARGE)]


def no_name(kv: KeyValues) -> Iterable[Change]:
    return [kv.change("k", LARGE), kv.change("a/b", LARGE)]


def long_name(kv: KeyValues) -> Iterable[Change]:
    return [kv.change("k", LARGE), kv.change("x" * 256, LARGE)]


def too_large(kv: KeyValues) -> Iterable[Change]:
    return [kv.change("k", LARGE), kv.change("l", bytes(VALUE_BYTES_MAX + 1))]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (too_many, InvalidArgument),
        (twice, InvalidArgument),
        (no_name, InvalidArgument),
        (long_name, NameTooLong),
        (too_large, FileTooLarge),
    ],
)
async def test_what_can_never_be_put_is_not_uploaded(
    world: World, changes: Callable[[KeyValues], Iterable[Change]], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await world.client.transaction(list(changes(world.kv)))
    assert world.blobs.puts == []


async def test_what_was_uploaded_for_a_put_that_is_refused_goes(world: World) -> None:
    await world.client.kv("/d/directory", create=True)
    for _ in range(3):
        with pytest.raises(IsADirectory):
            await world.kv.transaction([world.kv.change("k", LARGE), world.kv.change("directory", LARGE)])
    assert (await world.objects(), len(world.blobs.puts) > 0) == (0, True)


async def test_who_is_overtaken_during_the_upload_leaves_nothing(world: World) -> None:
    revision = await world.kv.put("k", b"1")
    async with kv_client(world.store.another(), world.blobs) as beside:
        other = await beside.kv("/d")

        async def overtake() -> None:
            world.blobs.before_put = None
            await other.put("k", b"2")

        world.blobs.before_put = overtake
        with pytest.raises(RevisionConflict):
            await world.kv.put_if("k", LARGE, revision)
    assert await world.objects() == 0


async def test_an_upload_that_fails_leaves_nothing(world: World) -> None:
    world.blobs.fail_puts = [BlobStoreUnavailable("by the test")]
    with pytest.raises(BodyUnavailable):
        await world.kv.put("k", bytes(VALUE_BYTES_MAX))
    assert await world.objects() == 0


@pytest.mark.parametrize("reply", [True, False], ids=["applied", "not applied"])
async def test_what_may_have_been_put_stays(world: World, reply: bool) -> None:
    """Its outcome is not known when the client ends: the blob of a put that was made is there."""
    fails = Moment.AFTER if reply else Moment.BEFORE
    is_lost, is_over = trio.Event(), False

    async def lose(moment: Moment, request: Request) -> None:
        await trio.lowlevel.checkpoint()
        if moment is fails and writes(request, b"s/") and world.blobs.puts and not is_over:
            is_lost.set()
            raise OutcomeUnknown("by the test")

    async with kv_client(world.store.another(lose), world.blobs) as unlucky:
        kv = await unlucky.kv("/d")
        await kv.put("warm", b"")  # from here on nobody else holds the directory
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kv.put, "k", LARGE)
            await is_lost.wait()
            nursery.cancel_scope.cancel()
        is_over = True
    assert await world.objects() == len(world.blobs.puts) > 0
    if reply:
        assert (await world.kv.get("k")).data == LARGE


@pytest.mark.expects_log("has lost its lease")
async def test_changes_may_be_a_generator(world: World) -> None:
    """It is used once, also if the first session to try is lost."""
    await world.kv.put("warm", b"")
    for lease in list(world.store.shared.data._leases):
        world.store.shared.data.revoke(lease)
    assert await world.kv.transaction(world.kv.change(key, b"1") for key in ("a", "b"))  # type: ignore[arg-type]
    assert [entry.key for entry in (await world.kv.list()).entries] == ["a", "b", "warm"]


def writes(request: Request, prefix: bytes) -> bool:
    """Whether it is a transaction that puts a key with a prefix, below the volume's."""
    return request.method == "txn" and any(
        isinstance(op, Put) and op.key.startswith(KEYS.prefix + prefix)
        for op in cast(Sequence[Op], request.arguments[1])
    )


@pytest.mark.expects_log("has lost its lease")
async def test_a_read_whose_delegation_is_in_doubt_is_made_again(world: World) -> None:
    """It was taken in passing, the reply was lost, and then the session: nothing was asked to be changed."""
    await world.kv.put("k", b"1")
    lost = 0

    async def lose(moment: Moment, request: Request) -> None:
        nonlocal lost
        await trio.lowlevel.checkpoint()
        if moment is Moment.AFTER and writes(request, b"G/") and not lost:
            lost += 1
            for lease in list(world.store.shared.data._leases):
                world.store.shared.data.revoke(lease)
            raise OutcomeUnknown("by the test")

    async with kv_client(world.store.another(lose), world.blobs) as reader:
        kv = await reader.kv("/d")
        for _ in range(6):
            assert (await kv.get("k")).data == b"1"
    assert lost == 1
