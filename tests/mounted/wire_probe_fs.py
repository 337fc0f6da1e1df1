"""A tiny filesystem in memory on pyfuse3 and the wire, to try the wire on a real kernel.

Usage: python -m tests.mounted.wire_probe_fs MOUNTPOINT OPTIONS-AS-JSON.  Prints "ready" when it answers; ends on
SIGTERM or umount.  The xattr user.seen of the root is a JSON object of what the handlers were told, by operation.
Some names misbehave: looking up `boom` raises, opening `hang` waits for ever, opening `odd` returns nonsense.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from apollofs.fs import fastloop
from apollofs.fs.attributes import Attributes
from apollofs.fs.wire import Wire, WireConfig
from apollofs.fs.wire_constants import (
    FS_IOC_FSGETXATTR,
    FS_IOC_GETFLAGS,
    FS_IOC_SETFLAGS,
    InitFlag,
    OpenReplyFlag,
)
from apollofs.fs.wire_guard import guard_operations
from apollofs.fs.wire_interrupts import Interruptible
from apollofs.fs.wire_load import pyfuse3
from apollofs.fs.wire_operations import WireOperations
from apollofs.fs.wire_replies import DirectoryReply, LockRange, encode_fs_flags, encode_fsxattr
from apollofs.fs.wire_structs import (
    CopyRangeRequest,
    CreateDetails,
    FallocateRequest,
    IoctlRequest,
    LockRequest,
    LseekRequest,
    ReadDirectoryRequest,
    Request,
    SetxattrRequest,
    StatxRequest,
    decode_flush,
    decode_fs_flags,
    decode_open,
    decode_read,
    decode_release,
    decode_setattr,
    decode_write,
)

BIRTH_NS = 1_000_000_000_123_456_789
LARGE_OFFSET = 1 << 60
"""Added to directory offsets: they are opaque 64-bit numbers."""


@dataclass(slots=True)
class Node:
    attributes: Attributes
    data: bytearray = field(default_factory=bytearray)
    children: dict[bytes, int] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    locks: dict[tuple[bool, int], tuple[int, int]] = field(default_factory=dict)
    """(flock, owner) -> kind and pid, whole files only."""

    def stat(self) -> Attributes:
        return self.attributes._replace(size_bytes=len(self.data), blocks=(len(self.data) + 511) // 512)


class Tree:
    """The nodes, shared by the two handler classes."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.nodes: dict[int, Node] = {}
        self.seen: dict[str, Any] = {}
        self.unlocked = trio.lowlevel.ParkingLot()
        self.new(stat.S_IFDIR | 0o755)
        for name in (b"hang", b"odd"):
            self.nodes[1].children[name] = self.new(stat.S_IFREG | 0o644)

    def new(self, mode: int) -> int:
        ino = len(self.nodes) + 1
        times = (BIRTH_NS, BIRTH_NS, BIRTH_NS, BIRTH_NS)
        attributes = Attributes(ino, mode, 1, os.getuid(), os.getgid(), 0, 0, 0, *times)
        self.nodes[ino] = Node(attributes._replace(attr_timeout_s=self.timeout_s, entry_timeout_s=self.timeout_s))
        return ino

    def drop_locks(self, ino: int, owner: int, *, flock: bool) -> None:
        if self.nodes[ino].locks.pop((flock, owner), None) is not None:
            self.unlocked.unpark_all()


def to_pyfuse3(a: Attributes) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino, entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid = a.ino, a.mode, a.nlink, a.uid, a.gid
    entry.st_size, entry.st_blocks = a.size_bytes, a.blocks
    entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = a.atime_ns, a.mtime_ns, a.ctime_ns
    entry.attr_timeout, entry.entry_timeout = a.attr_timeout_s, a.entry_timeout_s
    return entry


