"""Steps of time and misfortune: leases that end, frozen, crashed and deaf mounts, new sessions."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.protocol.state import KEPT, UNKNOWN, Etcd, Mount, Reader, State, Step
from tests.model.protocol.world import LETTERS, LIVES_MAX, World, asked_back, dropped, poisoned, put


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
    if at in scenario.deaf:
        yield from _hearing(world, state, at, mount)


def _leases(world: World, state: State, at: int, mount: Mount) -> Iterator[Step]:
    for life in range(1, mount.lives + 1):
        number = world.number(at, life)
        if number not in state.etcd.leases:
            continue
        current = number == mount.session and not mount.crashed
        if current and (at not in world.scenario.lapses or life == LIVES_MAX):
            continue
        if current and mount.valid and world.on("proof_from_sending"):
            continue
        after = state._replace(etcd=_without(world, state.etcd, number))
        yield Step(f"etcd ends the lease of {LETTERS[at]}'s session {life}", after, misfortune=current)


def _without(world: World, etcd: Etcd, session: int) -> Etcd:
    """All that is bound to a lease goes with it."""
    return etcd._replace(
        delegations=frozenset(held for held in etcd.delegations if held[1] != session),
        waiting=frozenset(writer for writer in etcd.waiting if writer[1] != session),
        notices=frozenset(notice for notice in etcd.notices if session not in (notice[0], notice[2])),
        leases=etcd.leases - {session},
        lock=0 if etcd.lock == session and world.on("lock_lease") else etcd.lock,
    )


def _ended(world: World, mount: Mount) -> Mount:
    """`Delegations.end`: everything that was cached goes; what is being taken is not kept."""
    if world.on("drop_with_session"):
        mount = mount._replace(held=(None,) * len(mount.held))
    if world.on("session_of_reply"):
        for directory in range(len(mount.held)):
            mount = poisoned(world, mount, directory)
    return mount._replace(
        session=0,
        valid=False,
        returns=(KEPT,) * len(mount.returns),
        events=frozenset(),
        in_doubt=False,
        deaf=False,
    )


def _crashed(mount: Mount) -> Mount:
    """The daemon is gone: what it had sent is still on its way."""
    sent = {(caller.session, caller.batch) for caller in mount.callers if caller.phase == "sent" and not caller.applied}
    return mount._replace(
        crashed=True,
        valid=False,
        held=(None,) * len(mount.held),
        returns=(KEPT,) * len(mount.returns),
        reader=Reader(),
        callers=(),
        entries=(UNKNOWN,) * len(mount.entries),
        air=None,
        reply=None,
        events=frozenset(),
        in_doubt=False,
        ghosts=mount.ghosts | sent,
        deaf=False,
    )


def _hearing(world: World, state: State, at: int, mount: Mount) -> Iterator[Step]:
    """The watch of the inbox breaks: hold nothing. Later the inbox is read, and watched from there."""
    who = LETTERS[at]
    if not mount.was_deaf and mount.session:
        deaf = dropped(world, mount)._replace(deaf=True, was_deaf=True, events=frozenset())
        yield Step(f"{who} can't hear recalls any more", put(state, at, deaf), True)
    if mount.deaf:
        heard = mount._replace(deaf=False)
        for holder, directory, _ in state.etcd.notices:
            if holder == mount.session:
                heard = asked_back(world, poisoned(world, heard, directory), directory)
        yield Step(f"{who} reads its inbox and hears again", put(state, at, heard))
