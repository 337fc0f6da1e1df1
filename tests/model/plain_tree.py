"""A namespace in plain Python objects: what Linux and POSIX say a filesystem does, with no disk, network or kernel.

Paths are tuples of names below one directory. Methods raise OSError with the errno that the system call has, found in
the order in which Linux looks. Everything runs as root; symlinks lead nowhere.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

Path = tuple[str, ...]
NOREPLACE, EXCHANGE = 1, 2


def fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass(eq=False)
class Node:
    """A file, a directory (`children`) or a symlink (`target`); with several names it is in several places."""

    mode: int
    data: bytearray = field(default_factory=bytearray)
    children: dict[str, Node] | None = None
    target: str | None = None
    xattrs: dict[str, bytes] = field(default_factory=dict)
    mtime_ns: int | None = None
    """Where it was set and nothing has changed it since."""
    nlink: int = 1

    @property
    def entries(self) -> dict[str, Node]:
        if self.children is None:
            raise fail(errno.ENOTDIR)
        return self.children

    def splice(self, offset: int, data: bytes) -> None:
        """A write."""
        if data:
            self.data.extend(bytes(max(0, offset - len(self.data))))
            self.data[offset : offset + len(data)] = data
            self.mtime_ns = None

    def resize(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.mtime_ns = None

    def zero(self, offset: int, length: int) -> None:
        """A hole within the size."""
        end = min(len(self.data), offset + length)
        if offset < end:
            self.data[offset:end] = bytes(end - offset)
        self.mtime_ns = None


class PlainTree:
    """See the module."""

    def __init__(self) -> None:
        self.root = Node(0o755, children={}, nlink=2)

    # -- looking -----------------------------------------------------------------------------------------------------

    def parent(self, path: Path) -> Node:
        """The directory that a path's last name is in."""
        node = self.root
        for name in path[:-1]:
            node = self._step(node, name)
            if node.target is not None:
                raise fail(errno.ENOENT)
            if node.children is None:
                raise fail(errno.ENOTDIR)
        return node

    def _step(self, directory: Node, name: str) -> Node:
        found = directory.entries.get(name)
        if found is None:
            raise fail(errno.ENOENT)
        return found

    def lstat(self, path: Path) -> Node:
        return self._step(self.parent(path), path[-1])

    def stat(self, path: Path) -> Node:
        """Following a symlink, which leads nowhere."""
        node = self.lstat(path)
        if node.target is not None:
            raise fail(errno.ENOENT)
        return node

    def open(self, path: Path) -> Node:
        """O_RDWR | O_NOFOLLOW."""
        node = self.lstat(path)
        if node.target is not None:
            raise fail(errno.ELOOP)
        if node.children is not None:
            raise fail(errno.EISDIR)
        return node

    def truncatable(self, path: Path) -> Node:
        node = self.stat(path)
        if node.children is not None:
            raise fail(errno.EISDIR)
        return node

    def walk(self) -> Iterator[tuple[Path, Node]]:
        """Everything below the root."""
        waiting: list[tuple[Path, Node]] = [((), self.root)]
        while waiting:
            at, directory = waiting.pop()
            for name, node in directory.entries.items():
                yield (*at, name), node
                if node.children is not None:
                    waiting.append(((*at, name), node))

    # -- changing ----------------------------------------------------------------------------------------------------

    def create(self, path: Path, mode: int, *, exclusive: bool) -> Node:
        """O_RDWR | O_CREAT | O_NOFOLLOW, with O_EXCL if `exclusive`."""
        parent = self.parent(path)
        if path[-1] not in parent.entries:
            return self._add(parent, path[-1], Node(mode))
        if exclusive:
            raise fail(errno.EEXIST)
        return self.open(path)

    def mkdir(self, path: Path, mode: int) -> None:
        self._make(path, Node(mode, children={}, nlink=2))

    def symlink(self, path: Path, target: str) -> None:
        self._make(path, Node(0o777, target=target))

    def link(self, source: Path, target: Path) -> None:
        node = self.lstat(source)
        parent = self.parent(target)
        if target[-1] in parent.entries:
            raise fail(errno.EEXIST)
        if node.children is not None:
            raise fail(errno.EPERM)
        self._add(parent, target[-1], node)
        node.nlink += 1

    def unlink(self, path: Path) -> Node:
        """The node that lost a name."""
        node = self.lstat(path)
        if node.children is not None:
            raise fail(errno.EISDIR)
        self._take(self.parent(path), path[-1])
        return node

    def rmdir(self, path: Path) -> None:
        node = self.lstat(path)
        if node.entries:
            raise fail(errno.ENOTEMPTY)
        self._take(self.parent(path), path[-1])

    def rename(self, source: Path, target: Path, flags: int) -> Node | None:
        """The node whose name was taken over, if there was one."""
        old_parent, new_parent = self.parent(source), self.parent(target)
        old, new = self._step(old_parent, source[-1]), new_parent.entries.get(target[-1])
        if flags == NOREPLACE and new is not None:
            raise fail(errno.EEXIST)
        if flags == EXCHANGE and new is None:
            raise fail(errno.ENOENT)
        if _contains(source, target):
            raise fail(errno.EINVAL)
        if _contains(target, source):
            raise fail(errno.EINVAL if flags == EXCHANGE else errno.ENOTEMPTY)
        if old is new:
            return None
        if flags == EXCHANGE:
            assert new is not None
            self._take(old_parent, source[-1], keep=True)
            self._take(new_parent, target[-1], keep=True)
            self._add(old_parent, source[-1], new)
            self._add(new_parent, target[-1], old)
            return None
        if new is not None:
            _refuse_replacing(old, new)
            self._take(new_parent, target[-1])
        self._take(old_parent, source[-1], keep=True)
        self._add(new_parent, target[-1], old)
        return new

    def set_xattr(self, path: Path, name: str, value: bytes, flags: int) -> None:
        xattrs = self.stat(path).xattrs
        if flags == os.XATTR_CREATE and name in xattrs:
            raise fail(errno.EEXIST)
        if flags == os.XATTR_REPLACE and name not in xattrs:
            raise fail(errno.ENODATA)
        xattrs[name] = value

    def remove_xattr(self, path: Path, name: str) -> None:
        xattrs = self.stat(path).xattrs
        if name not in xattrs:
            raise fail(errno.ENODATA)
        del xattrs[name]

    def _make(self, path: Path, node: Node) -> None:
        parent = self.parent(path)
        if path[-1] in parent.entries:
            raise fail(errno.EEXIST)
        self._add(parent, path[-1], node)

    def _add(self, parent: Node, name: str, node: Node) -> Node:
        parent.entries[name] = node
        parent.nlink += node.children is not None
        parent.mtime_ns = None
        return node

    def _take(self, parent: Node, name: str, *, keep: bool = False) -> None:
        """`keep`: the node gets another name, so its own count stays."""
        node = parent.entries.pop(name)
        parent.nlink -= node.children is not None
        parent.mtime_ns = None
        if not keep:
            node.nlink = 0 if node.children is not None else node.nlink - 1


def _contains(outer: Path, inner: Path) -> bool:
    """Whether `inner` lies below `outer`."""
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _refuse_replacing(old: Node, new: Node) -> None:
    if old.children is not None and new.children is None:
        raise fail(errno.ENOTDIR)
    if old.children is None and new.children is not None:
        raise fail(errno.EISDIR)
    if new.children:
        raise fail(errno.ENOTEMPTY)
