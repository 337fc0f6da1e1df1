"""The control socket: one line each way, bounded, for the owner only, and a bug in an answer ends nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from apollofs.fs.control import (
    REQUEST_BYTES_MAX,
    ControlServer,
    MountDead,
    MountSilent,
    ask,
    prepare_runtime_dir,
    socket_path,
)
from apollofs.fs.user_error import UserError


async def echo(request: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"heard": request["word"]}


async def refuse(request: Mapping[str, Any]) -> Mapping[str, Any]:
    raise UserError("not now")


async def break_down(request: Mapping[str, Any]) -> Mapping[str, Any]:
    raise ZeroDivisionError


async def hang(request: Mapping[str, Any]) -> Mapping[str, Any]:
    await trio.sleep_forever()


HANDLERS = {"echo": echo, "refuse": refuse, "break": break_down, "hang": hang}


@asynccontextmanager
async def served(path: str) -> AsyncIterator[ControlServer]:
    server = ControlServer(path, HANDLERS)
    await server.bind()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()


async def ask_in_thread(
    path: str, what: str, arguments: Mapping[str, Any] | None = None, deadline_s: float = 30
) -> Any:
    return await trio.to_thread.run_sync(lambda: ask(path, what, arguments, deadline_s=deadline_s))


@pytest.fixture
def path(tmp_path: Path) -> str:
    prepare_runtime_dir(str(tmp_path / "run"))
    return socket_path(str(tmp_path / "run"), "0:57")


async def test_answers(path: str) -> None:
    async with served(path) as server:
        assert path.endswith("/0-57.sock")
        assert (await trio.Path(path).stat()).st_mode & 0o777 == 0o600
        assert await ask_in_thread(path, "echo", {"word": "ä" * 1000}) == {"heard": "ä" * 1000}
        with pytest.raises(UserError, match="not now"):
            await ask_in_thread(path, "refuse")
        with pytest.raises(UserError, match="does not know 'unheard'"):
            await ask_in_thread(path, "unheard")
        await server.drained(30)
    assert not await trio.Path(path).exists()


async def test_a_former_mount_leaves_the_socket_of_its_successor(path: str) -> None:
    """The kernel gives a device number to the next mount at once, while the former daemon still commits."""
    former = ControlServer(path, HANDLERS)
    await former.bind()
    async with served(path):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(former.serve)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert await ask_in_thread(path, "echo", {"word": 1}) == {"heard": 1}
    assert not await trio.Path(path).exists()


@pytest.mark.expects_log("a request on the control socket failed")
async def test_a_bug_in_an_answer_ends_nothing(path: str) -> None:
    async with served(path):
        with pytest.raises(UserError, match="ZeroDivisionError"):
            await ask_in_thread(path, "break")
        assert await ask_in_thread(path, "echo", {"word": 1}) == {"heard": 1}


@pytest.mark.parametrize("text", [b"\n", b"{}\n", b"[]\n", b'{"ask": 1}\n', b"\xff\n", b"{" * (REQUEST_BYTES_MAX + 2)])
async def test_nonsense_is_refused(path: str, text: bytes) -> None:
    async with served(path):
        stream = await trio.open_unix_socket(path)
        async with stream:
            await stream.send_all(text)
            await stream.send_eof()
            answer = b"".join([part async for part in stream])
        assert b'"ok": false' in answer


async def test_nobody_there_and_nobody_answering(path: str, tmp_path: Path) -> None:
    with pytest.raises(MountDead):
        await ask_in_thread(path, "echo")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left_behind:
        left_behind.bind(path)
    with pytest.raises(MountDead):
        await ask_in_thread(path, "echo")
    async with served(path):
        with pytest.raises(MountSilent, match=r"within 0.1 s"):
            await ask_in_thread(path, "hang", deadline_s=0.1)
        assert await ask_in_thread(path, "echo", {"word": 1}) == {"heard": 1}


def test_a_runtime_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    prepare_runtime_dir(str(tmp_path / "new"))
    assert os.stat(tmp_path / "new").st_mode & 0o777 == 0o700
    os.chmod(tmp_path / "new", 0o777)
    with pytest.raises(UserError, match="can be written by others"):
        prepare_runtime_dir(str(tmp_path / "new"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be made"):
        prepare_runtime_dir(str(tmp_path / "file" / "below"))
