"""The port to where segments are kept; `fs/change_segments.py` implements it on blob stores."""

from __future__ import annotations

from typing import Protocol

from apollofs.metadata.changes.archive_index import SegmentEntry


class SegmentSource(Protocol):
    """Reads segments, in whichever site's store they are."""

    async def get(self, entry: SegmentEntry) -> bytes | None:
        """The segment's bytes as they were stored; None if there is no such object. Raises ArchiveUnavailable."""
        ...


class SegmentStore(SegmentSource, Protocol):
    """Where the archiver keeps segments. Names are never reused. Methods raise ArchiveUnavailable."""

    @property
    def site(self) -> int:
        """Id of the site in whose store new segments go."""
        ...

    async def put(self, name: str, data: bytes) -> None:
        """Durable on return. Repeating it is harmless."""
        ...

    async def delete(self, entry: SegmentEntry) -> None:
        """Deleting what is not there is no error."""
        ...

    async def names(self) -> list[str]:
        """Every segment's object in the own site's store."""
        ...

    async def discard(self, name: str) -> None:
        """Delete an object of the own site's store that no segment refers to."""
        ...
