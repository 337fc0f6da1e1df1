"""The agent as the archiver of the change log."""

from __future__ import annotations

from apollofs.fs.agent.context import AgentContext
from apollofs.fs.change_archive import ArchiveRun, archive_changes


async def archive_log(context: AgentContext) -> None:
    """Keep the change log's archive, in the own site's store. One process in a volume does, whichever site's agent or
    `changes archive` was first; the others wait to take over. Raises MetadataError."""
    options = context.options.archive
    if options is None:
        return
    run = ArchiveRun(context.site.name, False, options, context.options.compaction, context.stores.ca_file)
    await archive_changes(context.store, context.keys.volume, run)
