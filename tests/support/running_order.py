"""The order in which files of tests are run, several at a time: what takes long begins first.

A run on two cores is short if the cores always have something to do and the last files to begin are small. So the long
files come first, and of these by turns one that waits most of the time, for leases and deadlines to pass, and one that
computes. A file that is not named here comes later; naming it when it has grown long costs nothing but a line.
"""

from __future__ import annotations

from itertools import chain, zip_longest

WAITING = (
    "faults/test_mount_crash.py",
    "faults/test_mount_guard.py",
    "faults/test_mount_cache_disk.py",
    "faults/test_mount_outage.py",
    "faults/test_mount_clock.py",
    "faults/test_histories.py",
    "faults/test_changes_kafka.py",
    "mounted/test_collector.py",
    "mounted/test_sealed.py",
    "contract/test_blob_faults.py",
    "faults/test_mount_bodies.py",
    "mounted/test_kv.py",
    "mounted/test_sites.py",
    "faults/test_mount_bug.py",
    "faults/test_mount_start.py",
    "faults/test_mount_saves.py",
)
"""Below tests/, the longest first."""

COMPUTING = (
    "model/test_state_machine.py",
    "faults/test_change_log.py",
    "mounted/test_cli_mount.py",
    "contract/test_blobstore.py",
    "mounted/test_two_mounts_cached.py",
    "mounted/test_directory_locks.py",
    "mounted/test_two_mounts_listings.py",
    "mounted/test_two_mounts_directories.py",
    "mounted/test_two_mounts_pages.py",
    "model/test_write_back.py",
    "mounted/test_passthrough.py",
    "mounted/test_posix_names.py",
    "model/test_locks_protocol.py",
    "mounted/test_posix_data.py",
    "mounted/test_fsx.py",
    "faults/test_lost_replies.py",
    "unit/test_write_back_schedules.py",
    "mounted/test_real_code_tools.py",
    "mounted/test_posix_attributes.py",
    "mounted/test_cli_cache.py",
)
"""Likewise."""

_BY_TURNS = chain.from_iterable(zip_longest(COMPUTING, WAITING))
_RANK = {f"tests/{name}": rank for rank, name in enumerate(name for name in _BY_TURNS if name)}


def rank(path: str) -> int:
    """By which files are sorted; `path` is below the root, as in a node's name. Equal ranks keep their order."""
    return _RANK.get(path, len(_RANK))
