"""Receipts: a thread that runs, sleeps, asks again or has ended has taken in its reply."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from apollofs.fs.receipts import THREADS_MAX, Receipts

D, E = 100, 200


@pytest.fixture
def spinning() -> Iterator[int]:
    """A thread that is always ready to run."""
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.communicate()


def test_only_the_last_reply_is_missing() -> None:
    receipts = Receipts()
    receipts.sent(1, D)
    receipts.sent(2, D)
    receipts.sent(1, E)
    assert receipts.missing(D) == [2]
    assert receipts.missing(E) == [1]


def test_threads_are_bounded() -> None:
    receipts = Receipts()
    for tid in range(THREADS_MAX + 1):
        receipts.sent(tid, D)
    assert receipts.missing(D) == list(range(1, THREADS_MAX + 1))


async def test_who_runs_has_taken_it_in(spinning: int) -> None:
    receipts = Receipts()
    receipts.sent(spinning, D)
    assert await receipts.wait([spinning])


@pytest.fixture
def stopped(spinning: int) -> int:
    """A thread that is not ready to run."""
    os.kill(spinning, signal.SIGSTOP)
    os.waitpid(spinning, os.WUNTRACED)
    return spinning


@pytest.fixture
def ended() -> int:
    """A thread that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


async def test_who_sleeps_has_taken_it_in(stopped: int) -> None:
    receipts = Receipts()
    receipts.sent(stopped, D)
    assert await receipts.wait([stopped])


async def test_who_has_ended_has_taken_it_in(ended: int) -> None:
    receipts = Receipts()
    receipts.sent(ended, D)
    assert await receipts.wait([ended])


async def test_a_thread_that_cannot_be_seen_may_not_have_taken_it_in() -> None:
    receipts = Receipts()
    receipts.sent(0, D)
    assert not await receipts.wait([0])
