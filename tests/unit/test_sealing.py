"""Sealed trees over a store in memory: what is refused, interruptions, links, waypoints, and mounts that are silent."""

from __future__ import annotations

import stat
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import HoldsSealed, NoSuchEntry, OutcomeUnknown, Sealed, SealRefused, StoreUnavailable
from apollofs.metadata.format import pages
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.ops.seal import Mark
from apollofs.metadata.records import ROOT_INO, BodyChange, Inode, InodeFlag, RenameFlag, SetAttr
from apollofs.metadata.seal_records import Phase
from apollofs.metadata.sealing import Sealing, SealProgress, read_seals
from apollofs.metadata.store import Put, Range
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, OPTIONS, VOLUME, assert_sound, make_volume, mounted

KEYS = Keys(VOLUME)
TERM_S = 3600.0
FILES = 45
FILE = stat.S_IFREG | 0o644


class Tree:
    """`data/set`, with a directory `part` in it, files in both, and a file `outside` beside it."""

    def __init__(self, store: MemoryStore, volume: Volume) -> None:
        self.store = store
        self.volume = volume

    async def make(self) -> Tree:
        self.data = (await self.volume.mkdir(ROOT_INO, b"data", 0o755, ME)).ino
        self.root = (await self.volume.mkdir(self.data, b"set", 0o755, ME)).ino
        self.part = (await self.volume.mkdir(self.root, b"part", 0o755, ME)).ino
        await self.volume.mkdir(self.root, b"empty", 0o755, ME)
        for number in range(FILES):
            await self.volume.mknod(self.root, b"f%02d" % number, FILE, 0, ME)
        self.file = (await self.volume.mknod(self.part, b"file", FILE, 0, ME)).ino
        self.outside = (await self.volume.mknod(self.data, b"outside", FILE, 0, ME)).ino
        return self

    async def seal(self, tell: Callable[[SealProgress], None] = lambda _: None) -> int:
        return (await Sealing(self.store, self.volume, tell).seal(self.root, TERM_S)).number

    async def unseal(self, number: int, tell: Callable[[SealProgress], None] = lambda _: None) -> None:
        await Sealing(self.store, self.volume, tell).unseal(number)

    async def keys_of(self, letters: str) -> int:
        """How many keys tables have."""
        return sum(
            [1 for letter in letters for _ in [kv async for kv in pages(self.store, KEYS.table(letter.encode()))]]
        )


@pytest.fixture
async def store() -> MemoryStore:
    store = MemoryStore()
    await make_volume(store)
    return store


async def read_all(volume: Volume, tree: Tree) -> list[Inode]:
    """As a walk by path does: names, listings, attributes."""
    found = [await volume.lookup(ROOT_INO, b"data"), await volume.lookup(tree.data, b"set")]
    for directory in (tree.root, tree.part):
        page = await volume.readdir(directory, b"", 1000)
        for entry in page.entries:
            inode = await volume.lookup(directory, entry.name)
            found += [inode, await volume.getattr(inode.ino)]
    return found


async def trusted(volume: Volume, tree: Tree, groups: int = 3) -> None:
    """Read until so many directories are cached under the seal, and all that is in them."""
    with trio.fail_after(30):
        while volume.statistics()["seals"]["groups"] < groups:
            await read_all(volume, tree)
            await trio.sleep(0.01)
    await read_all(volume, tree)


