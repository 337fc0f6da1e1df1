"""Names, which are any bytes, for people."""

from __future__ import annotations


def name_text(name: bytes) -> str:
    """A name or a path as text; bytes that are no UTF-8 become \\xNN."""
    return name.decode("utf-8", "backslashreplace")
