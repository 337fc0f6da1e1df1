"""Write-back of names, one race at a time: each test holds back the one request or reply that it is about."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing

from apollofs.metadata.ahead import OPS_IN_BATCH, Ahead
from apollofs.metadata.errors import CloneSourceChanged, NoSuchEntry, OutcomeUnknown
from apollofs.metadata.group_cache import GroupCache
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore, Moment, Request
from apollofs.metadata.patience import Patience
from apollofs.metadata.records import ROOT_INO, BodyChange, Extent, SetAttr
from apollofs.metadata.store import REQUEST_BYTES_MAX, Compare, Delete, Op, Put, Range, RangeResult
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, VOLUME, assert_sound, make_volume, mounted

FILE = stat.S_IFREG | 0o644
KEYS = Keys(VOLUME)
Which = Callable[[Moment, Sequence[Op]], bool]


class Gate:
    """A hook that holds back what `which` says of a transaction's writes, or of a read ([]), until it is opened, at the
    latest when the context ends."""

    def __init__(self) -> None:
        self._which: Which | None = None
        self._opened = trio.Event()
        self.met = trio.Event()

    def close(self, which: Which) -> None:
        self._which, self._opened, self.met = which, trio.Event(), trio.Event()

    def open(self) -> None:
        self._which = None
        self._opened.set()

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        self.open()

    async def __call__(self, moment: Moment, request: Request) -> None:
        if self._which is not None and self._which(moment, _writes(request)):
            self.met.set()
            await self._opened.wait()


def _writes(request: Request) -> list[Op]:
    if request.method != "txn":
        return []
    _, then, _ = request.arguments
    assert isinstance(then, Sequence)
    return [op for op in then if not isinstance(op, Range)]


def puts(writes: Sequence[Op], prefix: bytes) -> bool:
    return any(isinstance(op, Put) and op.key.startswith(prefix) for op in writes)


async def names(volume: Volume, directory: int) -> list[bytes]:
    return [entry.name for entry in (await volume.readdir(directory, b"", 100)).entries]


async def made_elsewhere(store: MemoryStore, *path: bytes) -> int:
    """Make a directory from a mount that is gone by the time that this returns: nobody holds it."""
    async with mounted(store) as volume:
        ino = ROOT_INO
        for name in path:
            try:
                ino = (await volume.lookup(ino, name)).ino
            except NoSuchEntry:
                ino = (await volume.mkdir(ino, name, 0o755, ME)).ino
    return ino


async def test_what_is_queued_is_newer_than_a_read_that_was_sent_before() -> None:
    base, gate = MemoryStore(), Gate()
    await make_volume(base)
    async with mounted(base.another(gate)) as a, mounted(base) as b, gate:
        await trio.testing.wait_all_tasks_blocked()
        directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
        file = await a.mknod(directory.ino, b"f", FILE, 0, ME)
        await a.commit_body(file.ino, BodyChange(file.body_version, 5, inline=b"hello"))
        a.forget(file.ino)  # and with it the body
        await a.lookup(directory.ino, b"f")
        await b.mkdir(ROOT_INO, b"later", 0o755, ME)  # the store is ahead of all that `a` has seen
        gate.close(lambda moment, writes: moment is Moment.AFTER and not writes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.read_body, file.ino)
            await gate.met.wait()
            await a.setattr(file.ino, SetAttr(mode=0o600))
            await a.settle()
            gate.open()
        assert stat.S_IMODE((await a.getattr(file.ino)).mode) == 0o600
        assert stat.S_IMODE((await b.lookup(directory.ino, b"f")).mode) == 0o600
    await assert_sound(base)


async def test_who_takes_one_group_asks_of_all_that_he_reads() -> None:
    """The attributes of a file with two names come along with a name whose directory is taken."""
    base, gate = MemoryStore(), Gate()
    await make_volume(base)
    directory = await made_elsewhere(base, b"d")
    async with mounted(base.another(gate)) as a, mounted(base) as b, gate:
        await trio.testing.wait_all_tasks_blocked()
        file = (await a.mknod(directory, b"1", FILE, 0, ME)).ino
        await a.link(file, directory, b"2")
        await b.lookup(directory, b"1")
        for _ in range(5):
            await a.lookup(directory, b"1")
        assert file in a.delegations.cache.groups
        a.forget(file)  # where it is: known by number alone, it is in its own group alone
        for mode in (0o611, 0o612):
            await a.setattr(file, SetAttr(mode=mode))
        gate.close(lambda moment, writes: moment is Moment.BEFORE and puts(writes, KEYS.inodes))
        with trio.fail_after(5):
            await a.setattr(file, SetAttr(mode=0o600))
        assert a.statistics()["write_back"]["queued"], "the last change was answered ahead of the store"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_sees_mode, b, directory, 0o600)
            await trio.testing.wait_all_tasks_blocked()
            gate.open()
    await assert_sound(base)


async def _sees_mode(volume: Volume, directory: int, mode: int) -> None:
    assert stat.S_IMODE((await volume.lookup(directory, b"1")).mode) == mode


async def test_a_directory_that_is_wanted_before_its_maker_hears_of_it_is_not_exclusive() -> None:
    base, gate = MemoryStore(), Gate()
    await make_volume(base)
    async with mounted(base.another(gate)) as a, mounted(base) as b, gate:
        await trio.testing.wait_all_tasks_blocked()
        gate.close(lambda moment, writes: moment is Moment.AFTER and puts(writes, KEYS.dentries))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.mkdir, ROOT_INO, b"d", 0o755, ME)
            await gate.met.wait()
            directory = (await b.lookup(ROOT_INO, b"d")).ino
            assert await names(b, directory) == []
            assert await names(b, directory) == []
            gate.open()
        await a.mknod(directory, b"f", FILE, 0, ME)
        assert await names(b, directory) == [b"f"]
    await assert_sound(base)


async def test_an_old_claim_does_not_land_as_a_newer_one(autojump_clock: trio.testing.MockClock) -> None:
    """The reply to a claim comes when the group has been given back, taken again and claimed anew."""
    del autojump_clock
    base, first, second = MemoryStore(), Gate(), Gate()

    async def both(moment: Moment, request: Request) -> None:
        await first(moment, request)
        await second(moment, request)

    await make_volume(base)
    directory = await made_elsewhere(base, b"d")
    async with mounted(base.another(both)) as a, mounted(base) as b:
        await trio.testing.wait_all_tasks_blocked()
        await _take(a, directory)
        await a.mknod(directory, b"1", FILE, 0, ME)
        async with trio.open_nursery() as nursery, first, second:
            first.close(lambda moment, writes: moment is Moment.AFTER and puts(writes, KEYS.dentry(directory, b"2")))
            nursery.start_soon(a.mknod, directory, b"2", FILE, 0, ME)
            await first.met.wait()
            await b.mknod(directory, b"b", FILE, 0, ME)
            await trio.sleep(1)
            await _take(a, directory)
            await a.mknod(directory, b"3", FILE, 0, ME)
            second.close(lambda moment, writes: moment is Moment.BEFORE and puts(writes, KEYS.dentry(directory, b"4")))
            nursery.start_soon(a.mknod, directory, b"4", FILE, 0, ME)
            await second.met.wait()
            first.open()
            await trio.sleep(1)
            assert await names(b, directory) == [b"1", b"2", b"3", b"b"]
            assert await names(b, directory) == [b"1", b"2", b"3", b"b"]
            await a.mknod(directory, b"5", FILE, 0, ME)
            assert await names(b, directory) == [b"1", b"2", b"3", b"5", b"b"]
            second.open()
    await assert_sound(base)


async def _take(volume: Volume, directory: int) -> None:
    """Two touches; the directory's attributes and that there is no `5` are known then."""
    for name in (b"x", b"5"):
        with pytest.raises(NoSuchEntry):
            await volume.lookup(directory, name)
    await volume.getattr(directory)
    assert directory in volume.delegations.cache.groups


