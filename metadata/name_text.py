"""Names, which are any bytes, for people and for machines."""

from __future__ import annotations

import re

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\\]")
"""What a terminal or a log would obey, ends of lines, and what stands before an escaped byte."""


def name_text(name: bytes) -> str:
    """A name or a path as text that is in one line and means no other name.

    Bytes that are no UTF-8, and those of control characters, become \\xNN, a backslash two.
    """
    text = _UNSAFE.sub(_escaped, name.decode("utf-8", "surrogateescape"))
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _escaped(found: re.Match[str]) -> str:
    if found[0] == "\\":
        return "\\\\"
    return "".join(f"\\x{byte:02x}" for byte in found[0].encode())
