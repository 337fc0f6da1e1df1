"""Site policies: which sites have copies of what is in a directory, and when.

`p/<ino>` holds the policy that was set on a directory. The directory names itself by its number (`Inode.policy`), and
what is created in it inherits that number: so changing a policy is one key, whatever is below it, and who has none pays
nothing. Where a policy is set on a directory that is not empty, a site agent gives its number to what is there
(`fs/agent/moving.py`). A number without key `p/` means no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from apollofs.metadata import codec
from apollofs.metadata.errors import CorruptRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import retry
from apollofs.metadata.store import KeyValue, Range, Store, prefix_end

READ_S = 30.0
POLICIES_MAX = 1000
"""In a volume: every mount and agent holds all that it meets in memory."""
BOUND_DEFAULT_S = 60
REMEMBERED_S = 5.0
"""How long a mount goes by what it has read of a policy."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Sites are ids. A file's own site is that of the mount which writes it; it always has the bytes."""

    commit: tuple[int, ...] = ()
    """fsync and close return when these have the bytes."""
    commit_any: int = 0
    """fsync and close return when so many sites have the bytes, the writer's own included; 0: no such rule."""
    soon: tuple[int, ...] = ()
    """These get the bytes within `bound_s` of the commit; later counts as late, and is reported."""
    bound_s: int = BOUND_DEFAULT_S
    read: tuple[int, ...] = ()
    """These keep what is read there."""

    @property
    def holds_up_commits(self) -> bool:
        return bool(self.commit) or self.commit_any > 1

    @property
    def named(self) -> tuple[int, ...]:
        return (*self.commit, *self.soon, *self.read)

    def wants_copy(self, site: int, home: int, sites: Sequence[int]) -> bool:
        """Whether an agent at `site` is to have a copy of what was written at `home`; `sites`: all of the volume.

        Of "any N" each site knows its turn: the next ones after the writer's, in the order of their ids.
        """
        if site == home:
            return False
        return site in self.commit or site in self.soon or site in self.nearest(home, sites)[: self.commit_any - 1]

    def nearest(self, home: int, sites: Sequence[int]) -> tuple[int, ...]:
        """The other sites in the order in which "any N" takes them; none where there is no such rule."""
        if self.commit_any < 2:
            return ()
        others = sorted(site for site in sites if site != home)
        return tuple(sorted(others, key=lambda site: (site < home, site)))


def encode_policy(policy: Policy) -> bytes:
    return codec.encode_fields(
        [bytes(policy.commit), policy.commit_any, bytes(policy.soon), policy.bound_s, bytes(policy.read)]
    )


def decode_policy(value: bytes) -> Policy:
    """Raises CorruptRecord."""
    try:
        commit, any_, soon, bound_s, read = codec.decode_fields(value)
    except ValueError as exc:
        raise CorruptRecord(f"a site policy does not decode: {exc}") from exc
    return Policy(tuple(commit), any_, tuple(soon), bound_s, tuple(read))


async def read_policies(store: Store, keys: Keys) -> tuple[dict[int, KeyValue], int]:
    """All policies by their number, as they are stored, and the revision as of which that is. One request.

    Raises DeadlineExceeded, StoreError.
    """
    found = await retry(lambda: store.range(Range(keys.policies, prefix_end(keys.policies))), READ_S)
    return {keys.parse_numbers(kv.key)[0]: kv for kv in found.kvs}, found.revision


class PolicyMemory:
    """What a mount knows of policies: up to REMEMBERED_S old. One request for each that it meets, now and then."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys
        self._known: dict[int, tuple[Policy | None, float]] = {}

    def peek(self, number: int) -> Policy | None:
        """As it was when it was last asked for; None also if it never was. No request."""
        return self._known[number][0] if number in self._known else None

    async def get(self, number: int) -> Policy | None:
        """The policy of this number, or None. No request for number 0. Raises DeadlineExceeded, StoreError."""
        if not number:
            return None
        known = self._known.get(number)
        if known is None or known[1] < trio.current_time():
            found = await retry(lambda: self._store.range(Range(self._keys.policy(number))), READ_S)
            policy = decode_policy(found.kvs[0].value) if found.kvs else None
            known = self._known[number] = (policy, trio.current_time() + REMEMBERED_S)
            while len(self._known) > POLICIES_MAX:
                self._known.pop(next(iter(self._known)))
        return known[0]
