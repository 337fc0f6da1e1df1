"""The blob store port: five methods over named, immutable byte strings.

Adapters (`s3.py`, `local.py`, `memory.py`) know one kind of store. Policies (retry, limit, checksum verification,
metrics) are stores that wrap a store. All of them pass one contract suite, `tests/contract/test_blobstore.py`.

Names are relative ASCII paths of `[A-Za-z0-9._/-]`, never reused for other bytes. Methods are async, checkpoints,
cancellable; blocking work runs in threads behind the adapter's own limiter with immutable arguments.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

T = TypeVar("T")
Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class BlobStat:
    name: str
    size_bytes: int
    modified_s: float
    """Unix time of the last put, by the store's clock."""


class BlobStore(Protocol):
    """Errors are leaves of `errors.BlobStoreError`."""

    async def put(self, name: str, data: Buffer) -> None:
        """Store `data` under `name`, whole or not at all, durable on return. Repeating the same put is harmless.

        `data` must not change until the call has returned; what is read-only, never while somebody holds it.
        """
        ...

    async def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes `[offset, offset + length)`; `length` None: to the end.

        Exactly `length` bytes, or an error: `NoSuchBlob`; `RangeUnavailable` when the object is shorter.
        """
        ...

    async def read_into(self, name: str, length: int, then: Callable[[Buffer], T]) -> T:
        """The first `length` bytes, given to `then` in the thread that read them; what that returns. Errors as `read`.

        `then` raises nothing but errors of this package; it may run after the call was cancelled.
        """
        return then(await self.read(name, 0, length))

    async def stat(self, name: str) -> BlobStat:
        """Raises `NoSuchBlob`."""
        ...

    async def delete(self, name: str) -> None:
        """Deleting what is not there is no error."""
        ...

    def list(self, prefix: str = "", start_after: str = "") -> AsyncIterator[BlobStat]:
        """Every object whose name starts with `prefix`, in name order, from after `start_after`; paged inside."""
        ...

    async def aclose(self) -> None: ...
