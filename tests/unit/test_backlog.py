"""The backlog of an agent: its bound, its order, and the position up to which everything is done."""

from __future__ import annotations

import trio
import trio.testing

from apollofs.fs.agent.backlog import COMMITTED, MOVED, WANTED, Backlog, Job, Walk
from apollofs.fs.agent.rates import ByteRate
from apollofs.fs.agent.state import AgentState, decode_state, encode_state


def job(ino: int, rank: int = COMMITTED, revision: int = 0, walks: list[Walk] | None = None) -> Job:
    return Job(ino, (1, b"%d" % ino), rank, 1000 + ino, revision, walks=walks or [])


async def test_what_a_reader_waits_for_comes_first() -> None:
    backlog = Backlog()
    for number, rank in enumerate((MOVED, COMMITTED, WANTED, COMMITTED)):
        await backlog.add(job(number, rank))
    assert [[each.ino for each in await backlog.take(10)] for _ in range(3)] == [[2], [1, 3], [0]]


async def test_a_file_that_is_wanted_moves_up_and_is_taken_once() -> None:
    backlog = Backlog()
    await backlog.add(job(1, MOVED, 7))
    await backlog.add(job(2, MOVED))
    await backlog.add(job(1, WANTED))
    (first,) = await backlog.take(10)
    assert (first.ino, first.rank, first.revision) == (1, WANTED, 7)
    backlog.done(first)
    assert [each.ino for each in await backlog.take(10)] == [2]


async def test_what_comes_for_a_file_that_is_being_copied_waits() -> None:
    backlog = Backlog()
    await backlog.add(job(1, MOVED))
    (first,) = await backlog.take(10)
    await backlog.add(job(1, COMMITTED, 7))
    await backlog.add(job(2, MOVED))
    (other,) = await backlog.take(10)
    assert other.ino == 2
    await backlog.add(job(1, WANTED))
    backlog.done(first)
    (second,) = await backlog.take(10)
    assert (second.ino, second.rank, second.revision) == (1, WANTED, 7)
    await backlog.add(job(1, MOVED))
    backlog.again(second, 0)
    assert [each.ino for each in await backlog.take(10)] == [1]
    assert len(backlog) == 2


async def test_a_million_files_wait_outside() -> None:
    backlog = Backlog(100)
    added = 0

    async def feed() -> None:
        nonlocal added
        while added < 1_000:
            await backlog.add(job(added, revision=added + 1))
            added += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed)
        await trio.testing.wait_all_tasks_blocked()
        assert (len(backlog), added) == (100, 100)
        await backlog.add(job(5000, WANTED))  # is let in always
        while added < 1_000 or len(backlog):
            for each in await backlog.take(7):
                backlog.done(each)
            await trio.lowlevel.checkpoint()


async def test_what_is_committed_does_not_wait_for_a_walk() -> None:
    backlog, walk = Backlog(100), Walk()

    async def found(ino: int) -> None:
        await backlog.add(job(ino, MOVED, walks=[walk]))

    async with trio.open_nursery() as nursery:
        for ino in range(1, 1000):
            nursery.start_soon(found, ino)
        await trio.testing.wait_all_tasks_blocked()
        assert len(backlog) == 50
        with trio.fail_after(10):
            for ino in range(1000, 1040):
                await backlog.add(job(ino, COMMITTED, revision=ino))
        assert {each.rank for each in await backlog.take(40)} == {COMMITTED}
        nursery.cancel_scope.cancel()


async def test_the_position_waits_for_the_oldest() -> None:
    backlog = Backlog()
    for number in (5, 6, 7):
        await backlog.add(job(number, revision=number))
    backlog.mark(9)
    five, six, seven = await backlog.take(3)
    backlog.done(six)
    assert backlog.position == 4
    backlog.done(five)
    assert backlog.position == 6
    backlog.done(seven)
    assert backlog.position == 9


async def test_what_failed_comes_again_later(autojump_clock: trio.testing.MockClock) -> None:
    backlog = Backlog()
    await backlog.add(job(1, revision=3))
    (taken,) = await backlog.take(1)
    backlog.again(taken, 10.0)
    assert len(backlog) == 1
    began = trio.current_time()
    assert await backlog.take(1) == [taken]
    assert (trio.current_time() - began, taken.attempts) == (10.0, 1)