class Lossy:
    """A hook: while `losing`, the first transaction with dentries doesn't arrive, and nobody is told so, nor does
    another in the same slot. `lost`: the first."""

    def __init__(self) -> None:
        self.losing = False
        self.lost: tuple[Sequence[Compare], Sequence[Op], Sequence[Op]] | None = None
        self._slot = b""

    async def __call__(self, moment: Moment, request: Request) -> None:
        writes = _writes(request)
        if self.losing and moment is Moment.BEFORE and puts(writes, KEYS.dentries):
            compares, then, orelse = request.arguments
            if self.lost is None:
                self.lost = (compares, then, orelse)  # type: ignore[assignment]  # as `Request` says
                self._slot = writes[0].key
            if writes[0].key == self._slot:
                raise OutcomeUnknown("the request is on its way for long")


async def test_a_copy_of_a_batch_can_not_arrive_after_the_next(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    base, network = MemoryStore(), Lossy()
    await make_volume(base)
    async with mounted(base.another(network)) as a, mounted(base) as b:
        await trio.testing.wait_all_tasks_blocked()
        directory = await a.mkdir(ROOT_INO, b"d", 0o755, ME)
        file = await a.mknod(directory.ino, b"f", FILE, 0, ME)
        await a.settle()
        network.losing = True
        await a.setattr(file.ino, SetAttr(mode=0o611))
        for number in range(4):  # longer than an operation may take, not yet the next keepalive, and never idle
            await trio.sleep(3)
            await a.mknod(directory.ino, b"%d" % number, FILE, 0, ME)
        network.losing = False
        await a.setattr(file.ino, SetAttr(mode=0o600))
        await a.settle()
        assert network.lost is not None
        assert not (await base.txn(*network.lost)).succeeded
        assert stat.S_IMODE((await b.lookup(directory.ino, b"f")).mode) == 0o600
    await assert_sound(base)


async def test_a_clone_compares_its_source_in_whatever_group_that_is() -> None:
    """Both directories are held exclusively here, but the transaction of what is queued would not notice if the
    source's were given up before it."""
    base, gate = MemoryStore(), Gate()
    await make_volume(base)
    async with mounted(base.another(gate)) as a, mounted(base) as b, gate:
        await trio.testing.wait_all_tasks_blocked()
        one, two = [(await a.mkdir(ROOT_INO, name, 0o755, ME)).ino for name in (b"1", b"2")]
        source = (await a.mknod(one, b"s", FILE, 0, ME)).ino
        target = (await a.mknod(two, b"t", FILE, 0, ME)).ino
        extent = Extent(0, 9000, a.new_blob(), 0, 9000)
        await a.commit_body(source, BodyChange(0, 9000, extents=(extent,)))
        gate.close(lambda moment, writes: moment is Moment.BEFORE and puts(writes, KEYS.table(b"r")))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_clones_what_is_gone, a, source, target, extent)
            await gate.met.wait()
            assert (await b.lookup((await b.lookup(ROOT_INO, b"1")).ino, b"s")).ino == source
            await b.setattr(source, SetAttr(size_bytes=0))
            gate.open()
        assert (await b.lookup((await b.lookup(ROOT_INO, b"2")).ino, b"t")).size_bytes == 0
    await assert_sound(base)


