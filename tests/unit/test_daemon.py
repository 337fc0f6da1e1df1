"""The readiness pipe: a command that starts a daemon ends when that serves, or says in one line why it does not."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from apollofs.fs.daemon import NotifyReadiness

PROBE = Path(__file__).parents[1] / "support" / "daemon_probe.py"
DEADLINE_S = 60


def run_probe(mode: str, directory: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(PROBE), mode, str(directory)]
    return subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def await_end(pid: int) -> None:
    """Fails unless the process ends by itself."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        assert poller.poll(DEADLINE_S * 1000), f"process {pid} lives on"
    finally:
        os.close(pidfd)


def test_the_command_returns_and_the_daemon_lives_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "end")
    done = run_probe("serve", tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    pid = facts.pop("pid")
    assert facts == {
        "leads_session": True,
        "directory": "/",
        "descriptors": ["log", "log", "null"],
        # the three, the pipe, and the listing itself
        "open": 5,
    }
    assert Path(f"/proc/{pid}").exists()
    (tmp_path / "end").write_bytes(b"x")
    await_end(pid)
    assert (tmp_path / "log").read_text() == "this goes to the log\n"


def test_a_failure_is_one_line(tmp_path: Path) -> None:
    done = run_probe("fail", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "the reason, in one line\n")


@pytest.mark.parametrize(("mode", "how"), [("die", "was killed by SIGKILL"), ("end", "ended with status 3")])
def test_a_death_is_told(tmp_path: Path, mode: str, how: str) -> None:
    done = run_probe(mode, tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"it {how} before it answered; its log is {tmp_path}/log\n"


def test_a_daemon_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    done = run_probe("hang", tmp_path)
    assert done.returncode == 1
    assert "did not answer within 0.5 s and was ended" in done.stderr
    await_end(int((tmp_path / "pid").read_text()))


def test_a_log_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_probe("serve", tmp_path / "file")
    assert done.returncode == 1
    assert "log file" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, abstract: bool) -> None:
    address = f"@apollofs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address.replace("@", "\0"))
        listening.settimeout(DEADLINE_S)
        NotifyReadiness(address).ready({})
        assert listening.recv(100) == b"READY=1"


@pytest.mark.expects_log("systemd could not be told")
def test_a_deaf_systemd_ends_nothing(tmp_path: Path) -> None:
    NotifyReadiness(str(tmp_path / "missing")).ready({})
