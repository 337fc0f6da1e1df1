"""Every mutation of a volume, once, on a small namespace; and what the journal and the checker say afterwards."""

from __future__ import annotations

import contextlib
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import trio

from apollofs.metadata import journal
from apollofs.metadata.check import check_volume
from apollofs.metadata.errors import MetadataError
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.keys import Keys
from apollofs.metadata.ops.put_values import NewBody, ValueWrite
from apollofs.metadata.records import ROOT_INO, BodyChange, Extent, RenameFlag, SetAttr
from apollofs.metadata.store import Put, Range, Store, prefix_end
from apollofs.metadata.volume import Volume
from tests.support.volumes import ME, VOLUME

FILE = stat.S_IFREG | 0o644
KEYS = Keys(VOLUME)
WAIT_S = 60.0
_QUIET = (Kind.OPEN, Kind.NOTHING, Kind.USAGE)


@dataclass(frozen=True)
class Places:
    """What the operations are done to, all of it in the root."""

    file: int
    linked: int
    directory: int
    inner: int


async def furnish(volume: Volume) -> Places:
    """Files `file`, `other`, `linked`+`link`, directories `dir` (with `inner`) and `empty`; one attribute on `file`."""
    file = await volume.mknod(ROOT_INO, b"file", FILE, 0, ME)
    await volume.mknod(ROOT_INO, b"other", FILE, 0, ME)
    linked = await volume.mknod(ROOT_INO, b"linked", FILE, 0, ME)
    await volume.link(linked.ino, ROOT_INO, b"link")
    directory = await volume.mkdir(ROOT_INO, b"dir", 0o755, ME)
    await volume.mkdir(ROOT_INO, b"empty", 0o755, ME)
    inner = await volume.mknod(directory.ino, b"inner", FILE, 0, ME)
    await volume.setxattr(file.ino, b"user.old", b"value")
    return Places(file.ino, linked.ino, directory.ino, inner.ino)


Mutation = Callable[[Volume, Places], Awaitable[object]]


def mutations() -> dict[str, tuple[Kind, Mutation]]:
    """By name: the kind of its journal record, and the call. Each works once on what `furnish` has made."""
    root = ROOT_INO
    return {
        "create": (Kind.CREATE, lambda v, p: v.mknod(root, b"new", FILE, 0, ME)),
        "fifo": (Kind.CREATE, lambda v, p: v.mknod(p.directory, b"new", stat.S_IFIFO | 0o600, 0, ME)),
        "mkdir": (Kind.MKDIR, lambda v, p: v.mkdir(root, b"new", 0o755, ME)),
        "symlink": (Kind.CREATE, lambda v, p: v.symlink(root, b"new", b"target", ME)),
        "link": (Kind.LINK, lambda v, p: v.link(p.file, p.directory, b"new")),
        "unlink": (Kind.UNLINK, lambda v, p: v.unlink(root, b"file")),
        "unlink one of two": (Kind.UNLINK, lambda v, p: v.unlink(root, b"link")),
        "rmdir": (Kind.RMDIR, lambda v, p: v.rmdir(root, b"empty")),
        "rename": (Kind.RENAME, lambda v, p: v.rename(root, b"file", root, b"new")),
        "rename over a file": (Kind.RENAME, lambda v, p: v.rename(root, b"file", p.directory, b"inner")),
        "rename of a directory": (Kind.RENAME, lambda v, p: v.rename(root, b"dir", root, b"empty")),
        "exchange": (Kind.EXCHANGE, lambda v, p: v.rename(root, b"file", root, b"dir", RenameFlag.EXCHANGE)),
        "chmod": (Kind.SETATTR, lambda v, p: v.setattr(p.file, SetAttr(mode=0o600))),
        "chmod of a directory": (Kind.SETATTR, lambda v, p: v.setattr(p.directory, SetAttr(mode=0o700))),
        "truncate": (Kind.SETATTR, lambda v, p: v.setattr(p.linked, SetAttr(size_bytes=1 << 20))),
        "commit inline": (Kind.COMMIT, lambda v, p: v.commit_body(p.file, BodyChange(0, 4, inline=b"text"))),
        "commit blob": (Kind.COMMIT, _commit_blob),
        "put": (Kind.COMMIT, lambda v, p: v.put_values([_value(v, b"file", b"text")])),
        "put under one of two names": (Kind.COMMIT, lambda v, p: v.put_values([_value(v, b"link", b"text")])),
        "setxattr": (Kind.SETXATTR, lambda v, p: v.setxattr(p.file, b"user.new", b"value", create=True)),
        "removexattr": (Kind.REMOVEXATTR, lambda v, p: v.removexattr(p.file, b"user.old")),
    }


async def _commit_blob(volume: Volume, places: Places) -> object:
    extent = Extent(0, 65536, volume.new_blob(), 0, 65536)
    return await volume.commit_body(places.inner, BodyChange(0, 65536, extents=(extent,), lifts_inline=True))


def _value(volume: Volume, name: bytes, data: bytes) -> ValueWrite:
    return ValueWrite((ROOT_INO, name), None, NewBody(volume.session.new_ino(), len(data), data, (), 0o644, ME))


async def contents(store: Store) -> dict[bytes, tuple[bytes, int]]:
    """Every key of the volume with its value and its revision."""
    found = await store.range(Range(KEYS.prefix, KEYS.end))
    return {kv.key: (kv.value, kv.mod_revision) for kv in found.kvs}


async def changes(store: Store, since: int = 1) -> list[Change]:
    """What the journal says was done from revision `since` on, in order, without sessions' own bookkeeping."""
    last = (await store.range(Range(KEYS.superblock))).revision
    done: list[Change] = []
    revision = since - 1
    if last <= revision:
        return done
    # Past the last revision of the slots nothing comes: a put marks the end.
    mark = await store.lease_grant(60)
    end = await _mark(store, mark.id)
    with trio.fail_after(WAIT_S):
        async with store.watch(KEYS.slots, prefix_end(KEYS.slots), start_revision=since) as batches:
            async for batch in batches:
                for event in batch.events:
                    if not event.deleted and event.kv.mod_revision < end:
                        done += journal.decode(event.kv.value).changes
                if any(event.kv.mod_revision == end for event in batch.events):
                    break
    await store.lease_revoke(mark.id)
    return [change for change in done if change.kind not in _QUIET]


async def _mark(store: Store, lease: int) -> int:
    record = journal.encode(journal.SlotRecord(0, 0, 0, (Change(Kind.NOTHING),)))
    return (await store.txn((), (Put(KEYS.slot((1 << 24) - 1, 0), record, lease),))).revision


def counted(done: list[Change]) -> Counter[Kind]:
    """How often each kind was done."""
    return Counter(change.kind for change in done)


async def until_reopened(volume: Volume, lost: int) -> None:
    """Wait until the volume has a session that is not number `lost`."""
    with trio.fail_after(WAIT_S):
        while True:
            with contextlib.suppress(MetadataError):
                if volume.session.number != lost:
                    return
            await trio.sleep(0.01)


def names(count: int, tag: str = "f") -> Iterator[bytes]:
    """`count` names."""
    return (f"{tag}{number:05d}".encode() for number in range(count))


async def assert_sound_after_a_crash(store: Store) -> None:
    """The checker finds nothing but, maybe, a wrong sum of bytes and inodes: what a session that died did in its last
    seconds is in the namespace, and not in the sum."""
    violations = [violation async for violation in check_volume(store, VOLUME) if violation.table != "u"]
    assert violations == []
