"""What is repeated while etcd does not answer comes to an end."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from apollofs.metadata.errors import DeadlineExceeded, StoreUnavailable
from apollofs.metadata.session import retry

DEADLINE_S = 5.0


async def test_a_call_that_never_answers_ends_at_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    began = autojump_clock.current_time()
    with pytest.raises(DeadlineExceeded, match="no answer within 5 s"):
        await retry(trio.sleep_forever, DEADLINE_S)
    assert autojump_clock.current_time() == began + DEADLINE_S


async def test_failures_are_repeated_and_the_last_one_is_told(autojump_clock: trio.testing.MockClock) -> None:
    began, calls = autojump_clock.current_time(), 0

    async def fail() -> None:
        nonlocal calls
        calls += 1
        await trio.lowlevel.checkpoint()
        raise StoreUnavailable(f"failure {calls}")

    with pytest.raises(DeadlineExceeded) as told:
        await retry(fail, DEADLINE_S)
    assert f"failure {calls}" in str(told.value)
    assert calls > 1
    assert autojump_clock.current_time() == began + DEADLINE_S


async def test_an_answer_ends_it(autojump_clock: trio.testing.MockClock) -> None:
    del autojump_clock
    answers = iter([StoreUnavailable("not yet"), None])

    async def answer() -> int:
        await trio.lowlevel.checkpoint()
        failure = next(answers)
        if failure is not None:
            raise failure
        return 7

    assert await retry(answer, DEADLINE_S) == 7


async def test_without_a_deadline_there_is_one_call() -> None:
    calls = 0

    async def fail() -> None:
        nonlocal calls
        calls += 1
        await trio.lowlevel.checkpoint()
        raise StoreUnavailable("down")

    with pytest.raises(DeadlineExceeded, match="down"):
        await retry(fail, 0)
    assert calls == 1
