"""A volume rebuilt from its change log alone, and the same facts read from the volume itself.

    tree = Rebuilt()
    for record in ...: tree.take(record)
    assert tree.facts() == await volume_facts(store, VOLUME)

Bodies are compared by their identity (inode and body version), everything else as it is. Taking a record checks its
path and old path against the names as they are at that moment, and that nothing of it lies in a sealed tree.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field, replace
from typing import Any

from apollofs.metadata import codec
from apollofs.metadata.changes.position import Position
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.format import pages
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.keys import Keys
from apollofs.metadata.records import ROOT_INO, Inode, InodeFlag
from apollofs.metadata.seal_records import Phase
from apollofs.metadata.sealing import read_seals
from apollofs.metadata.store import Range, Store

Facts = dict[str, Any]
SHOWN_FLAGS = InodeFlag.IMMUTABLE | InodeFlag.APPEND_ONLY
OF_TREES = frozenset({Kind.SEAL, Kind.UNSEAL, Kind.POLICY, Kind.RETENTION})
"""What is said of a whole tree, and changes no inode."""


@dataclass
class Node:
    """One inode. `times` are those of a directory's names: (mtime, ctime)."""

    ino: int
    mode: int
    uid: int
    gid: int
    nlink: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    size_bytes: int = 0
    rdev: int = 0
    target: bytes = b""
    flags: int = 0
    body_version: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    place: tuple[int, bytes] | None = None
    """Of a directory."""
    times: tuple[int, int] | None = None


