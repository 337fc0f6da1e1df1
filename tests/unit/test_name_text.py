"""Names as text: one line, whatever bytes they are, and never the text of another name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollofs.metadata.name_text import name_text


def name_bytes(text: str) -> bytes:
    """What docs/CHANGES.md says of how to get them back."""
    return re.sub(
        rb"\\(?:x([0-9a-f]{2})|\\)",
        lambda found: bytes([int(found[1], 16)]) if found[1] else b"\\",
        text.encode(),
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"step-1000.pt", "step-1000.pt"),
        ("Gewichte für 権".encode(), "Gewichte für 権"),
        (b"\xff", "\\xff"),
        (b"\\xff", "\\\\xff"),
        (b"a\nb\x1b[31m\x7f", "a\\x0ab\\x1b[31m\\x7f"),
        ("\u009b2J\u2028".encode(), "\\xc2\\x9b2J\\xe2\\x80\\xa8"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),
    ],
)
def test_what_people_read(name: bytes, text: str) -> None:
    assert name_text(name) == text


@given(st.one_of(st.binary(), st.text().map(lambda text: text.encode(errors="surrogatepass"))))
def test_it_is_one_line_and_means_one_name(name: bytes) -> None:
    text = name_text(name)
    assert name_bytes(text) == name
    assert len(text.splitlines()) <= 1
