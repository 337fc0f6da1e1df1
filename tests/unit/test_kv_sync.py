"""The key-value store for programs without trio: what an interrupted wait leaves behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.kv import Client, KeyEvent, KeyWatch
from apollofs.fs.kv_sync import SyncKeyValues, SyncKeyWatch, open_client_sync
from apollofs.metadata.memory import MemoryStore
from tests.support.bodies import BrokenBlobs
from tests.support.values import kv_client
from tests.support.volumes import make_volume

WAIT_S = 60.0


class Interrupted(Exception):
    """Raised by the handler of a signal."""


@pytest.fixture
def values() -> Iterator[SyncKeyValues]:
    @asynccontextmanager
    async def opening() -> AsyncIterator[Client]:
        store = MemoryStore()
        await make_volume(store)
        async with kv_client(store, BrokenBlobs(MemoryBlobs())) as client:
            yield client

    with open_client_sync(opening) as client:
        yield client.kv("/d", create=True)


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """While it says so, whoever begins to wait for an event in the main thread is interrupted."""
    armed = [False]
    wait = KeyWatch.__anext__
    main = threading.main_thread().ident
    assert main is not None

    async def interrupt(watch: KeyWatch) -> KeyEvent:
        if armed.pop():
            signal.pthread_kill(main, signal.SIGUSR1)
        armed.append(False)
        return await wait(watch)

    def handle(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(KeyWatch, "__anext__", interrupt)
    before = signal.signal(signal.SIGUSR1, handle)
    yield armed
    signal.signal(signal.SIGUSR1, before)


def test_an_interrupted_wait_swallows_no_event(values: SyncKeyValues, interrupting: list[bool]) -> None:
    with values.watch() as events:
        begun = events.position
        for number in range(20):
            interrupting[0] = True
            with pytest.raises(Interrupted):
                events.next()
            assert events.position == begun
            begun = values.put(f"key{number}", b"1") + 1
            event = events.next(WAIT_S)
            assert event is not None
            assert (event.key, events.position) == (f"key{number}", begun)
        assert events.next(0) is None


def test_what_has_come_when_the_wait_was_interrupted_is_handed_out_first(
    values: SyncKeyValues, interrupting: list[bool]
) -> None:
    """The event is there already: whether the wait ends before it is interrupted, or is cancelled, nobody knows."""
    with values.watch() as events:
        expected = [f"key{number}" for number in range(30)]
        for key in expected:
            values.put(key, b"1")
        found: list[str] = []
        for attempt in range(2 * len(expected)):
            if found == expected:
                break
            position = events.position
            interrupting[0] = attempt % 2 == 0
            try:
                found.append(next(events).key)
            except Interrupted:
                assert events.position == position
        assert found == expected


def test_a_watch_can_be_closed_after_an_interrupted_wait(values: SyncKeyValues, interrupting: list[bool]) -> None:
    def wait() -> None:
        with values.watch() as events:
            interrupting[0] = True
            events.next()

    with pytest.raises(Interrupted):
        wait()
    values.put("key", b"1")
    with values.watch(from_revision=values.get("key").revision) as events:
        assert next(events).key == "key"


def test_who_waits_in_another_thread_is_told_that_the_watch_was_closed(values: SyncKeyValues) -> None:
    failures: list[RuntimeError] = []
    begun = threading.Event()

    def wait(events: SyncKeyWatch) -> None:
        try:
            for _ in events:
                begun.set()
        except RuntimeError as exc:
            failures.append(exc)

    with values.watch() as events:
        thread = threading.Thread(target=wait, args=(events,))
        thread.start()
        values.put("key", b"1")
        assert begun.wait(WAIT_S)
    thread.join(WAIT_S)
    assert [str(failure) for failure in failures] == ["the watch is closed"]