REFUSED: dict[str, tuple[type[Exception], Callable[[Volume, Tree], Awaitable[object]]]] = {
    "create": (Sealed, lambda v, t: v.mknod(t.part, b"new", FILE, 0, ME)),
    "mkdir": (Sealed, lambda v, t: v.mkdir(t.root, b"new", 0o755, ME)),
    "unlink": (Sealed, lambda v, t: v.unlink(t.part, b"file")),
    "rmdir": (Sealed, lambda v, t: v.rmdir(t.root, b"empty")),
    "rename within": (Sealed, lambda v, t: v.rename(t.part, b"file", t.part, b"other")),
    "rename out": (Sealed, lambda v, t: v.rename(t.part, b"file", ROOT_INO, b"out")),
    "rename in": (Sealed, lambda v, t: v.rename(t.data, b"outside", t.root, b"in")),
    "replace": (Sealed, lambda v, t: v.rename(t.data, b"outside", t.part, b"file")),
    "exchange": (Sealed, lambda v, t: v.rename(t.data, b"outside", t.part, b"file", RenameFlag.EXCHANGE)),
    "rename root": (Sealed, lambda v, t: v.rename(t.data, b"set", t.data, b"other")),
    "link in": (Sealed, lambda v, t: v.link(t.outside, t.root, b"in")),
    "link out": (Sealed, lambda v, t: v.link(t.file, t.data, b"out")),
    "truncate": (Sealed, lambda v, t: v.setattr(t.file, SetAttr(size_bytes=0))),
    "chmod": (Sealed, lambda v, t: v.setattr(t.root, SetAttr(mode=0o700))),
    "flags": (Sealed, lambda v, t: v.setattr(t.file, SetAttr(flags=InodeFlag.IMMUTABLE))),
    "setxattr": (Sealed, lambda v, t: v.setxattr(t.file, b"user.a", b"b")),
    "commit": (Sealed, lambda v, t: v.commit_body(t.file, BodyChange(0, 4, inline=b"late"))),
    "rename above": (HoldsSealed, lambda v, t: v.rename(ROOT_INO, b"data", ROOT_INO, b"other")),
    "chmod above": (HoldsSealed, lambda v, t: v.setattr(t.data, SetAttr(mode=0o700))),
    "chown above": (HoldsSealed, lambda v, t: v.setattr(ROOT_INO, SetAttr(uid=5))),
}


@pytest.mark.parametrize("what", sorted(REFUSED))
async def test_nothing_of_a_sealed_tree_changes(store: MemoryStore, what: str) -> None:
    error, call = REFUSED[what]
    async with mounted(store) as a, mounted(store) as b:
        tree = await Tree(store, a).make()
        await b.lookup(tree.data, b"outside")
        before = await read_all(b, tree)
        number = await tree.seal()
        for volume in (a, b):
            with pytest.raises(error):
                await call(volume, tree)
        after = await read_all(b, tree)
        assert [inode._replace(revision=0, seal=0, flags=InodeFlag(0)) for inode in after] == [
            inode._replace(revision=0) for inode in before
        ]
        await a.mknod(tree.data, b"beside", FILE, 0, ME)
        await tree.unseal(number)
        await call(b, tree)
        assert await tree.keys_of("zY") == 0
    await assert_sound(store)


@pytest.mark.parametrize("after", [1, 2, 20, FILES, FILES + 2])
async def test_what_is_interrupted_goes_on(store: MemoryStore, after: int) -> None:
    async with mounted(store) as a:
        tree = await Tree(store, a).make()

        async def interrupted(call: Callable[[Callable[[SealProgress], None]], Awaitable[object]]) -> None:
            with trio.CancelScope() as scope:
                await call(lambda progress: scope.cancel() if progress.inodes >= after else None)
            await assert_sound(store)

        await interrupted(tree.seal)
        number = await tree.seal()
        assert [each.phase for each in await read_seals(store, KEYS)] == [Phase.SEALED]
        assert await tree.seal() == number, "once more is no error"
        await interrupted(lambda tell: tree.unseal(number, tell))
        for again in await read_seals(store, KEYS):
            with pytest.raises(SealRefused, match="being unsealed"):
                await tree.seal()
            await tree.unseal(again.number)
        assert await read_seals(store, KEYS) == []
        await a.rename(ROOT_INO, b"data", ROOT_INO, b"moved")
        await a.unlink(tree.part, b"file")
    await assert_sound(store)


