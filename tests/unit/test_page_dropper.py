"""Dropping pages where some of the calls never come back."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from apollofs.fs.page_dropper import FIRST_BYTES, OFFSET_MAX, PIECE_BYTES_MIN, THREADS_MAX, PageDropper, Piece

PATIENCE_S = 30.0


class Kernel:
    """Has pages of inodes, some of which are being read: a call that covers one of these waits."""

    def __init__(self) -> None:
        self.reading: dict[int, int] = {}
        """Where, by inode."""
        self.dropped: list[Piece] = []
        self._changed = threading.Condition()
        self._answered = False
        self.waiting = 0

    def drop(self, piece: Piece) -> None:
        with self._changed:
            at = self.reading.get(piece.ino)
            if at is not None and piece.offset <= at and (not piece.length or at < piece.offset + piece.length):
                self.waiting += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._answered, PATIENCE_S)
                self.waiting -= 1
            self.dropped.append(piece)
            self._changed.notify_all()

    def answer(self) -> None:
        """Every READ, from now on."""
        with self._changed:
            self._answered = True
            self._changed.notify_all()

    def until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S)


class Clock:
    """A clock that a test sets: what has begun has waited long enough, at once."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def finish(dropper: PageDropper, kernel: Kernel) -> None:
    """Until no call is under way."""
    kernel.answer()
    while dropper.is_busy:
        dropper.tend()
        for thread in list(dropper._threads):
            thread.join(PATIENCE_S)


def test_all_are_dropped_once() -> None:
    kernel = Kernel()
    dropper = PageDropper(kernel.drop, lambda: 0.0)
    dropper.drop(range(1, 100))
    finish(dropper, kernel)
    assert sorted(kernel.dropped) == [Piece(ino) for ino in range(1, 100)]
    assert not dropper.is_busy


def test_those_that_wait_hold_up_no_other() -> None:
    kernel = Kernel()
    kernel.reading = dict.fromkeys(range(1, 21), 0)
    dropper = PageDropper(kernel.drop, Clock())
    dropper.drop(range(1, 41))
    while not {Piece(ino) for ino in range(21, 41)} <= set(kernel.dropped):
        dropper.tend()
    assert dropper.is_busy
    assert not {Piece(ino) for ino in range(1, 21)} & set(kernel.dropped)
    finish(dropper, kernel)
    assert {Piece(ino) for ino in range(1, 41)} <= set(kernel.dropped)


@pytest.mark.parametrize("at", [0, 5 * FIRST_BYTES + 4096, 1 << 40])
def test_what_surrounds_a_page_that_is_read_is_dropped_all_the_same(at: int) -> None:
    kernel = Kernel()
    kernel.reading = {1: at}
    dropper = PageDropper(kernel.drop, Clock())
    dropper.drop([1])
    while dropper.wants_tending or kernel.waiting < len(dropper._threads):
        dropper.tend()
    left, reached = OFFSET_MAX, 0
    for piece in sorted(kernel.dropped, key=lambda one: one.offset):
        left -= piece.length
        assert piece.offset >= reached
        reached = piece.offset + piece.length
    assert left <= PIECE_BYTES_MIN
    assert len(dropper._threads) < THREADS_MAX
    finish(dropper, kernel)


def test_one_that_waits_is_not_asked_for_again() -> None:
    kernel = Kernel()
    kernel.reading = {1: 0}
    dropper = PageDropper(kernel.drop, lambda: 0.0)
    dropper.drop([1])
    kernel.until(lambda: kernel.waiting == 1)
    dropper.drop([1, 2])
    kernel.until(lambda: Piece(2) in kernel.dropped)
    finish(dropper, kernel)
    assert kernel.dropped.count(Piece(1)) == 1
