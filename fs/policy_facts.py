"""A site policy for machines: what `policy get --json` prints, and what a record of the change log holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apollofs.metadata.policy import Policy


def policy_facts(policy: Policy, sites: Mapping[int, str]) -> dict[str, Any]:
    """With the names of sites in place of their ids; `sites`: names by id."""
    return {
        "commit": [sites.get(site, str(site)) for site in policy.commit],
        "commit_any": policy.commit_any,
        "async": [sites.get(site, str(site)) for site in policy.soon],
        "bound_s": policy.bound_s,
        "read": [sites.get(site, str(site)) for site in policy.read],
    }
