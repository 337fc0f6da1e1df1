"""Steps of operations: answered ahead of etcd where the group is held exclusively, otherwise one transaction each."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.write_back import rules
from tests.model.write_back.state import DROP, KEPT, Caller, Etcd, Mount, Operation, State, Step, Write
from tests.model.write_back.world import LETTERS, World, put, replaced, returned, shared


def steps(world: World, state: State, at: int) -> Iterator[Step]:
    """What the operations of one mount may do next."""
    mount, programs = state.mounts[at], world.scenario.programs[at]
    if mount.crashed:
        return
    for index, caller in enumerate(mount.callers):
        if caller.phase != "idle":
            yield from _go_on(world, state, at, index, programs[index][caller.at])
        elif caller.at < len(programs[index]):
            yield from _begin(world, state, at, index, programs[index][caller.at])


def changed(mount: Mount, index: int, caller: Caller) -> Mount:
    return mount._replace(callers=replaced(mount.callers, index, caller))


def _done(mount: Mount, index: int) -> Mount:
    return changed(mount, index, Caller(mount.callers[index].at + 1))


def _begin(world: World, state: State, at: int, index: int, operation: Operation) -> Iterator[Step]:
    mount = state.mounts[at]
    exists = operation.after < 0 or state.etcd.values[operation.after] or world.value_at(state.truth, operation.after)
    if not mount.session or not exists:
        return
    fact = _fact(world, at, mount, operation)
    if fact is not None:
        yield _ahead(world, state, at, index, operation, fact)
        return
    behind = frozenset(write.number for write in mount.queue)
    caller = Caller(mount.callers[index].at, "begun", mount.session, floor=len(state.truth), behind=behind)
    yield Step(f"{LETTERS[at]} is asked to {operation.name}", put(state, at, changed(mount, index, caller)))


def _fact(world: World, at: int, mount: Mount, operation: Operation) -> int | None:
    """The value that an operation is decided on ahead of etcd; None: it can't be."""
    held = world.usable(mount, world.directory(operation.key))
    if held is None or not held.exclusive:
        return None
    cached = held.known[operation.key]
    if world.on("pending") and operation.key in world.pending(at, mount):
        return None
    return cached.value if cached is not None else None


def _ahead(world: World, state: State, at: int, index: int, operation: Operation, fact: int) -> Step:
    mount, who = state.mounts[at], LETTERS[at]
    if operation.needs is not None and operation.needs != world.is_there(fact):
        wrong = fact != world.value_at(state.truth, operation.key)
        broken = "told: an error that was not true" if wrong else ""
        return Step(f"{who} refuses to {operation.name}", put(state, at, _done(mount, index)), broken=broken)
    number = world.numbers[operation]
    queue = (*mount.queue, Write(number, fact))
    mount = world.applied_ahead(mount._replace(queue=queue), operation.key, number)
    if operation.born >= 0:
        group = world.complete(operation.born, 0, exclusive=True)
        mount = mount._replace(held=replaced(mount.held, operation.born, group))
    if operation.waits:
        caller = Caller(mount.callers[index].at, "settle", mount.session, behind=frozenset({number}))
        mount = changed(mount, index, caller)
    else:
        mount = _done(mount, index)
    etcd = state.etcd._replace(ahead=state.etcd.ahead | {(number, mount.session)})
    text = f"{who} {'queues' if operation.waits else 'answers'}: {operation.name}"
    return Step(text, put(state, at, mount, etcd, (*state.truth, number)))


def _go_on(world: World, state: State, at: int, index: int, operation: Operation) -> Iterator[Step]:
    mount, who = state.mounts[at], LETTERS[at]
    caller = mount.callers[index]
    numbers = {write.number for write in mount.queue}
    if caller.phase == "settle":
        if not caller.behind & numbers:
            yield Step(f"{who} returns: {operation.name}", put(state, at, _done(mount, index)))
    elif caller.phase in ("begun", "fresh") and caller.session != mount.session:
        yield Step(f"{who} returns: the session has ended", put(state, at, _done(mount, index)))
    elif caller.phase == "begun":
        keys = {world.operations[number].key for number in numbers}
        if not world.on("wait_for_queue") or not (caller.behind & numbers or operation.key in keys):
            yield _send(world, state, at, index, operation)
    elif caller.phase == "sent":
        yield _deliver(world, state, at, index, operation)
    elif caller.phase == "fresh":
        yield _decide(world, state, at, index, operation)
    elif caller.phase == "replied":
        yield Step(f"{who} returns: {operation.name}", put(state, at, _returned(world, mount, index, operation)))
    else:
        yield from _wait(world, state, at, index, operation)