class Rebuilt:
    """Fed with every record from the beginning on, in order."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.names: dict[tuple[int, bytes], int] = {}
        self.dead: dict[int, Node] = {}
        self.policies: dict[int, bytes] = {}
        """Encoded, by the directory that has it, gone or not."""
        self.retentions: dict[int, bytes] = {}
        """Likewise."""
        self.seals: dict[int, float] = {}
        """The term in seconds, by the root of what is sealed."""
        self.position = Position(0)
        self.taken = 0

    def facts(self) -> Facts:
        return {
            "nodes": self.nodes,
            "names": self.names,
            "policies": self.policies,
            "retentions": _of_living(self.retentions, self.nodes),
            "seals": self.seals,
        }

    def take(self, record: ChangeRecord) -> None:
        """Apply one record; it must be later than all before."""
        assert record.position > self.position, (record, self.position)
        self.position, change = record.position, record.change
        self.taken += 1
        if change.old_parent:
            assert record.old_path == self._path(change.old_parent, change.old_name), record
        if change.parent:
            assert record.path == self._path(change.parent, change.name), record
        if self.seals and change.kind not in OF_TREES:
            assert not self._is_sealed(change), record
        getattr(self, f"_{change.kind.name.lower()}")(change)

    def _is_sealed(self, change: Change) -> bool:
        """Whether anything that it changes lies in a sealed tree. Of a file that it finds by number the log says
        nothing."""
        if change.ino in self.seals or change.ino2 in self.seals:
            return True
        return any(self._is_below_seal(directory) for directory in (change.parent, change.old_parent) if directory)

    def _is_below_seal(self, directory: int) -> bool:
        while directory not in self.seals:
            place = self.nodes[directory].place
            if directory == ROOT_INO or place is None:
                return False
            directory = place[0]
        return True

    def path_of(self, directory: int) -> bytes:
        """Where a directory is now."""
        names: list[bytes] = []
        while directory != ROOT_INO:
            place = self.nodes[directory].place
            assert place is not None
            directory = place[0]
            names.insert(0, place[1])
        return b"/" + b"/".join(names)

    def _path(self, directory: int, name: bytes) -> bytes:
        if not name:
            return b"/"
        return self.path_of(directory).rstrip(b"/") + b"/" + name

    # -- the kinds ---------------------------------------------------------------------------------------------------

    def _create(self, change: Change) -> None:
        now = change.time_ns
        self.nodes[change.ino] = Node(
            *(change.ino, change.mode, change.uid, change.gid, 1, now, now, now, now, change.size_bytes),
            rdev=change.rdev,
            target=change.value,
        )
        self._name(change)

    def _mkdir(self, change: Change) -> None:
        now, place = change.time_ns, (change.parent, change.name)
        node = Node(change.ino, change.mode, change.uid, change.gid, 2, now, now, now, now, place=place)
        node.times = (now, now)
        self.nodes[change.ino] = node
        if change.ino != ROOT_INO:
            self._name(change)

    def _link(self, change: Change) -> None:
        self._name(change)
        self._set(change.ino, change, nlink=change.nlink)

    def _restore(self, change: Change) -> None:
        self.nodes[change.ino] = self.dead.pop(change.ino)
        self._name(change)
        self._set(change.ino, change, nlink=1)

    def _unlink(self, change: Change) -> None:
        self._unname(change, change.parent, change.name, change.ino)
        self._drop(change.ino, change.nlink, change)

    def _rmdir(self, change: Change) -> None:
        self._unname(change, change.parent, change.name, change.ino)
        del self.nodes[change.ino]

    def _rename(self, change: Change) -> None:
        if change.ino2:
            self._unname(change, change.parent, change.name, change.ino2)
            if stat.S_ISDIR(change.mode):
                del self.nodes[change.ino2]
            else:
                self._drop(change.ino2, change.nlink2, change)
        self._unname(change, change.old_parent, change.old_name, change.ino)
        self._name(change)
        self._arrive(change, change.ino, (change.parent, change.name))

    def _exchange(self, change: Change) -> None:
        here, there = (change.old_parent, change.old_name), (change.parent, change.name)
        assert (self.names[here], self.names[there]) == (change.ino, change.ino2)
        self.names[here], self.names[there] = change.ino2, change.ino
        self._touch(change.parent, change.time_ns)
        self._touch(change.old_parent, change.time_ns)
        self._arrive(change, change.ino, there)
        self._arrive(change, change.ino2, here)

    def _setattr(self, change: Change) -> None:
        node = self.nodes[change.ino]
        if change.atime_offset_ns is not None:
            node.atime_ns = change.time_ns + change.atime_offset_ns
        if change.mtime_offset_ns is not None:
            node.mtime_ns = change.time_ns + change.mtime_offset_ns
            if node.times is not None:
                node.times = (node.mtime_ns, change.time_ns)
        self._set(change.ino, change, mode=change.mode, uid=change.uid, gid=change.gid, flags=change.flags)
        self._set(change.ino, change, size_bytes=change.size_bytes, body_version=change.body_version)

    def _commit(self, change: Change) -> None:
        mtime_ns = change.time_ns + (change.mtime_offset_ns or 0)
        self._set(change.ino, change, mtime_ns=mtime_ns, size_bytes=change.size_bytes, body_version=change.body_version)

    def _setxattr(self, change: Change) -> None:
        self.nodes[change.ino].xattrs[change.attribute] = change.value
        self._set(change.ino, change)

    def _removexattr(self, change: Change) -> None:
        del self.nodes[change.ino].xattrs[change.attribute]
        self._set(change.ino, change)

    def _seal(self, change: Change) -> None:
        self.seals[change.ino] = change.term_s

    def _unseal(self, change: Change) -> None:
        self.seals.pop(change.ino, None)

    def _policy(self, change: Change) -> None:
        _put(self.policies, change)

    def _retention(self, change: Change) -> None:
        _put(self.retentions, change)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _name(self, change: Change) -> None:
        place = (change.parent, change.name)
        assert place not in self.names
        self.names[place] = change.ino
        self._touch(change.parent, change.time_ns)

    def _unname(self, change: Change, parent: int, name: bytes, ino: int) -> None:
        assert self.names.pop((parent, name)) == ino
        self._touch(parent, change.time_ns)

    def _touch(self, directory: int, time_ns: int) -> None:
        self.nodes[directory].times = (time_ns, time_ns)

    def _arrive(self, change: Change, ino: int, place: tuple[int, bytes]) -> None:
        node = self.nodes[ino]
        node.ctime_ns = change.time_ns
        if stat.S_ISDIR(node.mode):
            node.place = place

    def _drop(self, ino: int, nlink: int, change: Change) -> None:
        self._set(ino, change, nlink=nlink)
        if not nlink:
            self.dead[ino] = self.nodes.pop(ino)

    def _set(self, ino: int, change: Change, **fields: Any) -> None:
        self.nodes[ino] = replace(self.nodes[ino], ctime_ns=change.time_ns, **fields)


def _put(policies: dict[int, bytes], change: Change) -> None:
    if change.value:
        policies[change.ino] = change.value
    else:
        policies.pop(change.ino, None)


def _of_living(policies: dict[int, bytes], nodes: dict[int, Node]) -> dict[int, bytes]:
    """Who applies retention forgets it for directories that are gone, sooner or later."""
    return {directory: value for directory, value in policies.items() if directory in nodes}


async def volume_facts(store: Store, volume: str) -> Facts:
    """The same of the volume, as of one revision; seals that stand as of now."""
    keys = Keys(volume)
    revision = (await store.range(Range(keys.superblock))).revision
    nodes: dict[int, Node] = {}
    names: dict[tuple[int, bytes], int] = {}
    async for kv in pages(store, keys.inodes, revision=revision):
        node = _node_of(codec.decode_inode(kv.value, kv.mod_revision))
        nodes[node.ino] = node
    async for kv in pages(store, keys.dentries, revision=revision):
        dentry = codec.decode_dentry(kv.value, kv.mod_revision)
        names[keys.parse_dentry(kv.key)] = dentry.ino
        if dentry.inode is not None:
            nodes[dentry.ino] = _node_of(dentry.inode)
    async for kv in pages(store, keys.table(b"t"), revision=revision):
        times = codec.decode_times(kv.value)
        nodes[keys.parse_numbers(kv.key)[0]].times = (times.mtime_ns, times.ctime_ns)
    async for kv in pages(store, keys.table(b"x"), revision=revision):
        ino, name = keys.parse_xattr(kv.key)
        if ino in nodes:  # else an unlinked file's
            nodes[ino].xattrs[name] = kv.value
    policies, retentions = [
        {keys.parse_numbers(kv.key)[0]: kv.value async for kv in pages(store, prefix, revision=revision)}
        for prefix in (keys.policies, keys.retentions)
    ]
    seals = {seal.root: seal.term_s for seal in await read_seals(store, keys) if seal.phase is Phase.SEALED}
    return {
        "nodes": nodes,
        "names": names,
        "policies": policies,
        "retentions": _of_living(retentions, nodes),
        "seals": seals,
    }


def _node_of(inode: Inode) -> Node:
    return Node(
        *(inode.ino, inode.mode, inode.uid, inode.gid, inode.nlink),
        *(inode.atime_ns, inode.mtime_ns, inode.ctime_ns, inode.btime_ns),
        size_bytes=inode.size_bytes,
        rdev=inode.rdev,
        target=inode.target,
        flags=int(inode.flags & SHOWN_FLAGS),
        body_version=inode.body_version,
        place=(inode.parent, inode.name) if inode.is_dir else None,
    )


def differences(left: Facts, right: Facts) -> list[str]:
    """What differs, a line each: of some thousand nodes nobody could see it."""
    return [
        f"{what} {key}: {left[what].get(key)} / {right[what].get(key)}"
        for what in left
        for key in sorted(left[what].keys() | right[what].keys())
        if left[what].get(key) != right[what].get(key)
    ]
