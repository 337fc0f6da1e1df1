"""The text after `-o`: apollofs's own options, those that the kernel knows, and those that only mount(8) reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from apollofs.fs.user_error import UserError

OWN_VALUES: Final = frozenset(
    {
        "site",
        "cache_dir",
        "cache_size",
        "lease_ttl",
        "operation_deadline",
        "commit_interval",
        "commit_deadline",
        "uploads",
        "downloads",
        "log_file",
        "password_file",
        "read_deadline",
        "delegations",
        "metrics",
        "entry_cache",
        "write_back",
        "passthrough",
    }
)
"""Options of ours that need a value."""
OWN_FLAGS: Final = frozenset({"ro", "rw", "allow_other", "noallow_other", "debug", "guard"})
KERNEL_FLAGS: Final = frozenset(
    {"suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime", "sync", "async", "dirsync"}
)
"""What libfuse hands to mount(2)."""
IGNORED: Final = frozenset(
    {"defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "_netdev", "nofail"}
    | {"relatime", "norelatime", "strictatime", "lazytime", "nolazytime", "diratime", "nodiratime"}
)
"""What mount(8), systemd or nobody needs: times of access are those that the volume keeps."""
IGNORED_PREFIXES: Final = ("x-", "X-", "comment=")
LOOPBACK: Final = "127.0.0.1"
PORT_MAX: Final = 65535
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?", re.IGNORECASE)
_FACTORS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


@dataclass(frozen=True, slots=True)
class MountOptions:
    """Parsed options. `values` has the keys of OWN_VALUES that were given, as text."""

    values: Mapping[str, str] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()
    kernel: tuple[str, ...] = ()


def parse_options(texts: Iterable[str]) -> MountOptions:
    """Parse comma-separated options, as often as -o was given; a later one wins over an earlier one.

    Raises UserError with the name of an option that is not known or lacks its value.
    """
    values: dict[str, str] = {}
    flags: set[str] = set()
    kernel: dict[str, None] = {}
    for item in (part.strip() for text in texts for part in text.split(",")):
        name, equals, value = item.partition("=")
        if not item or item in IGNORED or item.startswith(IGNORED_PREFIXES):
            continue
        if name.replace("-", "_") in OWN_VALUES:
            if not value:
                raise UserError(f"option {name!r} needs a value: -o {name}=...")
            values[name.replace("-", "_")] = value
        elif item in OWN_FLAGS:
            flags -= {"ro": {"rw"}, "rw": {"ro"}, "allow_other": {"noallow_other"}}.get(item, {"allow_other"})
            flags.add(item)
        elif item in KERNEL_FLAGS:
            kernel.pop(_opposite(item), None)
            kernel[item] = None
        elif item == "remount":
            raise UserError("apollofs can't be remounted: unmount it and mount it with the new options")
        else:
            # Without what follows "=": it may be a password that somebody tried to pass here.
            raise UserError(f"unknown option {name!r}" + (" (with a value)" if equals else ""))
    return MountOptions(values, frozenset(flags), tuple(kernel))


def _opposite(flag: str) -> str:
    if flag in ("sync", "async"):
        return "async" if flag == "sync" else "sync"
    return flag.removeprefix("no") if flag.startswith("no") else f"no{flag}"


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "9410" (this host only), "10.0.0.5:9410", "[::]:9410". Raises UserError."""
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and int(port) <= PORT_MAX
    if not is_port or (":" in host and host[0] + host[-1] != "[]"):
        raise UserError(f"{text!r} is no address: write it as 9410, 10.0.0.5:9410 or [::]:9410")
    return host.strip("[]") or LOOPBACK, int(port)


def parse_size(text: str) -> int:
    """Bytes of "10G", "512 MiB", "4096"; units are powers of 1024. Raises UserError."""
    matched = _SIZE.fullmatch(text.strip())
    if not matched:
        raise UserError(f"{text!r} is no size: write it as 4096, 512M or 10G")
    return int(float(matched[1]) * _FACTORS[matched[2].upper()])
