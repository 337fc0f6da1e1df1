"""What calls cost the daemon: how many requests of which kinds the kernel sends it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.mounted.harness import Mount

TRIES_MAX = 150
NAMES_AND_ATTRIBUTES = ("lookup", "getattr")


def asked(mount: Mount, call: Callable[[], object], kinds: tuple[str, ...] = NAMES_AND_ATTRIBUTES) -> int:
    """How many requests of these kinds a call costs the daemon."""
    before = _requests(mount, kinds)
    call()
    return _requests(mount, kinds) - before


def cached(mount: Mount, call: Callable[[], object], kinds: tuple[str, ...] = NAMES_AND_ATTRIBUTES) -> None:
    """Repeat a call until the kernel answers it by itself: after a recall the mount waits a while, each time longer."""
    for _ in range(TRIES_MAX):
        if asked(mount, call, kinds) == 0:
            return
    pytest.fail("the kernel keeps asking")


def _requests(mount: Mount, kinds: tuple[str, ...]) -> int:
    found = mount.status()["fuse"]["requests_by_kind"]
    return sum(int(found.get(kind, 0)) for kind in kinds)
