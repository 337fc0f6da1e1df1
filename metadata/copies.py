"""What `b/<blob>` says: which sites have a blob besides its own. A blob without that key is at its own site only.

A site that copies says so first (`begun`), and again when it has all of the blob (`complete`). So whoever removes a
blob finds every place where an object of it may be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from apollofs.metadata import codec
from apollofs.metadata.errors import CorruptRecord
from apollofs.metadata.store import KeyValue


@dataclass(frozen=True, slots=True)
class Copies:
    """As of `revision`, the key's mod_revision (0: there is no key). Site ids, in order."""

    complete: tuple[int, ...] = ()
    begun: tuple[int, ...] = ()
    revision: int = 0

    @property
    def sites(self) -> tuple[int, ...]:
        """Where objects of the blob may be."""
        return tuple(sorted({*self.complete, *self.begun}))

    def with_begun(self, site: int) -> Copies:
        if site in self.complete or site in self.begun:
            return self
        return replace(self, begun=tuple(sorted({*self.begun, site})))

    def with_complete(self, *sites: int) -> Copies:
        begun = tuple(site for site in self.begun if site not in sites)
        return replace(self, complete=tuple(sorted({*self.complete, *sites})), begun=begun)

    def without(self, site: int) -> Copies:
        complete = tuple(each for each in self.complete if each != site)
        return replace(self, complete=complete, begun=tuple(each for each in self.begun if each != site))


NOWHERE = Copies()


def encode_copies(copies: Copies) -> bytes:
    """Two bytes and one for each site."""
    return codec.encode_fields([bytes(copies.complete), *([bytes(copies.begun)] if copies.begun else [])])


def decode_copies(kv: KeyValue | None) -> Copies:
    """Raises CorruptRecord."""
    if kv is None:
        return NOWHERE
    try:
        complete, *begun = codec.decode_fields(kv.value)
        return Copies(tuple(complete), tuple(begun[0]) if begun else (), kv.mod_revision)
    except (ValueError, TypeError) as exc:
        raise CorruptRecord(f"a list of copies does not decode: {exc}") from exc
