"""What the steps share: the scenario, which rules are on, the first state, what is true, cached and held."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from apollofs.metadata.groups import QUEUED
from tests.model.protocol.world import LETTERS, LIVES_MAX, replaced
from tests.model.write_back import rules
from tests.model.write_back.state import (
    ASKED,
    DELETED,
    DELETED_ASKED_AGAIN,
    KEPT,
    Cached,
    Caller,
    Etcd,
    Held,
    Mount,
    Operation,
    Scenario,
    State,
)

__all__ = ["LETTERS", "LIVES_MAX", "World", "replaced"]
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """A scenario with some rules switched off."""

    scenario: Scenario
    off: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        assert self.off <= rules.RULES.keys()

    def on(self, rule: str) -> bool:
        return rule not in self.off

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        return self.scenario.operations

    @cached_property
    def numbers(self) -> dict[Operation, int]:
        return {operation: number for number, operation in enumerate(self.operations)}

    def number(self, mount: int, life: int) -> int:
        """The session number of a mount's n-th life; 0 is none."""
        return life * len(self.scenario.programs) + mount

    def first(self) -> State:
        scenario = self.scenario
        sessions = [self.number(mount, 1) for mount in range(len(scenario.programs))]
        pairs = [frozenset((d, sessions[mount]) for d, mount in held) for held in (scenario.held, scenario.exclusive)]
        etcd = Etcd((0,) * len(scenario.keys), 0, pairs[0], pairs[1], leases=frozenset(sessions))
        return State(etcd, (), tuple(self._mount(mount) for mount in range(len(sessions))))

    def _mount(self, at: int) -> Mount:
        scenario = self.scenario
        held = [
            self.complete(d, 0, exclusive=(d, at) in scenario.exclusive) if (d, at) in scenario.held else None
            for d in range(scenario.directories)
        ]
        return Mount(
            session=self.number(at, 1),
            valid=True,
            lives=1,
            held=tuple(held),
            returns=(KEPT,) * len(held),
            shares=(KEPT,) * len(held),
            callers=tuple(Caller() for _ in scenario.programs[at]),
            reads_left=scenario.reads_max if scenario.reads[at] else 0,
        )

    def complete(self, directory: int, taken: int, *, exclusive: bool) -> Held:
        """A group of which everything is known: nothing is there."""
        known = tuple(Cached(0, 0) if where == directory else None for where in self.scenario.keys)
        return Held(taken, known, exclusive)

    def directory(self, key: int) -> int:
        return self.scenario.keys[key]

    def has_ended(self, state: State) -> bool:
        """Whether the programs of all that live have ended, and nothing is queued."""
        return all(mount.crashed or self.is_through(at, mount) for at, mount in enumerate(state.mounts))

    def is_through(self, at: int, mount: Mount) -> bool:
        programs = self.scenario.programs[at]
        if mount.queue or mount.flight or mount.reader.phase != "idle":
            return False
        return all(c.phase == "idle" and c.at >= len(p) for c, p in zip(mount.callers, programs, strict=True))

    # -- what is true ------------------------------------------------------------------------------------------------

    def value_at(self, truth: tuple[int, ...], key: int) -> int:
        """The value of a key when the operations of `truth` were true."""
        return next((number for number in reversed(truth) if self.operations[number].key == key), 0)

    def is_there(self, value: int) -> bool:
        return self.operations[value].makes

    def fits(self, state: State, floor: int, keys: tuple[int, ...], values: tuple[int, ...]) -> bool:
        """Whether all of it was true at one moment, when at least `floor` operations were."""
        return any(
            all(self.value_at(state.truth[:end], key) == value for key, value in zip(keys, values, strict=True))
            for end in range(floor, len(state.truth) + 1)
        )

    # -- what is cached ----------------------------------------------------------------------------------------------

    def pending(self, at: int, mount: Mount) -> set[int]:
        """The keys that transactions in flight change, but for those of the queue."""
        programs = self.scenario.programs[at]
        sent = [(c, p) for c, p in zip(mount.callers, programs, strict=True) if c.phase in ("sent", "replied")]
        return {program[caller.at].key for caller, program in sent}

    def usable(self, mount: Mount, directory: int) -> Held | None:
        """A held group, while the lease is proven."""
        return mount.held[directory] if mount.session and (mount.valid or not self.on("proven")) else None

    def known(self, at: int, mount: Mount, key: int) -> int | None:
        """What is answered from the cache, or None."""
        held = self.usable(mount, self.directory(key))
        if held is None or held.known[key] is None or key in self.pending(at, mount):
            return None
        cached = held.known[key]
        return cached.value if cached is not None else None

    def stale(self, state: State) -> str:
        """A cached answer that is not true, or ""."""
        for at, mount in enumerate(state.mounts):
            for key in range(len(self.scenario.keys)) if not mount.crashed else ():
                value = self.known(at, mount, key)
                if value is not None and value != self.value_at(state.truth, key):
                    return f"{LETTERS[at]} answers name {key} from its cache: {self.operations[value].name}"
        return ""

    def learnt(self, mount: Mount, key: int, value: int, revision: int) -> Mount:
        """A reply is kept as far as its group has been held since."""
        directory = self.directory(key)
        held = mount.held[directory]
        if held is None or revision < held.taken:
            return mount
        known = held.known[key]
        if known is not None and known.as_of > revision:
            return mount
        held = held._replace(known=replaced(held.known, key, Cached(value, revision)))
        return mount._replace(held=replaced(mount.held, directory, held))

    def applied_ahead(self, mount: Mount, key: int, value: int) -> Mount:
        """What is answered ahead is known from now on; as of later than all that is read before it is committed."""
        directory = self.directory(key)
        held = mount.held[directory]
        assert held is not None
        as_of = QUEUED if self.on("queued_is_newest") else held.taken
        held = held._replace(known=replaced(held.known, key, Cached(value, as_of)))
        return mount._replace(held=replaced(mount.held, directory, held))


