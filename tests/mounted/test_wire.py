"""The wire on a real kernel: INIT, what pyfuse3 hides, intercepted requests, bugs, notifications, the loop's end."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollofs.fs.wire_constants import InitFlag, Opcode, SetattrValid
from tests.mounted.wire_mount import WAIT_S, Mount, finish, probes_under, wait_readable

pytestmark = pytest.mark.mounted


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with probes_under(tmp_path) as mount_one:
        yield mount_one


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_init_is_negotiated_and_the_loop_ends(mount: Mount, fast: bool, how: str) -> None:
    probe = mount(fast=fast, clear_flags=int(InitFlag.ASYNC_DIO), linger_us=50)
    assert probe.run("print(json.dumps(sorted(os.listdir(mnt))))") == ["hang", "odd"]
    init = probe.seen()["init"]
    wanted = InitFlag.POSIX_LOCKS | InitFlag.FLOCK_LOCKS | InitFlag.PARALLEL_DIROPS
    assert init["flags"] & wanted == wanted & init["offered"]
    assert not init["flags"] & InitFlag.ASYNC_DIO
    assert (init["max_background"], init["congestion_threshold"]) == (100, 75)
    assert init["max_write_bytes"] == 1 << 20
    command = ["umount", str(probe.mountpoint)] if how == "umount" else ["kill", "-TERM", str(probe.process.pid)]
    last = probe.end(command)
    assert (last["waits"] is not None) == fast
    assert last["registered"] == 0


def test_the_loop_ends_while_a_handler_is_blocked(mount: Mount) -> None:
    probe = mount()
    client = probe.start("print(1, flush=True); os.open(mnt + '/hang', os.O_RDONLY)")
    assert client.stdout is not None
    wait_readable(client.stdout)
    client.kill()  # the interrupt ends the handler
    client.communicate(timeout=WAIT_S)
    probe.end(["kill", "-TERM", str(probe.process.pid)])


@pytest.mark.parametrize("fast", [True, False])
def test_details_that_pyfuse3_hides(mount: Mount, fast: bool) -> None:
    probe = mount(fast=fast)
    pid = probe.run("""
fd = os.open(mnt + '/f', os.O_RDWR | os.O_CREAT, 0o640)
os.close(fd)
fd = os.open(mnt + '/f', os.O_WRONLY | os.O_APPEND | os.O_SYNC)
os.write(fd, b'hello')
os.utime(mnt + '/f')
os.ftruncate(fd, 3)
os.close(fd)
print(os.getpid())
""")
    seen = probe.seen()
    assert seen["write"]["open_flags"] & os.O_APPEND
    assert seen["write"]["open_flags"] & os.O_SYNC == os.O_SYNC
    assert (seen["write"]["size"], seen["write"]["pid"]) == (5, pid)
    assert seen["open"]["flags"] & os.O_APPEND
    assert seen["setattr"]["valid"] & SetattrValid.SIZE
    assert seen["setattr"]["size"] == 3
    assert seen["flush"]["pid"] == pid
    assert seen["release"]["fh"] == seen["write"]["fh"]


def test_setattr_says_now(mount: Mount) -> None:
    probe = mount()
    probe.run("os.utime(mnt + '/odd')")
    now = SetattrValid.ATIME_NOW | SetattrValid.MTIME_NOW
    assert probe.seen()["setattr"]["valid"] & now == now


def test_open_reply_bits_reach_the_kernel(mount: Mount) -> None:
    """CREATE answers with DIRECT_IO: each read comes to the daemon with its own size, not that of a page."""
    probe = mount()
    probe.run("fd = os.open(mnt + '/f', os.O_RDWR | os.O_CREAT); os.write(fd, b'hello'); os.pread(fd, 3, 1)")
    read = probe.seen()["read"]
    assert (read["offset"], read["size"]) == (1, 3)


def test_ranges(mount: Mount) -> None:
    probe = mount()
    result = probe.run("""
a = os.open(mnt + '/a', os.O_RDWR | os.O_CREAT)
b = os.open(mnt + '/b', os.O_RDWR | os.O_CREAT)
os.posix_fallocate(a, 0, 10000)
os.pwrite(a, b'0123456789', 0)
size = os.fstat(a).st_size
data, hole = os.lseek(a, 5, os.SEEK_DATA), os.lseek(a, 5, os.SEEK_HOLE)
try:
    os.lseek(a, 10000, os.SEEK_DATA)
except OSError as exc:
    past_end = exc.errno
