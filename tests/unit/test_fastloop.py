"""The fast loop's rules, with the C hook played by a script."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from apollofs.fs import fastloop
from apollofs.fs.fastloop import REQUESTS_MAX, FastLoop
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


@pytest.mark.expects_log("without the fast loop")
def test_without_the_private_function_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]
) -> None:
    monkeypatch.delattr(pyfuse3, fastloop.PRIVATE_NAME)
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
