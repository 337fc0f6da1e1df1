"""The bound over both caches: who leaves first, and who never."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio.testing

from apollofs.fs.room import AGAIN_AFTER_S, Room


class OneShelf:
    """Remembers what it was told; `busy` can't be removed."""

    def __init__(self) -> None:
        self.room = Room(0)
        self.forgotten: list[str] = []
        self.busy: set[str] = set()

    def forget(self, key: str) -> None:
        self.forgotten.append(key)

    def came_back(self, key: str, size_bytes: int) -> None:
        self.room.add(self, key, size_bytes)

    def remove(self, keys: Sequence[str]) -> Sequence[str]:
        return [key for key in keys if key in self.busy]


@pytest.fixture
def shelf() -> OneShelf:
    return OneShelf()


async def test_least_recently_used_leave_first(shelf: OneShelf) -> None:
    room = Room(30)
    for key in "abc":
        room.add(shelf, key, 10)
    room.use("a")
    room.add(shelf, "d", 10)
    assert [victim.key for victim in room.give_up()] == ["b"]
    assert shelf.forgotten == ["b"]
    assert room.bytes == 30
    assert [victim.key for victim in room.give_up(10)] == ["c", "a"]


async def test_a_scan_takes_nothing_from_what_is_used_again(
    shelf: OneShelf, mock_clock: trio.testing.MockClock
) -> None:
    room = Room(100)
    for key in ("often", "again"):
        room.add(shelf, key, 20)
    mock_clock.jump(AGAIN_AFTER_S)
    for key in ("often", "again"):
        room.use(key)
    for at in range(50):
        room.add(shelf, f"scanned {at}", 10)
        room.use(f"scanned {at}")
        room.give_up()
    assert "often" in room
    assert "again" in room
    assert room.bytes <= 100


async def test_what_is_kept_leaves_room_for_what_is_new(shelf: OneShelf, mock_clock: trio.testing.MockClock) -> None:
    room = Room(100)
    for at in range(10):
        room.add(shelf, f"k{at}", 10)
    mock_clock.jump(AGAIN_AFTER_S)
    for at in range(10):
        room.use(f"k{at}")
    room.add(shelf, "new", 10)
    assert [victim.key for victim in room.give_up()] == ["k0"]
    assert "new" in room


async def test_what_is_held_stays_and_counts(shelf: OneShelf) -> None:
    room = Room(20)
    for key in "abc":
        room.add(shelf, key, 10)
    room.hold("a")
    room.hold("a")
    assert [victim.key for victim in room.give_up(0)] == ["b", "c"]
    assert room.bytes == 10
    room.let_go("a")
    assert room.give_up(0) == []
    room.let_go("a")
    assert [victim.key for victim in room.give_up(0)] == ["a"]
    assert room.bytes == 0


async def test_what_is_used_or_pinned_elsewhere_comes_back(shelf: OneShelf) -> None:
    room = shelf.room = Room(100)
    room.is_pinned = lambda key: key == "pinned"
    for key in ("pinned", "busy", "free"):
        room.add(shelf, key, 10)
    shelf.busy = {"busy"}
    victims = room.give_up(0)
    assert room.bytes == 0
    stayed = room.remove(victims)
    assert {victim.key for victim in stayed} == {"pinned", "busy"}
    room.came_back(stayed)
    assert room.bytes == 20


async def test_growing_and_shrinking(shelf: OneShelf) -> None:
    room = Room(100)
    room.add(shelf, "a", 10)
    room.grow("a", 5)
    room.grow("absent", 5)
    assert (room.bytes, room.size_of("a")) == (15, 15)
    room.add(shelf, "a", 3)
    assert room.bytes == 3
    room.drop("a")
    room.drop("a")
    assert room.bytes == 0
