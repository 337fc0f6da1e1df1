"""The fast loop's rules, with the C hook played by a script."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from apollofs.fs import fastloop
from apollofs.fs.fastloop import PARKED_MAX, REQUESTS_MAX, STUCK_S, FastLoop
from apollofs.fs.wire_load import pyfuse3


class ScriptedHook:
    """Says what the last read found, as the extension does."""

    def __init__(self) -> None:
        self.is_dry = True
        self.has_exited = False

    def dry(self) -> bool:
        return self.is_dry

    def exited(self) -> bool:
        return self.has_exited

    def state(self) -> dict[str, dict[int, int]]:
        return {"counts": {}}


class ScriptedSession:
    """Plays pyfuse3: each byte of the pipe is a request, and waits until it is told to end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loop: FastLoop, fd: int) -> None:
        monkeypatch.setattr(pyfuse3, "main", self.main)
        monkeypatch.setattr(pyfuse3, "_session_loop", self.work)
        self._loop = loop
        self._fd = fd
        self.workers = 0
        self.waiting = 0
        self.end = trio.Event()

    async def main(self, least: int, most: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.work, nursery, least, most)

    async def work(self, nursery: trio.Nursery, least: int, most: int) -> None:
        self.workers += 1
        while await self._loop.wait_fuse_readable():
            if self._read():
                self.waiting += 1
                await self.end.wait()
                self.waiting -= 1
        self.workers -= 1

    def _read(self) -> bool:
        try:
            return bool(os.read(self._fd, 1))
        except BlockingIOError:
            return False


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ScriptedHook:
    scripted = ScriptedHook()
    monkeypatch.setattr(fastloop, "hook", scripted)
    return scripted


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


async def unused() -> bool:
    raise AssertionError


async def test_other_tasks_run_while_requests_never_end(hook: ScriptedHook, pipe: tuple[int, int]) -> None:
    loop = FastLoop(pipe[0], unused)
    hook.is_dry = False
    ran_at: list[int] = []
    served = 0

    async def other() -> None:
        while True:
            ran_at.append(served)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        while served < 10 * REQUESTS_MAX:
            assert await loop.wait_fuse_readable()
            served += 1
        nursery.cancel_scope.cancel()
    assert len(ran_at) >= 5
    assert max(later - earlier for earlier, later in pairwise(ran_at)) <= 2 * REQUESTS_MAX  # trio shuffles a batch


async def test_one_watches_and_the_next_takes_over(hook: ScriptedHook, pipe: tuple[int, int]) -> None:
    loop = FastLoop(pipe[0], unused)
    woken: list[int] = []

    async def worker(number: int) -> None:
        assert await loop.wait_fuse_readable()
        woken.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(worker, number)
        await wait_all_tasks_blocked()
        assert loop.waits == 1
        os.write(pipe[1], b"x")
    assert sorted(woken) == [0, 1, 2]
    assert loop.waits == 3


async def test_everybody_is_told_of_the_end(hook: ScriptedHook, pipe: tuple[int, int]) -> None:
    loop = FastLoop(pipe[0], unused)
    told: list[bool] = []

    async def worker() -> None:
        told.append(await loop.wait_fuse_readable())

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(worker)
        await wait_all_tasks_blocked()
        hook.has_exited = True
        trio.lowlevel.notify_closing(pipe[0])
    assert told == [False] * 5
    assert await loop.wait_fuse_readable() is False


async def test_a_cancelled_watcher_or_sleeper_leaves_the_others_going(
    hook: ScriptedHook, pipe: tuple[int, int]
) -> None:
    loop = FastLoop(pipe[0], unused)
    scopes = [trio.CancelScope() for _ in range(4)]
    woken: list[int] = []

    async def worker(number: int) -> None:
        with scopes[number]:
            assert await loop.wait_fuse_readable()
            woken.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(worker, number)
        await wait_all_tasks_blocked()
        for scope in scopes[:3]:
            scope.cancel()
            await wait_all_tasks_blocked()
        os.write(pipe[1], b"x")
    assert woken == [3]


async def test_workers_are_started_as_they_are_needed_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, hook: ScriptedHook, pipe: tuple[int, int]
) -> None:
    os.set_blocking(pipe[0], False)
    loop = FastLoop(pipe[0], unused)
    session = ScriptedSession(monkeypatch, loop, pipe[0])
    many = 3 * PARKED_MAX
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.serve, 2 * many, lambda crowded: None)
        await wait_all_tasks_blocked()
        assert session.workers == 1
        os.write(pipe[1], b"x" * many)
        await wait_all_tasks_blocked()
        assert (session.waiting, session.workers) == (many, many + 1)
        session.end.set()
        await wait_all_tasks_blocked()
        assert session.waiting == 0
        assert session.workers in (PARKED_MAX + 1, PARKED_MAX + 2), "one watches, and pyfuse3's own may be one too many"
        hook.has_exited = True
        trio.lowlevel.notify_closing(pipe[0])
    assert session.workers == 0


@pytest.mark.expects_log("2 requests wait")
async def test_when_all_wait_a_reserve_reads_on_for_a_while(
    monkeypatch: pytest.MonkeyPatch, hook: ScriptedHook, pipe: tuple[int, int], autojump_clock: MockClock
) -> None:
    os.set_blocking(pipe[0], False)
    loop = FastLoop(pipe[0], unused)
    session = ScriptedSession(monkeypatch, loop, pipe[0])
    crowds: list[bool] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.serve, 2, crowds.append)
        os.write(pipe[1], b"x" * 5)
        await wait_all_tasks_blocked()
        assert (session.waiting, crowds) == (2, [])
        await trio.sleep(3 * STUCK_S)
        assert (session.waiting, crowds) == (5, [True])
        session.end.set()
        await wait_all_tasks_blocked()
        assert (session.workers, crowds) == (2, [True, False])
        hook.has_exited = True
        trio.lowlevel.notify_closing(pipe[0])


@pytest.mark.expects_log("without the fast loop")
@pytest.mark.parametrize("name", [fastloop.PRIVATE_NAME, fastloop.PRIVATE_WORKER])
def test_without_a_private_function_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int], name: str
) -> None:
    monkeypatch.delattr(pyfuse3, name)
    assert fastloop.install(pipe[0]) is None
    assert os.get_blocking(pipe[0])


def test_install_and_uninstall(pipe: tuple[int, int]) -> None:
    before = getattr(pyfuse3, fastloop.PRIVATE_NAME)
    loop = fastloop.install(pipe[0])
    assert loop is not None
    assert getattr(pyfuse3, fastloop.PRIVATE_NAME) == loop.wait_fuse_readable
    assert not os.get_blocking(pipe[0])
    loop.uninstall()
    assert getattr(pyfuse3, fastloop.PRIVATE_NAME) is before
