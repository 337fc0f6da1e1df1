"""A blob that is filled block by block while the file is still written that it will be part of."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.fs.blobs import Block, block_count


@dataclass(eq=False, slots=True)
class GrowingBlob:
    """All its blocks are whole, but for the last one of a blob to which nothing is added any more. `length` is final
    only then: from the first commit that refers to it on."""

    number: int
    block_bytes: int
    count: int = 0
    length: int = 0
    closed: bool = False
    """Commits refer to it: what was kept room for and is not there yet must not be referred to, ever."""

    @property
    def takes_more(self) -> bool:
        return self.length == self.count * self.block_bytes

    def add(self, length: int) -> BlockPlace:
        """The place of a further block."""
        assert self.takes_more
        assert length <= self.block_bytes
        place = BlockPlace(self, self.count, length)
        self.count += 1
        self.length += length
        return place

    def add_rest(self, length: int) -> int:
        """Room for the last `length` bytes of it: where they begin."""
        assert self.takes_more
        start = self.length
        self.count += block_count(length, self.block_bytes)
        self.length += length
        return start


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """Where a block is put: index `index` of a blob."""

    blob: GrowingBlob
    index: int
    length: int

    @property
    def block(self) -> Block:
        return Block(self.blob.number, self.index, self.length)

    @property
    def offset(self) -> int:
        """In the blob."""
        return self.index * self.blob.block_bytes
