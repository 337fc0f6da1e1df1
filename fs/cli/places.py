"""What the environment says: the password, and where sockets and logs go. The only reader of it."""

from __future__ import annotations

import importlib.metadata
import os
import re

PASSWORD_VARIABLE = "APOLLOFS_ETCD_PASSWORD"
RUNTIME_VARIABLE = "APOLLOFS_RUNTIME_DIR"


def etcd_password() -> str:
    """The password from the environment, or nothing."""
    return os.environ.get(PASSWORD_VARIABLE, "")


def runtime_dir() -> str:
    """Where control sockets are: APOLLOFS_RUNTIME_DIR, /run/apollofs for root, else below XDG_RUNTIME_DIR or /tmp."""
    chosen = os.environ.get(RUNTIME_VARIABLE)
    if chosen:
        return os.path.abspath(chosen)
    if os.geteuid() == 0:
        return "/run/apollofs"
    user_dir = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(user_dir, "apollofs") if user_dir else f"/tmp/apollofs-{os.geteuid()}"


def log_path(mountpoint: str) -> str:
    """The log of a mount that runs in the background, unless --log-file names another."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", mountpoint).strip("-")[-150:] or "root"
    if os.geteuid() == 0:
        return f"/var/log/apollofs/{name}.log"
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "apollofs", f"{name}.log")


def notify_socket() -> str:
    """Where systemd wants to hear that a service is ready; empty without systemd."""
    return os.environ.get("NOTIFY_SOCKET", "")


def environment() -> dict[str, str]:
    """A copy, for a server that is started."""
    return dict(os.environ)


def version() -> str:
    """The installed version."""
    try:
        return importlib.metadata.version("apollofs")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def blob_ca_file() -> str | None:
    """The authority for S3 endpoints, as the AWS tools name it."""
    return os.environ.get("AWS_CA_BUNDLE") or None
