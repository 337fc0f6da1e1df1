"""The records that the volume keeps: plain, frozen, typed. `codec.py` turns them into bytes and back.

Times are nanoseconds since 1970, UTC, and may be negative; sizes and offsets are bytes.
"""

from __future__ import annotations

import enum
import stat
from dataclasses import dataclass, field
from typing import NamedTuple

ROOT_INO = 1
NAME_BYTES_MAX = 255
TARGET_BYTES_MAX = 4095
XATTR_NAME_BYTES_MAX = 255
XATTR_VALUE_BYTES_MAX = 65_536
XATTRS_MAX = 256
"""Extended attributes of one inode; with the name limit it also keeps listxattr under the kernel's 64 KiB."""
LINKS_MAX = 65_000
FILE_BYTES_MAX = (1 << 63) - 1 - (1 << 20)
"""The largest size of a file; a MiB below the kernel's limit, so that block arithmetic never overflows."""


class InodeFlag(enum.IntFlag):
    """Bits of `Inode.flags`. IMMUTABLE and APPEND_ONLY have the values of the kernel's FS_*_FL."""

    IMMUTABLE = 0x10
    APPEND_ONLY = 0x20
    INLINE = 0x100
    """The body is in `v/<ino>`, not in blobs."""
    WAYPOINT = 0x1000
    """Of a directory: a sealed tree lies below it, so its name, owner and mode stay as they are."""


@dataclass(frozen=True, slots=True)
class Extent:
    """File bytes `[offset, offset + length)` are bytes `[blob_offset, ...)` of a blob of `blob_length`."""

    offset: int
    length: int
    blob: int
    blob_offset: int
    blob_length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Inode(NamedTuple):
    """One file, directory, symlink or node, as of etcd revision `revision`."""

    ino: int
    mode: int
    """File type and permission bits, as in st_mode."""
    nlink: int
    uid: int
    gid: int
    size_bytes: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    rdev: int = 0
    target: bytes = b""
    """Of a symlink."""
    flags: InodeFlag = InodeFlag(0)
    extents: tuple[Extent, ...] = ()
    """In order of offset, never overlapping, never past `size_bytes`; what no extent covers is a hole."""
    inline_bytes: int = 0
    """Length of the inline body; what lies between it and `size_bytes` is a hole."""
    body_version: int = 0
    """Grows by one with each change of the body."""
    parent: int = 0
    """Of a directory: where it is; 0 for everything else."""
    name: bytes = b""
    """Of a directory: its name in `parent`."""
    revision: int = 0
    """mod_revision of the key that holds the record; not encoded."""
    xattrs: int = 0
    """How many extended attributes it has."""
    extent_pages: int = 0
    """How many keys `e/<ino>/<page>` hold the extents; 0: they are in the record."""
    extents_bytes: int = 0
    """Sum of the extents' lengths, kept where they are paged out."""
    copy: bytes = b""
    """The inline body once more, if it is very small, so that it is read with the name; else empty."""
    policy: int = 0
    """Of which directory the site policy applies (`policy.py`); 0: of none. Inherited at creation."""
    seal: int = 0
    """The number of the seal that keeps it as it is (`seal_records.py`); 0: none."""
    inline_at: int = 0
    """The number under which its inline body is, of a value that has replaced another one (`put_values.py`); 0: its
    own."""

    @property
    def inline_number(self) -> int:
        """Under which number `v/` has the inline body, if there is one."""
        return self.inline_at or self.ino

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_inline(self) -> bool:
        return bool(self.flags & InodeFlag.INLINE)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that are stored: st_blocks * 512, rounded up."""
        if self.is_inline:
            return self.inline_bytes
        return self.extents_bytes if self.extent_pages else sum(extent.length for extent in self.extents)


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """A name in a directory. `inode` is there for a file with one name (embedded), else None."""

    name: bytes
    ino: int
    file_type: int
    """S_IFMT bits."""
    inode: Inode | None = None
    record: object = field(default=None, compare=False, repr=False)
    """What it was read from, to tell whether that is what the name means still."""


@dataclass(frozen=True, slots=True)
class DirectoryPage:
    """Part of a directory in name order. All pages read with one `revision` are one snapshot."""

    entries: tuple[DirectoryEntry, ...]
    more: bool
    revision: int


class Body(NamedTuple):
    """A file's inode with everything needed to read its bytes: all extents, or the inline bytes."""

    inode: Inode
    inline: bytes = b""


