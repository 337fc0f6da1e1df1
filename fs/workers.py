"""Work on many bodies or blocks, by a few tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from apollofs.blobstore import BlobStoreError
from apollofs.fs.errors import BodyError
from apollofs.fs.user_error import UserError
from apollofs.metadata import workers as any_work
from apollofs.metadata.errors import MetadataError

T = TypeVar("T")


async def share_out(work: Callable[[T], Awaitable[None]], items: Iterable[T], workers: int) -> None:
    """As `metadata.workers.share_out`: the first error of a body or a store ends the others and is raised itself;
    MetadataError or UserError is that of a store that can't be opened."""
    await any_work.share_out(work, items, workers, (BodyError, BlobStoreError, MetadataError, UserError))