async def test_what_a_reader_waits_for_stays_that_when_it_comes_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    backlog = Backlog()
    await backlog.add(job(1, WANTED))
    (wanted,) = await backlog.take(1)
    backlog.again(wanted, 10.0)
    await backlog.add(job(1, COMMITTED, 7))
    await trio.sleep(10.0)
    (taken,) = await backlog.take(10)
    assert (taken.rank, taken.revision, len(backlog)) == (WANTED, 7, 1)
    await backlog.add(job(2))
    assert [each.ino for each in await backlog.take(10)] == [2], "it is taken once"


async def test_a_walk_waits_for_its_jobs_also_where_others_absorb_them() -> None:
    backlog, walk = Backlog(), Walk()
    await backlog.add(job(1, COMMITTED, 3))
    await backlog.add(job(1, MOVED, walks=[walk]))
    assert walk.open == 1
    (taken,) = await backlog.take(5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(walk.wait)
        await trio.testing.wait_all_tasks_blocked()
        backlog.done(taken)


async def test_a_site_that_cant_be_read_takes_no_room_from_others() -> None:
    backlog, site = Backlog(40), 7
    with trio.fail_after(10):
        for revision in range(1, 101):
            await backlog.add(job(revision, revision=revision))
            (taken,) = await backlog.take(10)
            assert backlog.put_off(taken, site) == (revision == 1), "it is news once"
            backlog.mark(revision)
    assert (len(backlog), backlog.position, set(backlog.away)) == (10, 0, {site})
    backlog.back(site)
    assert not backlog.away
    for each in await backlog.take(10):
        backlog.done(each)
    assert (len(backlog), backlog.position) == (0, 10)
    owed = await backlog.owed()
    assert (owed.first, owed.last, backlog.position) == (11, 100, 10)
    backlog.made_up(50)
    await backlog.add(job(50, MOVED, 50))
    backlog.made_up(51)
    assert backlog.position == 49
    backlog.made_up(0)
    backlog.done((await backlog.take(1))[0])
    assert backlog.position == 100


async def test_a_file_that_changes_again_and_again_at_a_site_that_cant_be_read_waits_once() -> None:
    backlog, site, walk = Backlog(40), 7, Walk()
    for revision in range(1, 101):
        await backlog.add(job(1, revision=revision, walks=[walk] if revision == 5 else []))
        backlog.put_off((await backlog.take(1))[0], site)
    assert len(backlog) == 1
    await walk.wait()
    assert (walk.open, walk.away) == (1, 1)
    await backlog.add(job(1, WANTED))
    backlog.back(site)
    (taken,) = await backlog.take(10)
    assert (taken.rank, taken.revision, walk.away) == (WANTED, 1, 0)
    backlog.done(taken)
    assert (walk.open, len(backlog)) == (0, 0)


async def test_wishes_have_places_of_their_own() -> None:
    backlog, site = Backlog(4, 2), 7

    async def ask() -> None:
        for ino in range(1, 10):
            await backlog.add(job(ino, WANTED))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert len(backlog) == 2
        for _ in range(4):
            with trio.fail_after(10):
                for each in await backlog.take(10):
                    backlog.put_off(each, site)  # one waits, the rest is left out, and nobody waits for them
            await trio.testing.wait_all_tasks_blocked()
    assert [each.ino for each in await backlog.take(10)] == [9]
    assert len(backlog) == 2
    backlog.back(site)
    with trio.fail_after(10):
        await backlog.wishes_left_out()
    assert [each.ino for each in await backlog.take(10)] == [1]


async def test_a_rate_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    rate = ByteRate(1000)
    began = trio.current_time()
    for _ in range(11):
        await rate.turn(500)
    assert 4.0 <= trio.current_time() - began <= 5.0


def test_a_state_comes_back_as_it_was() -> None:
    state = AgentState(7, {1: 2, 3: 4}, 5, {"lag_s": 0.5, "backlog": 3})
    assert decode_state(encode_state(state)) == state