copied = os.copy_file_range(a, b, 4, 3, 0)
print(json.dumps([size, data, hole, past_end, copied, os.pread(b, 10, 0).decode()]))
""")
    assert result == [10000, 5, 10000, errno.ENXIO, 4, "3456"]
    assert probe.seen()["fallocate"]["length"] == 10000


def test_ioctl_and_flags(mount: Mount) -> None:
    probe = mount()
    result = probe.run("""
fd = os.open(mnt + '/a', os.O_RDWR | os.O_CREAT)
flags = bytearray(8)
fcntl.ioctl(fd, 0x40086602, struct.pack('<Q', 0x30))
fcntl.ioctl(fd, 0x80086601, flags)
doubled = bytearray(struct.pack('<Q', 21))
fcntl.ioctl(fd, 0xc0085a01, doubled)
errors = []
for command in (0x5a03, 0x80085a02):
    try:
        fcntl.ioctl(fd, command, bytearray(8))
    except OSError as exc:
        errors.append(exc.errno)
print(json.dumps([flags[0], doubled[0], errors]))
""")
    assert result == [0x30, 42, [errno.ENOTTY, errno.EIO]]
    assert probe.seen()["bugs"] == 1


def test_flags_of_a_directory(mount: Mount) -> None:
    probe = mount()
    probe.run("fd = os.open(mnt, os.O_RDONLY); fcntl.ioctl(fd, 0x80086601, bytearray(8))")
    assert probe.seen()["ioctl"] == [0x80086601, 0, 4]


def test_birth_time(mount: Mount) -> None:
    probe = mount()
    result = subprocess.run(
        ["stat", "-c", "%W", str(probe.mountpoint / "odd")], capture_output=True, text=True, check=True, timeout=WAIT_S
    )
    assert result.stdout.strip() == "1000000000"


@pytest.mark.parametrize("plus", [True, False])
def test_a_long_directory_is_listed_once(mount: Mount, plus: bool) -> None:
    probe = mount(clear_flags=0 if plus else int(InitFlag.DO_READDIRPLUS))
    count = probe.run("""
for number in range(300):
    os.mkdir(f'{mnt}/directory-{number:04}')
names = os.listdir(mnt)
assert len(names) == len(set(names))
assert all(entry.is_dir() for entry in os.scandir(mnt) if entry.name.startswith('directory'))
print(len(names))
""")
    assert count == 302
    seen = probe.seen()
    assert ("readdirplus" in seen, "readdir" in seen) == (plus, not plus)
    assert seen["readdirplus" if plus else "readdir"] > 2


def test_xattr_flags_and_tmpfile(mount: Mount) -> None:
    probe = mount()
    result = probe.run("""
errors = []
for name, flag in (('user.a', os.XATTR_REPLACE), ('user.a', os.XATTR_CREATE), ('user.a', os.XATTR_CREATE)):
    try:
        os.setxattr(mnt + '/odd', name, b'v', flag)
        errors.append(0)
    except OSError as exc:
        errors.append(exc.errno)
fd = os.open(mnt, os.O_TMPFILE | os.O_RDWR, 0o600)
os.write(fd, b'x')
print(json.dumps([errors, os.getxattr(mnt + '/odd', 'user.a').decode(), os.pread(fd, 9, 0).decode()]))
""")
    assert result == [[errno.ENODATA, 0, errno.EEXIST], "v", "x"]


@pytest.mark.parametrize("fast", [True, False])
def test_a_bug_costs_one_request_not_the_mount(mount: Mount, fast: bool) -> None:
    probe = mount(fast=fast)
    result = probe.run("""
errors = []
for call in (lambda: os.stat(mnt + '/boom'), lambda: os.open(mnt + '/odd', os.O_RDONLY)):
    try:
        call()
    except OSError as exc:
        errors.append(exc.errno)
print(json.dumps(errors))
""")
    assert result == [errno.EIO, errno.EIO]
    assert probe.seen()["bugs"] == 2
    log = probe.log.read_text()
    assert "ZeroDivisionError" in log
    assert "Traceback" in log


def test_a_bug_in_forget_is_only_logged(mount: Mount) -> None:
    probe = mount(broken_forget=True)
    probe.run("os.mkdir(mnt + '/d'); os.rmdir(mnt + '/d')")
    seen = probe.until(lambda seen: seen["bugs"] > 0)  # FORGET comes when the kernel sees fit, soon
    assert seen["forget"][0][1] >= 1


@pytest.mark.parametrize("fast", [True, False])
def test_many_clients_at_once(mount: Mount, fast: bool) -> None:
    probe = mount(fast=fast, workers_max=4)
    clients = [
        probe.start(f"""
