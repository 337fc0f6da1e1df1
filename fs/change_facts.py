"""A record of the change log for machines: what `changes --json` prints, and what a message of the bridge holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from apollofs.fs.policy_facts import policy_facts, retention_facts
from apollofs.metadata.changes.record import ChangeRecord
from apollofs.metadata.journal import Kind
from apollofs.metadata.name_text import name_text
from apollofs.metadata.policy import decode_policy
from apollofs.metadata.retention import decode_retention


def change_facts(record: ChangeRecord, sites: Mapping[int, str]) -> dict[str, Any]:
    """The fields of docs/CHANGES.md; what its kind does not have is left out. `sites`: names by id."""
    change = record.change
    facts: dict[str, Any] = {
        "position": str(record.position),
        "revision": record.position.revision,
        "time_ns": change.time_ns,
        "kind": change.kind.name.lower(),
        "ino": change.ino,
        "parent": change.parent,
        "name": name_text(change.name),
        "path": _path_text(record.path),
        "session": record.session,
        "site": sites.get(record.site, str(record.site)),
        "size_bytes": change.size_bytes,
        "mode": change.mode,
    }
    more = {
        "old_parent": change.old_parent,
        "other_ino": change.ino2,
        "nlink": change.nlink,
        "body_version": change.body_version,
        "attribute": name_text(change.attribute),
        "term_s": change.term_s,
    }
    facts.update((name, value) for name, value in more.items() if value)
    if change.kind in (Kind.RENAME, Kind.EXCHANGE):
        facts["old_path"] = _path_text(record.old_path)
    if change.kind is Kind.POLICY:
        facts["policy"] = policy_facts(decode_policy(change.value), sites) if change.value else None
    elif change.kind is Kind.RETENTION:
        facts["retention"] = retention_facts(decode_retention(change.value)) if change.value else None
    return facts


def change_json(record: ChangeRecord, sites: Mapping[int, str]) -> str:
    """The facts in one line."""
    return json.dumps(change_facts(record, sites), ensure_ascii=False)


def _path_text(path: bytes | None) -> str | None:
    return None if path is None else name_text(path)
