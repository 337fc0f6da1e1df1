# The C extension beneath `wire.py`.  Load it through `wire_load`, never directly.

from collections.abc import Callable, Iterable
from typing import TypedDict

class State(TypedDict):
    mounted: bool
    init_patched: bool
    fd: int
    offered_flags: int
    flags: int
    in_flight: int
    kernel_minor: int
    max_write: int
    max_readahead: int
    max_background: int
    congestion_threshold: int
    max_stack_depth: int
    dry_count: int
    open_replies: int
    counts: dict[int, int]

def configure(
    *,
    set_flags: int = ...,
    clear_flags: int = ...,
    max_stack_depth: int = ...,
    max_readahead: int = ...,
    max_background: int = ...,
    congestion_threshold: int = ...,
    max_write: int = ...,
    time_gran: int = ...,
    linger_us: int = ...,
    intercept: Iterable[int] = ...,
    dispatch: Callable[[int, int, int, int, int, int, bytes], bytes | int | bool | None] | None = ...,
    interrupt: Callable[[int], object] | None = ...,
    on_error: Callable[[int, BaseException], object] | None = ...,
) -> None: ...
def current_unique() -> int: ...
def current() -> tuple[int, int, int, int, int, int, bytes]: ...
def open_reply(unique: int, flags: int, backing_id: int = 0, /) -> None: ...
def reply(unique: int, error: int, data: bytes | bytearray | memoryview = b"", /) -> bool: ...
def dry() -> bool: ...
def exited() -> bool: ...
def detach() -> None: ...
def state() -> State: ...
def invalidate_inodes(fd: int, inos: bytes, offset: int, /) -> bytes: ...
def expire_entries(fd: int, parent: int, names: tuple[bytes, ...], /) -> None: ...
