"""Dropping the kernel's pages of many inodes, where any of them may have to wait.

The kernel drops pages in their order in the file and waits for each that is being read or written back. If nobody
answers such a request, the rest of that call waits with it, for ever perhaps, in a state in which no signal ends it.
So every call has a thread, a few at a time; one that does not come back is left alone, what it was to drop is asked for
once more in pieces, smaller and smaller, and one more thread works for it. What stays at the end is less than
`PIECE_BYTES_MIN` around each page that is being read: who reads that page waits too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

WORKERS = 4
THREADS_MAX = 256
"""When all of them wait, what is left waits too."""
PATIENCE_S = 0.02
"""How long a call may take until it counts as one that waits."""
PIECE_BYTES_MIN = 128 << 10
"""As much as the kernel asks for with one READ while it reads ahead."""
FIRST_BYTES = 1 << 20
OFFSET_MAX = 1 << 62


class Piece(NamedTuple):
    """`length` bytes of an inode's pages from `offset` on; 0: to the end."""

    ino: int
    offset: int = 0
    length: int = 0

    def parts(self) -> list[Piece]:
        """The same in pieces; none where it is not worth it. All of an inode: each as long as all before it."""
        if self.length == 0:
            sizes = [FIRST_BYTES << power for power in range((OFFSET_MAX // FIRST_BYTES).bit_length() - 1)]
            return [Piece(self.ino, 0, FIRST_BYTES), *(Piece(self.ino, size, size) for size in sizes)]
        half = self.length // 2
        if half < PIECE_BYTES_MIN:
            return []
        return [Piece(self.ino, self.offset, half), Piece(self.ino, self.offset + half, half)]


class PageDropper:
    """Made with the call that drops one piece, and may wait. All methods are for one thread."""

    def __init__(self, drop: Callable[[Piece], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._drop = drop
        self._clock = clock
        self._queue: deque[Piece] = deque()
        self._threads: set[threading.Thread] = set()
        self._begun: dict[threading.Thread, tuple[Piece, float]] = {}
        self._split: set[Piece] = set()

    def drop(self, inos: Iterable[int]) -> None:
        """Begin with these; those for which an earlier call waits are under way already."""
        stuck = {piece.ino for piece, _ in list(self._begun.values())}
        self._queue.extend(Piece(ino) for ino in inos if ino not in stuck)
        self.tend()

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way, or to come."""
        return bool(self._queue) or any(thread.is_alive() for thread in self._threads)

    @property
    def wants_tending(self) -> bool:
        """Whether `tend` may have something to do soon."""
        unsplit = any(piece not in self._split for piece, _ in list(self._begun.values()))
        return unsplit or bool(self._queue and len(self._threads) < THREADS_MAX)

    def tend(self) -> None:
        """Put further threads in the place of those that wait. To be called again and again while it is busy."""
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        late = self._clock() - PATIENCE_S
        waiting = {piece for piece, since in list(self._begun.values()) if since <= late}
        self._split &= waiting
        for piece in waiting - self._split:
            self._split.add(piece)
            self._queue.extend(piece.parts())
        able = len(self._threads) - len(waiting)
        for _ in range(min(WORKERS - able, len(self._queue), THREADS_MAX - len(self._threads))):
            thread = threading.Thread(target=self._work, daemon=True)
            self._threads.add(thread)
            thread.start()

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            try:
                piece = self._queue.popleft()
            except IndexError:
                return
            self._begun[me] = (piece, self._clock())
            try:
                self._drop(piece)
            finally:
                del self._begun[me]
