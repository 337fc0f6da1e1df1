"""A directory's names, page by page, however many there are."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from apollofs.metadata.records import DirectoryEntry
from apollofs.metadata.volume import Volume

PAGE_KEYS = 1000


async def listed(volume: Volume, directory: int) -> AsyncGenerator[Sequence[DirectoryEntry], None]:
    """Up to PAGE_KEYS names at a time, in order; one request each. Who changes the directory meanwhile may be seen or
    not. To be closed (`aclosing`). Raises what `Volume.readdir` does."""
    after, more = b"", True
    while more:
        page = await volume.readdir(directory, after, PAGE_KEYS)
        yield page.entries
        after = page.entries[-1].name if page.entries else after
        more = page.more
