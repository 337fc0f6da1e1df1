"""What is mounted on this host: /proc/self/mountinfo, read without touching a mount (a dead one would hang)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

MOUNTINFO = "/proc/self/mountinfo"
FSTYPE = "fuse.apollofs"
FSNAME_PREFIX = "apollofs:"
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line. `device` is "major:minor", the same for every bind mount of one filesystem."""

    device: str
    root: str
    mountpoint: str
    fstype: str
    source: str

    @property
    def is_apollofs(self) -> bool:
        return self.fstype == FSTYPE

    @property
    def volume(self) -> str:
        """Of an apollofs mount: the volume's name."""
        return self.source.removeprefix(FSNAME_PREFIX)


def read_mounts(path: str = MOUNTINFO) -> list[MountEntry]:
    """Every mount of this process's namespace, in the order in which they were made (later ones hide earlier ones)."""
    with open(path, "rb") as file:
        return [parse_line(line) for line in file.read().splitlines()]


def parse_line(line: bytes) -> MountEntry:
    """See proc(5): optional fields end with a lone hyphen."""
    before, _, after = line.partition(b" - ")
    fields, tail = before.split(b" "), after.split(b" ")
    return MountEntry(
        device=fields[2].decode(),
        root=_unescape(fields[3]),
        mountpoint=_unescape(fields[4]),
        fstype=_unescape(tail[0]),
        source=_unescape(tail[1]),
    )


def _unescape(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda matched: bytes([int(matched[1], 8) & 0xFF]), field))


def mount_at(mountpoint: str, mounts: list[MountEntry] | None = None) -> MountEntry | None:
    """What is mounted exactly at `mountpoint` (absolute, without symlinks), or None."""
    for entry in reversed(read_mounts() if mounts is None else mounts):
        if entry.mountpoint == mountpoint:
            return entry
    return None


def place_of(device: str, mounts: list[MountEntry] | None = None) -> str | None:
    """A mountpoint in this mount namespace at which the filesystem `device` is on top, or None."""
    known = read_mounts() if mounts is None else mounts
    return next(
        (point for point, top in {entry.mountpoint: entry.device for entry in known}.items() if top == device), None
    )


def mount_of(path: str, mounts: list[MountEntry] | None = None) -> MountEntry | None:
    """The mount that `path` (absolute, without symlinks) lies on."""
    best: MountEntry | None = None
    for entry in read_mounts() if mounts is None else mounts:
        below = entry.mountpoint.rstrip("/") + "/"
        inside = path == entry.mountpoint or path.startswith(below)
        if inside and (best is None or len(entry.mountpoint) >= len(best.mountpoint)):
            best = entry
    return best


def absolute(path: str) -> str:
    """Absolute and without symlinks in its parent, never asking the last component itself: it may be a dead mount."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name) if name else "/"


def has_mounts_below(device: str, mounts: list[MountEntry] | None = None) -> bool:
    """Whether something is mounted on a directory or file of the filesystem `device`, in this mount namespace."""
    known = read_mounts() if mounts is None else mounts
    roots = tuple(entry.mountpoint.rstrip("/") + "/" for entry in known if entry.device == device)
    return any(entry.mountpoint.startswith(roots) for entry in known)