async def test_who_seals_stops_when_somebody_unseals(store: MemoryStore) -> None:
    """What it marked afterwards would have a number that nobody takes out again."""
    async with mounted(store) as a, mounted(store) as b:
        tree, other = await Tree(store, a).make(), Sealing(store, b)
        failed: list[SealRefused] = []

        async def seal(begun: trio.Event) -> None:
            try:
                await tree.seal(lambda progress: begun.set())
            except SealRefused as exc:
                failed.append(exc)

        async with trio.open_nursery() as nursery:
            begun = trio.Event()
            nursery.start_soon(seal, begun)
            await begun.wait()
            number = (await read_seals(store, KEYS))[0].number
            await other.unseal(number)
        assert failed
        with pytest.raises(SealRefused, match="not sealed any more"):
            await a.transact(lambda scope: Mark(scope, tree.root, (b"f00",), 0, number))
        await b.unlink(tree.part, b"file")
    await assert_sound(store)


async def test_a_file_is_sealed_under_all_its_names(store: MemoryStore) -> None:
    async with mounted(store) as a:
        tree = await Tree(store, a).make()
        await a.link(tree.file, tree.data, b"link")
        other = await a.mkdir(ROOT_INO, b"other", 0o755, ME)
        await a.link(tree.file, other.ino, b"too")
        number = await tree.seal()
        with pytest.raises(Sealed):
            await a.unlink(tree.data, b"link")
        with pytest.raises(SealRefused, match="another seal covers"):
            await Sealing(store, a).seal(other.ino, TERM_S)
        half = next(each for each in await read_seals(store, KEYS) if each.root == other.ino)
        await tree.unseal(half.number)
        with pytest.raises(Sealed):
            await a.setattr(tree.file, SetAttr(mode=0o600))
        await tree.unseal(number)
        await a.unlink(tree.data, b"link")
    await assert_sound(store)


async def test_seals_keep_the_way_to_each_of_them(store: MemoryStore) -> None:
    async with mounted(store) as a:
        tree = await Tree(store, a).make()
        beside = await a.mkdir(tree.data, b"beside", 0o755, ME)
        first = await tree.seal()
        second = (await Sealing(store, a).seal(beside.ino, TERM_S)).number
        for inside, why in ((tree.part, "part of /data/set"), (tree.data, "below is sealed")):
            with pytest.raises(SealRefused, match=why):
                await Sealing(store, a).seal(inside, TERM_S)
        await tree.unseal(first)
        with pytest.raises(HoldsSealed):
            await a.rename(ROOT_INO, b"data", ROOT_INO, b"moved")
        await tree.unseal(second)
        await a.rename(ROOT_INO, b"data", ROOT_INO, b"moved")
    await assert_sound(store)


async def test_what_is_sealed_is_cached_without_delegations(store: MemoryStore) -> None:
    async with mounted(store) as a, mounted(store) as b:
        tree = await Tree(store, a).make()
        number = await tree.seal()
        await trusted(b, tree)
        asked, confirmed = b.asked, b.statistics()["seals"]["confirmations"]
        await read_all(b, tree)
        with pytest.raises(NoSuchEntry):
            await b.lookup(tree.root, b"absent")
        assert b.asked - asked <= 2, "only the way to it is asked for"
        assert b.statistics()["seals"]["confirmations"] == confirmed
        held = [kv async for kv in pages(store, KEYS.table(b"G"))]
        sealed = {tree.root, tree.part}
        assert not [kv for kv in held if KEYS.parse_numbers(kv.key) in {(each, b.session.number) for each in sealed}]
        await tree.unseal(number)
        await a.unlink(tree.part, b"file")
        with pytest.raises(NoSuchEntry):
            await b.lookup(tree.part, b"file")


async def test_a_mount_that_ends_need_not_be_waited_for(store: MemoryStore) -> None:
    async with mounted(store) as a:
        tree = await Tree(store, a).make()
        number = await tree.seal()
        async with mounted(store) as b:
            await trusted(b, tree)
            assert await tree.keys_of("z") == 1
        assert await tree.keys_of("z") == 0
        with trio.fail_after(60):
            await tree.unseal(number)
    await assert_sound(store)


