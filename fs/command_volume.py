"""A volume as commands and agents use it that don't mount it: in a session of its own, with nothing cached."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from apollofs.metadata.format import list_sites
from apollofs.metadata.records import MountRecord
from apollofs.metadata.retired_sites import read_retired
from apollofs.metadata.session import SessionOptions
from apollofs.metadata.store import Store
from apollofs.metadata.volume import Volume, open_volume


def command_record(version: str) -> MountRecord:
    """Who works on a volume without mounting it."""
    return MountRecord(0, socket.gethostname(), os.getpid(), "", "", version, 0)


@asynccontextmanager
async def command_volume(store: Store, volume: str, version: str, slots: int = 4) -> AsyncIterator[Volume]:
    """The volume, at the first site that stays, while the block lasts. `slots`: transactions in flight at once. Raises
    as `open_volume` does."""
    sites = await list_sites(store, volume)
    gone = await read_retired(store, volume)
    site = next((each for each in sites if each.id not in gone), sites[0])
    record = replace(command_record(version), site=site.name)
    options = SessionOptions(slots=slots, delegations=False, write_back=False)
    async with open_volume(store, volume, site.name, options, record) as opened:
        yield opened
