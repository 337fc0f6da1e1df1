"""Placement: what a mount asks, and changes, of where bodies are: sites, policies, copies, wishes to the agent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import trio

from apollofs.metadata import codec
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.common import Location, Scope
from apollofs.metadata.ops.policy import InheritPolicy, SetPolicy
from apollofs.metadata.policy import Policy, PolicyMemory
from apollofs.metadata.replicas import Replicas
from apollofs.metadata.session import Session, retry
from apollofs.metadata.store import Compare, Put, Range, Relation, Store, Target, prefix_end
from apollofs.metadata.transact import Operation

T = TypeVar("T")
READ_S = 30.0
SITES_REMEMBERED_S = 30.0


class Transacts(Protocol):
    """A volume, as far as it runs operations in the mount's session."""

    @property
    def session(self) -> Session: ...
    def place_of(self, ino: int) -> Location | None: ...
    async def transact(self, make: Callable[[Scope], Operation[T]]) -> T: ...


class Placement:
    """Of a mounted volume, at site `here`. Methods raise SessionLost, DeadlineExceeded, StoreError."""

    def __init__(self, store: Store, keys: Keys, here: int, volume: Transacts) -> None:
        self._store = store
        self._keys = keys
        self._volume = volume
        self._sites: tuple[tuple[int, ...], float] = ((), 0.0)
        self.here = here
        self.replicas = Replicas(store, keys)
        self.policies = PolicyMemory(store, keys)

    async def site_ids(self) -> tuple[int, ...]:
        """All sites of the volume. One request now and then."""
        ids, until = self._sites
        if until < trio.current_time():
            prefix = self._keys.sites
            found = await retry(lambda: self._store.range(Range(prefix, prefix_end(prefix))), READ_S)
            ids = tuple(sorted(codec.decode_site(kv.value).id for kv in found.kvs))
            self._sites = (ids, trio.current_time() + SITES_REMEMBERED_S)
        return ids

    async def set_policy(self, directory: int, policy: Policy | None) -> None:
        """Give a directory a policy of its own; None: that of its parent. One request. NotADirectory, StaleInode,
        UnknownSite, SiteLeaving."""
        await self._volume.transact(lambda scope: SetPolicy(scope, directory, policy))

    async def inherit_policy(self, ino: int, location: Location, number: int) -> bool:
        """Give what was there before a policy was set its number, if its directory has it; whether it has that now.
        One request. StaleInode, NoSuchEntry: it is gone."""
        return await self._volume.transact(lambda scope: InheritPolicy(scope, ino, location, number))

    async def want_here(self, ino: int) -> bool:
        """Ask this site's agent for copies of a file's blobs; False: it has none now. One request; the wish ends with
        the session. OutcomeUnknown too."""
        value = codec.encode_fields(list(self._volume.place_of(ino) or (0, b"")))
        put = Put(self._keys.wanted(self.here, ino), value, self._volume.session.lease_id)
        has_agent = Compare(self._keys.agent(self.here), Target.VERSION, Relation.GREATER, 0)
        return (await self._store.txn((has_agent,), (put,))).succeeded

    async def still_wanted(self, inos: Sequence[int]) -> set[int]:
        """Those of up to a hundred files that this site's agent has not dealt with yet. One request."""
        asked = [Range(self._keys.wanted(self.here, ino), keys_only=True) for ino in inos]
        result = await retry(lambda: self._store.txn((), asked), READ_S)
        return {ino for ino, found in zip(inos, result.ranges, strict=True) if found is not None and found.kvs}