@pytest.mark.expects_log("has lost its lease")
async def test_a_new_session_goes_on_trusting(store: MemoryStore) -> None:
    async with mounted(store) as a, mounted(store) as b:
        tree = await Tree(store, a).make()
        number = await tree.seal()
        await trusted(b, tree)
        before = b.session.number
        b.session.give_up()
        key = KEYS.trust(number, before + 1)
        async with store.watch(key, start_revision=1) as changes:
            with trio.fail_after(30):
                await anext(changes)
        assert not (await store.range(Range(KEYS.trust(number, before)))).kvs
        asked = b.asked
        await b.readdir(tree.root, b"", 1000)
        assert b.asked == asked
        await tree.unseal(number)
        await b.mknod(tree.root, b"new", FILE, 0, ME)


@pytest.mark.expects_log("has lost its lease", "no new session yet")
@pytest.mark.parametrize("cut_off_s", [0, 60])
async def test_a_key_whose_reply_was_lost_with_the_session_is_taken_away(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, cut_off_s: float
) -> None:
    """Nobody trusts the seal by it, and who unseals would wait a whole term for it."""
    for module in ("seals", "session"):
        monkeypatch.setattr(f"apollofs.metadata.{module}.boot_time", trio.current_time)
    begun, back = trio.Event(), trio.Event()

    async def hook(moment: Moment, request: Request) -> None:
        if back.is_set():
            return
        if begun.is_set():
            raise StoreUnavailable("cut off")
        writes = request.arguments[1] if request.method == "txn" else ()
        assert isinstance(writes, tuple | list)
        if moment is Moment.AFTER and any(isinstance(op, Put) and op.key.startswith(KEYS.table(b"z")) for op in writes):
            begun.set()
            raise OutcomeUnknown("the reply was lost by the test")

    async with mounted(store) as a, mounted(store.another(hook), replace(OPTIONS, write_back=False)) as b:
        tree = await Tree(store, a).make()
        number = await tree.seal()
        lost = b.session
        await b.lookup(ROOT_INO, b"data")
        await b.readdir(tree.root, b"", 1000)
        await begun.wait()
        assert await tree.keys_of("z") == 1
        if not cut_off_s:
            lost.give_up()
        await trio.sleep(cut_off_s)
        back.set()
        with trio.fail_after(60):
            async with store.watch(KEYS.trust(number, lost.number), start_revision=1) as changes:
                while not (await anext(changes)).events[-1].deleted:
                    pass
        assert not lost.alive
        await trusted(b, tree)
        assert await tree.keys_of("z") == 1
        with trio.fail_after(60):
            await tree.unseal(number)


async def test_a_silent_mount_is_waited_for_its_term_and_answers_nothing_after_it(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Virtual time: the silent mount reaches nothing, and its seal lasts by the same clock."""
    monkeypatch.setattr("apollofs.metadata.seals.boot_time", trio.current_time)
    silent = trio.Event()

    async def hook(moment: Moment, request: Request) -> None:
        if silent.is_set() and moment is Moment.BEFORE:
            raise StoreUnavailable("cut off")

    async with mounted(store) as a, mounted(store.another(hook)) as b:
        tree = await Tree(store, a).make()
        number = await tree.seal()
        await trusted(b, tree)
        silent.set()
        began = trio.current_time()
        answered: list[float] = []

        async def read_on() -> None:
            while b.delegations.seals.trusts(number):
                assert b.cached_lookup(tree.part, b"file") is not None
                assert [each.phase for each in await read_seals(store, KEYS)] in ([Phase.SEALED], [Phase.ENDING])
                answered.append(trio.current_time() - began)
                await trio.sleep(60)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_on)
            await tree.unseal(number)
        assert answered[-1] > TERM_S / 2, "it was readable for long"
        await a.unlink(tree.part, b"file")
        assert b.cached_lookup(tree.part, b"file") is None
        assert b.cached_getattr(tree.part) is None
        silent = trio.Event()
    await assert_sound(store)
