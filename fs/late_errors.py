"""Errors that belong to nobody's call: reported once by each handle that was open then (as errseq_t does)."""

from __future__ import annotations


class ErrorCursor:
    """What one handle has been told so far. Made by `LateErrors.cursor`."""

    __slots__ = ("seen",)

    def __init__(self, seen: int) -> None:
        self.seen = seen


class LateErrors:
    """The late errors of one open file. Only the newest is kept: it says as much as all of them."""

    def __init__(self) -> None:
        self._count = 0
        self._newest: Exception | None = None

    def cursor(self) -> ErrorCursor:
        """For a handle that is opened now: errors from before are not its own."""
        return ErrorCursor(self._count)

    def record(self, error: Exception) -> None:
        """Every handle that is open now will report `error` once."""
        self._count += 1
        self._newest = error

    def report(self, cursor: ErrorCursor | None) -> None:
        """Raise the newest error if this handle has not reported it; None: a caller without a handle."""
        if cursor is None or cursor.seen == self._count:
            return
        cursor.seen = self._count
        assert self._newest is not None
        raise type(self._newest)(*self._newest.args) from self._newest
