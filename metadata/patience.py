"""How long an operation waits for the store: until its own deadline, or until the lease has ended and a moment more.

A mount that is cut off learns it when its lease can't be proven any more. From then on it could answer nothing that it
has cached, and nobody waits for it; so whoever needs the store hears soon that it can't be asked, and not only at the
deadline of an operation. What is shorter than a lease fails nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import trio

from apollofs.metadata.errors import DeadlineExceeded

GRACE_S = 3.0
"""What an operation that begins when the lease has ended, or is under way then, is given for an answer after all."""
AGAIN_S = 1.0
"""The same, for what begins after somebody has waited in vain: a path is several requests, one behind the other."""


class Patience:
    """Of one mount, over all its sessions. Until a lease is proven for the first time only deadlines count."""

    def __init__(self) -> None:
        self._until = math.inf
        """By trio's clock."""
        self._given_up = math.inf
        """When somebody waited in vain for the first time since then."""
        self._waiting: dict[trio.CancelScope, float] = {}
        """Scopes of what is under way, and when it began to wait."""

    def prove(self, left_s: float) -> None:
        """The lease is proven for so long from now: what is under way may wait until then, and a moment more."""
        self._until, self._given_up = trio.current_time() + left_s, math.inf
        for scope, began in self._waiting.items():
            scope.deadline = self._end(began)

    def gives_up(self, began: float) -> bool:
        """Whether what has waited for the store since `began` (trio's clock) is given up."""
        is_over = trio.current_time() >= self._end(began)
        if is_over:
            self._note_silence()
        return is_over

    @contextlib.contextmanager
    def scope(self, began: float, *, shield: bool = False) -> Iterator[trio.CancelScope]:
        """A block that is cancelled, and left without an error, when that is so."""
        with trio.CancelScope(deadline=self._end(began), shield=shield) as scope:
            self._waiting[scope] = began
            try:
                yield scope
            finally:
                del self._waiting[scope]
        if scope.cancelled_caught:
            self._note_silence()

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        """A block that may be given up at any checkpoint. Raises DeadlineExceeded then."""
        with self.scope(trio.current_time()) as scope:
            yield
        if scope.cancelled_caught:
            raise DeadlineExceeded("metadata store: no answer before the lease had ended")

    def _note_silence(self) -> None:
        self._given_up = min(self._given_up, trio.current_time())

    def _end(self, began: float) -> float:
        return max(began, self._until) + (GRACE_S if began < self._given_up else AGAIN_S)
