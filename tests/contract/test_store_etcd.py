"""What only a real cluster can show: certificates, users, members that die, replies that are lost."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from apollofs.fs.embedded import free_ports
from apollofs.metadata.errors import OutcomeUnknown, StoreAuthFailed, StoreError, StoreUnavailable
from apollofs.metadata.etcd import EtcdConfig, EtcdStore
from apollofs.metadata.store import Compare, Put, Range, Relation, Target, TxnResult
from tests.support.certificates import Certificates
from tests.support.etcd_server import ROOT_PASSWORD, EtcdCluster, wait_until
from tests.support.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.contract, pytest.mark.faults]

BOUND_S = 90
KEY = b"faults/key"
NUMBERS = itertools.count()


@asynccontextmanager
async def opened(config: EtcdConfig) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(config)
    try:
        with trio.fail_after(BOUND_S):
            yield store
    finally:
        await store.aclose()


async def put(store: EtcdStore, value: bytes, key: bytes = KEY) -> TxnResult:
    return await store.txn((), (Put(key, value),))


async def get(store: EtcdStore, key: bytes = KEY) -> bytes:
    (kv,) = (await store.range(Range(key))).kvs
    return kv.value


async def put_once(store: EtcdStore, key: bytes, value: bytes) -> None:
    """Put under a fence, again until it is known to be there."""
    absent = Compare(key, Target.VERSION, Relation.EQUAL, 0)
    while True:
        try:
            await store.txn((absent,), (Put(key, value),))
            return
        except (OutcomeUnknown, StoreUnavailable):
            await trio.lowlevel.checkpoint()


async def get_patiently(store: EtcdStore) -> bytes:
    while True:
        try:
            return await get(store)
        except StoreUnavailable:
            await trio.lowlevel.checkpoint()


# -- one member, behind a proxy ---------------------------------------------------------------------------------------


@pytest.fixture
def proxy(etcd: EtcdCluster) -> Iterator[TcpProxy]:
    with TcpProxy.started(etcd.server.endpoint) as running:
        yield running


def through(proxy: TcpProxy, call_deadline_s: float = 8.0, connect_deadline_s: float = 3.0) -> EtcdConfig:
    return EtcdConfig((proxy.endpoint,), call_deadline_s=call_deadline_s, connect_deadline_s=connect_deadline_s)


async def test_the_version(etcd: EtcdCluster) -> None:
    async with opened(EtcdConfig(etcd.endpoints)) as store:
        await store.check()
        assert (await store.server_version()).startswith("3.")


async def test_a_lost_reply_is_unknown_and_never_repeated(etcd: EtcdCluster, proxy: TcpProxy) -> None:
    async with opened(through(proxy)) as store, opened(EtcdConfig(etcd.endpoints)) as direct:
        await put(store, b"0")
        for number in range(1, 11):
            version = (await direct.range(Range(KEY))).kvs[0].version
            proxy.swallow_replies(times=1)
            with pytest.raises(OutcomeUnknown):
                await put(store, b"%d" % number)
            assert await get_patiently(store) == b"%d" % number
            assert (await direct.range(Range(KEY))).kvs[0].version == version + 1
        assert proxy.cuts == 10


async def test_a_read_whose_reply_is_lost_is_repeated(proxy: TcpProxy) -> None:
    async with opened(through(proxy)) as store:
        await put(store, b"1")
        for _ in range(5):
            proxy.swallow_replies(times=1)
            assert await get(store) == b"1"
            proxy.swallow_replies(times=1)
            assert not (
                await store.txn((Compare(KEY, Target.VERSION, Relation.EQUAL, 0),), (), (Range(KEY),))
            ).succeeded
        assert proxy.cuts == 10


async def test_a_lease_survives_lost_replies(proxy: TcpProxy) -> None:
    async with opened(through(proxy)) as store:
        lease = await store.lease_grant(600)
        proxy.swallow_replies(times=1)
        assert await store.lease_keepalive(lease.id) == 600
        proxy.swallow_replies(times=1)
        await store.lease_revoke(lease.id)
        assert await store.lease_keepalive(lease.id) == 0


async def test_silence_ends_a_call_in_bounded_time(proxy: TcpProxy) -> None:
    async with opened(through(proxy, call_deadline_s=0.5, connect_deadline_s=0.3)) as store:
        await put(store, b"1")
        proxy.blackhole()
        with pytest.raises(OutcomeUnknown):
            await put(store, b"2")
        with pytest.raises(StoreUnavailable):
            await get(store)
        with pytest.raises(StoreUnavailable):  # nothing is sent where nobody answered
            await put(store, b"3")
        proxy.heal()
        assert await get_patiently(store) in (b"1", b"2")


async def test_a_watch_goes_on_after_breaks(etcd: EtcdCluster, proxy: TcpProxy) -> None:
    key = b"faults/watched"
    async with opened(through(proxy)) as store, opened(EtcdConfig(etcd.endpoints)) as direct:
        start = (await put(direct, b"0", key)).revision
        seen: list[bytes] = []
        async with store.watch(key, start_revision=start) as batches:
            for number in range(1, 21):
                seen += [event.kv.value for event in (await anext(batches)).events]
                proxy.drop_connections()
                await put(direct, b"%d" % number, key)
            while len(seen) < 21:
                seen += [event.kv.value for event in (await anext(batches)).events]
        assert seen == [b"%d" % number for number in range(21)]


async def test_an_idle_watch_notices_that_its_server_has_gone_silent(etcd: EtcdCluster, proxy: TcpProxy) -> None:
    """By pings alone: nothing else is asked of this store."""
    config = EtcdConfig((proxy.endpoint, *etcd.endpoints), ping_s=5, ping_deadline_s=0.5, connect_deadline_s=1)
    key = b"faults/silent"
    async with opened(config) as store, opened(EtcdConfig(etcd.endpoints)) as direct:
        start = (await put(direct, b"1", key)).revision
        async with store.watch(key, start_revision=start) as batches:
            assert [event.kv.value for event in (await anext(batches)).events] == [b"1"]
            proxy.blackhole()
            await put(direct, b"2", key)
            assert [event.kv.value for event in (await anext(batches)).events] == [b"2"]


async def test_a_watch_that_is_left_is_taken_from_the_server(etcd: EtcdCluster) -> None:
    def watchers() -> float:
        return etcd.server.metric("etcd_debugging_mvcc_watcher_total")

    async with opened(EtcdConfig(etcd.endpoints)) as store:
        start = (await put(store, b"1")).revision
        before = watchers()
        for _ in range(10):
            async with store.watch(KEY, start_revision=start) as batches:
                await anext(batches)
                assert watchers() == before + 1
            await trio.to_thread.run_sync(wait_until, lambda: watchers() == before, "the watch is gone")


async def test_many_calls_through_a_slow_line(proxy: TcpProxy) -> None:
    proxy.delay_ms(20)
    async with opened(through(proxy)) as store:
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(put, store, b"", b"faults/slow/%02d" % number)
        assert (await store.range(Range(b"faults/slow/", b"faults/slow0"))).count == 50


async def test_a_connection_that_is_refused(proxy: TcpProxy) -> None:
    async with opened(through(proxy)) as store:
        await put(store, b"1")
        proxy.refuse()
        with pytest.raises(StoreError):
            await put(store, b"2")
        with pytest.raises(StoreUnavailable):
            await put(store, b"3")
        proxy.heal()
        assert await get_patiently(store) in (b"1", b"2")


async def test_an_unreachable_server_is_named() -> None:
    ports = free_ports(2)
    async with opened(EtcdConfig(tuple(("127.0.0.1", port) for port in ports))) as store:
        with pytest.raises(StoreUnavailable) as caught:
            await store.check()
    assert all(f"127.0.0.1:{port}" in str(caught.value) for port in ports)
    assert "refused" in str(caught.value)


async def test_one_bad_endpoint_among_good_ones(etcd: EtcdCluster) -> None:
    (port,) = free_ports(1)
    async with opened(EtcdConfig((("127.0.0.1", port), *etcd.endpoints))) as store:
        await put(store, b"1")
        assert await get(store) == b"1"


# -- certificates and users -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster.started(tmp_path_factory.mktemp("etcd-tls"), tls=True) as cluster:
        yield cluster


def with_certificates(cluster: EtcdCluster) -> tuple[EtcdConfig, Certificates]:
    certificates = cluster.certificates
    assert certificates is not None
    config = EtcdConfig(
        cluster.endpoints,
        ca_path=certificates.ca,
        cert_path=certificates.client_cert,
        key_path=certificates.client_key,
    )
    return config, certificates


async def test_tls_with_a_client_certificate(secure: EtcdCluster) -> None:
    config, _ = with_certificates(secure)
    async with opened(config) as store:
        await store.check()
        revision = (await put(store, b"1")).revision
        assert await get(store) == b"1"
        async with store.watch(KEY, start_revision=revision) as batches:
            assert [event.kv.value for event in (await anext(batches)).events] == [b"1"]


async def test_a_server_that_is_not_to_be_trusted(secure: EtcdCluster) -> None:
    config, certificates = with_certificates(secure)
    async with opened(replace(config, ca_path=certificates.other_ca)) as store:
        with pytest.raises(StoreAuthFailed) as caught:
            await store.check()
    assert f"127.0.0.1:{secure.server.ports.client}" in str(caught.value)


async def test_a_client_without_a_certificate_or_without_tls(secure: EtcdCluster) -> None:
    config, certificates = with_certificates(secure)
    for wrong in (EtcdConfig(config.endpoints, ca_path=certificates.ca), EtcdConfig(config.endpoints)):
        async with opened(wrong) as store:
            with pytest.raises((StoreUnavailable, StoreAuthFailed)) as caught:
                await store.check()
        assert f"127.0.0.1:{secure.server.ports.client}" in str(caught.value)


async def test_a_missing_certificate_file(secure: EtcdCluster) -> None:
    config, _ = with_certificates(secure)
    with pytest.raises(StoreAuthFailed, match=r"nowhere\.pem"):
        EtcdStore(replace(config, ca_path="/nonexistent/nowhere.pem"))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster.started(tmp_path_factory.mktemp("etcd-auth")) as cluster:
        cluster.enable_auth(("nobody", "secret"))
        yield cluster


async def test_user_and_password(guarded: EtcdCluster) -> None:
    config = EtcdConfig(guarded.endpoints, user="root", password=ROOT_PASSWORD)
    async with opened(config) as store:
        await store.check()
        revision = (await put(store, b"1")).revision
        assert await get(store) == b"1"
        async with store.watch(KEY, start_revision=revision) as batches:
            assert [event.kv.value for event in (await anext(batches)).events] == [b"1"]
        lease = await store.lease_grant(60)
        assert await store.lease_keepalive(lease.id) == 60
        await store.lease_revoke(lease.id)


@pytest.mark.parametrize(("user", "password"), [("root", "not it at all"), ("unheard of", ROOT_PASSWORD)])
async def test_a_wrong_password(guarded: EtcdCluster, user: str, password: str) -> None:
    async with opened(EtcdConfig(guarded.endpoints, user=user, password=password)) as store:
        for call in (store.check, lambda: get(store)):
            with pytest.raises(StoreAuthFailed) as caught:
                await call()
            assert f"127.0.0.1:{guarded.server.ports.client}" in str(caught.value)
            assert user in str(caught.value)
            assert password not in str(caught.value)


async def test_no_user_where_one_is_needed(guarded: EtcdCluster) -> None:
    async with opened(EtcdConfig(guarded.endpoints)) as store:
        with pytest.raises(StoreAuthFailed):
            await get(store)
        with pytest.raises(StoreAuthFailed):
            async with store.watch(KEY, start_revision=1) as batches:
                await anext(batches)


async def test_a_user_who_may_not(guarded: EtcdCluster) -> None:
    async with opened(EtcdConfig(guarded.endpoints, user="nobody", password="secret")) as store:
        await store.check()
        with pytest.raises(StoreAuthFailed):
            await put(store, b"2")
        with pytest.raises(StoreAuthFailed):
            async with store.watch(KEY, start_revision=1) as batches:
                await anext(batches)


async def test_a_token_that_is_no_longer_good(guarded: EtcdCluster) -> None:
    """A restarted server has forgotten all tokens."""
    async with opened(EtcdConfig(guarded.endpoints, user="root", password=ROOT_PASSWORD)) as store:
        start = (await put(store, b"1")).revision
        async with store.watch(KEY, start_revision=start) as batches:
            assert [event.kv.value for event in (await anext(batches)).events] == [b"1"]
            await trio.to_thread.run_sync(guarded.server.restart)
            assert await get_patiently(store) == b"1"
            await put(store, b"2")
            assert [event.kv.value for event in (await anext(batches)).events] == [b"2"]


async def test_a_user_where_none_is_needed(etcd: EtcdCluster) -> None:
    async with opened(EtcdConfig(etcd.endpoints, user="root", password="whatever")) as store:
        await put(store, b"1")
        assert await get(store) == b"1"


# -- members that stop ------------------------------------------------------------------------------------------------


async def test_a_restart_amid_calls(tmp_path_factory: pytest.TempPathFactory) -> None:
    with EtcdCluster.started(tmp_path_factory.mktemp("etcd-restart")) as cluster:
        async with opened(EtcdConfig(cluster.endpoints)) as store:
            await write_while(store, cluster.server.restart)


async def test_failover_when_a_member_is_killed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with EtcdCluster.started(tmp_path_factory.mktemp("etcd-three"), members=3) as cluster:
        async with opened(EtcdConfig(cluster.endpoints, call_deadline_s=3, connect_deadline_s=1)) as store:
            await store.check()
            await write_while(store, cluster.servers[0].kill)
            await trio.to_thread.run_sync(cluster.servers[0].start)
            await write_while(store, cluster.servers[1].pause)
            cluster.servers[1].resume()


async def write_while(store: EtcdStore, disturb: object) -> None:
    """Tasks write, a watch follows, `disturb` happens in the middle: all is there once, and seen in order."""
    assert callable(disturb)
    prefix = b"faults/while/%d/" % next(NUMBERS)
    tasks, each = 4, 40
    start = (await store.range(Range(prefix))).revision + 1
    halfway = trio.Event()
    seen: list[bytes] = []

    async def write(task: int) -> None:
        for number in range(each):
            await put_once(store, prefix + b"%d/%03d" % (task, number), b"")
            if number == each // 4:
                halfway.set()

    async def follow() -> None:
        async with store.watch(prefix, prefix[:-1] + b"0", start_revision=start) as batches:
            while len(seen) < tasks * each:
                seen.extend(event.kv.key for event in (await anext(batches)).events)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        for task in range(tasks):
            nursery.start_soon(write, task)
        await halfway.wait()
        await trio.to_thread.run_sync(disturb)
    expected = [prefix + b"%d/%03d" % (task, number) for task in range(tasks) for number in range(each)]
    assert sorted(seen) == expected
    for task in range(tasks):
        mine = [key for key in seen if key.startswith(prefix + b"%d/" % task)]
        assert mine == sorted(mine)
    found = await store.range(Range(prefix, prefix[:-1] + b"0"))
    assert [kv.key for kv in found.kvs] == expected
    assert {kv.version for kv in found.kvs} == {1}
