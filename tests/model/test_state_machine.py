"""Two mounts of one namespace against one plain model: whatever is done on one, the other shows what the model says.

APOLLOFS_MODEL_STEPS=20000 takes more steps than every run does, APOLLOFS_MODEL_SEED=n other ones. Once more with
delegations recalled at random moments, on mounts that take them again at once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as Directory

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.two_mounts import TwoMounts, World
from tests.mounted.client import Client
from tests.mounted.harness import LocalBodies, Namespace
from tests.mounted.variants import EagerNamespace
from tests.mounted.watchdog import Watchdog
from tests.support.random_recalls import RandomRecalls

pytestmark = [pytest.mark.mounted, pytest.mark.model, pytest.mark.slow]

STEPS = int(os.environ.get("APOLLOFS_MODEL_STEPS", "2000"))
STEPS_RECALLED = int(os.environ.get("APOLLOFS_MODEL_STEPS", "400"))
SEED = int(os.environ.get("APOLLOFS_MODEL_SEED", "1"))
STEPS_OF_EXAMPLE = 50
STEPS_OF_SEED = 1000


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Modes of the model are those that were asked for."""
    before = os.umask(0)
    yield
    os.umask(before)


@contextmanager
def two_mounts(directory: Directory, kind: type[Namespace]) -> Iterator[tuple[Namespace, type[TwoMounts], list[int]]]:
    """A namespace, the machine of its two mounts, and the number of steps that the machine has done."""
    sites = [LocalBodies("west"), LocalBodies("east")]
    options = ("--block-size", "64K", "--inline-max", "4K")
    with (
        Watchdog.started() as watchdog,
        kind.made(directory, sites, format_options=options) as namespace,
        Client.started() as west_client,
        Client.started() as east_client,
    ):
        west, east = namespace.mount("west"), namespace.mount("east")
        world = World((west.path, east.path), (west_client, east_client), itertools.count(1), [0])

        class Example(TwoMounts):
            def __init__(self) -> None:
                watchdog.watch((west.pid, east.pid))
                super().__init__(world)

        yield namespace, Example, world.steps
        watchdog.calm()


def play(machine: type[TwoMounts], done: list[int], steps: int) -> None:
    """Examples with one seed after the other until so many steps are `done`."""
    for number in itertools.count(SEED):
        left = steps - done[0]
        if left <= 0:
            return
        print(f"{done[0]} steps done; now APOLLOFS_MODEL_SEED={number}")
        run_state_machine_as_test(seed(number)(machine), settings=settings_for(min(left, STEPS_OF_SEED)))


@pytest.mark.usefixtures("open_umask")
def test_two_mounts_do_what_the_model_says(tmp_path: Directory) -> None:
    with two_mounts(tmp_path, Namespace) as (_, machine, done):
        play(machine, done, STEPS)


@pytest.mark.usefixtures("open_umask")
def test_they_do_it_while_delegations_are_recalled_at_random(tmp_path: Directory) -> None:
    with (
        two_mounts(tmp_path, EagerNamespace) as (namespace, machine, done),
        RandomRecalls.started(namespace.cluster.endpoints, namespace.volume, SEED) as recalls,
    ):
        play(machine, done, STEPS_RECALLED)
        counts = recalls.end()
        print(f"{done[0]} steps, {counts['notices']} notices, {counts['writers']} writers that waited")
        assert counts["notices"] and counts["writers"]


def settings_for(steps: int) -> settings:
    return settings(
        max_examples=max(1, steps // STEPS_OF_EXAMPLE),
        stateful_step_count=STEPS_OF_EXAMPLE,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
