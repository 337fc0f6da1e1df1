"""What the steps share: the scenario, which rules are on, and the first state; what is written, seen and cached."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from tests.model.protocol import rules
from tests.model.protocol.state import (
    DELETED,
    DELETED_ASKED_AGAIN,
    DROPPING,
    EXPIRED,
    KEPT,
    NAME,
    READY,
    Cached,
    Caller,
    Etcd,
    Mount,
    Mutation,
    Reader,
    Scenario,
    State,
)

T = TypeVar("T")
LIVES_MAX = 2
"""Sessions of one mount."""
LETTERS = "ABCDEF"


@dataclass(frozen=True, slots=True)
class World:
    """A scenario with some rules switched off."""

    scenario: Scenario
    off: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        assert self.off <= rules.RULES.keys()

    def on(self, rule: str) -> bool:
        return rule not in self.off

    def number(self, mount: int, life: int) -> int:
        """The session number of a mount's n-th life; 0 is none."""
        return life * len(self.scenario.programs) + mount

    def first(self) -> State:
        scenario = self.scenario
        numbers = [self.number(mount, 1) for mount in range(len(scenario.programs))]
        held = frozenset((directory, numbers[mount]) for directory, mount in scenario.held)
        etcd = Etcd((0,) * len(scenario.keys), delegations=held, leases=frozenset(numbers))
        return State(etcd, tuple(self._mount(m) for m in range(len(numbers))))

    def _mount(self, mount: int) -> Mount:
        scenario = self.scenario
        held = {directory for directory, holder in scenario.held if holder == mount}
        group = rules.born(0, len(scenario.keys))._replace(complete=scenario.complete)
        return Mount(
            session=self.number(mount, 1),
            valid=True,
            lives=1,
            held=tuple(group if directory in held else None for directory in range(scenario.directories)),
            returns=(KEPT,) * scenario.directories,
            reader=Reader(),
            callers=tuple(Caller() for _ in scenario.programs[mount]),
            entries=(EXPIRED,) * len(scenario.keys),
        )

    def name(self, key: int) -> str:
        spec = self.scenario.keys[key]
        return f"{spec.kind} {key} of directory {spec.directory}"

    def exists(self, state: State, directory: int) -> bool:
        """Whether a directory has been made, if anybody makes it here."""
        done = [mutation for batch in state.etcd.history for mutation in batch]
        return directory not in self.scenario.born or any(mutation.born == directory for mutation in done)

    def is_through(self, at: int, mount: Mount) -> bool:
        """Whether the mount's programs have ended."""
        return all(
            caller.phase == "idle" and not caller.alone and caller.at >= len(program)
            for caller, program in zip(mount.callers, self.scenario.programs[at], strict=True)
        )

    def reads(self, at: int, mount: Mount) -> tuple[int, ...]:
        """The keys that a mount may want to read now."""
        return () if self.scenario.rests and self.is_through(at, mount) else self.scenario.reads[at]

    def directory(self, key: int) -> int:
        return self.scenario.keys[key].directory


def put(state: State, at: int, mount: Mount, etcd: Etcd | None = None) -> State:
    if mount.reader.phase != "replied" and mount.reply is None and not any(caller.applied for caller in mount.callers):
        held = tuple(group and rules.settled(group) for group in mount.held)
        mount = mount._replace(held=held)
    mounts = (*state.mounts[:at], mount, *state.mounts[at + 1 :])
    return State(etcd or state.etcd, mounts)


def replaced(items: tuple[T, ...], at: int, item: T) -> tuple[T, ...]:
    return (*items[:at], item, *items[at + 1 :])


# -- versions ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=100_000)
def version_at(history: tuple[tuple[Mutation, ...], ...], revision: int, key: int) -> int:
    """How often a key had been written as of a revision."""
    return sum(any(key in mutation.writes for mutation in batch) for batch in history[:revision])


def keys_of(batch: tuple[Mutation, ...]) -> list[int]:
    return list(dict.fromkeys(key for mutation in batch for key in mutation.writes))


# -- what is cached ----------------------------------------------------------------------------------------------------


def pending(mount: Mount) -> set[int]:
    """The keys that transactions in flight change."""
    return {key for caller in mount.callers if caller.phase in ("sent", "replied") for key in keys_of(caller.batch)}


def answer(world: World, mount: Mount, key: int) -> int | None:
    """The version that the daemon answers without asking etcd, or None."""
    spec = world.scenario.keys[key]
    group = mount.held[spec.directory]
    if group is None or not mount.session or (not mount.valid and world.on("proven")):
        return None
    if world.on("pending") and key in pending(mount):
        return None
    return rules.known(group, key, spec)


