"""Packing: small bodies that are committed at the same time share one blob, and so one PUT.

With fewer than SOLO_MAX PUTs in flight a body is put at once, alone: an idle mount waits for nothing. Otherwise bodies
gather, and when a PUT returns, those that wait (as many as fit one block) go out together: the principle of
`metadata/group_commit.py`. Whoever was in a pack comes back in a moment with the next file: so while packs are the
rule, the first to come waits for the others for a small part of what a PUT takes. What fails, fails for all of a pack,
and for nobody else; who is cancelled leaves, and the others' PUT goes on.

A pack's blob is shared from birth: each member's commit puts its reference. Between the PUT and the last of these
commits only this mount knows who is still to come, so the blob counts as in use here (`blobs_in_use`).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from copy import copy
from dataclasses import dataclass, field

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.fs.blobs import BlobSource, Block
from apollofs.fs.cache import BlockCache
from apollofs.fs.errors import BodyError, BodyUnavailable
from apollofs.fs.plan import Place
from apollofs.metadata.errors import MetadataError

log = logging.getLogger(__name__)

SOLO_MAX = 2
"""PUTs in flight from which on bodies are gathered."""
IN_FLIGHT_MAX = 4
GATHERING_PART = 0.2
"""Of the time that a PUT took last: for so long at most are others waited for."""
GATHERING_S_MAX = 0.01
MEMBER_BYTES_MAX = 1 << 20
PACK_BYTES_MAX = 4 << 20
"""A pack is one block as well; a reader of one member may fetch all of it."""
MEMBERS_MAX = 32
"""Bodies in memory at once, waiting or on their way."""


@dataclass(eq=False, slots=True)
class _Member:
    """One body. `place` or `error` is set when `done` is."""

    data: bytes
    pack: _Pack | None = None
    done: trio.Event = field(default_factory=trio.Event)
    place: Place | None = None
    error: Exception | None = None


@dataclass(eq=False, slots=True)
class _Pack:
    """Bodies that go out together. `waiting`: how many of them still want it."""

    members: list[_Member]
    waiting: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Packer:
    """Stores small bodies for a mount's writer. `nursery` must outlive every caller of `put`."""

    def __init__(
        self, source: BlobSource, cache: BlockCache, new_blob: Callable[[], int], nursery: trio.Nursery
    ) -> None:
        self._source = source
        self._cache = cache
        self._new_blob = new_blob
        self._nursery = nursery
        self._pack_bytes_max = min(PACK_BYTES_MAX, source.block_bytes)
        self._waiting: deque[_Member] = deque()
        self._in_flight = 0
        self._room = trio.CapacityLimiter(MEMBERS_MAX)
        self._crowd = 1
        """How many bodies the largest of the last packs had; halved with each one since."""
        self._took_s = 0.0
        self._gathering = False
        self._held: Counter[int] = Counter()
        self.packs = 0
        self.packed = 0
        """How many blobs were put, and how many bodies they hold."""

    @property
    def member_bytes_max(self) -> int:
        """Up to which size a body is packed."""
        return min(MEMBER_BYTES_MAX, self._pack_bytes_max)

    @property
    def blobs_in_use(self) -> set[int]:
        """Blobs to which commits under way are going to refer."""
        return set(self._held)

    async def put(self, read: Callable[[], Awaitable[bytes]]) -> Place:
        """Store what `read` returns, at most `member_bytes_max` bytes. `release` must follow, after the commit.

        Raises what `read` does, BodyUnavailable, BlobStoreFull, SessionLost. Cancelled, it may be stored or not.
        """
        async with self._room:
            member = _Member(await read())
            self._waiting.append(member)
            self._arrived()
            try:
                await member.done.wait()
            except trio.Cancelled:
                self._leave(member)
                raise
        if member.error is not None:
            raise copy(member.error) from member.error
        assert member.place is not None
        return member.place

    def release(self, place: Place) -> None:
        """The commit of what is there has ended, well or not."""
        self._held[place.blob] -= 1
        if not self._held[place.blob]:
            del self._held[place.blob]

    def _leave(self, member: _Member) -> None:
        """Its caller was cancelled. A PUT that nobody waits for is given up."""
        pack = member.pack
        if pack is None:
            self._waiting.remove(member)
        elif member.place is not None:
            self.release(member.place)
        else:
            pack.waiting -= 1
            if not pack.waiting:
                pack.scope.cancel()

    def _arrived(self) -> None:
        if self._crowd < 2 or self._in_flight >= SOLO_MAX or self._is_full():
            self._send()
        elif not self._gathering:
            self._gathering = True
            self._nursery.start_soon(self._gather)

    async def _gather(self) -> None:
        """Let others come, then send what waits."""
        try:
            await trio.sleep(min(GATHERING_PART * self._took_s, GATHERING_S_MAX))
        finally:
            self._gathering = False
            self._send()

    def _send(self) -> None:
        """Start what may go: alone while little is in flight, then all that wait, as far as they fit."""
        while self._waiting and (self._in_flight < SOLO_MAX or self._is_full()):
            pack = self._next_pack()
            self._in_flight += 1
            self._nursery.start_soon(self._store, pack)

    def _is_full(self) -> bool:
        """Whether a whole pack waits: no more can join it, so it needs not wait either."""
        return self._in_flight < IN_FLIGHT_MAX and sum(len(each.data) for each in self._waiting) >= self._pack_bytes_max

    def _next_pack(self) -> _Pack:
        members: list[_Member] = []
        size = 0
        while self._waiting and (not members or size + len(self._waiting[0].data) <= self._pack_bytes_max):
            member = self._waiting.popleft()
            size += len(member.data)
            members.append(member)
        pack = _Pack(members, len(members))
        for member in members:
            member.pack = pack
        return pack

    async def _store(self, pack: _Pack) -> None:
        # An exception may not leave this task: the mount's nursery would end with it.
        members = pack.members
        data = members[0].data if len(members) == 1 else b"".join(member.data for member in members)
        began = trio.current_time()
        error: Exception | None = BodyUnavailable("the mount is ending")
        stored: Block | None = None
        try:
            with pack.scope:
                block = Block(self._new_blob(), 0, len(data))
                await self._source.put_block(block, data)
                stored = block
        except (BodyError, BlobStoreError, MetadataError) as exc:
            error = exc
        except Exception as exc:
            log.exception("small bodies could not be stored")
            error = exc
        finally:
            self._in_flight -= 1
            self._took_s = trio.current_time() - began
            self._crowd = max(len(members), self._crowd // 2)
            if stored is not None:
                error = None
                self._answer(pack, stored)
            for member in members:
                member.error = error
                member.done.set()
            if self._waiting:
                self._arrived()
        if stored is not None:
            await self._cache.insert(stored, data)

    def _answer(self, pack: _Pack, block: Block) -> None:
        """Tell each member where its bytes are. What cancelled members had there is never referred to."""
        offset = 0
        for member in pack.members:
            member.place = Place(block.blob, offset, block.length, is_packed=len(pack.members) > 1)
            offset += len(member.data)
        self._held[block.blob] += pack.waiting
        self.packs += 1
        self.packed += len(pack.members)
