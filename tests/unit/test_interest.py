"""What a mount takes again after a recall, and what it leaves alone."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from apollofs.metadata.counting import CountingStore
from apollofs.metadata.groups import Group
from apollofs.metadata.interest import ANSWERS_BEFORE, NAMES_ALONG, Interest
from apollofs.metadata.keys import Keys
from apollofs.metadata.memory import MemoryStore
from apollofs.metadata.recalls import drop, holders_in
from apollofs.metadata.records import ROOT_INO, BodyChange
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, assert_sound, make_volume, mounted

FILE = stat.S_IFREG | 0o644
KEYS = Keys("v")
GROUP = 7


def held(*names: bytes, answers: int = ANSWERS_BEFORE, changed: bool = False) -> Group:
    group = Group(GROUP, 1, answers=answers, changed=changed)
    for key in (KEYS.inode(GROUP), *(KEYS.dentry(GROUP, name) for name in names)):
        group.learn(key, None, 1)
    return group


async def test_a_group_is_worth_its_price_after_a_few_answers() -> None:
    interest = Interest(KEYS)
    interest.recalled(GROUP, held(b"a", b"b"), 1)
    assert interest.is_cool(GROUP)
    assert interest.names_of(GROUP) == (KEYS.dentry(GROUP, b"a"), KEYS.dentry(GROUP, b"b"))


@pytest.mark.parametrize(
    ("group", "holders"),
    [
        (held(answers=ANSWERS_BEFORE - 1), 1),
        (held(answers=4 * ANSWERS_BEFORE - 1), 4),
        (held(answers=1000, changed=True), 1),
        (None, 1),
    ],
)
async def test_what_is_not_worth_it_is_left_alone_for_a_while(group: Group | None, holders: int) -> None:
    interest = Interest(KEYS)
    interest.recalled(GROUP, group, holders)
    assert not interest.is_cool(GROUP)
    assert interest.names_of(GROUP) is None


async def test_a_group_of_which_much_is_known_is_read_as_it_is_asked_for() -> None:
    interest = Interest(KEYS)
    interest.recalled(GROUP, held(*(b"%d" % number for number in range(NAMES_ALONG + 1))), 1)
    assert interest.names_of(GROUP) == ()


async def test_a_group_is_taken_at_its_second_touch() -> None:
    interest = Interest(KEYS)
    assert [interest.touch(GROUP) for _ in range(3)] == [False, True, True]


@pytest.mark.parametrize(("notice", "holders"), [(drop(1), 1), (drop(1000), 1000), (b"", 1), (b"?", 1)])
def test_a_notice_says_how_many_were_asked(notice: bytes, holders: int) -> None:
    assert holders_in(notice) == holders


class Pair(NamedTuple):
    writer: Volume
    reader: Volume
    counted: CountingStore


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """Two mounts; what the second one asks the store is counted."""
    store = MemoryStore()
    counted = CountingStore(store)
    await make_volume(store)
    async with mounted(store) as writer, mounted(counted) as reader:
        yield Pair(writer, reader, counted)
    await assert_sound(store)


async def replace(volume: Volume, value: bytes) -> None:
    fresh = await volume.mknod(ROOT_INO, b"new", FILE, 0, ME)
    change = BodyChange(base_version=fresh.body_version, size_at_least=len(value), inline=value)
    await volume.commit_body(fresh.ino, change)
    await volume.rename(ROOT_INO, b"new", ROOT_INO, b"value")


async def look(volume: Volume) -> bytes:
    """As a program's open and read do."""
    await volume.getattr(ROOT_INO)
    inode = await volume.lookup(ROOT_INO, b"value")
    return (await volume.read_body(inode.ino)).inline


async def test_who_only_reads_pays_one_request_for_each_change(pair: Pair) -> None:
    for number in range(10):
        await replace(pair.writer, b"%d" % number)
        pair.counted.reset()
        assert await look(pair.reader) == b"%d" % number
        if number > 2:
            assert pair.counted.requests == 1
        pair.counted.reset()
        assert await look(pair.reader) == b"%d" % number
        if number > 2:
            assert pair.counted.requests == 0


async def test_who_looks_once_between_changes_leaves_the_directory_alone(pair: Pair) -> None:
    await replace(pair.writer, b"0")
    await look(pair.reader)
    for number in range(10):
        await replace(pair.writer, b"%d" % number)
        await pair.reader.lookup(ROOT_INO, b"value")
    assert pair.reader.statistics()["delegations"]["taken"] <= 2


async def test_a_body_that_is_very_small_is_read_with_its_name(pair: Pair) -> None:
    await replace(pair.writer, b"x" * 256)
    await pair.reader.lookup(ROOT_INO, b"value")
    inode = await pair.reader.lookup(ROOT_INO, b"value")
    pair.counted.reset()
    assert (await pair.reader.read_body(inode.ino)).inline == b"x" * 256
    assert pair.counted.requests == 0
