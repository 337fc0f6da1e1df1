"""The FUSE wire beneath pyfuse3: requests it does not know, details it hides, INIT and OPEN replies as we want them.

How it hangs together: `wire_load` puts a C hook between libfuse and /dev/fuse.  Requests of intercepted kinds never
reach libfuse; the hook gives them to `Wire`, which decodes them, calls a `WireOperations` method and replies.  All
other requests go to pyfuse3 as before, and `current()` shows the handler what pyfuse3 left out.

Life of a mount, in this order:

    wire = Wire(wire_operations, config)        # before pyfuse3.init()
    pyfuse3.init(operations, mountpoint, options)
    wire.verify_active()
    async with trio.open_nursery() as nursery:
        wire.start(nursery)
        loop = fastloop.install(wire.fd)
        await loop.serve(workers_max, wire.interrupts.refuse_waiting)    # or pyfuse3.main(1, workers_max)
        nursery.cancel_scope.cancel()           # ends lock waits: EINTR
    wire.close()                                # before pyfuse3.close()
    pyfuse3.close()
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from fcntl import F_UNLCK
from types import CoroutineType
from typing import Any, NamedTuple

import trio

from apollofs.fs.wire_constants import InitFlag, Opcode
from apollofs.fs.wire_device import Device
from apollofs.fs.wire_dispatch import Route, routes
from apollofs.fs.wire_guard import ErrnoOf, Faults, ends_the_mount, errno_of_oserror
from apollofs.fs.wire_interrupts import Interrupts
from apollofs.fs.wire_load import hook
from apollofs.fs.wire_operations import WireOperations
from apollofs.fs.wire_structs import Request, decode_lock

log = logging.getLogger(__name__)

LOCK_OPCODES = frozenset({Opcode.GETLK, Opcode.SETLK, Opcode.SETLKW})


class WireInactiveError(RuntimeError):
    """The hook is not in the path between libfuse and the kernel: locks and more would silently not work."""


@dataclass(frozen=True, slots=True)
class WireConfig:
    """What to negotiate with the kernel, and bounds.  None leaves libfuse's value."""

    set_flags: InitFlag = (
        InitFlag.POSIX_LOCKS
        | InitFlag.FLOCK_LOCKS
        | InitFlag.PARALLEL_DIROPS
        | InitFlag.CACHE_SYMLINKS
        | InitFlag.DIRECT_IO_ALLOW_MMAP
    )
    """Set where the kernel offers them. A symlink's target never changes, so it may be kept for ever."""
    clear_flags: InitFlag = InitFlag(0)
    max_background: int | None = 256
    """Asynchronous requests (read-ahead, write-back) that the kernel keeps in flight, 1 to 65535."""
    congestion_threshold: int | None = 192
    max_stack_depth: int | None = None
    """1 for passthrough, 2 where the backing files lie on overlayfs."""
    max_readahead_bytes: int | None = None
    """Can lower the kernel's 128 KiB, not raise it."""
    max_write_bytes: int | None = None
    """Can lower libfuse's 1 MiB, not raise it."""
    time_granularity_ns: int | None = 1
    linger_us: int = 50
    """How long an idle loop looks for the next request of a client that was just answered before it gives way, busy all
    that time: 0 to 1000."""
    tasks_max: int = 4096
    """Asynchronous handlers at work at once, lock waits aside; over it EAGAIN (ENOLCK for locks)."""
    lock_waits_max: int = 4096
    """Blocking lock requests at once; over it ENOLCK."""


class Negotiated(NamedTuple):
    """What INIT settled."""

    flags: InitFlag
    offered: InitFlag
    kernel_minor: int
    max_write_bytes: int
    max_readahead_bytes: int
    max_background: int
    congestion_threshold: int
    max_stack_depth: int


