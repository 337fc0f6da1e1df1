"""The kernel's references to inodes are counted, and it is asked to drop the oldest where there are too many."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from apollofs.fs.references import PRUNED_AT_ONCE, References

MANY = 2000


class Kernel:
    """Drops what it is asked to, but for what is in use; `can` says whether it knows how."""

    def __init__(self, *, can: bool = True, in_use: frozenset[int] = frozenset(), gone: bool = False) -> None:
        self.forgotten: list[int] = []
        self.references = References(self.forgotten.append, MANY)
        self.asked: list[int] = []
        self.pruned = trio.Event()
        """It was asked all that it is asked at one time."""
        self._can = can
        self._gone = gone
        self._in_use = in_use

    def prune(self, inos: Sequence[int]) -> bool:
        assert len(inos) <= PRUNED_AT_ONCE
        if self._gone:
            raise OSError(107, "the mount has ended")
        self.asked += inos
        if len(inos) < PRUNED_AT_ONCE:
            trio.from_thread.run_sync(self.pruned.set)
        return self._can

    def forget(self) -> None:
        """The FORGETs arrive, of what it was asked to drop and can."""
        for ino in self.asked:
            if ino in self.references and ino not in self._in_use:
                self.references.release(ino, 1)


def test_the_last_forget_counts() -> None:
    forgotten: list[int] = []
    references = References(forgotten.append)
    for ino in (5, 6, 5):
        references.add(ino)
    references.release(5, 1)
    assert (5 in references, forgotten, len(references)) == (True, [], 2)
    references.release(5, 1)
    references.release(6, 7)
    assert (5 in references, forgotten, len(references)) == (False, [5, 6], 0)


async def test_the_oldest_are_dropped(nursery: trio.Nursery) -> None:
    kernel = Kernel(in_use=frozenset({0}))
    nursery.start_soon(kernel.references.keep_bounded, kernel.prune)
    for ino in range(MANY):
        kernel.references.add(ino)
    await trio.testing.wait_all_tasks_blocked()
    assert kernel.asked == []
    kernel.references.add(MANY)
    await kernel.pruned.wait()
    assert kernel.asked == list(range(1 + MANY // 8))
    kernel.forget()
    assert kernel.forgotten == kernel.asked[1:]
    assert 0 not in kernel.references._oldest(MANY // 8), "what is in use is not tried again before the others"


@pytest.mark.parametrize("kernel", [Kernel(can=False), Kernel(gone=True)])
async def test_a_kernel_that_cannot_is_not_asked_again(kernel: Kernel) -> None:
    for ino in range(MANY + 1):
        kernel.references.add(ino)
    await kernel.references.keep_bounded(kernel.prune)
    assert len(kernel.references) == MANY + 1