async def _clones_what_is_gone(volume: Volume, source: int, target: int, extent: Extent) -> None:
    with pytest.raises(CloneSourceChanged):
        await volume.commit_body(target, BodyChange(0, 9000, extents=(extent,), cloned_from=source))


async def test_no_room_does_not_give_a_group_back_before_its_change_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apollofs.metadata.group_cache.KEYS_MAX", 10)
    base = MemoryStore()
    await make_volume(base)
    async with mounted(base) as volume:
        await trio.testing.wait_all_tasks_blocked()
        for step in range(8):
            directory = await volume.mkdir(ROOT_INO, b"%d" % step, 0o755, ME)
            for number in range(12):
                await volume.mknod(directory.ino, b"%02d" % number, FILE, 0, ME)
                await volume.settle()
            assert len(await names(volume, directory.ino)) == 12
    await assert_sound(base)


async def test_a_walk_reads_ahead_only_what_is_not_queued(autojump_clock: trio.testing.MockClock) -> None:
    """A directory that is held exclusively but not completely known is listed along with one that is to be taken."""
    del autojump_clock
    base, gate = MemoryStore(), Gate()
    await make_volume(base)
    for name in (b"1", b"2", b"3"):
        await made_elsewhere(base, b"top", name)
    async with mounted(base.another(gate)) as a, mounted(base) as b, gate:
        await trio.testing.wait_all_tasks_blocked()
        top = (await a.lookup(ROOT_INO, b"top")).ino
        one, two, three = [entry.ino for entry in (await a.readdir(top, b"", 10)).entries]
        await a.lookup(top, b"1")
        await b.mknod(three, b"b", FILE, 0, ME)
        await trio.sleep(1)
        await names(a, one)
        for name in (b"x1", b"x2"):
            await a.mknod(two, name, FILE, 0, ME)
        with pytest.raises(NoSuchEntry):
            await a.lookup(two, b"x3")
        gate.close(lambda moment, writes: moment is Moment.BEFORE and puts(writes, KEYS.dentries))
        await a.mknod(two, b"x3", FILE, 0, ME)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_sees_names, a, two, [b"x1", b"x2", b"x3"])
            await trio.testing.wait_all_tasks_blocked()
            gate.open()
    await assert_sound(base)


async def _sees_names(volume: Volume, directory: int, expected: list[bytes]) -> None:
    assert await names(volume, directory) == expected


# -- the queue alone ---------------------------------------------------------------------------------------------------


def queue() -> tuple[Ahead, GroupCache]:
    """A queue without a store, and a cache that holds directory 1 exclusively."""
    cache = GroupCache(KEYS, lambda: True)
    held = cache.hold(1, 1)
    held.exclusive = held.complete = True
    return Ahead(KEYS, cache, enabled=True, wait_s=1, patience=Patience()), cache


