"""When the lease is no longer proven the pages of open files go, once."""

from __future__ import annotations

import errno

import pytest
import trio
import trio.testing

from apollofs.fs import lease_end
from apollofs.fs.lease_end import LeaseEnd


class Pages:
    """Those that were dropped."""

    def __init__(self) -> None:
        self.dropped: list[int] = []
        self._two = trio.Event()

    def drop(self, ino: int) -> None:
        self.dropped.append(ino)
        if len(self.dropped) % 2 == 0:
            trio.from_thread.run_sync(self._two.set)
        if ino == 13:
            raise OSError(errno.ENOTCONN, "the mount has ended")

    async def both(self) -> list[int]:
        """Wait for two."""
        await self._two.wait()
        self._two = trio.Event()
        found, self.dropped = sorted(self.dropped), []
        return found


async def test_pages_go_when_the_lease_is_not_renewed(
    monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(lease_end, "boot_time", trio.current_time)
    pages = Pages()
    end = LeaseEnd(lambda: [5, 13], pages.drop)
    async with trio.open_nursery() as nursery:
        end.prove(trio.current_time() + 10)
        nursery.start_soon(end.serve)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(5)
        end.prove(trio.current_time() + 10)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(9)
        await trio.testing.wait_all_tasks_blocked()
        assert end.count == 0
        mock_clock.jump(2)
        assert await pages.both() == [5, 13]
        mock_clock.jump(60)
        await trio.testing.wait_all_tasks_blocked()
        assert end.count == 1
        end.prove(trio.current_time() + 10)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(11)
        assert await pages.both() == [5, 13]
        nursery.cancel_scope.cancel()
    assert end.count == 2
