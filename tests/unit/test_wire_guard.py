"""Handlers that misbehave, and requests that are interrupted, without a mount."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import trio
from trio.testing import MockClock

from apollofs.fs.wire_guard import Faults, guard_operations, guarded
from apollofs.fs.wire_interrupts import EARLY_MAX, LOOK_S, Interruptible, Interrupts, killed
from apollofs.fs.wire_load import hook, pyfuse3

OURS = "apollofs.fs.wire_guard"


class StrangeError(Exception):
    """Not known to any errno map."""


async def fails_with(exc: BaseException) -> None:
    await trio.lowlevel.checkpoint()
    raise exc


async def errno_raised(exc: BaseException, faults: Faults) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await guarded(fails_with, faults, what="test")(exc)
    number: int = caught.value.errno
    return number


@pytest.mark.expects_log("test failed with EIO")
async def test_every_exception_becomes_an_errno(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    assert await errno_raised(pyfuse3.FUSEError(errno.ENOENT), faults) == errno.ENOENT
    assert await errno_raised(OSError(errno.ENOSPC, "full"), faults) == errno.ENOSPC
    assert faults.bugs == 0
    with caplog.at_level(logging.CRITICAL, logger=OURS):
        assert await errno_raised(StrangeError("x"), faults) == errno.EIO
        assert await errno_raised(OSError("no number"), faults) == errno.EIO
        assert await errno_raised(pyfuse3.FUSEError(0), faults) == errno.EIO
        assert await errno_raised(pyfuse3.FUSEError(100_000), faults) == errno.EIO
        assert await errno_raised(ExceptionGroup("several", [StrangeError("y")]), faults) == errno.EIO
    assert faults.bugs == 5


@pytest.mark.expects_log("test failed with EIO", "no errno could be found")
async def test_errno_map_decides_and_may_break(caplog: pytest.LogCaptureFixture) -> None:
    def broken(exc: BaseException) -> int | None:
        raise ZeroDivisionError

    assert await errno_raised(StrangeError("x"), Faults(lambda exc: errno.ESTALE)) == errno.ESTALE
    assert await errno_raised(StrangeError("x"), Faults(broken)) == errno.EIO
    assert "StrangeError" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.expects_log("getattr failed with EIO")
async def test_a_wrong_result_is_a_bug() -> None:
    async def handler() -> object:
        return "not attributes"

    faults = Faults()
    with pytest.raises(pyfuse3.FUSEError):
        await guarded(handler, faults, what="getattr", returns=pyfuse3.EntryAttributes)()
    assert faults.bugs == 1


async def test_cancellation_from_outside_passes() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await guarded(trio.sleep_forever, Faults(), what="test")()
    assert scope.cancelled_caught


async def test_an_interrupt_ends_the_handler_with_eintr() -> None:
    interrupts = Interrupts()
    handler = guarded(trio.sleep_forever, Faults(), what="test", interrupts=interrupts, mode=Interruptible.ALWAYS)

    async def interrupt_once_registered() -> None:
        await trio.testing.wait_all_tasks_blocked()
        assert interrupts.registered == 1
        interrupts.fire(hook.current_unique())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupt_once_registered)
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await handler()
    assert caught.value.errno == errno.EINTR
    assert (interrupts.registered, interrupts.delivered) == (0, 1)


async def test_an_early_interrupt_waits_for_its_request() -> None:
    interrupts = Interrupts()
    interrupts.fire(10)
    with pytest.raises(pyfuse3.FUSEError), interrupts.interruptible(10):
        await trio.sleep_forever()
    with interrupts.interruptible(10):
        await trio.lowlevel.checkpoint()


async def test_early_interrupts_are_bounded() -> None:
    interrupts = Interrupts()
    for unique in range(EARLY_MAX + 1):
        interrupts.fire(unique)
    with interrupts.interruptible(0):  # the oldest was dropped
        await trio.lowlevel.checkpoint()
    with pytest.raises(pyfuse3.FUSEError), interrupts.interruptible(1):
        await trio.lowlevel.checkpoint()


async def test_finished_work_is_not_undone_by_an_interrupt() -> None:
    interrupts = Interrupts()
    with interrupts.interruptible(4):
        interrupts.fire(4)
    assert interrupts.delivered == 1


async def test_what_would_wait_is_refused_while_too_many_wait() -> None:
    interrupts = Interrupts()
    interrupts.refuse_waiting(True)
    with interrupts.interruptible(4, Interruptible.FATAL, os.getpid()):
        pass
    with pytest.raises(pyfuse3.FUSEError) as caught, interrupts.interruptible(5, Interruptible.FATAL, os.getpid()):
        await trio.sleep_forever()
    assert caught.value.errno == errno.EAGAIN
    interrupts.refuse_waiting(False)
    with interrupts.interruptible(6, Interruptible.FATAL, os.getpid()):
        await trio.lowlevel.checkpoint()


async def test_fatal_mode_ignores_signals_that_do_not_kill() -> None:
    interrupts = Interrupts()
    with interrupts.interruptible(4, Interruptible.FATAL, os.getpid()):
        interrupts.fire(4)
        await trio.lowlevel.checkpoint()
    assert interrupts.delivered == 0


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


async def test_a_kill_after_another_signal_is_noticed(
    sleeper: subprocess.Popen[bytes], autojump_clock: MockClock
) -> None:
    """The kernel says nothing of the second one."""
    interrupts = Interrupts()

    async def request() -> None:
        with interrupts.interruptible(4, Interruptible.FATAL, sleeper.pid):
            await trio.sleep(100 * LOOK_S)

    async def signalled() -> None:
        await trio.sleep(LOOK_S)
        interrupts.fire(4)
        await trio.sleep(10 * LOOK_S)
        assert (interrupts.registered, interrupts.delivered) == (1, 0)
        sleeper.kill()
        sleeper.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupts.keep_looking)
        nursery.start_soon(signalled)
        with pytest.raises(pyfuse3.FUSEError):
            await request()
        nursery.cancel_scope.cancel()


def test_killed_tells_the_dead_from_the_living() -> None:
    assert not killed(os.getpid())
    assert not killed(0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert killed(gone.pid)


@pytest.mark.expects_log("forget failed with EIO", "lookup failed with EIO")
async def test_guard_operations_wraps_every_handler() -> None:
    class Broken(pyfuse3.Operations):
        async def lookup(self, *args: object) -> pyfuse3.EntryAttributes:
            raise StrangeError("lookup")

        async def forget(self, *args: object) -> None:
            raise pyfuse3.FUSEError(errno.EIO)

    operations, faults = Broken(), Faults(lambda exc: None)
    guard_operations(operations, faults)
    with pytest.raises(pyfuse3.FUSEError):
        await operations.lookup(pyfuse3.ROOT_INODE, pyfuse3.FileNameT(b"x"), None)
    await operations.forget([])
    assert faults.bugs == 2


def test_guard_operations_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="no such handlers"):
        guard_operations(pyfuse3.Operations(), Faults(), Interrupts(), {"looukp": Interruptible.FATAL})


def test_pyfuse3_first_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import pyfuse3, apollofs.fs.wire_load"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ImportError: pyfuse3 was imported before" in done.stderr
