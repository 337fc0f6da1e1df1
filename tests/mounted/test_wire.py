"""The wire on a real kernel: a small filesystem mounted by a subprocess, used by other subprocesses.

No call into the mount is made by the test process itself, so that a mount which hangs fails a test, not the run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest

from apollofs.fs.wire_constants import InitFlag, Opcode, SetattrValid

pytestmark = pytest.mark.mounted

ROOT = Path(__file__).parents[2]
WAIT_S = 30
PRELUDE = "import errno, fcntl, json, os, signal, struct, sys\nmnt = sys.argv[1]\n"


def wait_readable(stream: IO[str]) -> None:
    ready, _, _ = select.select([stream], [], [], WAIT_S)
    assert ready, "nothing was printed in time"


class Probe:
    """One mount of wire_probe_fs."""

    def __init__(self, mountpoint: Path, log: Path, options: dict[str, Any]) -> None:
        self.mountpoint = mountpoint
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.mounted.wire_probe_fs", str(mountpoint), json.dumps(options)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
            )
        wait_readable(self.out)
        assert self.out.readline() == "ready\n", log.read_text()

    @property
    def out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def start(self, code: str) -> subprocess.Popen[str]:
        """A client process on this mount; its first argument is the mountpoint, its stdout JSON."""
        return subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code, str(self.mountpoint)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str) -> Any:
        """What a client that ran to its end printed, parsed."""
        return finish(self.start(code))

    def seen(self) -> dict[str, Any]:
        """What the handlers were told so far."""
        seen: dict[str, Any] = self.run("print(os.getxattr(mnt, 'user.seen').decode())")
        return seen

    def end(self, command: list[str]) -> dict[str, Any]:
        """End the mount by `command` and return what the process says at its end."""
        subprocess.run(command, check=True, timeout=WAIT_S)
        out, _ = self.process.communicate(timeout=WAIT_S)
        assert self.process.returncode == 0, self.log.read_text()
        last: dict[str, Any] = json.loads(out)
        return last

    def clean_up(self) -> None:
        """Leave nothing mounted and nothing running, whatever state it is in."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        self.out.close()
        if f" {self.mountpoint} " in Path("/proc/self/mounts").read_text():
            subprocess.run(["umount", "-l", str(self.mountpoint)], check=False, timeout=WAIT_S)


def finish(client: subprocess.Popen[str]) -> Any:
    try:
        out, err = client.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        client.kill()
        raise
    assert client.returncode == 0, err
    return json.loads(out) if out else None


Mount = Callable[..., Probe]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    probes: list[Probe] = []

    def mount_one(**options: Any) -> Probe:
        mountpoint = tmp_path / f"mnt{len(probes)}"
        mountpoint.mkdir()
        probes.append(Probe(mountpoint, tmp_path / f"log{len(probes)}", options))
        return probes[-1]

    yield mount_one
    for probe in probes:
        probe.clean_up()


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


def test_flock_and_fcntl_locks_reach_the_handlers(mount: Mount) -> None:
    probe = mount()
    result = probe.run("""
a, b = (os.open(mnt + '/odd2', os.O_RDWR | os.O_CREAT) for _ in 'ab')
fcntl.flock(a, fcntl.LOCK_EX)
try:
    fcntl.flock(b, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError as exc:
    refused = exc.errno
fcntl.flock(a, fcntl.LOCK_UN)
fcntl.flock(b, fcntl.LOCK_EX | fcntl.LOCK_NB)
fcntl.lockf(a, fcntl.LOCK_EX, 10, 5)
child = os.fork()
if child == 0:
    query = struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0)
    kind, _, _, _, pid = struct.unpack('hhqqi4x', fcntl.fcntl(b, fcntl.F_GETLK, query))
    os._exit(0 if (kind, pid) == (fcntl.F_WRLCK, 4242) else 1)
conflict_seen = os.waitpid(child, 0)[1] == 0
os.close(a)                                     # drops the fcntl locks
child = os.fork()
if child == 0:
    fcntl.lockf(b, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os._exit(0)
free = os.waitpid(child, 0)[1] == 0
print(json.dumps([refused, conflict_seen, free]))
""")
    assert result == [errno.EAGAIN, True, True]
    seen = probe.seen()
    assert seen["counts"][str(int(Opcode.SETLK))] >= 4
    assert seen["counts"][str(int(Opcode.GETLK))] == 1


