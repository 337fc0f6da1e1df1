"""What `apollofs agent status` says of each site."""

from __future__ import annotations

from typing import Any

from apollofs.fs.agent.state import read_state
from apollofs.metadata.election import read_winner
from apollofs.metadata.format import list_sites
from apollofs.metadata.keys import Keys
from apollofs.metadata.name_text import name_text
from apollofs.metadata.store import Store
from apollofs.metadata.tree import Tree

COUNTERS = (
    *("backlog", "lag_s", "last_lag_s", "rate", "files", "copied_blobs", "copied_bytes", "late_files", "failures"),
    *("given_up", "sites_away", "retired", "retention_kept"),
)


async def report(store: Store, volume: str) -> list[dict[str, Any]]:
    """One mapping for each site. Raises NotFormatted, StoreError."""
    keys = Keys(volume)
    found: list[dict[str, Any]] = []
    for site in await list_sites(store, volume):
        winner = await read_winner(store, keys.agent(site.id))
        state = await read_state(store, keys, site.id)
        walking = int(state.facts.get("walking", 0))
        path = await Tree(store, keys).path_of(walking) if walking else None
        found.append(
            {
                "site": site.name,
                "agent": f"{winner.host}:{winner.pid}" if winner else "",
                "session": winner.session if winner else 0,
                **{name: state.facts.get(name, 0) for name in COUNTERS},
                "moving": name_text(path) if path is not None else "",
                "moved_files": int(state.facts.get("walked", 0)),
                "position": state.position,
                "updated_s": state.updated_ns / 1e9,
            }
        )
    return found
