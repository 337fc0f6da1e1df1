"""Memory for whole objects: used again when nobody looks at it any more, and bounded."""

from __future__ import annotations

import ctypes
import gc

from apollofs.blobstore.rooms import LEAST_BYTES, Rooms

SIZE = 3 * LEAST_BYTES + 77


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_it_is_aligned_and_as_long_as_asked_for() -> None:
    rooms = Rooms()
    for size in (1, LEAST_BYTES - 1, LEAST_BYTES, SIZE):
        assert len(rooms.take(size)) == size
    assert address(rooms.take(SIZE)) % 4096 == 0


def test_it_is_used_again_after_the_last_view() -> None:
    rooms = Rooms()
    whole = rooms.take(SIZE)
    at, part = address(whole), whole[5:10].toreadonly()
    del whole
    gc.collect()
    other = rooms.take(SIZE)
    assert address(other) != at
    del part
    gc.collect()
    assert address(rooms.take(SIZE - 1)) == at


def test_small_things_do_not_hold_large_rooms() -> None:
    rooms = Rooms()
    at = address(rooms.take(4 * LEAST_BYTES))
    gc.collect()
    small = rooms.take(LEAST_BYTES)
    assert address(small) != at
    assert address(rooms.take(2 * LEAST_BYTES)) == at


def test_what_is_kept_is_bounded() -> None:
    rooms = Rooms(kept_bytes_max=2 * LEAST_BYTES)
    held = [rooms.take(LEAST_BYTES) for _ in range(5)]
    seen = [address(one) for one in held]
    while held:
        held.pop(0)
    gc.collect()
    again = [address(rooms.take(LEAST_BYTES)) for _ in range(1)]
    assert again == seen[-1:]
    assert sum(map(len, rooms._free)) <= 2 * LEAST_BYTES
