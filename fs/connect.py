"""Reaching a volume's metadata: from a META_URL to a Store, with one clear line where that fails."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from apollofs.fs.meta_url import MetaAccess, MetaURL
from apollofs.fs.user_error import UserError, leaves
from apollofs.metadata.errors import DeadlineExceeded, OutcomeUnknown, StoreAuthFailed, StoreUnavailable
from apollofs.metadata.store import Store

CONNECT_DEADLINE_S = 15.0
CLOSE_DEADLINE_S = 5.0


@asynccontextmanager
async def connected_store(access: MetaAccess, deadline_s: float = CONNECT_DEADLINE_S) -> AsyncIterator[Store]:
    """A Store that has answered once; closed when the context ends.

    Raises UserError that names the servers: not reachable in `deadline_s`, user or password refused, bad certificate.
    """
    # grpc starts threads and takes a third of a second to import: who only parses a command shall not wait for it
    from apollofs.metadata.etcd import EtcdConfig, EtcdStore

    url = access.url
    config = EtcdConfig(
        endpoints=url.endpoints,
        ca_path=(url.ca_file or _system_authorities()) if url.tls else None,
        cert_path=url.cert_file or None,
        key_path=url.key_file or None,
        user=url.user or None,
        password=access.password if url.user else None,
    )
    with explained(url):
        store = EtcdStore(config)
    try:
        with explained(url):
            try:
                with trio.fail_after(deadline_s):
                    await store.check()
            except trio.TooSlowError as exc:
                raise StoreUnavailable(f"no answer within {deadline_s:g} s") from exc
        yield store
    finally:
        with trio.move_on_after(CLOSE_DEADLINE_S, shield=True):
            await store.aclose()


def _system_authorities() -> str:
    """The file of the authorities that this host trusts. Raises UserError where it has none."""
    path = ssl.get_default_verify_paths().cafile
    if path is None:
        raise UserError("this host has no file of trusted authorities: name one with ?ca=FILE in the metadata URL")
    return path


@contextmanager
def explained(url: MetaURL) -> Iterator[None]:
    """Turn what the store says of connection and credentials into a line that names the servers."""
    try:
        yield
    except (Exception, BaseExceptionGroup) as exc:
        for leaf in leaves(exc):
            if isinstance(leaf, StoreAuthFailed):
                raise UserError(f"etcd at {url.servers} does not let us in: {leaf}") from exc
            if isinstance(leaf, (StoreUnavailable, OutcomeUnknown, DeadlineExceeded)):
                raise UserError(f"etcd at {url.servers} can't be reached: {leaf}") from exc
        raise