def kernel_answer(world: World, mount: Mount, key: int) -> int | None:
    """The version that the kernel answers without asking the daemon, or None."""
    version, session = mount.entries[key]
    if version < 0 or mount.crashed:
        return None
    proven = mount.valid and mount.session == session
    return version if proven or not world.on("kernel_proven") else None


def kernel_floor(world: World, state: State, mount: Mount, key: int) -> int:
    """What this host's kernel must show: until a call returns, its own host may still see what was before it."""
    floor = state.etcd.versions[key]
    for caller in mount.callers:
        if caller.applied and key in keys_of(caller.batch):
            floor = min(floor, version_at(state.etcd.history, caller.applied, key) - 1)
    return floor


def stale(world: World, state: State) -> str:
    """A cached answer that is not what etcd has, or ""."""
    for at, mount in enumerate(state.mounts):
        if mount.crashed:
            continue
        for key, now in enumerate(state.etcd.versions):
            version = answer(world, mount, key)
            if version is not None and version != now:
                return f"{LETTERS[at]} answers {world.name(key)} from its cache: version {version}, etcd has {now}"
            if not world.scenario.kernel:
                continue
            version = kernel_answer(world, mount, key)
            if version is not None and version < kernel_floor(world, state, mount, key):
                return f"the kernel of {LETTERS[at]} answers {world.name(key)}: version {version}, etcd has {now}"
    return ""


# -- giving back -------------------------------------------------------------------------------------------------------


def kept(world: World, mount: Mount, key: int, cached: Cached) -> Mount:
    """A reply to a plain read is kept as far as its group has been held since."""
    directory = world.directory(key)
    group = mount.held[directory]
    if group is None or (cached.revision < group.taken and world.on("held_since")):
        return mount
    group = rules.learnt(group, key, world.scenario.keys[key], cached, world.on("newest"))
    return mount._replace(held=replaced(mount.held, directory, group))


def asked_back(world: World, mount: Mount, directory: int) -> Mount:
    """The group is to be given back, whether or not its key is there."""
    phase = mount.returns[directory]
    if phase in (DELETED, DELETED_ASKED_AGAIN):
        phase = DELETED_ASKED_AGAIN
    elif phase == KEPT:
        phase = begun(world)
    held = mount.held
    if world.on("cache_before_key"):
        held = replaced(held, directory, None)
    return mount._replace(held=held, returns=replaced(mount.returns, directory, phase))


def begun(world: World) -> int:
    return DROPPING if world.scenario.kernel and world.on("kernel_before_key") else READY


def poisoned(world: World, mount: Mount, directory: int) -> Mount:
    """A recall of a group: acquisitions of it that are in flight, births too, are good for one use."""
    reader = mount.reader
    if reader.phase != "idle" and world.directory(reader.key) == directory:
        mount = mount._replace(reader=reader._replace(poisoned=True))
    for at, caller in enumerate(mount.callers):
        if caller.phase != "idle" and any(mutation.born == directory for mutation in caller.batch):
            mount = mount._replace(callers=replaced(mount.callers, at, caller._replace(poisoned=True)))
    return mount


def dropped(world: World, mount: Mount) -> Mount:
    """Everything that is held is given back, and nothing that is being taken is kept."""
    for directory, group in enumerate(mount.held):
        mount = poisoned(world, mount, directory)
        if group is not None:
            mount = asked_back(world, mount, directory)
    return mount


def waited_for(world: World, mount: Mount) -> set[int]:
    """The directories that operations which wait for others are to change."""
    return {
        world.directory(key)
        for caller in mount.callers
        if caller.claimed or caller.phase in ("claim", "notify", "wait")
        for key in keys_of(caller.batch)
    }


def given(world: World, mount: Mount, directory: int) -> list[int]:
    """The names of a directory that the kernel has, or is about to have, and may use."""
    late = mount.air.key if mount.air is not None else -1
    return [
        key
        for key, spec in enumerate(world.scenario.keys)
        if spec == (directory, NAME)
        and (key == late or (mount.entries[key][0] >= 0 and mount.valid and mount.entries[key][1] == mount.session))
    ]


def locks(world: World, mount: Mount) -> set[int]:
    """The directories whose kernel lock calls of this host hold, from their request to our reply."""
    return {
        key.directory
        for caller in mount.callers
        if caller.phase != "idle"
        for mutation in (*caller.batch, *caller.alone)
        for key in (world.scenario.keys[index] for index in mutation.writes)
        if key.kind == NAME
    }