def add(ahead: Ahead, *writes: Put | Delete) -> None:
    ahead.add(writes, None, 0, 0, lambda revision: None)


def create(number: int, size: int = 1) -> list[Put | Delete]:
    return [Put(KEYS.dentry(1, b"%d" % number), bytes(size)), Put(KEYS.times(1), b"%d" % number)]


def test_what_the_queue_covers() -> None:
    ahead, cache = queue()
    assert ahead.covers(create(1), 0)
    assert ahead.covers([Put(KEYS.inode(7), b""), *create(1)], 7), "what is born is nobody else's"
    assert not ahead.covers([Put(KEYS.inode(7), b"")], 0), "of a group that is not held"
    assert not ahead.covers([Put(KEYS.xattr(1, b"user.x"), b"")], 0)
    assert not ahead.covers([Delete(KEYS.extents(7, 0), KEYS.extents(7, 9))], 0), "a range of keys"
    pending = cache.start_write(create(1))
    assert not ahead.covers(create(1), 0), "a write in flight changes the name"
    assert ahead.covers(create(2), 0), "the times of a directory are written blindly"
    cache.end_write(pending)
    most = OPS_IN_BATCH // 2
    assert ahead.covers([Put(KEYS.dentry(1, b"%d" % n), b"") for n in range(most)], 0)
    assert not ahead.covers([Put(KEYS.dentry(1, b"%d" % n), b"") for n in range(most + 1)], 0)
    assert not ahead.covers(create(1, REQUEST_BYTES_MAX // 2), 0)
    cache.groups[1].exclusive = False
    assert not ahead.covers(create(1), 0)


def test_a_batch_keeps_to_the_limits_of_a_transaction() -> None:
    ahead, _ = queue()
    for number in range(300):
        add(ahead, *create(number))
    batch, ops = ahead._next_batch()
    assert (len(batch), len(ops)) == (OPS_IN_BATCH - 1, OPS_IN_BATCH), "the times are put once"
    assert [op for op in ops if op.key == KEYS.times(1)] == [Put(KEYS.times(1), b"%d" % (len(batch) - 1))]
    ahead, _ = queue()
    for number in range(10):
        add(ahead, *create(number, REQUEST_BYTES_MAX // 8))
    assert len(ahead._next_batch()[0]) == 3


def test_a_batch_writes_a_key_once_as_the_last_one_leaves_it() -> None:
    ahead, _ = queue()
    one, two = create(1), create(2)
    add(ahead, *one)
    add(ahead, *two)
    body = Put(KEYS.dentry(1, b"2"), b"with a body")
    add(ahead, Delete(one[0].key), Put(KEYS.times(1), b"last"))
    add(ahead, body)
    batch, ops = ahead._next_batch()
    assert len(batch) == 4
    assert {op.key: op for op in ops} == {
        one[0].key: Delete(one[0].key),
        KEYS.times(1): Put(KEYS.times(1), b"last"),
        body.key: body,
    }


def test_a_batch_is_never_empty() -> None:
    ahead, _ = queue()
    add(ahead, *create(1, REQUEST_BYTES_MAX // 2))
    assert len(ahead._next_batch()[0]) == 1


async def test_a_read_waits_for_what_was_queued_before_it_and_no_longer() -> None:
    ahead, _ = queue()
    add(ahead, *create(1))
    first = ahead._next_batch()[0]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ahead.before_reading, [Range(KEYS.dentries_of(1), KEYS.dentries_of(2))])
        await trio.testing.wait_all_tasks_blocked()
        add(ahead, *create(2))
        assert nursery.child_tasks
        ahead._leave(first, 5)
        await trio.testing.wait_all_tasks_blocked()
        assert not nursery.child_tasks


def _absent(revision: int) -> RangeResult:
    return RangeResult((), more=False, count=0, revision=revision)


def test_what_is_queued_is_never_replaced_by_what_was_read() -> None:
    ahead, cache = queue()
    write = create(1)[0]
    cache.apply(1, write, ahead.revision, queued=True)
    add(ahead, write)
    cache.learn(1, [Range(write.key)], [_absent(100)], 100)
    assert cache.peek(1, write.key) != (None,)
    ahead._leave(ahead._next_batch()[0], 101)
    cache.learn(1, [Range(write.key)], [_absent(100)], 100)
    assert cache.peek(1, write.key) != (None,)
    cache.learn(1, [Range(write.key)], [_absent(102)], 102)
    assert cache.peek(1, write.key) == (None,)
