"""The change log: what its records say, from where, and what a reader hears when some of it is gone."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import trio

from apollofs.fs.change_facts import change_facts
from apollofs.metadata.changes.history import mark_end
from apollofs.metadata.changes.log import within
from apollofs.metadata.changes.position import Position, parse_position
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.errors import ChangesLost, InvalidArgument, NotFormatted
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.ops.seal import BeginSeal
from apollofs.metadata.policy import Policy, decode_policy
from apollofs.metadata.records import ROOT_INO, BodyChange, RenameFlag, SetAttr
from apollofs.metadata.retention import Retention, decode_retention
from apollofs.metadata.sealing import Sealing
from apollofs.metadata.volume import Volume
from tests.support.change_logs import KEYS, World, made_world
from tests.support.rebuilt import Rebuilt, differences, volume_facts
from tests.support.retaining import set_retention
from tests.support.volumes import ME, VOLUME, mounted

TERM_S = 3600.0


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with made_world() as world:
        yield world


def told(records: list[ChangeRecord]) -> list[tuple[Kind, bytes | None, bytes | None]]:
    return [(record.change.kind, record.path, record.old_path) for record in records]


async def some_changes(volume: Volume) -> tuple[int, int]:
    """A directory, moved and with something in it; its number and a file's."""
    directory = (await volume.mkdir(ROOT_INO, b"d", 0o755, ME)).ino
    file = (await volume.mknod(directory, b"f", stat.S_IFREG | 0o644, 0, ME)).ino
    await volume.commit_body(file, BodyChange(0, 5, inline=b"bytes"))
    await volume.rename(ROOT_INO, b"d", ROOT_INO, b"e")
    await volume.setattr(file, SetAttr(mode=0o600))
    await volume.unlink(directory, b"f")
    await volume.settle()
    return directory, file


EXPECTED = [
    (Kind.MKDIR, b"/d", None),
    (Kind.CREATE, b"/d/f", None),
    (Kind.COMMIT, b"/d/f", None),
    (Kind.RENAME, b"/e", b"/d"),
    (Kind.SETATTR, b"/e/f", None),
    (Kind.UNLINK, b"/e/f", None),
]


async def test_records_say_what_happened_where_and_when(world: World) -> None:
    async with mounted(world.store) as volume:
        directory, file = await some_changes(volume)
        found = await world.read()
        assert told(found) == [(Kind.MKDIR, b"/", None), *EXPECTED]
        commit = found[3]
        assert (commit.change.ino, commit.change.parent, commit.change.size_bytes) == (file, directory, 5)
        assert (commit.session, commit.site) == (volume.session.number, 1)
        assert commit.change.body_version == 1
        times = [record.change.time_ns for record in found]
        assert times == sorted(times)
        positions = [record.position for record in found]
        assert positions == sorted(set(positions))


async def test_archive_and_live_are_one(world: World) -> None:
    async with mounted(world.store) as volume:
        await some_changes(volume)
        before = await world.read()
        report = await world.archive()
        assert (report.segments, report.changes) == (1, len(before))
        assert await world.read() == before
        await volume.mkdir(ROOT_INO, b"later", 0o755, ME)
        await volume.settle()
        whole = await world.read()
        assert told(whole) == [*told(before), (Kind.MKDIR, b"/later", None)]
        await world.store.compact((await world.archive()).through)
        assert await world.read() == whole
        for at, record in enumerate(whole):
            assert await world.read(record.position) == whole[at:]
            after = Position(record.position.revision, record.position.offset + 1)
            assert await world.read(after) == whole[at + 1 :]


async def test_a_subtree_is_followed_through_renames(world: World) -> None:
    async with mounted(world.store) as volume:
        outer = (await volume.mkdir(ROOT_INO, b"outer", 0o755, ME)).ino
        inner = (await volume.mkdir(ROOT_INO, b"inner", 0o755, ME)).ino
        await volume.mkdir(inner, b"before", 0o755, ME)
        await volume.rename(ROOT_INO, b"inner", outer, b"inner")
        await volume.mkdir(inner, b"inside", 0o755, ME)
        await volume.mkdir(ROOT_INO, b"outermost", 0o755, ME)
        other = (await volume.mkdir(ROOT_INO, b"other", 0o755, ME)).ino
        await volume.rename(outer, b"inner", ROOT_INO, b"other", RenameFlag.EXCHANGE)
        await volume.mkdir(inner, b"after", 0o755, ME)
        await volume.mkdir(other, b"new", 0o755, ME)
        expected = [
            (Kind.MKDIR, b"/outer", None),
            (Kind.RENAME, b"/outer/inner", b"/inner"),
            (Kind.MKDIR, b"/outer/inner/inside", None),
            (Kind.EXCHANGE, b"/other", b"/outer/inner"),
            (Kind.MKDIR, b"/outer/inner/new", None),
        ]
        await volume.settle()
        assert told(await world.read(selects=within(b"/outer"))) == expected
        await world.archive()
        assert told(await world.read(selects=within(b"/outer/"))) == expected
        everything = await world.read(selects=within(b"/"))
        assert everything == await world.read()