class Shell(pyfuse3.Operations):
    """What pyfuse3 serves.  A file's fh is its ino."""

    def __init__(self, tree: Tree, wire: Wire, options: dict[str, Any]) -> None:
        super().__init__()
        self.broken_forget = options.get("broken_forget", False)
        self.backing: str | None = options.get("backing")
        self.backing_id: int | None = None
        self.tree = tree
        self.wire = wire

    def init(self) -> None:
        print("ready", flush=True)

    async def lookup(self, parent: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        if name == b"boom":
            raise ZeroDivisionError("boom")
        ino = self.tree.nodes[parent].children.get(name)
        if ino is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(ino, ctx)

    async def forget(self, inode_list: Any) -> None:
        self.tree.seen["forget"] = [list(pair) for pair in inode_list]
        if self.broken_forget:
            raise pyfuse3.FUSEError(errno.EIO)

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return to_pyfuse3(self.tree.nodes[inode].stat())

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        _, body = self.wire.current()
        self.tree.seen["setattr"] = decode_setattr(body)._asdict()
        node = self.tree.nodes[inode]
        if fields.update_size:
            del node.data[attr.st_size :]
            node.data.extend(bytes(attr.st_size - len(node.data)))
        return to_pyfuse3(node.stat())

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        ino = self.tree.nodes[parent].children[name] = self.tree.new(mode)
        return await self.getattr(ino, ctx)

    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        del self.tree.nodes[parent].children[name]

    async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        del self.tree.nodes[parent].children[name]

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        unique = self.wire.current_unique()
        ino = self.tree.nodes[parent].children[name] = self.tree.new(mode)
        self.wire.open_reply(unique, OpenReplyFlag.DIRECT_IO)
        return pyfuse3.FileInfo(fh=ino, keep_cache=False), await self.getattr(ino, ctx)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        request, body = self.wire.current()
        self.tree.seen["open"] = decode_open(body)._asdict() | {"pid": request.pid}
        children = self.tree.nodes[1].children
        if inode == children[b"hang"]:
            await trio.sleep_forever()
        if self.backing is not None:
            self.use_backing(self.wire.current_unique(), self.backing)
        elif inode == children[b"odd"]:
            return "no FileInfo"  # type: ignore[return-value]
        return pyfuse3.FileInfo(fh=inode, keep_cache=False)

    def use_backing(self, unique: int, path: str) -> None:
        with open(path, "rb") as file:
            try:
                self.backing_id = self.wire.device.backing_open(file.fileno())
            except OSError as exc:
                self.tree.seen["backing"] = exc.errno
                return
        self.wire.open_reply(unique, OpenReplyFlag.PASSTHROUGH, self.backing_id)
        self.tree.seen["backing"] = "open"

    async def read(self, fh: int, off: int, size: int) -> bytes:
        _, body = self.wire.current()
        self.tree.seen["read"] = decode_read(body)._asdict()
        return bytes(self.tree.nodes[fh].data[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        request, body = self.wire.current()
        self.tree.seen["write"] = decode_write(body)._asdict() | {"pid": request.pid}
        data = self.tree.nodes[fh].data
        data.extend(bytes(max(0, off - len(data))))
        data[off : off + len(buf)] = buf
        return len(buf)

    async def flush(self, fh: int) -> None:
        request, body = self.wire.current()
        flush = decode_flush(body)
        self.tree.seen["flush"] = flush._asdict() | {"pid": request.pid}
        self.tree.drop_locks(request.ino, flush.lock_owner, flock=False)

    async def release(self, fh: int) -> None:
        request, body = self.wire.current()
        release = decode_release(body)
        self.tree.seen["release"] = release._asdict()
        self.tree.drop_locks(request.ino, release.lock_owner, flock=True)
        if self.backing_id is not None:
            self.wire.device.backing_close(self.backing_id)
            self.backing_id = None
            self.tree.seen["backing"] = "closed"

    async def opendir(self, inode: int, ctx: Any) -> int:
        self.wire.open_reply(self.wire.current_unique(), OpenReplyFlag.CACHE_DIR)
        return inode

    async def releasedir(self, fh: int) -> None:
        pass

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        if name == b"user.seen":
            negotiated = self.wire.negotiated()
            assert negotiated is not None
            more = {"bugs": self.wire.faults.bugs, "tasks": self.wire.tasks, "init": negotiated._asdict()}
            return json.dumps(self.tree.seen | more | {"counts": self.wire.request_counts()}).encode()
        try:
            return self.tree.nodes[inode].xattrs[name]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ENODATA) from None


class WireShell(WireOperations):
    """What the wire serves: some of it at once, some in tasks."""

    wire: Wire

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    async def _notify(self, what: str) -> None:
        device, odd = self.wire.device, self.tree.nodes[1].children[b"odd"]
        calls: dict[str, Callable[[], bool]] = {
            "attributes": partial(device.invalidate_attributes, odd),
            "entry": partial(device.invalidate_entry, 1, b"odd"),
            "expire": partial(device.expire_entry, 1, b"odd"),
            "epoch": device.inc_epoch,
            "store": partial(device.store, 1 << 40, 0, b"bytes"),
            "prune": partial(device.prune, (odd, 1 << 40)),
        }
        self.tree.seen.setdefault("notified", {})[what] = await trio.to_thread.run_sync(calls[what])

    def _conflict(self, node: Node, lock: LockRequest) -> tuple[int, int] | None:
        for (flock, owner), held in node.locks.items():
            if flock == lock.flock and owner != lock.owner and fcntl.F_WRLCK in (held[0], lock.kind):
                return held
        return None

    def getlk(self, request: Request, lock: LockRequest) -> LockRange:
        kind, pid = self._conflict(self.tree.nodes[request.ino], lock) or (fcntl.F_UNLCK, 0)
        return LockRange(lock.start, lock.end, kind, pid)

    async def setlk(self, request: Request, lock: LockRequest, *, wait: bool) -> None:
        self.tree.seen["setlk"] = lock._asdict() | {"wait": wait}
        node = self.tree.nodes[request.ino]
        if lock.kind == fcntl.F_UNLCK:
            self.tree.drop_locks(request.ino, lock.owner, flock=lock.flock)
            return
        while self._conflict(node, lock) is not None:
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "locked")
            await self.tree.unlocked.park()
        node.locks[lock.flock, lock.owner] = lock.kind, lock.pid

    def fallocate(self, request: Request, allocate: FallocateRequest) -> None:
        self.tree.seen["fallocate"] = allocate._asdict()
        if allocate.mode:
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        data = self.tree.nodes[request.ino].data
        data.extend(bytes(max(0, allocate.offset + allocate.length - len(data))))

    def lseek(self, request: Request, seek: LseekRequest) -> int:
        size = len(self.tree.nodes[request.ino].data)
        if seek.offset >= size:
            raise pyfuse3.FUSEError(errno.ENXIO)
        return seek.offset if seek.whence == os.SEEK_DATA else size

    async def copy_file_range(self, request: Request, copy: CopyRangeRequest) -> int:
        await trio.lowlevel.checkpoint()
        self.tree.seen["copy_file_range"] = copy._asdict()
        part = self.tree.nodes[request.ino].data[copy.offset_in : copy.offset_in + copy.length]
        self.tree.nodes[copy.ino_out].data[copy.offset_out : copy.offset_out + len(part)] = part
        return len(part)

    def ioctl(self, request: Request, ioctl: IoctlRequest) -> bytes:
        self.tree.seen["ioctl"] = [ioctl.command, len(ioctl.data), ioctl.out_size_max]
        node = self.tree.nodes[request.ino]
        if ioctl.command == FS_IOC_GETFLAGS:
            return encode_fs_flags(node.attributes.flags, ioctl.out_size_max)
        if ioctl.command == FS_IOC_FSGETXATTR:
            return encode_fsxattr(node.attributes.flags)
        if ioctl.command == FS_IOC_SETFLAGS:
            node.attributes = node.attributes._replace(flags=decode_fs_flags(ioctl.data))
            return b""
        if ioctl.command == 0xC0085A01:  # _IOWR('Z', 1, 8 bytes): doubles a number
            return (2 * int.from_bytes(ioctl.data, "little")).to_bytes(8, "little")
        if ioctl.command == 0x80085A02:  # _IOR('Z', 2, 8 bytes): a handler that hands out too much
            return bytes(100)
        raise pyfuse3.FUSEError(errno.ENOTTY)

    def statx(self, request: Request, statx: StatxRequest) -> Attributes:
        return self.tree.nodes[request.ino].stat()

    async def read_directory(self, request: Request, read: ReadDirectoryRequest, reply: DirectoryReply) -> None:
        key = "readdirplus" if read.plus else "readdir"
        self.tree.seen[key] = self.tree.seen.get(key, 0) + 1
        children = list(self.tree.nodes[read.fh].children.items())
        start = read.offset - LARGE_OFFSET if read.offset else 0
        for position, (name, ino) in enumerate(children[start:], start + 1):
            attributes = self.tree.nodes[ino].stat()
            if not reply.add(name, attributes, LARGE_OFFSET + position):
                break

    async def set_xattr(self, request: Request, xattr: SetxattrRequest) -> None:
        if xattr.name == b"user.notify":
            await self._notify(xattr.value.decode())
            return
        xattrs = self.tree.nodes[request.ino].xattrs
        if xattr.flags & os.XATTR_CREATE and xattr.name in xattrs:
            raise FileExistsError(errno.EEXIST, "exists")
        if xattr.flags & os.XATTR_REPLACE and xattr.name not in xattrs:
            raise pyfuse3.FUSEError(errno.ENODATA)
        xattrs[xattr.name] = xattr.value

    def tmpfile(self, request: Request, create: CreateDetails) -> tuple[Attributes, int]:
        ino = self.tree.new(create.mode)
        return self.tree.nodes[ino].stat(), ino


async def serve(wire: Wire, loop: fastloop.FastLoop | None, workers_max: int) -> None:
    async with trio.open_nursery() as nursery:
        wire.start(nursery)

        async def end_on_signal() -> None:
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    pyfuse3.terminate()
                    return

        nursery.start_soon(end_on_signal)
        if loop is not None:
            await loop.serve(workers_max, wire.interrupts.refuse_waiting)
        else:
            await pyfuse3.main(1, workers_max)
        nursery.cancel_scope.cancel()


def main(mountpoint: str, options: dict[str, Any]) -> None:
    """Mount, serve, unmount."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    tree = Tree(options.get("timeout_s", 0))
    config = WireConfig(
        clear_flags=InitFlag(options.get("clear_flags", 0)),
        max_background=100,
        congestion_threshold=75,
        max_stack_depth=2 if "backing" in options else None,
        linger_us=options.get("linger_us", 0),
        lock_waits_max=options.get("lock_waits_max", 4096),
        set_flags=WireConfig().set_flags | InitFlag(options.get("set_flags", 0)),
    )
    wire = Wire(wire_shell := WireShell(tree), config)
    wire_shell.wire = wire
    shell = Shell(tree, wire, options)
    guard_operations(shell, wire.faults, wire.interrupts, {"open": Interruptible[options.get("open", "ALWAYS")]})
    pyfuse3.init(shell, mountpoint, {"fsname=wire-probe", "default_permissions"})
    wire.verify_active()
    loop = fastloop.install(wire.fd) if options.get("fast", True) else None
    try:
        trio.run(serve, wire, loop, options.get("workers_max", 16))
        print(json.dumps({"waits": loop.waits if loop else None, "registered": wire.interrupts.registered}), flush=True)
    finally:
        if loop is not None:
            loop.uninstall()
        wire.close()
        pyfuse3.close()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
