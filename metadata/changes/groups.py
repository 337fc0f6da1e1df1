"""Consumer groups: a name under which readers of the change log take turns, each going on where the last one stopped.

One reader of a group is active at a time: who has the role. Positions are committed under that role, so that a reader
which was replaced, and does not know, can't move the group's position. What a reader has dealt with and not committed
is read again by the next one: each position at least once, in order.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from apollofs.metadata import codec
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.role import Role, held_role
from apollofs.metadata.errors import InvalidArgument
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import retry
from apollofs.metadata.store import Delete, Put, Range, Store, prefix_end

READ_S = 30.0
LEASE_S = 10
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ConsumerGroup:
    """Made by `open_group`: this process is the group's reader."""

    def __init__(self, store: Store, keys: Keys, name: str, role: Role) -> None:
        self._store = store
        self._key = keys.group(name)
        self._role = role

    async def position(self) -> Position | None:
        """Where to go on; None if the group has never committed. Raises DeadlineExceeded, StoreError."""
        found = await retry(lambda: self._store.range(Range(self._key)), READ_S)
        return _position_of(found.kvs[0].value) if found.kvs else None

    async def commit(self, position: Position) -> None:
        """All before `position` has been dealt with. One request. Raises RoleLost, DeadlineExceeded, StoreError."""
        await self._role.commit((), (Put(self._key, codec.encode_fields(position)),))


@asynccontextmanager
async def open_group(store: Store, keys: Keys, name: str, *, ttl_s: int = LEASE_S) -> AsyncIterator[ConsumerGroup]:
    """Become the group's reader as soon as nobody else is, for the length of the block; RoleLost is raised there when
    that ends, within `ttl_s` of a reader that died. Raises InvalidArgument for a bad name, StoreError."""
    check_group(name)
    key = keys.group_reader(name)
    async with held_role(store, key, f"reads for the group {name}", ttl_s, wait=True) as role:
        yield ConsumerGroup(store, keys, name, role)


async def list_groups(store: Store, keys: Keys) -> dict[str, Position]:
    """Every group and its position."""
    found = await retry(lambda: store.range(Range(keys.groups, prefix_end(keys.groups))), READ_S)
    return {kv.key[len(keys.groups) :].decode(): _position_of(kv.value) for kv in found.kvs}


async def forget_group(store: Store, keys: Keys, name: str) -> None:
    """The group has no position any more: it begins anew. RoleTaken while somebody reads for it."""
    check_group(name)
    async with held_role(store, keys.group_reader(name), f"reads for the group {name}", LEASE_S, wait=False) as role:
        await role.commit((), (Delete(keys.group(name)),))


def check_group(name: str) -> None:
    """Raises InvalidArgument."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"bad group name {name!r}: use 1 to 64 letters, digits, '.', '_' and '-', no sign first")


def _position_of(value: bytes) -> Position:
    revision, offset = codec.decode_fields(value)
    return Position(revision, offset)