async def test_a_subtree_that_moves_with_a_directory_above_it(world: World) -> None:
    async with mounted(world.store) as volume:
        outer = (await volume.mkdir(ROOT_INO, b"outer", 0o755, ME)).ino
        middle = (await volume.mkdir(outer, b"middle", 0o755, ME)).ino
        inner = (await volume.mkdir(middle, b"inner", 0o755, ME)).ino
        await volume.rename(ROOT_INO, b"outer", ROOT_INO, b"away")
        await volume.mkdir(inner, b"not seen", 0o755, ME)
        await volume.rename(ROOT_INO, b"away", ROOT_INO, b"outer")
        await volume.mkdir(inner, b"seen", 0o755, ME)
        other = (await volume.mkdir(outer, b"other", 0o755, ME)).ino
        await volume.rename(outer, b"other", outer, b"middle", RenameFlag.EXCHANGE)
        await volume.mkdir(other, b"inner", 0o755, ME)
        await volume.settle()
        expected = [
            (Kind.MKDIR, b"/outer/middle/inner", None),
            (Kind.RENAME, b"/away", b"/outer"),
            (Kind.RENAME, b"/outer", b"/away"),
            (Kind.MKDIR, b"/outer/middle/inner/seen", None),
            (Kind.EXCHANGE, b"/outer/middle", b"/outer/other"),
            (Kind.MKDIR, b"/outer/middle/inner", None),
        ]
        assert told(await world.read(selects=within(b"/outer/middle/inner"))) == expected


async def test_what_holds_for_a_subtree_is_set_above_it(world: World) -> None:
    async with mounted(world.store) as volume:
        outer = (await volume.mkdir(ROOT_INO, b"outer", 0o755, ME)).ino
        await volume.mkdir(outer, b"inner", 0o755, ME)
        start = await world.log().now()
        await volume.placement.set_policy(outer, Policy(soon=(1,)))
        await set_retention(volume, outer, Retention(last=3, patterns=("run-{step}",)))
        sealing = Sealing(world.store, volume)
        await sealing.unseal((await sealing.seal(outer, TERM_S)).number)
        await volume.setattr(outer, SetAttr(mode=0o700))
        await volume.settle()
        kinds = [Kind.POLICY, Kind.RETENTION, Kind.SEAL, Kind.UNSEAL]
        assert told(await world.read(start, selects=within(b"/outer/inner"))) == [(k, b"/outer", None) for k in kinds]


@pytest.mark.parametrize("kind", [Kind.RENAME, Kind.EXCHANGE])
def test_renames_have_an_old_path_whether_it_is_known_or_not(kind: Kind) -> None:
    record = ChangeRecord(Position(1), 1, 1, Change(kind, 5, 2, b"x", old_parent=9, old_name=b"x"), b"/x", b"/y")
    assert change_facts(record, {})["old_path"] == "/y"
    assert change_facts(record._replace(old_path=None), {})["old_path"] is None
    assert "old_path" not in change_facts(record._replace(change=Change(Kind.MKDIR, 5, 2, b"x")), {})


def test_what_may_have_come_out_of_a_subtree_is_selected() -> None:
    change = Change(Kind.RENAME, 5, 2, b"x", mode=stat.S_IFREG | 0o644, old_parent=9, old_name=b"x")
    record = ChangeRecord(Position(1), 1, 1, change, b"/elsewhere/x", None)
    assert within(b"/outer")(record)
    assert not within(b"/outer")(record._replace(old_path=b"/other/x"))


@pytest.mark.parametrize("path", [b"/outer", b"outer", b"/outer/", b"//outer", b"/./outer/.", b"outer//"])
async def test_spellings_of_a_subtree(world: World, path: bytes) -> None:
    async with mounted(world.store) as volume:
        outer = (await volume.mkdir(ROOT_INO, b"outer", 0o755, ME)).ino
        await volume.mkdir(outer, b"inner", 0o755, ME)
        await volume.mkdir(ROOT_INO, b"outermost", 0o755, ME)
        await volume.settle()
        expected = [(Kind.MKDIR, b"/outer", None), (Kind.MKDIR, b"/outer/inner", None)]
        assert told(await world.read(selects=within(path))) == expected


