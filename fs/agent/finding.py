"""The bodies of many files at once, found by their numbers and where they were last seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apollofs.fs.agent.backlog import Job
from apollofs.metadata import codec
from apollofs.metadata.errors import CorruptRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import Extent, Inode
from apollofs.metadata.replicas import Referent
from apollofs.metadata.session import retry
from apollofs.metadata.store import KeyValue, Range, Store, prefix_end

READ_S = 30.0
JOBS_IN_REQUEST = 40
"""Each takes up to three reads."""
MOVES_MAX = 16
"""How many renames are followed before the file is looked for later."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file's body, and the key that proves, unchanged, that it still refers to it."""

    referent: Referent
    policy: int
    extents: tuple[Extent, ...]


async def find_bodies(store: Store, keys: Keys, jobs: Sequence[Job]) -> dict[Job, Found | CorruptRecord]:
    """Those of the jobs' files that have a name and a body in blobs, and those whose records do not decode, with what
    is wrong. One request for forty, more for those that have moved or are very fragmented. Raises DeadlineExceeded,
    StoreError."""
    found: dict[Job, Found | CorruptRecord] = {}
    left = list(jobs)
    for _ in range(MOVES_MAX):
        moved: list[Job] = []
        for at in range(0, len(left), JOBS_IN_REQUEST):
            moved += await _find(store, keys, left[at : at + JOBS_IN_REQUEST], found)
        if not moved:
            break
        left = moved
    return found


async def _find(store: Store, keys: Keys, jobs: Sequence[Job], found: dict[Job, Found | CorruptRecord]) -> list[Job]:
    """The files that are elsewhere by now; their jobs say where."""
    asked: list[Range] = []
    for job in jobs:
        asked += [Range(keys.dentry(*job.location))] if job.location is not None else []
        asked += [Range(keys.inode(job.ino)), Range(keys.moved(job.ino))]
    result = await retry(lambda: store.txn((), asked), READ_S)
    answers = iter([answer.kvs for answer in result.ranges if answer is not None])
    moved: list[Job] = []
    for job in jobs:
        there = next(answers) if job.location is not None else ()
        own, where = next(answers), next(answers)
        try:
            known = _inode_in(job.ino, there, own)
            if known is not None:
                inode, referent = known
                extents = inode.extents if not inode.extent_pages else await _paged(store, keys, inode)
                if extents:
                    found[job] = Found(referent, inode.policy, extents)
            elif where and codec.decode_location(where[0].value) != job.location:
                job.location = codec.decode_location(where[0].value)
                moved.append(job)
        except CorruptRecord as exc:
            found[job] = exc
    return moved


def _inode_in(ino: int, there: Sequence[KeyValue], own: Sequence[KeyValue]) -> tuple[Inode, Referent] | None:
    if there:
        inode = codec.decode_dentry(there[0].value, there[0].mod_revision).inode
        if inode is not None and inode.ino == ino:
            return inode, Referent(there[0].key, there[0].mod_revision)
    if own:
        return codec.decode_inode(own[0].value, own[0].mod_revision), Referent(own[0].key, own[0].mod_revision)
    return None


async def _paged(store: Store, keys: Keys, inode: Inode) -> tuple[Extent, ...]:
    """If the inode changes meanwhile, what is read here is announced in vain, and the file looked at again."""
    prefix = keys.extents_of(inode.ino)
    found = await retry(lambda: store.range(Range(prefix, prefix_end(prefix))), READ_S)
    return tuple(extent for kv in found.kvs for extent in codec.decode_extents(kv.value))