for number in range(100):
    path = f'{{mnt}}/{worker}-{{number}}'
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert os.write(fd, b'x' * number) == number
    os.close(fd)
    os.unlink(path)
""")
        for worker in range(4)
    ]
    for client in clients:
        finish(client)
    assert probe.seen()["bugs"] == 0


def test_blocked_requests_leave_workers_for_others(mount: Mount) -> None:
    probe = mount(workers_max=4)
    hanging = [probe.start("print(1, flush=True); os.open(mnt + '/hang', os.O_RDONLY)") for _ in range(3)]
    for client in hanging:
        assert client.stdout is not None
        wait_readable(client.stdout)
    assert "counts" in probe.seen()
    for client in hanging:
        client.kill()
        client.communicate(timeout=WAIT_S)


def test_with_all_workers_waiting_interrupts_are_read(mount: Mount) -> None:
    """What need not wait is answered, what would wait is refused, and a killed process goes."""
    probe = mount(workers_max=4)
    hanging = [probe.start("os.open(mnt + '/hang', os.O_RDONLY)") for _ in range(4)]
    probe.until(lambda seen: seen["counts"].get(str(int(Opcode.OPEN))) == 4)
    refused = probe.run("""
try:
    os.open(mnt + '/hang', os.O_RDONLY)
except OSError as exc:
    print(exc.errno)
""")
    assert refused == errno.EAGAIN
    for client in hanging:
        client.kill()
        client.communicate(timeout=WAIT_S)
    last = probe.end(["kill", "-TERM", str(probe.process.pid)])
    assert last["registered"] == 0


def test_passthrough_reads_the_backing_file(mount: Mount, tmp_path: Path) -> None:
    """Needs CAP_SYS_ADMIN and Linux 6.9; without them the mount says so and serves the file itself."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"from the backing file")
    probe = mount(backing=str(backing), set_flags=int(InitFlag.PASSTHROUGH))
    content = probe.run("print(json.dumps(open(mnt + '/odd', 'rb').read().decode()))")
    seen = probe.seen()
    if seen["backing"] in ("open", "closed"):
        assert seen["init"]["flags"] & InitFlag.PASSTHROUGH
        assert content == "from the backing file"
        assert str(int(Opcode.READ)) not in seen["counts"]
        assert probe.until(lambda seen: seen["backing"] == "closed")
    else:
        assert content == ""


def test_notifications_reach_the_kernel(mount: Mount) -> None:
    """A name and attributes that the kernel may keep for ever are asked for again only when we say so."""
    probe = mount(timeout_s=1000)
    result = probe.run("""
def asked(*commands):
    before = json.loads(os.getxattr(mnt, 'user.seen'))['counts']
    for command in commands:
        os.setxattr(mnt + '/hang', 'user.notify', command.encode())
    os.stat(mnt + '/odd')
    after = json.loads(os.getxattr(mnt, 'user.seen'))['counts']
    return [after.get(op, 0) - before.get(op, 0) for op in ('1', '3')]
os.stat(mnt + '/odd')
kept = asked()
attributes = asked('attributes')
entry = asked('entry')
expired = asked('expire')
epoch = asked('epoch')
asked('store')
told = json.loads(os.getxattr(mnt, 'user.seen'))['notified']
print(json.dumps([kept, attributes, entry, expired, epoch, told]))
""")
    kept, attributes, entry, expired, epoch, told = result
    assert kept == [0, 0]
    assert attributes[1] == 1
    assert (entry[0], expired[0]) == (1, 1)
    assert epoch[0] == (1 if told["epoch"] else 0)
    assert told["attributes"] is True
    assert told["entry"] is True
    assert told["store"] is False  # an inode that the kernel has never seen


def test_the_kernel_forgets_what_it_is_asked_to(mount: Mount) -> None:
    """Needs Linux 6.18; an older one says that it can't."""
    probe = mount(timeout_s=1000)
    ino = probe.run("""
ino = os.stat(mnt + '/odd').st_ino
os.setxattr(mnt + '/hang', 'user.notify', b'prune')
print(ino)
""")
    if probe.seen()["notified"]["prune"]:
        assert probe.until(lambda seen: "forget" in seen)["forget"] == [[ino, 1]]
