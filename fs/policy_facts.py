"""Policies for machines: what `get --json` prints, and what a record of the change log holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apollofs.metadata.policy import Policy
from apollofs.metadata.retention import Retention


def policy_facts(policy: Policy, sites: Mapping[int, str]) -> dict[str, Any]:
    """Of sites. With the names of sites in place of their ids; `sites`: names by id."""
    return {
        "commit": [sites.get(site, str(site)) for site in policy.commit],
        "commit_any": policy.commit_any,
        "async": [sites.get(site, str(site)) for site in policy.soon],
        "bound_s": policy.bound_s,
        "read": [sites.get(site, str(site)) for site in policy.read],
    }


def retention_facts(retention: Retention) -> dict[str, Any]:
    """By the names of the options that set them."""
    return {
        "keep_last": retention.last,
        "keep_every": retention.every,
        "keep_for_s": retention.keep_for_s,
        "min_free_bytes": retention.min_free_bytes,
        "capacity_bytes": retention.capacity_bytes,
        "patterns": list(retention.patterns),
        "marker": retention.marker,
        "settle_s": retention.settle_s,
        "recursive": retention.is_recursive,
    }
