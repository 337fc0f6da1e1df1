"""Steps of time and misfortune: leases that end, frozen and crashed mounts, new sessions."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.write_back.state import KEPT, Caller, Mount, Reader, State, Step
from tests.model.write_back.world import LETTERS, LIVES_MAX, World, gone, put


def steps(world: World, state: State, at: int) -> Iterator[Step]:
    """What may happen to one mount's session next. A frozen mount is one whose own steps do not happen for a while."""
    mount = state.mounts[at]
    scenario, who = world.scenario, LETTERS[at]
    yield from _leases(world, state, at, mount)
    if mount.crashed:
        return
    if mount.valid and at in scenario.lapses and mount.lives < LIVES_MAX:
        yield Step(f"{who}'s lease is not proven any more", put(state, at, mount._replace(valid=False)), True)
    if not mount.valid and mount.session in state.etcd.leases:
        yield Step(f"{who}'s lease is renewed", put(state, at, mount._replace(valid=True)))
    if not mount.valid and mount.session:
        lost = put(state, at, _ended(world, mount))
        yield Step(f"{who} takes its session for lost", lost, mount.session in state.etcd.leases)
    if not mount.session:
        number = world.number(at, mount.lives + 1)
        begun = mount._replace(session=number, valid=True, lives=mount.lives + 1)
        etcd = state.etcd._replace(leases=state.etcd.leases | {number})
        yield Step(f"{who} begins a new session", put(state, at, begun, etcd))
    if at in scenario.crashes:
        yield Step(f"{who} crashes", put(state, at, _crashed(mount)), True)


def _leases(world: World, state: State, at: int, mount: Mount) -> Iterator[Step]:
    for life in range(1, mount.lives + 1):
        number = world.number(at, life)
        if number not in state.etcd.leases:
            continue
        current = number == mount.session and not mount.crashed
        if current and (mount.valid or at not in world.scenario.lapses or life == LIVES_MAX):
            continue
        after, broken = _without(state, number)
        yield Step(f"etcd ends the lease of {LETTERS[at]}'s session {life}", after, current, broken)


def _without(state: State, session: int) -> tuple[State, str]:
    """All that is bound to a lease goes with it, and what had been answered in it and not committed is not true any
    more. That must be the end of what it had answered."""
    etcd = state.etcd
    lost = {number for number, owner in etcd.ahead if owner == session}
    broken = "middle: what is lost was answered before what is not" if lost & etcd.owed else ""
    etcd = etcd._replace(
        delegations=frozenset(pair for pair in etcd.delegations if pair[1] != session),
        exclusive=frozenset(pair for pair in etcd.exclusive if pair[1] != session),
        waiting=frozenset(pair for pair in etcd.waiting if pair[1] != session),
        leases=etcd.leases - {session},
        ahead=frozenset(pair for pair in etcd.ahead if pair[1] != session),
        owed=etcd.owed - lost,
    )
    left = tuple(number for number in state.truth if number not in lost)
    mounts = tuple(_refloored(mount, state.truth, lost) for mount in state.mounts) if lost else state.mounts
    exclusive = frozenset(pair for pair in state.etcd.exclusive if pair[1] == session)
    return gone(State(etcd, left, mounts), exclusive), broken


def _refloored(mount: Mount, truth: tuple[int, ...], lost: set[int]) -> Mount:
    def floor(before: int) -> int:
        return sum(number not in lost for number in truth[:before])

    callers = tuple(caller._replace(floor=floor(caller.floor)) for caller in mount.callers)
    return mount._replace(callers=callers, reader=mount.reader._replace(floor=floor(mount.reader.floor)))


def _ended(world: World, mount: Mount) -> Mount:
    """Everything that was cached or queued goes."""
    flown = {mount.flight} if mount.flight is not None and mount.flight.phase == "sent" else set()
    return mount._replace(
        session=0,
        valid=False,
        held=(None,) * len(mount.held),
        returns=(KEPT,) * len(mount.returns),
        shares=(KEPT,) * len(mount.shares),
        queue=() if world.on("queue_with_session") else mount.queue,
        flight=None,
        ghosts=mount.ghosts | {flight for flight in flown if not flight.applied},
        events=frozenset(),
    )


def _crashed(mount: Mount) -> Mount:
    """The daemon is gone: what it had sent is still on its way."""
    flown = {mount.flight} if mount.flight is not None and mount.flight.phase == "sent" else set()
    return mount._replace(
        valid=False,
        held=(None,) * len(mount.held),
        returns=(KEPT,) * len(mount.returns),
        shares=(KEPT,) * len(mount.shares),
        callers=tuple(Caller() for _ in mount.callers),
        reader=Reader(),
        queue=(),
        flight=None,
        ghosts=mount.ghosts | {flight for flight in flown if not flight.applied},
        events=frozenset(),
        crashed=True,
    )
