"""Steps of the kernel's cache: taking entries in, and dropping them under the directory's lock or without it."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.protocol.state import DROPPING, EXPIRED, NAME, OWN, READY, UNKNOWN, Air, Mount, State, Step
from tests.model.protocol.world import LETTERS, World, answer, given, kernel_answer, locks, put, replaced, waited_for


def steps(world: World, state: State, at: int) -> Iterator[Step]:
    """What the kernel of one host may do next."""
    mount, who = state.mounts[at], LETTERS[at]
    locked = locks(world, mount)
    if mount.air is None:
        yield from _ask(world, state, at, locked)
    else:
        air = mount.air
        entries = replaced(mount.entries, air.key, (air.version, air.session))
        taken_in = put(state, at, mount._replace(entries=entries, air=None))
        yield Step(f"the kernel of {who} takes in {world.name(air.key)}", taken_in)
    for directory, phase in enumerate(mount.returns):
        if phase == DROPPING:
            yield from _drop(world, state, at, directory, locked)


def _ask(world: World, state: State, at: int, locked: set[int]) -> Iterator[Step]:
    """A process looks something up that the kernel can't answer; the daemon answers from what it holds."""
    mount = state.mounts[at]
    for key in world.reads(at, mount):
        version = answer(world, mount, key)
        if version is None and not world.on("kernel_held") and mount.valid:
            version = state.etcd.versions[key]  # as read just now, without holding it
        if version is None or kernel_answer(world, mount, key) is not None:
            continue
        needs_lock = world.scenario.keys[key].kind == NAME and mount.entries[key] == UNKNOWN
        if needs_lock and world.directory(key) in locked:
            continue
        asked = mount._replace(air=Air(key, version, mount.session, needs_lock))
        yield Step(f"{LETTERS[at]} tells its kernel version {version} of {world.name(key)}", put(state, at, asked))


def _drop(world: World, state: State, at: int, directory: int, locked: set[int]) -> Iterator[Step]:
    """Attributes need no lock; names need the directory's, unless an operation that waits lets go of it."""
    mount, who = state.mounts[at], LETTERS[at]
    air = mount.air
    if air is not None and world.scenario.keys[air.key] == (directory, OWN):
        mount = mount._replace(air=None)  # a reply that was sent before attributes are dropped is ignored
    late = air is not None and world.scenario.keys[air.key] == (directory, NAME)
    free = directory not in locked and not (late and air is not None and air.locked)
    taken_in = not late or not world.on("kernel_receipts")
    if (free and taken_in) or not given(world, mount, directory):
        dropped = _dropped(world, mount, directory, EXPIRED)
        yield Step(f"the kernel of {who} drops what it has of directory {directory}", put(state, at, dropped))
    elif world.on("hurry") and directory in waited_for(world, mount):
        outdated = tuple(
            UNKNOWN if spec.kind == NAME else entry
            for spec, entry in zip(world.scenario.keys, mount.entries, strict=True)
        )
        outdated_mount = _dropped(world, mount._replace(entries=outdated, air=None), directory, UNKNOWN)
        yield Step(f"the kernel of {who} outdates every entry", put(state, at, outdated_mount))


def _dropped(world: World, mount: Mount, directory: int, entry: tuple[int, int]) -> Mount:
    entries = tuple(
        (entry if kept[0] >= 0 else kept) if world.directory(key) == directory else kept
        for key, kept in enumerate(mount.entries)
    )
    returns = replaced(mount.returns, directory, READY)
    return mount._replace(entries=entries, returns=returns)
