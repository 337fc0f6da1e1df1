"""Values as files: what a client puts, mounts read, and the other way round; conditions, transactions, listings."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import trio

from apollofs.fs.kv import Client, KeyValues
from apollofs.metadata import journal
from apollofs.metadata.errors import (
    Compacted,
    FileTooLarge,
    InvalidArgument,
    IsADirectory,
    NameTooLong,
    NoSuchEntry,
    NotADirectory,
    OperationNotPermitted,
    RequestTooLarge,
    RevisionConflict,
)
from apollofs.metadata.journal import Kind
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import ROOT_INO, InodeFlag, RenameFlag, SetAttr
from apollofs.metadata.store import Range, prefix_end
from tests.support.filesystems import LARGE, USER, Pair, close, content, create, save
from tests.support.values import VALUE_BYTES_MAX, kv_client
from tests.support.volumes import VOLUME

TABLES = (b"v", b"d", b"g")


@dataclass
class World:
    """Two mounts, two clients, and the root directory as each client has it."""

    pair: Pair
    client: Client
    kv: KeyValues
    other: KeyValues


@pytest.fixture
async def world(pair: Pair) -> AsyncIterator[World]:
    async with kv_client(pair.store, pair.blobs) as one, kv_client(pair.store, pair.blobs) as two:
        yield World(pair, one, await one.kv("/"), await two.kv("/"))


@pytest.mark.parametrize("value", [b"", b"small", LARGE, LARGE * 20], ids=["empty", "small", "large", "blocks"])
async def test_a_put_is_a_file_and_a_file_a_value(world: World, value: bytes) -> None:
    revision = await world.kv.put("f", value)
    found = await world.other.get("f")
    assert (found.data, found.revision) == (value, revision)
    for mount in (world.pair.here, world.pair.there):
        assert await content(mount) == value
    await save(world.pair.here, b"g", value)
    assert (await world.kv.get("g")).data == value
    assert (await world.kv.get("g")).data == value


async def test_each_sees_at_once_what_the_other_has_changed(world: World) -> None:
    """Both cache the directory by turns: each change recalls what the other has."""
    await world.kv.put("f", b"0")
    for number in range(1, 30):
        text = b"%d" % number
        if number % 2:
            await world.kv.put("f", text)
        else:
            attributes = await world.pair.here.lookup(ROOT_INO, b"f")
            opened = await world.pair.here.open(attributes.ino, os.O_WRONLY | os.O_TRUNC, USER)
            await world.pair.here.write(opened.fh, 0, text)
            await close(world.pair.here, opened.fh)
        assert await content(world.pair.there) == text
        assert await content(world.pair.here) == text
        assert (await world.kv.get("f")).data == (await world.other.get("f")).data == text


async def test_what_a_mount_answered_ahead_of_the_store_is_seen(world: World) -> None:
    for number in range(5):
        await create(world.pair.here, b"n%d" % number)
    assert [entry.key for entry in (await world.kv.list("n")).entries] == [f"n{number}" for number in range(5)]
    await world.pair.here.unlink(ROOT_INO, b"n3")
    with pytest.raises(NoSuchEntry):
        await world.kv.get("n3")
    with pytest.raises(RevisionConflict):
        await world.kv.put_if_absent("n2", b"")


# -- who has the file open ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [b"small", LARGE], ids=["small", "large"])
@pytest.mark.parametrize("before", [b"another", b"y" * 60, LARGE[::-1]], ids=["small", "inline", "large"])
async def test_who_has_a_value_open_keeps_it_whole(world: World, before: bytes, after: bytes) -> None:
    """And what is still written to it does not get into the new one."""
    ino = await save(world.pair.here, b"f", before)
    opened = await world.pair.here.open(ino, os.O_RDWR, USER)
    await world.kv.put("f", after)
    assert (await world.pair.here.getattr(ino)).nlink == 0
    assert bytes(await world.pair.here.read(opened.fh, 0, len(before))) == before
    await world.pair.here.write(opened.fh, 0, b"late")
    assert bytes(await world.pair.here.read(opened.fh, 0, 4)) == b"late"
    await close(world.pair.here, opened.fh)
    assert await content(world.pair.here) == await content(world.pair.there) == after


async def test_a_value_that_is_changed_through_a_mount(world: World) -> None:
    """In every way that leaves the file in place: nothing of what was put stays where it is not true any more."""
    await world.kv.put("f", b"value")
    here = world.pair.here
    ino = (await here.lookup(ROOT_INO, b"f")).ino
    opened = await here.open(ino, os.O_RDWR, USER)
    await here.write(opened.fh, 2, b"LUE")
    await close(here, opened.fh)
    assert (await world.kv.get("f")).data == b"vaLUE"
    await world.kv.put("f", b"value")
    ino = (await here.lookup(ROOT_INO, b"f")).ino
    for size, value in ((3, b"val"), (5, b"val\0\0"), (0, b""), (1, b"\0")):
        await world.pair.volume.setattr(ino, SetAttr(size_bytes=size))
        assert (await world.kv.get("f")).data == (await world.other.get("f")).data == value
    await world.kv.put("f", b"value")
    await here.rename(ROOT_INO, b"f", ROOT_INO, b"g", RenameFlag(0))
    assert (await world.kv.get("g")).data == b"value"
    await here.link((await here.lookup(ROOT_INO, b"g")).ino, ROOT_INO, b"h")
    ino = (await here.lookup(ROOT_INO, b"h")).ino
    opened = await here.open(ino, os.O_WRONLY, USER)
    await here.write(opened.fh, 0, LARGE)
    await close(here, opened.fh)
    assert (await world.kv.get("g")).data == (await world.kv.get("h")).data == LARGE


async def test_what_is_replaced_again_and_again_leaves_nothing(world: World) -> None:
    for number in range(20):
        await world.kv.put("f", b"%d" % number * 20)
        ino = (await world.pair.here.lookup(ROOT_INO, b"f")).ino
        await world.pair.here.setxattr(ino, b"user.a", b"value", 0)
    keys = Keys(VOLUME)
    left = [await world.pair.store.range(Range(prefix, prefix_end(prefix))) for prefix in map(keys.table, TABLES)]
    assert [found.count for found in left] == [1, 1, 0]


async def test_a_replaced_file_hands_on_owner_and_mode(world: World) -> None:
    ino = await save(world.pair.here, b"f", LARGE)
    await world.pair.volume.setattr(ino, SetAttr(mode=0o4750))
    await world.kv.put("f", LARGE + b"x")
    found = await world.pair.here.lookup(ROOT_INO, b"f")
    assert (found.mode & 0o7777, found.uid, found.gid) == (0o750, USER.uid, USER.gid)
    await world.kv.put("new", b"", mode=0o600)
    assert (await world.pair.here.lookup(ROOT_INO, b"new")).mode & 0o7777 == 0o600


async def test_several_names(world: World) -> None:
    """A put takes one name away from the file."""
    ino = await save(world.pair.here, b"f", b"one")
    await world.pair.here.link(ino, ROOT_INO, b"g")
    assert await world.kv.get("g") == await world.other.get("f")
    with pytest.raises(InvalidArgument):
        await world.client.transaction([world.kv.change("f", b"3"), world.kv.change("g", b"4")])
    revision = (await world.kv.get("g")).revision
    await world.kv.put_if("f", b"two", revision)
    assert (await world.kv.get("g")).data == b"one"
    entries = {entry.key: entry.size_bytes for entry in (await world.kv.list()).entries}
    assert entries == {"f": 3, "g": None}
    await world.kv.put("g", b"three")
    assert (await world.pair.here.lookup(ROOT_INO, b"g")).nlink == 1
    await world.kv.put("f", LARGE)
    assert await world.kv.delete("g")
    assert await content(world.pair.there) == LARGE


# -- conditions --------------------------------------------------------------------------------------------------------


async def test_conditional_puts(world: World) -> None:
    first = await world.kv.put_if_absent("f", b"1")
    with pytest.raises(RevisionConflict) as refused:
        await world.other.put_if_absent("f", b"2")
    assert (refused.value.name, refused.value.revision) == (b"f", first)
    second = await world.other.put_if("f", b"2", first)
    with pytest.raises(RevisionConflict) as refused:
        await world.kv.put_if("f", b"3", first)
    assert refused.value.revision == second
    with pytest.raises(RevisionConflict):
        await world.kv.delete("f", revision=first)
    assert await world.kv.delete("f", revision=second)
    assert not await world.kv.delete("f")
    with pytest.raises(RevisionConflict) as refused:
        await world.kv.put_if("f", b"3", second)
    assert refused.value.revision == 0


async def test_counting_from_two_clients_and_a_mount_that_looks_on(world: World) -> None:
    await world.kv.put("count", b"0")

    async def count(kv: KeyValues) -> None:
        for _ in range(25):
            while True:
                found = await kv.get("count")
                try:
                    await kv.put_if("count", b"%d" % (int(found.data) + 1), found.revision)
                    break
                except RevisionConflict:
                    pass

    async with trio.open_nursery() as nursery:
        for kv in (world.kv, world.other, world.kv, world.other):
            nursery.start_soon(count, kv)
        last = 0
        for _ in range(50):
            now = int(await content(world.pair.here, b"count"))
            assert now >= last
            last = now
    assert await content(world.pair.there, b"count") == b"100"


# -- transactions ------------------------------------------------------------------------------------------------------


async def test_all_of_a_transaction_or_nothing(world: World) -> None:
    below = await world.client.kv("/below/deep", create=True)
    one = await world.kv.put("one", b"1")
    changes = [
        world.kv.unchanged("one", one),
        world.kv.unchanged("none", 0),
        below.change("two", b"2", revision=0),
        below.change("large", LARGE),
        world.kv.removal("gone"),
    ]
    revision = await world.client.transaction(changes)
    assert [entry.revision for entry in (await below.list()).entries] == [revision, revision]
    with pytest.raises(RevisionConflict) as refused:
        await world.client.transaction([world.kv.change("one", b"x"), below.change("two", b"y", revision=one)])
    assert (refused.value.name, refused.value.revision) == (b"two", revision)
    assert (await world.kv.get("one")).data == b"1"
    revision = await world.client.transaction([world.kv.removal("one"), below.change("two", b"3"), below.removal("x")])
    assert await world.kv.list("one") == await world.kv.list("one")
    assert (await below.get("two")).revision == revision
    assert await world.client.transaction([world.kv.removal("one")]) == 0


async def test_limits_of_a_transaction(world: World) -> None:
    await world.client.transaction([world.kv.change(f"k{number}", b"v" * 64) for number in range(16)])
    directories = [await world.client.kv(f"d{number}", create=True) for number in range(16)]
    await world.client.transaction([kv.change("k", b"v", revision=0) for kv in directories])
    await world.client.transaction([kv.change("k", LARGE) for kv in directories])
    await world.client.transaction([kv.removal("k") for kv in directories])
    with pytest.raises(InvalidArgument):
        await world.client.transaction([world.kv.change(f"k{number}", b"") for number in range(17)])
    with pytest.raises(InvalidArgument):
        await world.client.transaction([world.kv.change("k", b"1"), world.kv.change("k", b"2")])


async def test_what_a_transaction_was_for_is_as_a_mount_answered(world: World) -> None:
    """A mount has answered a create and not committed it: who relies on its absence is told."""
    below = await world.client.kv("/below", create=True)
    directory = await world.pair.here.lookup(ROOT_INO, b"below")
    for number in range(5):
        await world.pair.here.create(directory.ino, b"n%d" % number, 0o644, os.O_RDWR | os.O_CREAT, USER)
    with pytest.raises(RevisionConflict):
        await world.client.transaction([below.unchanged("n4", 0), world.kv.change("f", b"")])


# -- listings and the past ---------------------------------------------------------------------------------------------


async def test_an_empty_page_has_a_revision(world: World) -> None:
    revision = await world.kv.put("a", b"1")
    for page in (await world.kv.list("a", after="b"), await world.kv.list("b"), await world.kv.list(after="z")):
        assert (page.entries, page.after) == ((), None)
        assert page.revision >= revision
    assert (await world.kv.list("a", after="b", revision=revision)).revision == revision


async def test_pages_are_one_snapshot(world: World) -> None:
    for number in range(7):
        await world.kv.put(f"a{number}", b"v" * number)
    await world.kv.put("b", b"")
    await world.client.kv("a-directory", create=True)
    page = await world.kv.list("a", limit=3)
    await world.kv.put("a9", b"")
    await world.kv.delete("a5")
    keys = [entry.key for entry in page.entries]
    while page.after is not None:
        page = await world.kv.list("a", after=page.after, limit=3, revision=page.revision)
        keys += [entry.key for entry in page.entries]
    assert keys == [f"a{number}" for number in range(7)]
    newest = await world.kv.list("a")
    assert [(entry.key, entry.size_bytes) for entry in newest.entries][-2:] == [("a6", 6), ("a9", 0)]
    assert (await world.kv.list("a", after="b")).entries == ()
    with pytest.raises(InvalidArgument):
        await world.kv.list(limit=0)


@pytest.mark.parametrize("value", [b"old", LARGE], ids=["small", "large"])
async def test_a_value_as_it_was(world: World, value: bytes) -> None:
    revision = await world.kv.put("f", value)
    await world.kv.put("f", b"new")
    assert (await world.kv.get("f", revision=revision)).data == value
    with pytest.raises(NoSuchEntry):
        await world.kv.get("f", revision=revision - 1)
    await world.pair.store.compact(revision + 1)
    with pytest.raises(Compacted):
        await world.kv.get("f", revision=revision)


# -- what is refused ---------------------------------------------------------------------------------------------------


async def test_what_is_no_value(world: World) -> None:
    await world.client.kv("d", create=True)
    await world.pair.here.symlink(ROOT_INO, b"s", b"target", USER)
    for name, error in (("d", IsADirectory), ("s", InvalidArgument)):
        with pytest.raises(error):
            await world.kv.get(name)
        with pytest.raises(error):
            await world.kv.put(name, b"")
        with pytest.raises(error):
            await world.kv.delete(name)
    for name in ("", ".", "a/b"):
        with pytest.raises(InvalidArgument):
            await world.kv.get(name)
        with pytest.raises(InvalidArgument):
            await world.kv.put(name, b"")
    with pytest.raises(NameTooLong):
        await world.kv.put("n" * 256, b"")
    await world.kv.put("f", b"")
    with pytest.raises(NotADirectory):
        await world.client.kv("/f/g", create=True)
    with pytest.raises(NoSuchEntry):
        await world.client.kv("/nowhere")


async def test_immutable_files_stay(world: World) -> None:
    ino = await save(world.pair.here, b"f", b"small")
    await world.pair.volume.setattr(ino, SetAttr(flags=InodeFlag.IMMUTABLE))
    for value in (b"other", LARGE):
        with pytest.raises(OperationNotPermitted):
            await world.kv.put("f", value)
    await world.pair.volume.setattr(ino, SetAttr(flags=InodeFlag(0)))


async def test_sizes(world: World) -> None:
    await world.kv.put("f", bytes(VALUE_BYTES_MAX))
    with pytest.raises(FileTooLarge):
        await world.kv.put("g", bytes(VALUE_BYTES_MAX + 1))
    ino = await save(world.pair.here, b"sparse", b"x")
    await world.pair.volume.setattr(ino, SetAttr(size_bytes=1000))
    assert (await world.kv.get("sparse")).data == b"x".ljust(1000, b"\0")
    await world.pair.volume.setattr(ino, SetAttr(size_bytes=VALUE_BYTES_MAX + 1))
    with pytest.raises(FileTooLarge):
        await world.kv.get("sparse")
    with pytest.raises(NoSuchEntry):
        await world.kv.get("g")


@pytest.mark.parametrize("value", [7, "text", None, [1, 2]])
async def test_what_has_no_bytes_is_refused(world: World, value: object) -> None:
    with pytest.raises(TypeError):
        await world.kv.put("f", value)  # type: ignore[arg-type]
    assert (await world.kv.list("f")).entries == ()
    for buffer in (bytearray(b"bytes"), memoryview(b"b.y.t.e.s")[::2]):
        await world.kv.put("f", buffer)  # type: ignore[arg-type]
        assert (await world.kv.get("f")).data == b"bytes"


async def test_a_removed_directory_takes_nothing(world: World) -> None:
    below = await world.client.kv("/below", create=True)
    await world.pair.here.rmdir(ROOT_INO, b"below")
    for call in (below.put("f", b""), below.get("f")):
        with pytest.raises(NoSuchEntry):
            await call
    assert (await below.list()).entries == ()


# -- the journal -------------------------------------------------------------------------------------------------------


async def test_the_journal_has_each_put_once(world: World) -> None:
    keys = Keys(VOLUME)
    start = await world.kv.put("f", b"small") + 1
    changed = [
        await world.kv.put("f", b"other"),
        await world.kv.put("f", LARGE),
        await world.client.transaction([world.kv.removal("f"), world.kv.change("g", b"g")]),
    ]
    found: dict[int, list[tuple[Kind, bytes]]] = {}
    async with world.pair.store.watch(keys.slots, prefix_end(keys.slots), start_revision=start) as batches:
        while len(found) < 3:
            for event in (await anext(batches)).events:
                changes = [c for c in journal.decode(event.kv.value).changes if c.kind != Kind.NOTHING]
                if changes and event.kv.mod_revision in changed:
                    found[event.kv.mod_revision] = [(change.kind, change.name) for change in changes]
    assert list(found.values()) == [
        [(Kind.UNLINK, b"f"), (Kind.CREATE, b"f"), (Kind.COMMIT, b"f")],
        [(Kind.UNLINK, b"f"), (Kind.CREATE, b"f"), (Kind.COMMIT, b"f")],
        [(Kind.UNLINK, b"f"), (Kind.CREATE, b"g"), (Kind.COMMIT, b"g")],
    ]


async def test_too_much_for_one_request(world: World) -> None:
    world.client._bodies._inline_bytes_max = VALUE_BYTES_MAX  # as of a volume with a large inline limit
    with pytest.raises(RequestTooLarge):
        await world.client.transaction([world.kv.change(f"k{n}", bytes(200_000)) for n in range(10)])
    assert (await world.kv.list("k")).entries == ()
