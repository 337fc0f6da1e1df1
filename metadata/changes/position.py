"""Positions in the change log."""

from __future__ import annotations

import re
from typing import NamedTuple

from apollofs.metadata.errors import InvalidArgument

REVISION_MAX = (1 << 63) - 1
_TEXT = re.compile(r"(\d{1,19})(?:\.(\d{1,9}))?")


class Position(NamedTuple):
    """`offset` counts the changes of one transaction. As text: "1234.5", or "1234" for "1234.0"."""

    revision: int
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.revision}.{self.offset}"


def parse_position(text: str) -> Position:
    """Raises InvalidArgument."""
    found = _TEXT.fullmatch(text)
    if not found or int(found[1]) > REVISION_MAX:
        raise InvalidArgument(f"{text!r} is no position of the change log: it looks like 1234.0")
    return Position(int(found[1]), int(found[2] or 0))
