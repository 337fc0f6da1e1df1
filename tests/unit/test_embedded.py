"""The private etcd of `apollofs up`: found, started again on its data, ended; never somebody else's process."""

from __future__ import annotations

import errno
import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollofs.fs.embedded import HOST, EmbeddedEtcd, EtcdMissing, free_ports
from apollofs.fs.embedded_auth import close_to_others
from apollofs.fs.user_error import UserError

ENVIRONMENT = {**os.environ, "ETCD_NAME": "a variable that must not reach it"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedEtcd]:
    server = EmbeddedEtcd(str(tmp_path / "volume"), ENVIRONMENT)
    with server.locked():
        yield server
        server.stop()


def call(port: int, method: str, body: dict[str, str]) -> dict[str, object]:
    """One call of etcd's JSON gateway."""
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    connection.request("POST", f"/v3/kv/{method}", json.dumps(body))
    answer: dict[str, object] = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def test_ports_are_kept_for_who_asks_for_them() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((HOST, port))  # as the kernel does for who asks for any port
        with socket.create_server((HOST, port)) as server:
            assert server.getsockname()[1] == port


def test_life(server: EmbeddedEtcd) -> None:
    assert server.state() is None
    assert server.running_pid() is None
    state = server.start()
    pid = server.running_pid()
    assert pid is not None
    assert server.state() == state
    assert server.start() == state
    assert server.running_pid() == pid, "it was running, and is not started again"
    call(state.client_port, "put", {"key": "a2V5", "value": "dmFsdWU="})
    assert server.stop()
    assert not server.stop()
    assert server.running_pid() is None
    assert server.start() == state, "the ports are kept"
    assert call(state.client_port, "range", {"key": "a2V5"})["count"] == "1"


def test_it_is_started_again_when_it_died(server: EmbeddedEtcd) -> None:
    state = server.start()
    pid = server.running_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert server.running_pid() is None
    assert server.start() == state
    assert server.running_pid() not in (None, pid)


def test_a_port_that_was_taken_is_chosen_anew(server: EmbeddedEtcd) -> None:
    before = server.start()
    server.stop()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((HOST, before.client_port))
        taken.listen()
        after = server.start()
        assert after.client_port != before.client_port
        assert server.state() == after


def test_a_pid_file_that_names_a_stranger_is_not_believed(server: EmbeddedEtcd) -> None:
    state = server.start()
    pid_file = Path(server.directory, "etcd.pid")
    own = pid_file.read_text()
    for text in (str(os.getpid()), "nonsense"):
        pid_file.write_text(text)
        assert server.running_pid() == int(own)
    assert server.start() == state


def test_one_directory_by_two_paths(server: EmbeddedEtcd, tmp_path: Path) -> None:
    state = server.start()
    pid = server.running_pid()
    (tmp_path / "link").symlink_to(server.directory)
    other = EmbeddedEtcd(str(tmp_path / "link"), ENVIRONMENT)
    assert (other.start(), other.running_pid()) == (state, pid)


def test_a_start_that_fails_changes_nothing_of_what_runs(
    server: EmbeddedEtcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if what runs isn't found."""
    state = server.start()
    pid = server.running_pid()
    program = tmp_path / "etcd"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    other = EmbeddedEtcd(server.directory, ENVIRONMENT, str(program))
    monkeypatch.setattr(other, "running_pid", lambda: None)
    with pytest.raises(UserError, match="ended at once"):
        other.start()
    assert (server.state(), server.running_pid()) == (state, pid)


@pytest.mark.parametrize("name", ["apollofs.json", "etcd.pid"])
def test_a_full_disk_leaves_no_server(server: EmbeddedEtcd, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    replaced = os.replace

    def full(source: str, target: str) -> None:
        if target.endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replaced(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left"):
            server.start()
    assert server.running_pid() is None
    assert server.start() == server.state()


def test_a_server_that_an_interrupted_start_has_left_is_found(server: EmbeddedEtcd) -> None:
    state = server.start()
    left = server.running_pid()
    Path(server.directory, "etcd.pid").unlink()
    assert server.running_pid() == left
    Path(server.directory, "apollofs.json").unlink()
    assert server.start() != state
    assert server.running_pid() not in (None, left)


def test_two_at_once(server: EmbeddedEtcd) -> None:
    with pytest.raises(UserError, match="is at work"), EmbeddedEtcd(server.directory, {}).locked():
        pass


def test_a_server_that_ends_at_once_is_told_with_its_last_word(tmp_path: Path) -> None:
    program = tmp_path / "etcd"
    program.write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 1\n")
    program.chmod(0o755)
    server = EmbeddedEtcd(str(tmp_path / "volume"), ENVIRONMENT, str(program))
    with server.locked(), pytest.raises(UserError, match="etcd ended at once: no such luck"):
        server.start()


def test_etcd_is_not_installed(tmp_path: Path) -> None:
    server = EmbeddedEtcd(str(tmp_path / "volume"), {"PATH": str(tmp_path)})
    with server.locked(), pytest.raises(EtcdMissing, match="apt-get install etcd-server"):
        server.start()


def test_it_is_closed_to_who_does_not_know_the_password(server: EmbeddedEtcd) -> None:
    port = server.start().client_port
    path = Path(close_to_others(HOST, port, server.directory))
    password = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert call(port, "range", {"key": "a2V5"})["error"] == "etcdserver: user name is empty"
    assert close_to_others(HOST, port, server.directory) == str(path), "again, and nothing changes"
    assert path.read_text() == password
    server.stop()
    server.start()
    assert call(port, "range", {"key": "a2V5"})["error"] == "etcdserver: user name is empty"
    server.stop()
    with pytest.raises(UserError, match="does not answer"):
        close_to_others(HOST, port, server.directory)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"client_port": 1, "peer_port": 2, "schema": 9}'])
def test_a_damaged_or_newer_state_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "apollofs.json").write_text(text)
    with pytest.raises(UserError, match=r"damaged|newer"):
        EmbeddedEtcd(str(tmp_path), {}).state()
