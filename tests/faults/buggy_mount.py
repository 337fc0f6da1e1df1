"""The command with bugs in one handler, run as `apollofs` is.

mkdir of `bug-TYPE` raises an exception of that type, of `odd-reply` returns what no mkdir returns, of `stuck` never
returns.
"""

from __future__ import annotations

import sys

import trio

from apollofs.fs.attributes import Attributes, Caller
from apollofs.fs.cli.app import main
from apollofs.fs.filesystem import Filesystem


class Unheard(BaseException):
    """Not even an Exception."""


BUGS: dict[bytes, BaseException] = {
    b"KeyError": KeyError("a bug"),
    b"AssertionError": AssertionError("a bug"),
    b"MemoryError": MemoryError("a bug"),
    b"RecursionError": RecursionError("a bug"),
    b"StopAsyncIteration": StopAsyncIteration("a bug"),
    b"StopIteration": StopIteration("a bug"),
    b"UnicodeDecodeError": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a bug"),
    b"ExceptionGroup": ExceptionGroup("a bug", [KeyError("inside")]),
    b"TooSlowError": trio.TooSlowError("a bug"),
    b"ClosedResourceError": trio.ClosedResourceError("a bug"),
    b"OSError": OSError("a bug without a number"),
    b"Unheard": Unheard("a bug"),
    b"GeneratorExit": GeneratorExit("a bug"),
}
"""By the end of the name."""
_mkdir = Filesystem.mkdir


async def buggy_mkdir(self: Filesystem, parent: int, name: bytes, mode: int, caller: Caller) -> Attributes:
    """See the module."""
    if name.startswith(b"bug-"):
        raise BUGS[name[4:]]
    if name == b"stuck":
        await trio.sleep_forever()
    if name == b"odd-reply":
        return None  # type: ignore[return-value]
    return await _mkdir(self, parent, name, mode, caller)


if __name__ == "__main__":
    Filesystem.mkdir = buggy_mkdir  # type: ignore[method-assign]
    sys.exit(main())
