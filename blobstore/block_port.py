"""The port that the rest of apollofs holds: a blob store whose bytes are verified, and that reads parts of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from .footer import Footer
from .port import BlobStore, Buffer

T = TypeVar("T")


class BlockStore(BlobStore, Protocol):
    """A blob store of sealed objects; names, sizes and bytes are those of the data, without the seal.

    All methods raise `CorruptBlob` where the object isn't what was put under this name.
    """

    async def read_block(self, name: str, data_length: int, offset: int = 0, length: int | None = None) -> memoryview:
        """Bytes `[offset, offset + length)` of a block known to hold `data_length` bytes; `length` None: to the end.

        Knowing the length saves requests: one if the range reaches the last chunk (of `footer.CHUNK_BYTES`), is near
        the end, or the block's checksums are remembered; else two. The result is read-only and may share memory with
        bytes around it.

        Raises `NoSuchBlob`; `CorruptBlob` (also when the block has another length); `RangeUnavailable` when the range
        leaves `data_length`.
        """
        ...

    async def fetch_block(self, name: str, data_length: int, then: Callable[[memoryview, Footer], T]) -> T:
        """A whole block, verified, and its checksums, given to `then` in the thread that read it; what that returns.

        One request, one way to a thread. `data.obj` is the whole object as it was received, which nobody changes while
        it is held: it can be put elsewhere with `put_sealed`. `then` raises nothing, and may run after the call was
        cancelled or has been repeated. Errors as `read_block`.
        """
        ...

    async def put_sealed(self, name: str, sealed: Buffer) -> None:
        """As `put`, of data with the footer of `footer.pack_footer` behind it: for who has computed that already, and
        has it in the same buffer. Nothing is copied or computed; a wrong footer makes a block that can't be read.
        """
        ...
