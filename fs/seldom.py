"""Warnings of what may happen again with every block: one a minute says as much."""

from __future__ import annotations

import logging

import trio

INTERVAL_S = 60.0


class SeldomWarning:
    """`text` has one %s, for what went wrong."""

    def __init__(self, log: logging.Logger, text: str) -> None:
        self._log = log
        self._text = text
        self._said_s = -float("inf")

    def __call__(self, what: str) -> None:
        """Log it, unless something was a moment ago."""
        now = trio.current_time()
        if now - self._said_s >= INTERVAL_S:
            self._said_s = now
            self._log.warning(self._text, what)
