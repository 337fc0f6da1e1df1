"""`y/<site>`: how far the agents of a site have come, and what the last one was seen to do.

The position and the walks are what a new agent goes on from; the rest is for `apollofs agent status`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from apollofs.metadata import codec
from apollofs.metadata.errors import CorruptRecord
from apollofs.metadata.keys import Keys
from apollofs.metadata.session import retry
from apollofs.metadata.store import Range, Store

READ_S = 30.0


@dataclass(slots=True)
class AgentState:
    """`position`: all that the journal says up to this revision is done; 0: nothing is. `walked`: for each policy its
    mod_revision when its tree was last looked at as a whole."""

    position: int = 0
    walked: dict[int, int] = field(default_factory=dict)
    updated_ns: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    """Counters of the agent that has written this."""


def encode_state(state: AgentState) -> bytes:
    walked = [number for pair in sorted(state.walked.items()) for number in pair]
    facts = [item for pair in sorted(state.facts.items()) for item in pair]
    return codec.encode_fields([state.position, walked, state.updated_ns, facts])


def decode_state(value: bytes) -> AgentState:
    """Raises CorruptRecord."""
    try:
        position, walked, updated_ns, facts = codec.decode_fields(value)
        return AgentState(
            position,
            dict(zip(walked[::2], walked[1::2], strict=True)),
            updated_ns,
            dict(zip(facts[::2], facts[1::2], strict=True)),
        )
    except (ValueError, TypeError) as exc:
        raise CorruptRecord(f"an agent's state does not decode: {exc}") from exc


async def read_state(store: Store, keys: Keys, site: int) -> AgentState:
    """What was last written; a fresh one if nothing was. One request. Raises DeadlineExceeded, StoreError."""
    found = await retry(lambda: store.range(Range(keys.agent_state(site))), READ_S)
    return decode_state(found.kvs[0].value) if found.kvs else AgentState()
