"""A site that can't be read while others can: one task looks now and then whether it is back, and its jobs wait."""

from __future__ import annotations

import logging

import trio

from apollofs.blobstore import BlobStoreError
from apollofs.fs.agent.context import AgentContext
from apollofs.fs.blobs import Block, site_of
from apollofs.fs.errors import BodyError, CorruptBody
from apollofs.fs.user_error import UserError
from apollofs.metadata.errors import MetadataError

log = logging.getLogger(__name__)
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 30.0


async def watch_site(context: AgentContext, block: Block) -> None:
    """Until the site of this block can be read: its jobs are offered again then. A store that does not have the block
    any more answers, too."""
    site, pause_s = site_of(block.blob), RETRY_FIRST_S
    log.info("site %d can't be read: its files wait", site)
    while True:
        await trio.sleep(pause_s)
        try:
            await context.source.read_at(block, site)
        except CorruptBody:
            break
        except (BodyError, BlobStoreError, UserError, MetadataError) as exc:
            log.debug("site %d can't be read yet: %s", site, exc)
        else:
            break
        pause_s = min(2 * pause_s, RETRY_MAX_S)
    log.info("site %d can be read again", site)
    context.backlog.back(site)