def put(state: State, at: int, mount: Mount, etcd: Etcd | None = None, truth: tuple[int, ...] | None = None) -> State:
    """The state with another mount in it. Without a reply on its way all that comes is newer than what is known."""
    written = any(caller.applied for caller in mount.callers) or (mount.flight is not None and mount.flight.applied)
    if mount.reader.phase != "replied" and not written:
        mount = mount._replace(held=tuple(held and _settled(held) for held in mount.held))
    mounts = replaced(state.mounts, at, mount)
    return State(etcd or state.etcd, state.truth if truth is None else truth, mounts)


def _settled(held: Held) -> Held:
    known = tuple(
        Cached(cached.value, 0) if cached is not None and cached.as_of != QUEUED else cached for cached in held.known
    )
    return held._replace(taken=0, known=known)


def gone(state: State, pairs: frozenset[tuple[int, int]]) -> State:
    """The watches of those who wait for groups to be shared see that these keys have been deleted."""
    mounts = tuple(
        mount._replace(reader=mount.reader._replace(holders=mount.reader.holders - pairs))
        if mount.reader.phase == "sharing"
        else mount
        for mount in state.mounts
    )
    return state._replace(mounts=mounts)


def asked(phase: int) -> int:
    """What becomes of a key that is to go, whatever is under way."""
    return DELETED_ASKED_AGAIN if phase in (DELETED, DELETED_ASKED_AGAIN) else ASKED


def returned(mount: Mount, directory: int) -> Mount:
    """The group is dropped and given back, whether or not its key is there."""
    return mount._replace(
        held=replaced(mount.held, directory, None),
        returns=replaced(mount.returns, directory, asked(mount.returns[directory])),
    )


def shared(world: World, mount: Mount, directory: int) -> Mount:
    """The group is not exclusive any more, and its key goes, whether or not it is there."""
    held = mount.held[directory]
    if held is not None:
        exclusive = held.exclusive and not world.on("flag_first")
        held = held._replace(exclusive=exclusive, claim=0 if world.on("land") else held.claim)
    phase = mount.shares[directory]
    again = asked(phase) if world.on("share_again") or phase == KEPT else phase
    return mount._replace(held=replaced(mount.held, directory, held), shares=replaced(mount.shares, directory, again))