def test_a_path_that_goes_up_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        within(b"/outer/../inner")


async def test_paths_of_directories_from_before_the_position(world: World) -> None:
    """Nothing of them is in what is read: their places come from etcd's history, or from the segment."""
    async with mounted(world.store) as volume:
        directory = (await volume.mkdir(ROOT_INO, b"d", 0o755, ME)).ino
        inner = (await volume.mkdir(directory, b"inner", 0o755, ME)).ino
        await volume.settle()
        await world.archive()
        start = await world.log().now()
        await volume.mkdir(inner, b"a", 0o755, ME)
        await volume.rename(ROOT_INO, b"d", ROOT_INO, b"e")
        await volume.mkdir(inner, b"b", 0o755, ME)
        await volume.settle()
        expected = [(Kind.MKDIR, b"/d/inner/a", None), (Kind.RENAME, b"/e", b"/d"), (Kind.MKDIR, b"/e/inner/b", None)]
        assert told(await world.read(start)) == expected
        await world.store.compact((await world.archive()).through)
        assert told(await world.read(start)) == expected


async def test_one_log_is_read_again_and_again(world: World) -> None:
    """Each reading knows where directories were then, not where they were when the one before ended."""
    async with mounted(world.store) as volume:
        start = await world.log().now()
        await some_changes(volume)
        log = world.log()
        for _ in range(3):
            found: list[ChangeRecord] = []
            async with aclosing(log.read(start)) as batches:
                async for batch in batches:
                    found += batch.records
            assert told(found) == EXPECTED


async def test_a_file_with_several_names_is_in_every_subtree(world: World) -> None:
    async with mounted(world.store) as volume:
        start = await world.log().now()
        file = (await volume.mknod(ROOT_INO, b"f", stat.S_IFREG | 0o644, 0, ME)).ino
        await volume.link(file, ROOT_INO, b"g")
        await volume.setattr(file, SetAttr(mode=0o600))
        await volume.settle()
        assert told(await world.read(start))[-1] == (Kind.SETATTR, None, None)
        assert told(await world.read(start, selects=within(b"/elsewhere"))) == [(Kind.SETATTR, None, None)]


async def test_what_was_compacted_before_it_was_archived_is_an_error(world: World) -> None:
    async with mounted(world.store) as volume:
        directory, _ = await some_changes(volume)
        newest = await volume.mkdir(ROOT_INO, b"new", 0o755, ME)
        await volume.settle()
        await world.store.compact((await world.log().now()).revision - 1)
        await volume.mkdir(directory, b"last", 0o755, ME)
        await volume.settle()
        with pytest.raises(ChangesLost, match="lost") as caught:
            await world.read()
        assert newest.ino
        found = await world.read(parse_position(caught.value.first))
        assert told(found) == [(Kind.MKDIR, b"/e/last", None)]


async def test_following_hears_what_comes(world: World) -> None:
    async with mounted(world.store) as volume:
        log = world.log()
        start = await log.now()
        heard: list[bytes | None] = []

        async def follow() -> None:
            async with aclosing(log.read(start, follow=True)) as batches:
                async for batch in batches:
                    heard.extend(record.path for record in batch.records)
                    if len(heard) == 3:
                        return

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow)
                for name in (b"a", b"b", b"c"):
                    await volume.mkdir(ROOT_INO, name, 0o755, ME)
                    await volume.settle()
                    if name == b"a":
                        await world.archive()
        assert heard == [b"/a", b"/b", b"/c"]


async def test_a_restored_file_and_its_attributes_are_rebuilt(world: World) -> None:
    async with mounted(world.store) as volume:
        file = (await volume.mknod(ROOT_INO, b"f", stat.S_IFREG | 0o644, 0, ME)).ino
        await volume.setxattr(file, b"user.a", b"value")
        await volume.setxattr(file, b"user.b", b"")
        await volume.removexattr(file, b"user.b")
        await volume.unlink(ROOT_INO, b"f")
        await volume.settle()
        (stone,) = await world.keys_in("g")
        await volume.restore(stone, ROOT_INO, b"again")
        await volume.setattr(ROOT_INO, SetAttr(mode=0o700, mtime_ns=0, atime_ns=-1))
        tree = Rebuilt()
        for record in await world.read():
            tree.take(record)
        assert differences(tree.facts(), await volume_facts(world.store, VOLUME)) == []
        assert tree.nodes[file].xattrs == {b"user.a": b"value"}