LOCK_AND_REPORT = """
fd = os.open(mnt + '/lock', os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
print(json.dumps('locked'), flush=True)
"""

WAIT_FOR_LOCK = """
class Alarm(Exception):
    pass
def on_alarm(*args):
    raise Alarm
signal.signal(signal.SIGALRM, on_alarm)
fd = os.open(mnt + '/lock', os.O_RDWR | os.O_CREAT)
signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
try:
    fcntl.flock(fd, fcntl.LOCK_EX)
    result = 'locked'
except Alarm:
    result = 'interrupted'
signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps(result), flush=True)
"""


def hold_lock(probe: Probe) -> subprocess.Popen[str]:
    holder = probe.start(LOCK_AND_REPORT + "signal.pause()")
    assert holder.stdout is not None
    wait_readable(holder.stdout)
    assert holder.stdout.readline() == '"locked"\n'
    return holder


def test_a_blocked_lock_is_interrupted_and_then_granted(mount: Mount) -> None:
    probe = mount()
    holder = hold_lock(probe)
    assert probe.run(WAIT_FOR_LOCK) == "interrupted"
    assert probe.seen()["tasks"] == 0
    waiter = probe.start(LOCK_AND_REPORT)
    while probe.seen()["tasks"] == 0:
        assert waiter.poll() is None
    holder.kill()  # flock ends with the process
    holder.communicate(timeout=WAIT_S)
    assert finish(waiter) == "locked"
    assert probe.seen()["tasks"] == 0


def test_lock_waits_are_bounded(mount: Mount) -> None:
    probe = mount(lock_waits_max=1)
    holder = hold_lock(probe)
    waiter = probe.start(LOCK_AND_REPORT)
    while probe.seen()["tasks"] == 0:
        assert waiter.poll() is None
    refused = probe.run("""
fd = os.open(mnt + '/lock', os.O_RDWR)
try:
    fcntl.flock(fd, fcntl.LOCK_EX)
except OSError as exc:
    print(exc.errno)
""")
    assert refused == errno.ENOLCK
    holder.kill()  # flock ends with the process
    holder.communicate(timeout=WAIT_S)
    assert finish(waiter) == "locked"


OPEN_HANGING = """
class Alarm(Exception):
    pass
def on_alarm(*args):
    raise Alarm
signal.signal(signal.SIGALRM, on_alarm)
signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
try:
    os.open(mnt + '/hang', os.O_RDONLY)
except Alarm:
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps('interrupted'))
"""


@pytest.mark.parametrize("fast", [True, False])
def test_an_ordinary_request_is_interrupted(mount: Mount, fast: bool) -> None:
    probe = mount(fast=fast)
    assert probe.run(OPEN_HANGING) == "interrupted"
    assert probe.seen()["bugs"] == 0


def test_fatal_mode_stops_for_sigkill(mount: Mount) -> None:
    probe = mount(open="FATAL")
    client = probe.start("print(1, flush=True); os.open(mnt + '/hang', os.O_RDONLY)")
    assert client.stdout is not None
    wait_readable(client.stdout)
    while Path(f"/proc/{client.pid}/syscall").read_text().split()[0] != str(257):  # until it is inside openat()
        os.sched_yield()
    client.kill()
    client.communicate(timeout=WAIT_S)
    probe.end(["umount", str(probe.mountpoint)])


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
    while not (seen := probe.seen())["bugs"]:  # FORGET comes when the kernel sees fit, soon
        assert probe.process.poll() is None
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


def test_lock_constants_are_those_of_this_machine() -> None:
    assert (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK) == (0, 1, 2)
