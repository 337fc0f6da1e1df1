"""The extension's settings and bounds, without a mount."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from apollofs.fs.attributes import Attributes
from apollofs.fs.wire import Wire, WireConfig, WireInactiveError
from apollofs.fs.wire_constants import Opcode
from apollofs.fs.wire_device import Device, DeviceClosedError
from apollofs.fs.wire_load import hook
from apollofs.fs.wire_operations import WireOperations
from apollofs.fs.wire_structs import FallocateRequest, LockRequest, LseekRequest, Request, StatxRequest


@pytest.fixture(autouse=True)
def _detached() -> Iterator[None]:
    yield
    hook.detach()


class Some(WireOperations):
    """Handlers that answer at once."""

    def lseek(self, request: Request, seek: LseekRequest) -> int:
        return seek.offset

    def fallocate(self, request: Request, allocate: FallocateRequest) -> None:
        raise OSError(errno.ENOSPC, "full")

    def statx(self, request: Request, statx: StatxRequest) -> Attributes:
        raise ZeroDivisionError

    async def setlk(self, request: Request, lock: LockRequest, *, wait: bool) -> None:
        """Never reached: there is no nursery."""


def dispatch(wire: Wire, opcode: Opcode, body: bytes) -> bytes | int | None:
    return wire._dispatch(opcode, 2, 1, 0, 0, 0, body)


@pytest.mark.parametrize("opcode", [0, -1, 64, 26, 36])
def test_opcodes_that_cannot_be_intercepted(opcode: int) -> None:
    with pytest.raises(ValueError, match="cannot be intercepted"):
        hook.configure(intercept=[opcode])
    with pytest.raises(TypeError):
        hook.configure(intercept=["x"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "config", [WireConfig(max_background=0), WireConfig(linger_us=10**6), WireConfig(max_stack_depth=3)]
)
def test_numbers_out_of_bounds(config: WireConfig) -> None:
    with pytest.raises(ValueError, match="must be between"):
        Wire(WireOperations(), config)


def test_announced_open_replies_are_bounded() -> None:
    announced = hook.state()["open_replies"]
    assert announced == 0
    for unique in range(1024):
        hook.open_reply(2 * unique, 1)
    hook.open_reply(0, 2)  # again for the same request: replaces it
    with pytest.raises(OverflowError):
        hook.open_reply(5000, 1)
    hook.detach()
    assert hook.state()["open_replies"] == 0


def test_nothing_is_mounted() -> None:
    wire = Wire(WireOperations())
    for ask in (wire.verify_active, lambda: wire.fd, lambda: wire.device):
        with pytest.raises(WireInactiveError):
            ask()
    assert wire.negotiated() is None
    with pytest.raises(RuntimeError, match="nothing is mounted"):
        hook.reply(2, 0, b"")
    assert hook.exited()


def test_a_closed_device_says_nothing_to_anybody() -> None:
    device = Device(0)
    device.close()
    for call in (device.inc_epoch, lambda: device.invalidate_attributes(1), lambda: device.backing_close(1)):
        with pytest.raises(DeviceClosedError):
            call()


@pytest.mark.expects_log("opcode 52 failed with EIO", "opcode 46 failed with EIO", "opcode 32 failed with EIO")
def test_dispatch_answers_whatever_the_handler_does() -> None:
    wire = Wire(Some())
    lseek = (1).to_bytes(8, "little") + (77).to_bytes(8, "little") + bytes(8)
    assert dispatch(wire, Opcode.LSEEK, lseek) == (77).to_bytes(8, "little")
    assert dispatch(wire, Opcode.LSEEK, b"short") == errno.EIO
    assert dispatch(wire, Opcode.FALLOCATE, bytes(32)) == errno.ENOSPC
    assert dispatch(wire, Opcode.STATX, bytes(24)) == errno.EIO
    assert dispatch(wire, Opcode.SETLK, bytes(48)) == errno.EIO  # start() was not called
    assert wire.faults.bugs == 3
    assert wire.tasks == 0


def test_only_what_is_overridden_is_intercepted() -> None:
    wire = Wire(Some())
    assert set(wire._routes) == {
        Opcode.LSEEK,
        Opcode.FALLOCATE,
        Opcode.STATX,
        Opcode.SETLK,
        Opcode.SETLKW,
    }