def _wait(world: World, state: State, at: int, index: int, operation: Operation) -> Iterator[Step]:
    """Others hold what it changes, or the session has ended."""
    mount, who = state.mounts[at], LETTERS[at]
    caller = mount.callers[index]
    if caller.phase == "conflict":
        yield _recall(world, state, at, index, operation)
    elif caller.phase == "lost" or caller.session not in state.etcd.leases:
        yield Step(f"{who} returns: the session has ended", put(state, at, _done(mount, index)))
    elif not _others(state.etcd, world.directory(operation.key), caller.session):
        again = caller._replace(phase="begun", seen=-1) if world.on("unlearn") else caller._replace(phase="fresh")
        yield Step(f"{who} sees that all is free", put(state, at, changed(mount, index, again)))


def _others(etcd: Etcd, directory: int, session: int) -> frozenset[tuple[int, int]]:
    return frozenset(pair for pair in etcd.delegations if pair[0] == directory and pair[1] != session)


def _send(world: World, state: State, at: int, index: int, operation: Operation) -> Step:
    mount, directory = state.mounts[at], world.directory(operation.key)
    caller = mount.callers[index]
    held = world.usable(mount, directory) if caller.session == mount.session else None
    number = 0
    if held is not None and caller.seen >= 0:
        busy = mount.returns[directory] != KEPT or mount.shares[directory] != KEPT
        claims = max(each.claim for each in mount.callers) if world.on("claim_number") else 0
        number = rules.claim(held, claims, busy=busy and world.on("no_claim_while_sharing"))
    if number and held is not None:
        mount = mount._replace(held=replaced(mount.held, directory, held._replace(claim=number)))
    sent = changed(mount, index, caller._replace(phase="sent", claim=number))
    claims_it = f", and claims directory {directory}" if number else ""
    return Step(f"{LETTERS[at]} sends: {operation.name}{claims_it}", put(state, at, sent))


def _deliver(world: World, state: State, at: int, index: int, operation: Operation) -> Step:
    mount, etcd, who = state.mounts[at], state.etcd, LETTERS[at]
    caller, directory = mount.callers[index], world.directory(operation.key)
    if caller.session not in etcd.leases and world.on("fence"):
        lost = changed(mount, index, caller._replace(phase="lost"))
        return Step(f"etcd refuses {who}'s transaction: no session", put(state, at, lost))
    now = etcd.values[operation.key]
    others = _others(etcd, directory, caller.session) if world.on("guard") else frozenset()
    if others or caller.seen != now:
        refused = caller._replace(phase="conflict" if others else "fresh", seen=now)
        why = "others hold" if others else f"it reads {world.operations[now].name}"
        mount = _landed(world, changed(mount, index, refused), index, directory, applied=False)
        return Step(f"etcd refuses {who}'s transaction: {why}", put(state, at, mount))
    return _apply(world, state, at, index, operation)


def _apply(world: World, state: State, at: int, index: int, operation: Operation) -> Step:
    mount, etcd = state.mounts[at], state.etcd
    caller, directory, number = mount.callers[index], world.directory(operation.key), world.numbers[operation]
    broken = ""
    if caller.seen != world.value_at(state.truth, operation.key):
        broken = f"lost: {operation.name} replaces what it has not seen"
    if caller.session not in etcd.leases:
        broken = "dead: a transaction of an ended session commits"
    pair = {(directory, caller.session)}
    born = {(operation.born, caller.session)} if operation.born >= 0 else set()
    ahead = {earlier for earlier, _ in etcd.ahead}
    etcd = etcd._replace(
        values=replaced(etcd.values, operation.key, number),
        revision=etcd.revision + 1,
        delegations=etcd.delegations | born,
        exclusive=etcd.exclusive | born | (pair if caller.claim else set()),
        waiting=etcd.waiting - pair,
        owed=etcd.owed | (caller.behind & ahead),
    )
    mount = changed(mount, index, caller._replace(phase="replied", applied=etcd.revision))
    text = f"etcd applies for {LETTERS[at]}: {operation.name}"
    return Step(text, put(state, at, mount, etcd, (*state.truth, number)), broken=broken)


