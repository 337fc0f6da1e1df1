"""Setting, reading and clearing site policies from outside any mount."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.fs.agent.state import read_state
from apollofs.fs.command_volume import command_volume
from apollofs.fs.user_error import UserError
from apollofs.metadata import codec
from apollofs.metadata.errors import NotADirectory
from apollofs.metadata.format import list_sites
from apollofs.metadata.keys import Keys
from apollofs.metadata.name_text import name_text
from apollofs.metadata.policy import POLICIES_MAX, Policy, decode_policy, read_policies
from apollofs.metadata.records import SiteRecord
from apollofs.metadata.store import Range, Store
from apollofs.metadata.tree import Place, Tree


@dataclass(frozen=True, slots=True)
class Applied:
    """A policy and how far each site has come with what was there when it was set or changed."""

    path: bytes | None
    """Of the directory that it was set on; None: that is gone."""
    policy: Policy
    done: dict[str, bool]
    """By the name of each site that is to have copies: whether its agent has looked at the whole tree since."""
    walked: dict[str, int]
    """By name, of those whose agents are at it: how many files they have found so far."""


class PolicyCommands:
    """Of one volume. Methods raise UserError, NoSuchEntry, NotADirectory, DeadlineExceeded, StoreError."""

    def __init__(self, store: Store, volume: str, version: str) -> None:
        self._store = store
        self._keys = Keys(volume)
        self._tree = Tree(store, self._keys)
        self._version = version

    async def site_ids(self) -> dict[str, int]:
        return {site.name: site.id for site in await list_sites(self._store, self._keys.volume)}

    async def set(self, path: bytes, policy: Policy | None) -> None:
        """Give a directory a policy of its own, or (None) that of its parent; what is in it follows in the background.

        One transaction, in a session of its own.
        """
        place = await self._directory(path)
        known, _ = await read_policies(self._store, self._keys)
        if policy is not None and place.ino not in known and len(known) >= POLICIES_MAX:
            raise UserError(f"the volume has {POLICIES_MAX} policies already: see `apollofs policy list`")
        if policy is None and place.ino not in known:
            raise UserError(f"{name_text(path)} has no policy of its own")
        async with command_volume(self._store, self._keys.volume, self._version) as volume:
            await volume.placement.set_policy(place.ino, policy)

    async def get(self, path: bytes) -> Applied | None:
        """The policy that applies in a directory; None if there is none."""
        place = await self._directory(path)
        found = await self._store.range(Range(self._keys.inode(place.ino)))
        number = codec.decode_inode(found.kvs[0].value, 0).policy if found.kvs else 0
        return (await self._applied()).get(number)

    async def list(self) -> list[Applied]:
        """All policies of the volume."""
        return list((await self._applied()).values())

    async def _directory(self, path: bytes) -> Place:
        place = await self._tree.place(path)
        if not place.is_dir:
            raise NotADirectory(f"{name_text(path)} is no directory: policies are on directories")
        return place

    async def _applied(self) -> dict[int, Applied]:
        policies, _ = await read_policies(self._store, self._keys)
        sites = await list_sites(self._store, self._keys.volume)
        states = {site: await read_state(self._store, self._keys, site.id) for site in sites}
        found: dict[int, Applied] = {}
        for number, kv in policies.items():
            policy = decode_policy(kv.value)
            asked = [site for site in sites if _is_asked(policy, site)]
            done = {site.name: states[site].walked.get(number) == kv.mod_revision for site in asked}
            walked = {
                site.name: int(states[site].facts.get("walked", 0))
                for site in asked
                if states[site].facts.get("walking") == number
            }
            found[number] = Applied(await self._tree.path_of(number), policy, done, walked)
        return found


def _is_asked(policy: Policy, site: SiteRecord) -> bool:
    """Whether its agent has anything to do for the policy. With "any N" that depends on where a file was written."""
    return policy.commit_any > 1 or site.id in (*policy.commit, *policy.soon)
