"""Sites that are being removed, or have been: nobody begins to use them.

`X/<site>` is put before `remove_site` looks for what depends on the site, and stays once that is removed: an id is
never given again. Who begins a session at a site, or names it in a policy, compares that there is no such key, so what
`remove_site` has not found can't come later.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio

from apollofs.metadata.errors import MetadataError, SiteLeaving, UnknownSite
from apollofs.metadata.keys import Keys
from apollofs.metadata.store import Compare, Delete, Put, Range, Relation, Store, Target, prefix_end

LEAVING, REMOVED = b"leaving", b"removed"
UNMARK_S = 10.0


def refusal(mark: bytes, site: str) -> MetadataError:
    """What to tell who would use a site, called `site`, that has this mark."""
    if mark == REMOVED:
        return UnknownSite(f"site {site} has been removed")
    return SiteLeaving(f"site {site} is being removed; if that was interrupted, `apollofs site remove` again ends it")


async def read_retired(store: Store, volume: str) -> set[int]:
    """Ids of the sites that are being removed or have been. One request."""
    keys = Keys(volume)
    found = await store.range(Range(keys.retired_sites, prefix_end(keys.retired_sites)))
    return {keys.parse_numbers(kv.key)[0] for kv in found.kvs}


@contextlib.asynccontextmanager
async def leaving(store: Store, keys: Keys, site: int) -> AsyncIterator[Compare]:
    """Refuse whoever would begin to use the site while the block lasts; for ever if it ends well, when it is expected
    to have put REMOVED. Yields what its transaction must compare: nobody else has marked or unmarked it."""
    key = keys.retired_site(site)
    marked = await store.txn((), (Put(key, LEAVING),))
    ours = Compare(key, Target.MOD, Relation.EQUAL, marked.revision)
    try:
        yield ours
    except BaseException:
        with trio.CancelScope(shield=True), trio.move_on_after(UNMARK_S), contextlib.suppress(MetadataError):
            await store.txn((ours,), (Delete(key),))
        raise