class Wire:
    """One mount's wire; one per process, as pyfuse3 has one session.  For the event loop's thread only."""

    def __init__(
        self, operations: WireOperations, config: WireConfig | None = None, errno_of: ErrnoOf = errno_of_oserror
    ) -> None:
        """Configure the hook for `operations`.  Raises ValueError for a number out of bounds."""
        self._config = config = config or WireConfig()
        self.faults = Faults(errno_of)
        self.interrupts = Interrupts()
        self._nursery: trio.Nursery | None = None
        self._device: Device | None = None
        self._tasks = 0
        self._lock_waits = 0
        self._routes: dict[int, Route] = routes(operations, self._extended_xattr)
        optional = {
            "max_background": config.max_background,
            "congestion_threshold": config.congestion_threshold,
            "max_stack_depth": config.max_stack_depth,
            "max_readahead": config.max_readahead_bytes,
            "max_write": config.max_write_bytes,
            "time_gran": config.time_granularity_ns,
        }
        hook.configure(
            set_flags=int(config.set_flags),
            clear_flags=int(config.clear_flags),
            linger_us=config.linger_us,
            intercept=self._routes,
            dispatch=self._dispatch,
            interrupt=self.interrupts.fire,
            on_error=self._on_error,
            **{name: -1 if value is None else value for name, value in optional.items()},
        )

    def verify_active(self) -> None:
        """Raise WireInactiveError unless pyfuse3.init() has mounted through the hook.  Call it right after init."""
        if not hook.state()["mounted"]:
            raise WireInactiveError("pyfuse3.init() did not go through the wire hook")

    def negotiated(self) -> Negotiated | None:
        """What kernel and daemon agreed on; None until pyfuse3.main() has served INIT, the first request.

        Raises WireInactiveError when INIT was answered but could not be patched (a kernel before Linux 4.20).
        """
        state = hook.state()
        if not state["init_patched"]:
            if state["counts"].get(Opcode.INIT) and not state["in_flight"]:
                raise WireInactiveError("the INIT reply passed the wire hook unpatched")
            return None
        return Negotiated(
            InitFlag(state["flags"]),
            InitFlag(state["offered_flags"]),
            state["kernel_minor"],
            state["max_write"],
            state["max_readahead"],
            state["max_background"],
            state["congestion_threshold"],
            state["max_stack_depth"],
        )

    def start(self, nursery: trio.Nursery) -> None:
        """Run asynchronous handlers in `nursery` from now on; before pyfuse3.main()."""
        self._nursery = nursery
        nursery.start_soon(self.interrupts.keep_looking)

    def close(self) -> None:
        """Let go of the session: after pyfuse3.main() has returned, before pyfuse3.close()."""
        if self._device is not None:
            self._device.close()
        self._nursery = None
        hook.detach()

    @property
    def fd(self) -> int:
        """The descriptor of /dev/fuse, which pyfuse3 owns.  Raises WireInactiveError before it is mounted."""
        fd = hook.state()["fd"]
        if fd < 0:
            raise WireInactiveError("nothing is mounted")
        return fd

    @property
    def device(self) -> Device:
        """Notifications and passthrough.  Raises WireInactiveError before the mount."""
        if self._device is None:
            self._device = Device(self.fd)
        return self._device

    @property
    def tasks(self) -> int:
        """Asynchronous handlers at work now, lock waits included."""
        return self._tasks + self._lock_waits

    def request_counts(self) -> dict[int, int]:
        """How many requests of each opcode have arrived since the mount."""
        return hook.state()["counts"]

    @staticmethod
    def current_unique() -> int:
        """The request that pyfuse3 was handed last: the handler's own, until its first await."""
        return hook.current_unique()

    @staticmethod
    def current() -> tuple[Request, bytes]:
        """Header and first 128 bytes of body of that request; decode the body with `wire_structs.decode_*`."""
        *header, body = hook.current()
        return Request(*header), body

    @staticmethod
    def open_reply(unique: int, flags: int, backing_id: int = 0) -> None:
        """Add `OpenReplyFlag` bits, and a backing id, to the reply that OPEN, CREATE or OPENDIR `unique` will get.

        Call it just before the handler returns.  Whatever is replied to `unique` consumes it, an error too.  Raises
        OverflowError when 1024 are waiting, which only a bug can do.
        """
        hook.open_reply(unique, flags, backing_id)

    def _extended_xattr(self) -> bool:
        return bool(hook.state()["flags"] & InitFlag.SETXATTR_EXT)

    def _on_error(self, opcode: int, exc: BaseException) -> None:
        """The C hook caught an exception in one of our callbacks; the caller got EIO."""
        self.faults.errno_for(exc, f"wire callback for opcode {opcode}")

    def _dispatch(
        self, opcode: int, unique: int, ino: int, uid: int, gid: int, pid: int, body: bytes
    ) -> bytes | int | None:
        """Called by the hook for each intercepted request: data, an errno, or None for "later"."""
        route = self._routes[opcode]
        try:
            request = Request(opcode, unique, ino, uid, gid, pid)
            result, encode = route(request, body)
            if not isinstance(result, CoroutineType):
                return encode(result)
            return self._later(request, result, encode, body)
        except BaseException as exc:
            if ends_the_mount(exc):
                raise
            return self.faults.errno_for(exc, f"opcode {opcode}")

    def _later(
        self, request: Request, work: Coroutine[Any, Any, Any], encode: Callable[[Any], bytes], body: bytes
    ) -> int | None:
        """Start a task for `work`; an errno if there are too many.  Giving a lock back is never refused."""
        waits = request.opcode == Opcode.SETLKW
        refused = self._lock_waits >= self._config.lock_waits_max if waits else self._tasks >= self._config.tasks_max
        if refused and not (request.opcode in LOCK_OPCODES and decode_lock(body).kind == F_UNLCK):
            work.close()
            return errno.ENOLCK if request.opcode in LOCK_OPCODES else errno.EAGAIN
        scope = trio.CancelScope()
        try:
            if self._nursery is None:
                raise WireInactiveError("Wire.start() was not called")
            self._nursery.start_soon(self._run, request, work, encode, scope)
        except BaseException:
            work.close()
            raise
        # Now, not in the task: an INTERRUPT may come before the task's first step.
        self.interrupts.register(request.unique, scope)
        if waits:
            self._lock_waits += 1
        else:
            self._tasks += 1
        return None

    async def _run(
        self, request: Request, work: Coroutine[Any, Any, Any], encode: Callable[[Any], bytes], scope: trio.CancelScope
    ) -> None:
        """Finish one request in its task.  Ends with exactly one reply: EINTR too when the mount is ending."""
        data, error = b"", errno.EINTR
        try:
            with scope:
                data = encode(await work)
                error = 0
        except BaseException as exc:
            if ends_the_mount(exc):
                raise
            error = self.faults.errno_for(exc, f"opcode {request.opcode}")
        finally:
            work.close()
            self.interrupts.unregister(request.unique)
            if request.opcode == Opcode.SETLKW:
                self._lock_waits -= 1
            else:
                self._tasks -= 1
            self._reply(request, error, data)

    def _reply(self, request: Request, error: int, data: bytes) -> None:
        try:
            hook.reply(request.unique, error, data)
        except (OSError, RuntimeError) as exc:  # the connection is gone, or a reply that the kernel refused
            log.error("no reply could be sent to opcode %d: %r", request.opcode, exc)
