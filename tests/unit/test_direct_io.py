"""Writing past the page cache: the same bytes, whichever way they go."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollofs.fs import direct_io
from apollofs.fs.direct_io import ALIGNMENT, BUFFER_BYTES, write_past_cache

DATA = os.urandom(2 * BUFFER_BYTES + ALIGNMENT + 77)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


@pytest.mark.parametrize("offset", [0, ALIGNMENT, 4 * BUFFER_BYTES, 100])
@pytest.mark.parametrize("length", [0, 1, ALIGNMENT - 1, ALIGNMENT, BUFFER_BYTES, len(DATA)])
@pytest.mark.parametrize("shift", [0, 3])
def test_what_was_written_is_read(fd: int, offset: int, length: int, shift: int) -> None:
    os.pwrite(fd, b"before" * BUFFER_BYTES, 0)
    expected = bytearray(b"before" * BUFFER_BYTES)
    data = memoryview(DATA)[shift : shift + length]
    expected[offset : offset + len(data)] = data
    write_past_cache(fd, offset, data)
    assert os.pread(fd, len(expected) + 1, 0) == expected


def test_a_filesystem_without_direct_writes(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: str, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here", path)
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    write_past_cache(fd, 0, memoryview(DATA))
    assert os.pread(fd, len(DATA) + 1, 0) == DATA


def test_a_disk_that_refuses_also_what_is_aligned(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real_pwrite = os.pwrite

    def refuse(written: int, data: memoryview, offset: int) -> int:
        if written != fd:
            raise OSError(errno.EINVAL, "not so")
        return real_pwrite(written, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    write_past_cache(fd, 0, memoryview(DATA))
    assert os.pread(fd, len(DATA) + 1, 0) == DATA


def test_more_at_once_than_the_disk_is_given(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "_slots", threading.BoundedSemaphore(0))
    write_past_cache(fd, 0, memoryview(DATA))
    assert os.pread(fd, len(DATA) + 1, 0) == DATA


def test_a_descriptor_that_can_not_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    opened = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            write_past_cache(opened, 1, memoryview(b"x"))
    finally:
        os.close(opened)