async def test_seals_are_told_around_what_may_change(world: World) -> None:
    async with mounted(world.store) as volume:
        tree = (await volume.mkdir(ROOT_INO, b"tree", 0o755, ME)).ino
        await volume.mkdir(tree, b"inner", 0o755, ME)
        start = await world.log().now()
        sealing = Sealing(world.store, volume)
        number = (await sealing.seal(tree, TERM_S)).number
        assert await rebuilt(world) == {tree: TERM_S}
        await sealing.unseal(number)
        await volume.mkdir(tree, b"later", 0o755, ME)
        await sealing.seal(tree, 2 * TERM_S)
        assert await rebuilt(world) == {tree: 2 * TERM_S}
        expected = [(Kind.SEAL, b"/tree", None), (Kind.UNSEAL, b"/tree", None), (Kind.MKDIR, b"/tree/later", None)]
        found = await world.read(start, selects=within(b"/tree"))
        assert told(found) == [*expected, expected[0]]
        assert (found[0].change.ino, found[0].change.term_s, stat.S_ISDIR(found[0].change.mode)) == (tree, TERM_S, True)


async def test_a_sealing_that_was_given_up(world: World) -> None:
    """Nobody could rely on it, so there is no seal in the log; what ends it is told."""
    async with mounted(world.store) as volume:
        await volume.mkdir(ROOT_INO, b"d", 0o755, ME)
        start = await world.log().now()
        number = (await volume.transact(lambda scope: BeginSeal(scope, ROOT_INO, TERM_S))).number
        assert await world.read(start) == []
        await Sealing(world.store, volume).unseal(number)
        assert told(await world.read(start)) == [(Kind.UNSEAL, b"/", None)]
        assert await rebuilt(world) == {}


async def test_policies_are_told(world: World) -> None:
    policies = [Policy(soon=(1,)), Policy(commit_any=1, bound_s=5), None]
    async with mounted(world.store) as volume:
        directory = (await volume.mkdir(ROOT_INO, b"d", 0o755, ME)).ino
        start = await world.log().now()
        for policy in policies:
            await volume.placement.set_policy(directory, policy)
            await rebuilt(world)
        found = await world.read(start)
        assert told(found) == [(Kind.POLICY, b"/d", None)] * 3
        values = [record.change.value for record in found]
        assert [decode_policy(value) if value else None for value in values] == policies


async def test_retention_policies_are_told(world: World) -> None:
    policies = [Retention(last=3, patterns=("run-{step}",)), Retention(every=100, is_recursive=True), None]
    async with mounted(world.store) as volume:
        directory = (await volume.mkdir(ROOT_INO, b"d", 0o755, ME)).ino
        start = await world.log().now()
        for policy in policies:
            await set_retention(volume, directory, policy)
            await rebuilt(world)
        found = await world.read(start)
        assert told(found) == [(Kind.RETENTION, b"/d", None)] * 3
        values = [record.change.value for record in found]
        assert [decode_retention(value) if value else None for value in values] == policies
        facts = [change_facts(record, {}) for record in found]
        assert [each["retention"] and each["retention"]["keep_every"] for each in facts] == [0, 100, None]


async def rebuilt(world: World) -> dict[int, float]:
    """Rebuild the volume from the log, and compare; the seals that stand."""
    tree = Rebuilt()
    for record in await world.read():
        tree.take(record)
    assert differences(tree.facts(), await volume_facts(world.store, VOLUME)) == []
    return tree.seals


async def test_a_volume_that_is_gone(world: World) -> None:
    log = world.log()
    async with made_world() as other:
        gone = other.log()
        await other.store.txn((), [])
        assert (await gone.beginning()).revision > 0
    log = type(log)(world.store, type(KEYS)("nowhere"), world.segments())
    with pytest.raises(NotFormatted):
        await log.beginning()
    with pytest.raises(NotFormatted):
        await mark_end(log._store, log._keys)


@pytest.mark.parametrize("text", ["", "x", "1.", ".1", "1.2.3", "-1", "99999999999999999999"])
def test_what_is_no_position(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_position(text)


def test_positions_as_text() -> None:
    assert str(Position(12, 3)) == "12.3"
    assert parse_position("12.3") == Position(12, 3)
    assert parse_position("12") == Position(12, 0)
