"""Steps of operations that change the namespace: sending, waiting for delegations, giving up, batches, the lock."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.protocol import rules
from tests.model.protocol.state import EXPIRED, NAME, Cached, Caller, Etcd, Mount, Mutation, State, Step
from tests.model.protocol.world import (
    LETTERS,
    World,
    asked_back,
    dropped,
    keys_of,
    locks,
    put,
    replaced,
    version_at,
)

LOCK, UNLOCK = Mutation("lock", ()), Mutation("unlock", ())
Batch = tuple[Mutation, ...]


def steps(world: World, state: State, at: int) -> Iterator[Step]:
    """What the operations of one mount may do next."""
    mount = state.mounts[at]
    for ghost in mount.ghosts:
        yield _ghost(world, state, at, ghost)
    if mount.in_doubt:
        ghosts = frozenset(ghost for ghost in mount.ghosts if ghost[0] != mount.session)
        settled = mount._replace(in_doubt=False, ghosts=ghosts if world.on("settle") else mount.ghosts)
        yield Step(f"{LETTERS[at]} settles its slot", put(state, at, settled))
    for index, caller in enumerate(mount.callers):
        yield from _call(world, state, at, index, caller)


def changed(state: State, at: int, index: int, caller: Caller, etcd: Etcd | None = None) -> State:
    mount = state.mounts[at]
    return put(state, at, mount._replace(callers=replaced(mount.callers, index, caller)), etcd)


def _call(world: World, state: State, at: int, index: int, caller: Caller) -> Iterator[Step]:
    phase, who = caller.phase, LETTERS[at]
    if phase == "idle":
        yield from _begin(world, state, at, index, caller)
    elif phase == "sent":
        yield _deliver(world, state, at, index, caller)
    elif phase == "replied":
        yield _return(world, state, at, index, caller)
        if at in world.scenario.loses and not caller.resent:
            resent = caller._replace(phase="sent", resent=True)
            yield Step(f"the reply to {who} is lost, it sends again", changed(state, at, index, resent), True)
    elif phase in ("lost", "exists"):
        yield _refused(world, state, at, index, caller)
    else:
        yield from _wait(world, state, at, index, caller)
    if phase in ("sent", "replied") and at in world.scenario.gives_up:
        yield _give_up(world, state, at, index, caller)


def _begin(world: World, state: State, at: int, index: int, caller: Caller) -> Iterator[Step]:
    program = world.scenario.programs[at][index]
    mount = state.mounts[at]
    if not mount.session:
        return
    if caller.alone:
        batch, rest = caller.alone[:1], caller.alone[1:]
    elif caller.at < len(program):
        batch, rest = program[caller.at], ()
        if len(batch) > 1 and world.on("batch_apart") and not rules.go_together(world.scenario.keys, batch):
            batch, rest = batch[:1], batch[1:]
    else:
        return
    if batch == (LOCK,) or batch == (UNLOCK,):
        yield from _lock(world, state, at, index, caller._replace(batch=batch))
        return
    if world.scenario.kernel and not _gets_locks(world, mount, batch):
        return
    if any(mutation.after >= 0 and not state.etcd.versions[mutation.after] for mutation in batch):
        return
    session = mount.session
    names = " and ".join(mutation.name for mutation in batch)
    if batch[0].locked and caller.lock != session and world.on("lock_session"):
        ended = Caller(at=len(program))
        yield Step(f"{LETTERS[at]} does not {names}: its lock is lost", changed(state, at, index, ended))
        return
    sent = caller._replace(phase="sent", session=session, batch=batch, alone=rest)
    yield Step(f"{LETTERS[at]} sends: {names}", changed(state, at, index, sent))


def _gets_locks(world: World, mount: Mount, batch: Batch) -> bool:
    keys = world.scenario.keys
    wanted = {keys[key].directory for key in keys_of(batch) if keys[key].kind == NAME}
    if mount.air is not None and mount.air.locked and keys[mount.air.key].directory in wanted:
        return False
    return not wanted & locks(world, mount)


def _lock(world: World, state: State, at: int, index: int, caller: Caller) -> Iterator[Step]:
    """Locks are keys bound to the lease; here request and reply are one step."""
    session, etcd = state.mounts[at].session, state.etcd
    after = caller._replace(at=caller.at + 1, batch=())
    if session not in etcd.leases:
        yield Step(f"{LETTERS[at]} gets no lock: its session has ended", changed(state, at, index, after))
    elif caller.batch == (UNLOCK,):
        free = etcd._replace(lock=0 if etcd.lock == session else etcd.lock)
        yield Step(f"{LETTERS[at]} unlocks", changed(state, at, index, after, free))
    elif not etcd.lock:
        locked = etcd._replace(lock=session)
        yield Step(f"{LETTERS[at]} locks", changed(state, at, index, after._replace(lock=session), locked))


# -- at etcd -----------------------------------------------------------------------------------------------------------


def _deliver(world: World, state: State, at: int, index: int, caller: Caller) -> Step:
    who, etcd = LETTERS[at], state.etcd
    if caller.applied and world.on("once") and caller.session in etcd.leases:
        return Step(
            f"etcd tells {who} that it was applied", changed(state, at, index, caller._replace(phase="replied"))
        )
    if caller.session not in etcd.leases and world.on("fence"):
        lost = caller._replace(phase="lost")
        return Step(f"etcd refuses {who}'s transaction: no session", changed(state, at, index, lost))
    groups = _others(world, etcd, caller.session, caller.batch)
    if groups:
        conflict = caller._replace(phase="conflict", claims=groups)
        return Step(f"etcd refuses {who}'s transaction: others hold", changed(state, at, index, conflict))
    if _exists(etcd, caller.batch):
        phase = "exists"
        if len(caller.batch) > 1:
            caller, phase = caller._replace(batch=caller.batch[:1], alone=caller.batch[1:]), "sent"
        refused = caller._replace(phase=phase)
        return Step(f"etcd refuses {who}'s transaction: a name exists", changed(state, at, index, refused))
    etcd = _applied(etcd, caller.session, caller.batch, _claims(world, caller.session, index, caller.claimed))
    replied = caller._replace(phase="replied", applied=len(etcd.history), claimed=frozenset())
    names = " and ".join(mutation.name for mutation in caller.batch)
    after = changed(state, at, index, replied, etcd)
    return Step(f"etcd applies for {who}: {names}", after, broken=_wrong(state.etcd, caller.session, caller.batch))


def _ghost(world: World, state: State, at: int, ghost: tuple[int, Batch]) -> Step:
    """A copy of a transaction that nobody waits for arrives."""
    (session, batch), mount, etcd = ghost, state.mounts[at], state.etcd
    names = " and ".join(mutation.name for mutation in batch)
    mount = mount._replace(ghosts=mount.ghosts - {ghost})
    dead = session not in etcd.leases and world.on("fence")
    if dead or _others(world, etcd, session, batch) or _exists(etcd, batch):
        return Step(f"etcd refuses a late copy of {LETTERS[at]}'s {names}", put(state, at, mount))
    after = put(state, at, mount, _applied(etcd, session, batch, frozenset()))
    return Step(f"etcd applies a late copy of {LETTERS[at]}'s {names}", after, broken=_wrong(etcd, session, batch))


def _others(world: World, etcd: Etcd, session: int, batch: Batch) -> frozenset[int]:
    if not world.on("guard"):
        return frozenset()
    return rules.others_holding(etcd.delegations, session, world.scenario.keys, batch)


def _exists(etcd: Etcd, batch: Batch) -> bool:
    return any(mutation.exclusive and etcd.versions[key] for mutation in batch for key in mutation.writes)


def _claims(world: World, session: int, index: int, groups: frozenset[int]) -> frozenset[tuple[int, int, int]]:
    """The keys that say that an operation waits for groups; with one for all of a session, who is through takes away
    what the others still need."""
    return frozenset((directory, session, index if world.on("own_claim") else 0) for directory in groups)


def _applied(etcd: Etcd, session: int, batch: Batch, claims: frozenset[tuple[int, int, int]]) -> Etcd:
    versions = list(etcd.versions)
    for key in keys_of(batch):
        versions[key] += 1
    born = {(mutation.born, session) for mutation in batch if mutation.born >= 0}
    return etcd._replace(
        versions=tuple(versions),
        history=(*etcd.history, batch),
        delegations=etcd.delegations | born,
        waiting=etcd.waiting - claims,
    )


def _wrong(etcd: Etcd, session: int, batch: Batch) -> str:
    """What applying these operations breaks, or ""."""
    if session not in etcd.leases:
        return "dead: a transaction of an ended session commits"
    done = [mutation for earlier in etcd.history for mutation in earlier]
    if any(mutation in done for mutation in batch):
        return "once: an operation happens twice"
    keys = [key for mutation in batch if mutation.exclusive for key in mutation.writes]
    if len(keys) != len(set(keys)):
        return "exclusive: two operations make the same name"
    if any(mutation.locked for mutation in batch) and etcd.lock != session:
        return "lock: what was prepared under a lock commits without it"
    return ""


# -- at the mount ------------------------------------------------------------------------------------------------------


def _return(world: World, state: State, at: int, index: int, caller: Caller) -> Step:
    """The transaction has been applied: the cache is told, then the call returns."""
    mount, history = state.mounts[at], state.etcd.history
    for key in keys_of(caller.batch):
        cached = Cached(version_at(history, caller.applied, key), caller.applied)
        mount = _kept(world, mount, key, cached)
    for mutation in caller.batch:
        if mutation.born >= 0 and mount.session:
            mount = _born(world, mount, mutation, caller)
    names = " and ".join(mutation.name for mutation in caller.batch)
    return Step(f"{LETTERS[at]} returns: {names}", put(state, at, _done(mount, index, caller)))


def _kept(world: World, mount: Mount, key: int, cached: Cached) -> Mount:
    keys, directory = world.scenario.keys, world.directory(key)
    reader, group = mount.reader, mount.held[directory]
    if reader.phase != "idle" and world.directory(reader.key) == directory:
        mount = mount._replace(reader=reader._replace(own=(*reader.own, (key, cached))))
    if group is not None and world.on("own_write"):
        mount = mount._replace(held=replaced(mount.held, directory, rules.written(group, key, keys[key], cached)))
    if mount.entries[key][0] >= 0:
        mount = mount._replace(entries=replaced(mount.entries, key, EXPIRED))
    if mount.air is not None and mount.air.key == key:
        # a positive entry that is being asked for again is unhashed by the change; a negative one is never asked for
        # again without the lock
        mount = mount._replace(air=None)
    return mount


def _born(world: World, mount: Mount, mutation: Mutation, caller: Caller) -> Mount:
    """A new directory is held from its birth, complete and empty."""
    if caller.poisoned and world.on("poison"):
        return asked_back(world, mount, mutation.born)
    if caller.session != mount.session:
        return mount
    group = rules.born(caller.applied, len(world.scenario.keys))
    return mount._replace(held=replaced(mount.held, mutation.born, group))


def _done(mount: Mount, index: int, caller: Caller) -> Mount:
    """The operations in hand are over; what was to go alone comes next."""
    next_at = caller.at if caller.alone else caller.at + 1
    after = Caller(next_at, alone=caller.alone, lock=caller.lock)
    return mount._replace(callers=replaced(mount.callers, index, after))


def _refused(world: World, state: State, at: int, index: int, caller: Caller) -> Step:
    after = put(state, at, _done(state.mounts[at], index, caller))
    if caller.phase == "exists":
        done = [mutation for batch in state.etcd.history for mutation in batch]
        broken = "told: an operation meets its own work" if caller.batch[0] in done else ""
        return Step(f"{LETTERS[at]} returns: the name exists", after, broken=broken)
    if caller.resent and world.on("lost_in_doubt"):
        return Step(f"{LETTERS[at]} returns: the session ended, it may have been applied", after)
    broken = "told: an operation that has happened is reported as not done" if caller.applied else ""
    return Step(f"{LETTERS[at]} returns: the session ended, nothing was changed", after, broken=broken)


def _give_up(world: World, state: State, at: int, index: int, caller: Caller) -> Step:
    """At its deadline an operation ends with an unknown outcome; a copy may still arrive."""
    mount = state.mounts[at]
    if not caller.applied:
        mount = mount._replace(ghosts=mount.ghosts | {(caller.session, caller.batch)})
    if len(caller.batch) > 1 and not world.on("batch_unknown"):
        caller = caller._replace(alone=caller.batch)
    mount = _done(mount, index, caller)
    if mount.session == caller.session:
        mount = dropped(world, mount) if world.on("doubt") else mount
        mount = mount._replace(in_doubt=world.on("doubt"))
    return Step(f"{LETTERS[at]} gives up, outcome unknown", put(state, at, mount), True)


# -- waiting for others ------------------------------------------------------------------------------------------------


def _wait(world: World, state: State, at: int, index: int, caller: Caller) -> Iterator[Step]:
    who, etcd, session = LETTERS[at], state.etcd, caller.session
    if caller.phase == "conflict":
        if len(caller.batch) > 1:
            # a batch goes apart: each waits for itself
            apart = caller._replace(phase="sent", batch=caller.batch[:1], alone=caller.batch[1:])
            yield Step(f"{who}'s batch goes apart", changed(state, at, index, apart))
        else:
            yield _claim_first(world, state, at, index, caller)
    elif session not in etcd.leases:
        yield Step(
            f"{who} stops waiting: its session has ended", changed(state, at, index, caller._replace(phase="lost"))
        )
    elif caller.phase == "claim":
        groups = caller.claims
        holders = frozenset(held for held in etcd.delegations if held[0] in groups and held[1] != session)
        claimed = caller._replace(phase="notify", holders=holders, claims=frozenset(), claimed=caller.claimed | groups)
        etcd = etcd._replace(waiting=etcd.waiting | _claims(world, session, index, groups))
        yield Step(f"etcd notes that {who} waits, and tells it the holders", changed(state, at, index, claimed, etcd))
    elif caller.phase == "notify":
        yield _notify(world, changed(state, at, index, caller._replace(phase="wait", holders=frozenset())), who, caller)
    elif all(held[1] == session for held in etcd.delegations if held[0] in caller.claimed):
        again = caller._replace(phase="sent")
        yield Step(f"{who} sees that all is free, and sends again", changed(state, at, index, again))


def _claim_first(world: World, state: State, at: int, index: int, caller: Caller) -> Step:
    """Somebody else holds: say so. What this mount holds of it stays, until it is wanted elsewhere."""
    mount = state.mounts[at]
    mount = mount._replace(callers=replaced(mount.callers, index, caller._replace(phase="claim")))
    return Step(f"{LETTERS[at]} will wait", put(state, at, mount))


def _notify(world: World, state: State, who: str, caller: Caller) -> Step:
    """A notice for each holder; those that watch their inbox will hear of it."""
    etcd = state.etcd
    if world.scenario.deaf:
        # one key for each holder and group: the last writer's replaces it, and ends with the last writer
        told = {(session, directory) for directory, session in caller.holders}
        others = frozenset(notice for notice in etcd.notices if notice[:2] not in told)
        etcd = etcd._replace(notices=others | {(*pair, caller.session) for pair in told})
    mounts = tuple(
        mount._replace(events=mount.events | {d for d, session in caller.holders if session == mount.session})
        if mount.session and not mount.deaf
        else mount
        for mount in state.mounts
    )
    return Step(f"etcd puts {who}'s notices", State(etcd, mounts))