def _decide(world: World, state: State, at: int, index: int, operation: Operation) -> Step:
    """The refused transaction has read what is there: an error is final, anything else is sent again."""
    mount, who, directory = state.mounts[at], LETTERS[at], world.directory(operation.key)
    caller = mount.callers[index]
    if operation.needs is None or operation.needs == world.is_there(caller.seen):
        again = changed(mount, index, caller._replace(phase="begun"))
        return Step(f"{who} decides again to {operation.name}", put(state, at, again))
    fits = world.fits(state, caller.floor, (operation.key,), (caller.seen,))
    etcd = state.etcd._replace(waiting=state.etcd.waiting - {(directory, caller.session)})
    broken = "" if fits else "told: an error that was not true"
    return Step(f"{who} refuses to {operation.name}", put(state, at, _done(mount, index), etcd), broken=broken)


def _recall(world: World, state: State, at: int, index: int, operation: Operation) -> Step:
    """Others hold: give up one's own, say that one waits, and tell them."""
    mount, directory = state.mounts[at], world.directory(operation.key)
    caller = mount.callers[index]
    if mount.reader.takes == directory and mount.reader.phase in ("asked", "replied"):
        mount = mount._replace(reader=mount.reader._replace(poisoned=True))
    if mount.held[directory] is not None:
        mount = returned(mount, directory)
    told = {session for _, session in _others(state.etcd, directory, caller.session)}
    etcd = state.etcd
    if caller.session in etcd.leases:
        etcd = etcd._replace(waiting=etcd.waiting | {(directory, caller.session)})
    state = put(state, at, changed(mount, index, caller._replace(phase="wait")), etcd)
    return Step(f"{LETTERS[at]} recalls directory {directory}", notified(state, told, (directory, DROP)))


def notified(state: State, sessions: set[int], notice: tuple[int, str]) -> State:
    """The mounts of these sessions will hear of it."""
    mounts = tuple(
        mount._replace(events=mount.events | {notice}) if mount.session in sessions and not mount.crashed else mount
        for mount in state.mounts
    )
    return state._replace(mounts=mounts)


def _landed(world: World, mount: Mount, index: int, directory: int, *, applied: bool) -> Mount:
    caller = mount.callers[index]
    if not caller.claim or caller.session != mount.session:
        return mount
    mount = changed(mount, index, caller._replace(claim=0))
    held = mount.held[directory]
    if not world.on("land"):
        if held is not None:
            held = held._replace(exclusive=held.exclusive or applied, claim=0)
        return mount._replace(held=replaced(mount.held, directory, held))
    held, back = rules.landed(held, caller.claim, applied=applied)
    mount = mount._replace(held=replaced(mount.held, directory, held))
    if not back:
        return mount
    if mount.reader.takes_turn(directory) and world.on("turn_landing"):
        mount = mount._replace(reader=mount.reader._replace(poisoned=True))
    return shared(world, mount, directory)


def _returned(world: World, mount: Mount, index: int, operation: Operation) -> Mount:
    """The transaction has been applied: the cache is told, then the call returns."""
    caller = mount.callers[index]
    mount = _landed(world, mount, index, world.directory(operation.key), applied=True)
    if caller.session != mount.session:
        return _done(mount, index)
    own = (operation.key, world.numbers[operation], caller.applied)
    mount = world.learnt(mount, *own)
    reader = mount.reader
    if reader.takes >= 0 and reader.takes == world.directory(operation.key):
        mount = mount._replace(reader=reader._replace(own=(*reader.own, own)))
    if operation.born >= 0:
        shared_before = caller.shared and world.on("shared_at_birth")
        group = world.complete(operation.born, caller.applied, exclusive=not shared_before)
        mount = mount._replace(held=replaced(mount.held, operation.born, group))
        if caller.poisoned:
            mount = returned(mount, operation.born)
    return _done(mount, index)
