"""Two mounts that cache one directory and both change it never wait for each other.

While a process makes, removes or renames a name, the kernel holds the directory's lock until the mount replies, and
dropping a name of that directory needs the same lock. Each mount must drop what it cached before the other may change
it: if both were to wait for that lock, neither would reply.

APOLLOFS_DEADLOCK_ROUNDS=5000 plays more rounds than every run does. The lease here outlasts what a client may take, so
that a wait which only its end would break fails the test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounted import rivals
from tests.mounted.client import Client
from tests.mounted.harness import LocalBodies, Mount, Namespace
from tests.mounted.rivals import Tally, Versions
from tests.mounted.variants import EagerNamespace, OldKernelNamespace, RivalNamespace
from tests.mounted.watchdog import Watchdog

pytestmark = [pytest.mark.mounted, pytest.mark.slow]

ROUNDS = int(os.environ.get("APOLLOFS_DEADLOCK_ROUNDS", "80"))
ROUNDS_IN_CALL = 40
LEASE_S = 120
Mounts = tuple[Mount, Mount]


@pytest.fixture(params=[EagerNamespace, OldKernelNamespace, RivalNamespace], ids=["epochs", "no-epochs", "turns"])
def mounts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounts]:
    kind: type[Namespace] = request.param
    with kind.made(tmp_path, [LocalBodies("west"), LocalBodies("east")]) as namespace:
        yield (
            namespace.mount("west", "--lease-ttl", str(LEASE_S)),
            namespace.mount("east", "--lease-ttl", str(LEASE_S)),
        )


def both(first: Callable[[], Tally], second: Callable[[], Tally]) -> list[Tally]:
    """What both sides return; all that they raise, as one side often fails because the other has."""
    found: list[Tally] = []
    errors: list[Exception] = []
    for each in (first, second):
        try:
            found.append(each())
        except Exception as exc:  # noqa: BLE001  (told below)
            errors.append(exc)
    if errors:
        raise ExceptionGroup("the rivals have failed", errors)
    return found


def test_two_mounts_that_change_one_directory_never_wait_for_each_other(
    mounts: Mounts,
    tmp_path: Path,
    client: Client,
    other_client: Client,
    watchdog: Watchdog,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    versions = tmp_path / "versions"
    versions.write_bytes(bytes(Versions.size_bytes()))
    here, there = (mount.path / "directory" for mount in mounts)
    here.mkdir()
    address = f"\0apollofs-rivals-{os.getpid()}"
    client.call(rivals.listen, address)
    accepting = client.start(rivals.accept, here, versions)
    other_client.call(rivals.join, there, versions, address)
    accepting.result()
    tallies: list[Tally] = []
    for _ in range(0, ROUNDS, ROUNDS_IN_CALL):
        watchdog.watch(mount.pid for mount in mounts)
        running = [each.start(rivals.play, side, ROUNDS_IN_CALL) for side, each in enumerate((client, other_client))]
        tallies += both(*(each.result for each in running))
    watchdog.calm()
    slowest = max(tallies, key=lambda tally: tally.slowest_s)
    record_property("slowest_call_s", round(slowest.slowest_s, 4))
    counts = [mount.status() for mount in mounts]
    print(
        f"{request.node.name}: {ROUNDS} rounds, {sum(tally.changes for tally in tallies)} changes, "
        f"{sum(tally.looks for tally in tallies)} looks; the slowest call, {slowest.slowest}, took "
        f"{slowest.slowest_s * 1000:.1f} ms; {[count['delegations']['recalls_heard'] for count in counts]} recalls, "
        f"{[count['kernel_cache']['epochs'] for count in counts]} epochs, "
        f"{[count['delegations']['turns'] for count in counts]} turns"
    )
    kind = type(mounts[0].namespace)
    for count in counts:
        assert count["delegations"]["recalls_heard"] >= ROUNDS / 2, "else nothing was cached that could be waited for"
        if kind is RivalNamespace:
            assert count["delegations"]["turns"] >= ROUNDS / 2
            assert not count["delegations"]["turns_missed"], "else they waited for each other until they gave up"
        else:
            assert (count["kernel_cache"]["epochs"] > 0) == (kind is EagerNamespace)
