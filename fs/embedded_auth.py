"""Closing the embedded etcd to other users of the host: a password that only the directory's owner can read.

etcd listens on the loopback address, where everybody on the host can reach it. Right after its first start it gets a
user `root` with a random password, and authentication is switched on; both survive restarts in etcd's own data. The
password lies in `DIRECTORY/etcd-password`, readable by the owner only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
from typing import Final

from apollofs.fs.user_error import UserError

USER: Final = "root"
PASSWORD_FILE: Final = "etcd-password"
CALL_DEADLINE_S = 20.0
_REFUSED_SINCE_CLOSED: Final = ("user name is empty", "user name not found", "permission denied", "invalid auth token")
_DONE_BEFORE: Final = ("already exists", "already enabled")


def close_to_others(host: str, port: int, directory: str) -> str:
    """Have the server ask for the password; the path of the file that holds it. Begun again, it goes on.

    Raises UserError where the server refuses.
    """
    path = os.path.join(directory, PASSWORD_FILE)
    password = _password(path)
    steps: tuple[tuple[str, dict[str, str]], ...] = (
        ("user/add", {"name": USER, "password": password}),
        ("role/add", {"name": "root"}),
        ("user/grant", {"user": USER, "role": "root"}),
        ("enable", {}),
    )
    for method, body in steps:
        error = _call(host, port, method, body)
        if any(text in error for text in _REFUSED_SINCE_CLOSED):
            return path
        if error and not any(text in error for text in _DONE_BEFORE):
            raise UserError(f"etcd on port {port} can't be closed to other users ({method}): {error}")
    return path


def _password(path: str) -> str:
    """The password in the file, which is made the first time."""
    with contextlib.suppress(FileExistsError):
        fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32))
            file.flush()
            os.fsync(fd)
        # whole, and never over a password that etcd may know already
        os.link(f"{path}.new", path)
    os.unlink(f"{path}.new")
    with open(path, encoding="ascii") as file:
        return file.read()


def _call(host: str, port: int, method: str, body: dict[str, str]) -> str:
    """One call of etcd's JSON gateway; what it says if it refuses, else nothing."""
    connection = http.client.HTTPConnection(host, port, timeout=CALL_DEADLINE_S)
    try:
        connection.request("POST", f"/v3/auth/{method}", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read(65_536)
        if answer.status == http.client.OK:
            return ""
        return str(json.loads(text).get("error") or f"status {answer.status}")
    except (OSError, ValueError, http.client.HTTPException) as exc:
        raise UserError(f"etcd on port {port} does not answer: {exc}") from exc
    finally:
        connection.close()
