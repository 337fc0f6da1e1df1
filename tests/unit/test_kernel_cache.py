"""KernelCache against a kernel that records what it is told: what is given, and what must go before a key goes."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from apollofs.fs.kernel_cache import NAMES_MAX, KernelCache
from tests.support.kernels import Kernel, attach

VALIDITY_S = 10.0
D, E, FILE = 100, 200, 7
ME, OTHER = 1, 2


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def groups() -> dict[int, int]:
    """The held group of each inode."""
    return {}


@pytest.fixture
def cache(kernel: Kernel, groups: dict[int, int]) -> KernelCache:
    cache = KernelCache(lambda _: VALIDITY_S, group_of=lambda ino: groups.get(ino, 0))
    attach(cache, kernel)
    return cache


def test_nothing_is_given_before_there_is_a_mount() -> None:
    cache = KernelCache(lambda _: VALIDITY_S)
    assert cache.attributes(D, FILE) == cache.entry(D, b"f") == 0


def test_nothing_is_given_while_the_lease_is_not_proven(kernel: Kernel) -> None:
    cache = KernelCache(lambda _: 0.0)
    attach(cache, kernel)
    assert cache.attributes(D, FILE) == cache.entry(D, b"f") == 0
    assert not cache.holds(D)


def test_entries_are_given_only_where_they_can_be_outdated(kernel: Kernel) -> None:
    kernel.has_epochs = False
    cache = KernelCache(lambda _: VALIDITY_S)
    attach(cache, kernel)
    assert cache.attributes(D, FILE) == VALIDITY_S
    assert cache.entry(D, b"f") == 0


def test_entries_can_be_switched_off(kernel: Kernel) -> None:
    cache = KernelCache(lambda _: VALIDITY_S, entries=False)
    attach(cache, kernel)
    assert cache.entry(D, b"f") == 0


async def test_all_that_was_given_goes(cache: KernelCache, kernel: Kernel) -> None:
    cache.attributes(D, FILE)
    cache.entry(D, b"f")
    cache.entry(D, b"absent")
    cache.entry(E, b"other")
    await cache.drop(D)
    assert kernel.told == [("attributes", FILE), ("entries", D, b"absent", b"f")]
    assert not cache.holds(D)
    assert cache.holds(E)
    await cache.drop_all()
    assert ("entries", E, b"other") in kernel.told
    assert not cache.holds(E)


async def test_an_inode_on_its_way_is_waited_for(cache: KernelCache, kernel: Kernel) -> None:
    """The kernel has not taken in the reply yet that the attributes came with."""
    cache.attributes(D, FILE)
    kernel.unknown.add(FILE)
    kernel.referenced.add(FILE)
    kernel.known_after = 3
    await cache.drop(D)
    assert kernel.told == [("attributes", FILE)] * 3
    assert not cache.holds(D)


async def test_an_inode_that_was_forgotten_is_not_waited_for(cache: KernelCache, kernel: Kernel) -> None:
    cache.attributes(D, FILE)
    kernel.unknown.add(FILE)
    await cache.drop(D)
    assert kernel.told == [("attributes", FILE)]


async def test_who_waits_for_others_is_let_go_without_the_lock(cache: KernelCache, kernel: Kernel) -> None:
    cache.entry(D, b"f")
    with kernel.lock:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.drop, D)
            await trio.testing.wait_all_tasks_blocked()
            assert cache.holds(D)
            cache.hurry(D)
        assert kernel.told == [("epoch",)]
        assert not cache.holds(D)


async def test_nobody_is_let_go_who_does_not_wait_any_more(cache: KernelCache, kernel: Kernel) -> None:
    cache.entry(D, b"f")
    cache.hurry(D)
    cache.calm(D)
    await cache.drop(D)
    assert kernel.told == [("entries", D, b"f")]


async def test_mounts_below_are_not_outdated(kernel: Kernel) -> None:
    kernel.submounts = True
    cache = KernelCache(lambda _: 0.2)
    attach(cache, kernel)
    cache.entry(D, b"f")
    with kernel.lock:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.drop, D)
            cache.hurry(D)
    assert ("epoch",) not in kernel.told
    assert not cache.holds(D)


async def test_an_entry_that_moves_meanwhile_goes_too(cache: KernelCache, kernel: Kernel) -> None:
    cache.entry(D, b"f")
    with kernel.lock:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.drop, D)
            await trio.testing.wait_all_tasks_blocked()
            cache.renamed(D, b"f", D, b"g")
            kernel.lock.release()
        kernel.lock.acquire()
    assert ("entries", D, b"g") in kernel.told


def test_an_entry_takes_its_time_along(cache: KernelCache, kernel: Kernel) -> None:
    cache.entry(D, b"f")
    cache.renamed(D, b"f", E, b"f")
    assert kernel.told == [("epoch",)], "nobody would expire it in a directory that is not held"
    kernel.told.clear()
    cache.entry(E, b"held")
    cache.renamed(D, b"f", E, b"f")
    assert kernel.told == []
    assert cache.holds(E)


def test_an_entry_without_time_moves_freely(cache: KernelCache, kernel: Kernel) -> None:
    cache.renamed(D, b"f", E, b"f")
    assert kernel.told == []


def test_changes_that_the_kernel_cannot_know(cache: KernelCache, kernel: Kernel) -> None:
    cache.changed(FILE)
    assert kernel.told == []
    cache.attributes(D, FILE)
    cache.changed(FILE)
    assert kernel.told == [("attributes", FILE)]


@pytest.mark.parametrize("dropped", [True, False])
async def test_what_has_moved_does_not_go_with_where_it_was(cache: KernelCache, kernel: Kernel, dropped: bool) -> None:
    cache.attributes(D, FILE)
    cache.changed(FILE)
    cache.attributes(E, FILE)
    if dropped:
        await cache.drop(D)
    else:
        cache.discard(D)
    kernel.told.clear()
    cache.changed(FILE)
    assert kernel.told == [("attributes", FILE)]


async def test_pages_move_with_the_file(cache: KernelCache, kernel: Kernel, groups: dict[int, int]) -> None:
    cache.attributes(D, FILE)
    cache.reads(FILE, 1, (1, 1))
    groups[FILE] = E
    await cache.moved(FILE)
    assert kernel.told == [("attributes", FILE)]
    await cache.drop(D)
    assert kernel.told == [("attributes", FILE)], "a directory through which files pass remembers none of them"
    await cache.drop(E)
    assert ("pages", FILE) in kernel.told


async def test_pages_are_dropped_where_no_recall_would(cache: KernelCache, kernel: Kernel) -> None:
    cache.attributes(D, FILE)
    await cache.moved(FILE)
    assert kernel.told == [("attributes", FILE)], "it has no pages"
    cache.reads(FILE, 1, (1, 1))
    await cache.moved(FILE)
    assert kernel.told[1:] == [("pages", FILE)]
    assert cache.pages.asks(FILE)
    await cache.drop(D)
    assert kernel.told[2:] == []


def test_a_late_reply_does_not_bring_old_times_back(cache: KernelCache, kernel: Kernel) -> None:
    cache.attributes(D, D)
    cache.answers_getattr(D, ME)
    cache.names_changed(D, ME)
    assert kernel.told == [], "who asks again has taken in what it was told"
    cache.answers_getattr(D, OTHER)
    cache.names_changed(D, ME)
    assert kernel.told == [("attributes", D)]


def test_several_who_were_told_are_one(cache: KernelCache, kernel: Kernel) -> None:
    """A directory that many processes look at takes up no more memory for each."""
    cache.attributes(D, D)
    for tid in range(2, 1000):
        cache.answers_getattr(D, tid)
    assert len(cache._told) == 1
    cache.names_changed(D, ME)
    assert kernel.told == [("attributes", D)]
    cache.names_changed(D, ME)
    assert kernel.told == [("attributes", D)]
    assert cache._told == {}


async def test_names_that_are_gone_take_up_no_room(cache: KernelCache, kernel: Kernel) -> None:
    cache.entry(D, b"kept")
    for number in range(1000):
        cache.entry(D, b"%d" % number)
        cache.renamed(D, b"%d" % number, D, b"to %d" % number)
        cache.gone(D, b"%d" % number)
        cache.gone(D, b"to %d" % number)
    cache.gone(D, b"never given")
    assert cache.statistics()["names"] == 1
    with kernel.lock:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.drop, D)
            await trio.testing.wait_all_tasks_blocked()
            cache.gone(D, b"kept")
            kernel.lock.release()
        kernel.lock.acquire()
    assert cache.statistics()["names"] == 0


def test_room_is_made_when_all_is_given(kernel: Kernel) -> None:
    asked: list[str] = []
    cache = KernelCache(lambda _: VALIDITY_S, make_room=lambda: asked.append("room"))
    attach(cache, kernel)
    for number in range(NAMES_MAX):
        cache.entry(D, b"%d" % number)
    assert asked == []
    cache.entry(E, b"one more")
    assert asked == ["room"]


async def test_a_listing_goes_with_its_group(cache: KernelCache, kernel: Kernel) -> None:
    epoch = cache.gives_listing(D)
    assert epoch
    assert cache.keeps_listing(D)
    assert cache.holds_listing(D, epoch)
    await cache.drop(D)
    assert kernel.told == [("pages", D)]
    assert not cache.keeps_listing(D)
    again = cache.gives_listing(D)
    assert not cache.holds_listing(D, epoch), "what was handed out before the group was given back"
    assert cache.holds_listing(D, again)


def test_a_listing_is_not_given_without_a_proven_lease(kernel: Kernel) -> None:
    cache = KernelCache(lambda _: 0.0)
    attach(cache, kernel)
    assert cache.gives_listing(D) == 0
    assert not cache.holds_listing(D, 0)


def test_a_change_that_may_have_happened_ends_a_listing(cache: KernelCache, kernel: Kernel) -> None:
    cache.gives_listing(D)
    cache.names_unsure(D)
    assert not cache.keeps_listing(D)
    assert kernel.told == [("attributes", D)]
    cache.entry(D, b"f")
    cache.names_unsure(D)
    assert kernel.told[1:] == [("attributes", D), ("epoch",)]


def test_where_something_is_mounted_inside_it_gives_the_directory_back(kernel: Kernel) -> None:
    kernel.submounts = True
    given_back: list[int] = []
    cache = KernelCache(lambda _: VALIDITY_S, give_back=given_back.append)
    attach(cache, kernel)
    cache.entry(D, b"f")
    cache.names_unsure(D)
    assert kernel.told == [("attributes", D)]
    assert given_back == [D]


def test_what_is_given_is_bounded(cache: KernelCache) -> None:
    for number in range(NAMES_MAX):
        cache.entry(D, b"%d" % number)
    assert cache.entry(D, b"one more") == 0
    assert cache.entry(D, b"0") == VALIDITY_S
    cache.discard(D)
    assert cache.entry(D, b"one more") == VALIDITY_S


async def test_what_was_forgotten_is_not_dropped(cache: KernelCache, kernel: Kernel) -> None:
    cache.attributes(D, FILE)
    cache.forget(FILE)
    await cache.drop(D)
    assert kernel.told == []


async def test_a_mount_that_has_ended_keeps_nothing(cache: KernelCache, kernel: Kernel) -> None:
    cache.entry(D, b"f")

    def gone() -> None:
        raise OSError(107, "the mount has ended")

    kernel.on_expire = gone
    await cache.drop(D)
    cache.detach()
    assert cache.entry(D, b"f") == 0


async def test_a_lock_that_a_request_of_ours_holds_is_not_waited_for(cache: KernelCache, kernel: Kernel) -> None:
    cache.entry(D, b"f")
    with cache.locked(E, D):
        await cache.drop(D)
    assert kernel.told == [("epoch",)]
    cache.entry(D, b"f")
    await cache.drop(D)
    assert kernel.told[1:] == [("entries", D, b"f")]


async def test_but_where_something_is_mounted_inside(cache: KernelCache, kernel: Kernel) -> None:
    """The mount below would be gone with the name that leads to it."""
    kernel.submounts = True
    cache.entry(D, b"f")
    with cache.locked(D):
        await cache.drop(D)
    assert kernel.told == [("entries", D, b"f")]