@dataclass(frozen=True, slots=True)
class BodyChange:
    """What one commit changes of a body. The commit never shrinks a file; truncation is `setattr`.

    Either `inline` is the whole new body (and needs that nobody else has changed the body since `base_version`), or
    `extents` are laid over the newest extents, whoever wrote those (so that two mounts that write different ranges
    both keep their bytes), and `holes` are cut out of them first. `lifts_inline`: the extents contain all that was
    inline at `base_version`, which must still be the newest. What can't be merged raises `BodyConflict`; the writer
    then reads the body again and prepares anew.
    """

    base_version: int
    size_at_least: int
    extents: tuple[Extent, ...] = ()
    holes: tuple[tuple[int, int], ...] = ()
    """Ranges (offset, length) that become holes (punched), before the extents are laid over."""
    inline: bytes | None = None
    lifts_inline: bool = False
    rewrites_all: bool = False
    """The extents replace every extent there is (merging a fragmented file); needs `base_version` to be the newest."""
    append_from: int | None = None
    """Extents at or past this offset were appended (O_APPEND): if the file has grown past `append_from` since, they
    move by as much."""
    mtime_ns: int = 0
    """0: now."""
    is_packed: bool = False
    """The extents' blob holds bytes of other files too, so the inode's reference to it is put."""
    cloned_from: int = 0
    """The extents are in blobs of this inode, which must still refer to them: else CloneSourceChanged."""
    copies: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """(blob, sites that have all of it besides its own), of the extents' blobs."""


@dataclass(frozen=True, slots=True)
class SetAttr:
    """Changes of setattr; None leaves a field. Times: nanoseconds, or NOW for the time of the operation."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size_bytes: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    flags: InodeFlag | None = None
    """New IMMUTABLE and APPEND_ONLY bits; the others are kept."""
    clear_suid: bool = False
    """Clear S_ISUID, and S_ISGID where the group may execute (a write, truncate or chown by an unprivileged user)."""


NOW = -(1 << 63)
"""In `SetAttr.atime_ns` and `mtime_ns`: the time of the operation (UTIME_NOW)."""


TIME_MIN_NS, TIME_MAX_NS = -(1 << 62), (1 << 63) - 1
"""What can be stored, as nanoseconds since 1970: from 1823 to 2262. Differences of such times from now fit 64 bits."""


def storable_time(time_ns: int) -> int:
    """As with other filesystems, a time that can't be stored becomes the nearest one that can."""
    return min(max(time_ns, TIME_MIN_NS), TIME_MAX_NS)


def without_suid(mode: int) -> int:
    """A file's mode after a write or a chown: no setuid bit, and no setgid bit if the group may execute."""
    return mode & ~stat.S_ISUID & (~stat.S_ISGID if mode & stat.S_IXGRP else ~0)


@dataclass(frozen=True, slots=True)
class Owner:
    """Credentials of who creates something."""

    uid: int
    gid: int


class RenameFlag(enum.IntFlag):
    """renameat2's flags."""

    NOREPLACE = 1
    EXCHANGE = 2


@dataclass(frozen=True, slots=True)
class Renamed:
    """What a rename did: the inode that moved, and what the target's name meant before (replaced or exchanged)."""

    moved: Inode
    replaced: Inode | None
    """As it is now: nlink 0 if that was its last name."""


@dataclass(frozen=True, slots=True)
class Superblock:
    uuid: str
    name: str
    block_bytes: int
    """Size of the blocks that blobs are cut into; each is one object."""
    inline_bytes_max: int
    """Bodies up to this size are kept in etcd."""
    features: tuple[str, ...]
    created_ns: int
    sites_made: int = 1
    """The id that was given to a site last. None is given twice: mounts and agents have stores open by it."""


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """A site and where its bodies are. `store` is a flat mapping, never credentials (`blobstore.url`)."""

    id: int
    """1 to 255; the top byte of the blobs written there."""
    name: str
    store: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class MountRecord:
    """Who has the volume mounted; lives as long as the session."""

    session: int
    host: str
    pid: int
    mountpoint: str
    site: str
    version: str
    started_ns: int

    @property
    def serves_files(self) -> bool:
        """Whether it is a mount, and not a command that works on the volume for a moment."""
        return bool(self.mountpoint)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the volume holds: regular bytes as allocated, and inodes of every type."""

    bytes: int
    inodes: int
