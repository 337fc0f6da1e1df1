"""flock and fcntl locks between processes on one mount and on the other."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.mount_faults import until
from tests.mounted import clients
from tests.mounted.client import Client
from tests.mounted.clients import errno_of
from tests.mounted.conftest import Pair, Places

pytestmark = pytest.mark.mounted

EX, SH, UN, NB = fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN, fcntl.LOCK_NB
Lock = Callable[..., None]
KINDS: list[Lock] = [clients.flock, clients.lockf]


@dataclass(frozen=True)
class Queue:
    """What the processes of both mounts wait for."""

    pair: Pair

    def until(self, count: int) -> None:
        """Return when so many requests wait, each found to have to."""
        mounts = (self.pair.west, self.pair.east)
        until(lambda: sum(each.status()["locks"]["waiting"] for each in mounts) == count, f"{count} requests wait")


@pytest.fixture
def queue(places: Places) -> Queue:
    return Queue(places.pair)


@pytest.fixture
def file(here: Path, there: Path, client: Client, other_client: Client) -> None:
    """Both clients have the same file open as "f", the other one on the other mount."""
    (here / "file").write_bytes(b"0" * 100)
    client.call(clients.open_as, "f", here / "file", os.O_RDWR)
    other_client.call(clients.open_as, "f", there / "file", os.O_RDWR)


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("lock", KINDS)
def test_exclusive_and_shared(lock: Lock, client: Client, other_client: Client) -> None:
    client.call(lock, "f", EX)
    for operation in (EX, SH):
        assert other_client.call(errno_of, lock, "f", operation | NB) == errno.EAGAIN
    client.call(lock, "f", SH)
    other_client.call(lock, "f", SH | NB)
    assert other_client.call(errno_of, lock, "f", EX | NB) == errno.EAGAIN
    client.call(lock, "f", UN)
    # a conversion of one's own lock
    other_client.call(lock, "f", EX | NB)
    assert client.call(errno_of, lock, "f", SH | NB) == errno.EAGAIN
    other_client.call(lock, "f", UN)
    client.call(lock, "f", EX | NB)


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("lock", KINDS)
def test_a_lock_that_was_used_on_one_mount_only_is_free_for_a_try_on_the_other(
    lock: Lock, client: Client, other_client: Client, places: Places
) -> None:
    for operation in (EX, UN, SH, EX, UN):
        client.call(lock, "f", operation)
    assert places.pair.west.status()["locks"]["decided_alone"] >= 1
    other_client.call(lock, "f", EX | NB)
    assert client.call(errno_of, lock, "f", SH | NB) == errno.EAGAIN
    other_client.call(lock, "f", UN)
    client.call(lock, "f", EX | NB)


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("lock", KINDS)
def test_a_lock_that_goes_round_on_one_mount_goes_on_to_the_other(
    lock: Lock, here: Path, client: Client, other_client: Client, queue: Queue
) -> None:
    with Client.started() as third:
        third.call(clients.open_as, "f", here / "file", os.O_RDWR)
        client.call(lock, "f", EX)
        first = third.start(lock, "f", EX)
        queue.until(1)
        second = other_client.start(lock, "f", EX)
        queue.until(2)
        client.call(lock, "f", UN)
        first.result()
        assert client.call(errno_of, lock, "f", SH | NB) == errno.EAGAIN
        assert not second.is_done(0.1)
        third.call(lock, "f", UN)
        second.result()


@pytest.mark.usefixtures("file")
def test_getlk_sees_what_is_held_and_no_more(here: Path, there: Path, client: Client) -> None:
    client.call(clients.lockf, "f", EX, 10, 5)
    client.call(clients.lockf, "f", EX, 10, 50)
    client.call(clients.lockf, "f", UN, 10, 5)
    with (there / "file").open("r+b") as file:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
        kind, _, start, length, _ = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))
        assert (kind, start, length) == (fcntl.F_WRLCK, 50, 10)
        client.call(clients.lockf, "f", UN)
        assert struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] == fcntl.F_UNLCK


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("lock", KINDS)
def test_a_waiter_gets_the_lock_when_it_is_given_up(
    lock: Lock, client: Client, other_client: Client, queue: Queue
) -> None:
    client.call(lock, "f", EX)
    waiting = other_client.start(lock, "f", EX)
    queue.until(1)
    client.call(lock, "f", UN)
    waiting.result()
    assert client.call(errno_of, lock, "f", EX | NB) == errno.EAGAIN


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("lock", KINDS)
@pytest.mark.parametrize("way", ["close", "kill"])
def test_a_lock_ends_with_its_holder(lock: Lock, way: str, client: Client, other_client: Client, queue: Queue) -> None:
    client.call(lock, "f", EX)
    waiting = other_client.start(lock, "f", EX)
    queue.until(1)
    client.call(clients.close, "f") if way == "close" else client.kill()
    waiting.result()


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("lock", KINDS)
def test_a_waiter_that_is_interrupted_lets_go(lock: Lock, client: Client, other_client: Client, queue: Queue) -> None:
    client.call(lock, "f", EX)
    waiting = other_client.start(clients.interruptible, lock, "f", EX)
    queue.until(1)
    other_client.signal(signal.SIGUSR1)
    assert waiting.result() == "interrupted"
    client.call(lock, "f", UN)
    # nothing is left of the request that was given up
    client.call(lock, "f", EX | NB)
    assert other_client.call(errno_of, lock, "f", EX | NB) == errno.EAGAIN


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("lock", KINDS)
def test_a_waiter_that_is_killed_does_not_get_the_lock(
    lock: Lock, client: Client, other_client: Client, queue: Queue
) -> None:
    client.call(lock, "f", EX)
    other_client.start(lock, "f", EX)
    queue.until(1)
    other_client.kill()
    client.call(lock, "f", UN)
    client.call(lock, "f", EX)


@pytest.mark.usefixtures("file")
def test_record_locks_are_of_ranges(client: Client, other_client: Client) -> None:
    client.call(clients.lockf, "f", EX, 10, 0)
    client.call(clients.lockf, "f", SH, 10, 10)
    other_client.call(clients.lockf, "f", EX | NB, 0, 20)
    other_client.call(clients.lockf, "f", SH | NB, 5, 12)
    assert other_client.call(errno_of, clients.lockf, "f", EX | NB, 1, 9) == errno.EAGAIN
    assert other_client.call(errno_of, clients.lockf, "f", EX | NB, 1, 15) == errno.EAGAIN
    # a hole is unlocked into the range; what is on both sides stays
    client.call(clients.lockf, "f", UN, 4, 3)
    other_client.call(clients.lockf, "f", EX | NB, 4, 3)
    assert other_client.call(errno_of, clients.lockf, "f", EX | NB, 1, 2) == errno.EAGAIN
    assert other_client.call(errno_of, clients.lockf, "f", EX | NB, 1, 7) == errno.EAGAIN


@pytest.mark.usefixtures("file")
def test_getlk_names_a_conflict(here: Path, client: Client, other_client: Client) -> None:
    client.call(clients.lockf, "f", EX, 10, 5)
    with (here / "file").open("r+b") as file:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
        kind, _, start, length, pid = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))
        assert (kind, start, length, pid) == (fcntl.F_WRLCK, 5, 10, client.pid)
        asked = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 20, 5, 0)
        assert struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] == fcntl.F_UNLCK


@pytest.mark.usefixtures("file")
def test_record_locks_end_with_any_descriptor_of_the_process(client: Client, other_client: Client, here: Path) -> None:
    client.call(clients.lockf, "f", EX)
    client.call(clients.open_as, "second", here / "file", os.O_RDONLY)
    client.call(clients.close, "second")
    other_client.call(clients.lockf, "f", EX | NB)


@pytest.mark.usefixtures("file")
def test_flock_and_fcntl_do_not_see_each_other(client: Client, other_client: Client) -> None:
    client.call(clients.flock, "f", EX)
    other_client.call(clients.lockf, "f", EX | NB)


@pytest.mark.usefixtures("file")
def test_locks_need_a_fitting_descriptor(there: Path, client: Client) -> None:
    client.call(clients.open_as, "readable", there / "file", os.O_RDONLY)
    assert client.call(errno_of, clients.lockf, "readable", EX | NB) == errno.EBADF
    client.call(clients.lockf, "readable", SH | NB)
    client.call(clients.flock, "readable", EX | NB)


def test_a_cycle_of_two_waiters_is_edeadlk(here: Path, client: Client, other_client: Client, queue: Queue) -> None:
    (here / "file").write_bytes(b"0" * 100)
    for each in (client, other_client):
        each.call(clients.open_as, "f", here / "file", os.O_RDWR)
    client.call(clients.lockf, "f", EX, 1, 0)
    other_client.call(clients.lockf, "f", EX, 1, 1)
    waiting = client.start(clients.lockf, "f", EX, 1, 1)
    queue.until(1)
    assert other_client.call(errno_of, clients.lockf, "f", EX, 1, 0) == errno.EDEADLK
    other_client.call(clients.lockf, "f", UN, 1, 1)
    waiting.result()


def test_waiters_are_served_in_the_order_of_arrival(here: Path, there: Path, client: Client, queue: Queue) -> None:
    (here / "file").touch()
    client.call(clients.open_as, "f", here / "file", os.O_RDWR)
    client.call(clients.flock, "f", EX)
    with Client.started() as first, Client.started() as second:
        first.call(clients.open_as, "f", there / "file", os.O_RDWR)
        second.call(clients.open_as, "f", here / "file", os.O_RDWR)
        one = first.start(clients.flock, "f", EX)
        queue.until(1)
        two = second.start(clients.flock, "f", EX)
        queue.until(2)
        client.call(clients.flock, "f", UN)
        one.result()
        assert not two.is_done(0.1)
        first.call(clients.flock, "f", UN)
        two.result()


def test_counting_under_a_lock_loses_nothing(here: Path, there: Path, client: Client, other_client: Client) -> None:
    (here / "counter").write_bytes(b"0" * 20)
    counting = [
        client.start(clients.add_one_each_time, here / "counter", 25),
        other_client.start(clients.add_one_each_time, there / "counter", 25),
    ]
    for each in counting:
        each.result()
    assert int((here / "counter").read_bytes()) == 50
