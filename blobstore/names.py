"""What a blob may be called, the same for every store, so that no store meets a name that another cannot hold."""

from __future__ import annotations

import re

from .errors import BadBlobName

NAME_LENGTH_MAX = 700
"""Characters. S3 allows 1024 bytes, and the location's prefix needs some of them."""

COMPONENT_LENGTH_MAX = 200
"""Characters. Local filesystems allow 255 bytes, and the local store adds a mark to directories."""

_COMPONENT = re.compile(r"[A-Za-z0-9._-]+")
_PREFIX = re.compile(r"[A-Za-z0-9._/-]*")


def check_name(name: str) -> str:
    """Return `name` if it is good: components of `[A-Za-z0-9._-]` joined by single slashes, none of them `.` or `..`.

    Raises `BadBlobName`.
    """
    if len(name) > NAME_LENGTH_MAX:
        raise BadBlobName(f"a blob's name has {len(name)} characters, {NAME_LENGTH_MAX} are allowed: {name[:60]!r}...")
    for component in name.split("/"):
        good = _COMPONENT.fullmatch(component) and component not in (".", "..")
        if not good or len(component) > COMPONENT_LENGTH_MAX:
            raise BadBlobName(f"{name!r} is no name for a blob: relative paths of [A-Za-z0-9._-] only")
    return name


def check_prefix(prefix: str) -> str:
    """Return `prefix` if some good name can start with it. Raises `BadBlobName`."""
    if len(prefix) > NAME_LENGTH_MAX or not _PREFIX.fullmatch(prefix):
        raise BadBlobName(f"no blob's name starts with {prefix[:60]!r}")
    return prefix


def check_range(offset: int, length: int | None) -> None:
    """Assert that a range can exist at all; a negative one is a caller's bug."""
    assert offset >= 0, f"offset {offset} is negative"
    assert length is None or length >= 0, f"length {length} is negative"
