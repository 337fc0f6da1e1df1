"""FUSE_INTERRUPT: from the number of a request to the cancel scope of the task that works on it.

The kernel sends an INTERRUPT when the process behind a request gets a signal.  It may be ignored, and the reply to the
request itself is the only answer to it.  Three facts shape this file:

- With one reader an INTERRUPT never overtakes its request, but it may come before the handler has registered itself.
  Such early ones are kept, a bounded number, and fire on registration.
- Most callers do not expect EINTR from file operations (git's progress timer and Go's preemption signal hit them all
  the time), so ordinary requests should stop for SIGKILL only: `FATAL`.  Waits for locks stop for every signal.
- The kernel sends one INTERRUPT for a request, at its first signal.  Whether SIGKILL has come after another one must be
  looked for.
"""

from __future__ import annotations

import errno
from enum import Enum
from itertools import islice
from types import TracebackType

import trio

from apollofs.fs.wire_load import hook, pyfuse3

EARLY_MAX = 1024
LOOK_S = 0.5
"""How often the processes are looked at that got a signal which did not kill them."""
LOOKS_MAX = 256
"""At how many at once."""
_SIGKILL_BIT = 1 << 8


class Interruptible(Enum):
    """Which signals end a request."""

    NEVER = "never"
    FATAL = "fatal"
    """SIGKILL only; the caller is dead and only waits for the reply."""
    ALWAYS = "always"


class Interrupts:
    """The registered requests of one mount.  For the event loop's thread only."""

    def __init__(self) -> None:
        self._scopes: dict[int, tuple[trio.CancelScope, int | None]] = {}
        self._early: dict[int, None] = {}
        self._spared: dict[int, None] = {}
        """Of the scopes: interrupted by a signal that does not end them.  The next to be looked at comes first."""
        self._some_spared = trio.Event()
        self._refusing = False
        self.delivered = 0
        """How many scopes were cancelled."""

    def register(self, unique: int, scope: trio.CancelScope, *, fatal_pid: int | None = None) -> None:
        """Cancel `scope` when request `unique` is interrupted, or now if it already was.

        With `fatal_pid`, only if that thread has SIGKILL pending.  `unregister` must follow, always.
        """
        self._scopes[unique] = scope, fatal_pid
        if unique in self._early:
            del self._early[unique]
            self.fire(unique)

    def unregister(self, unique: int) -> None:
        """Forget the request; nothing happens if it is not known."""
        self._scopes.pop(unique, None)
        self._spared.pop(unique, None)

    def fire(self, unique: int) -> None:
        """The kernel says that request `unique` is interrupted."""
        entry = self._scopes.get(unique)
        if entry is None:
            self._early[unique] = None
            if len(self._early) > EARLY_MAX:
                del self._early[next(iter(self._early))]
            return
        scope, fatal_pid = entry
        if fatal_pid is None or killed(fatal_pid):
            self.delivered += 1
            scope.cancel()
        else:
            self._spared[unique] = None
            self._some_spared.set()

    async def keep_looking(self) -> None:
        """End the requests of those that are killed after another signal; until cancelled."""
        while True:
            await self._some_spared.wait()
            await trio.sleep(LOOK_S)
            for unique in list(islice(self._spared, LOOKS_MAX)):
                del self._spared[unique]
                self.fire(unique)
            if not self._spared:
                self._some_spared = trio.Event()

    def interruptible(
        self, unique: int, mode: Interruptible = Interruptible.ALWAYS, pid: int = 0
    ) -> InterruptibleBlock:
        """A `with` block around what an interrupt may stop; raises FUSEError(EINTR) at its end if one did.

        `unique` is what `Wire.current_unique()` said in the handler's first step, before any await; with FATAL `pid`
        is the caller's.  An interrupt that comes when the work is already done changes nothing.  What a cancelled
        operation leaves behind is up to the code inside.  EAGAIN: it would have waited, and too many do.
        """
        return InterruptibleBlock(self, unique, pid if mode is Interruptible.FATAL else None)

    def refuse_waiting(self, refusing: bool) -> None:
        """From now on a block that is entered must not wait (EAGAIN), or may again: too many do already."""
        self._refusing = refusing

    @property
    def refusing(self) -> bool:
        """Whether what would wait is refused."""
        return self._refusing

    @property
    def registered(self) -> int:
        """How many requests could be interrupted now."""
        return len(self._scopes)


class InterruptibleBlock:
    """The context manager that `Interrupts.interruptible` returns."""

    __slots__ = ("_errno", "_fatal_pid", "_interrupts", "_scope", "_unique")

    def __init__(self, interrupts: Interrupts, unique: int, fatal_pid: int | None) -> None:
        self._interrupts = interrupts
        self._unique = unique
        self._fatal_pid = fatal_pid
        self._scope = trio.CancelScope()
        self._errno = errno.EINTR

    def __enter__(self) -> trio.CancelScope:
        if self._interrupts.refusing:
            self._errno = errno.EAGAIN
            self._scope.cancel()
        self._interrupts.register(self._unique, self._scope, fatal_pid=self._fatal_pid)
        return self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._interrupts.unregister(self._unique)
        swallowed = self._scope.__exit__(kind, exc, traceback)
        if self._scope.cancelled_caught:
            raise pyfuse3.FUSEError(self._errno)
        return swallowed


def killed(pid: int) -> bool:
    """Whether thread `pid` has SIGKILL pending; True as well when it is gone.

    False for 0 (another namespace), and where /proc does not say.
    """
    if pid == 0:
        return False
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            lines = status.read().split(b"\n")
    except (FileNotFoundError, ProcessLookupError):
        return True
    except PermissionError:
        return False
    pending = 0
    for line in lines:
        if line.startswith((b"SigPnd:", b"ShdPnd:")):
            pending |= int(line.split()[1], 16)
    return bool(pending & _SIGKILL_BIT)


def current_unique() -> int:
    """The number of the request that pyfuse3 was handed last: valid in a handler until its first await."""
    return hook.current_unique()
