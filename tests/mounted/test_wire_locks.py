"""Locks over the wire, and requests that a signal interrupts, on a real kernel."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollofs.fs.wire_constants import Opcode
from tests.mounted.wire_mount import WAIT_S, Mount, Probe, finish, probes_under, wait_readable

pytestmark = pytest.mark.mounted


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with probes_under(tmp_path) as mount_one:
        yield mount_one


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
    os._exit(0 if (kind, pid) == (fcntl.F_WRLCK, os.getppid()) else 1)
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
    assert seen["counts"][str(int(Opcode.SETLK))] >= 3
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
    probe.until(lambda seen: seen["tasks"] == 1)
    holder.kill()  # flock ends with the process
    holder.communicate(timeout=WAIT_S)
    assert finish(waiter) == "locked"
    assert probe.seen()["tasks"] == 0


def test_lock_waits_are_bounded(mount: Mount) -> None:
    probe = mount(lock_waits_max=1)
    holder = hold_lock(probe)
    waiter = probe.start(LOCK_AND_REPORT)
    probe.until(lambda seen: seen["tasks"] == 1)
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
    probe.until(lambda _: Path(f"/proc/{client.pid}/wchan").read_text() == "request_wait_answer")
    client.kill()
    client.communicate(timeout=WAIT_S)
    probe.end(["umount", str(probe.mountpoint)])
