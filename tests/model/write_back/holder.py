"""Steps of who holds exclusively: committing what is queued, hearing notices, sharing and giving back."""

from __future__ import annotations

from collections.abc import Iterator

from apollofs.metadata.groups import QUEUED
from tests.model.write_back import rules
from tests.model.write_back.state import (
    ASKED,
    DELETED,
    DELETED_ASKED_AGAIN,
    DROP,
    KEPT,
    SHARE,
    Cached,
    Etcd,
    Flight,
    Mount,
    State,
    Step,
    Write,
)
from tests.model.write_back.world import LETTERS, World, gone, put, replaced, returned, shared


def steps(world: World, state: State, at: int) -> Iterator[Step]:
    """What the committer and the groups of one mount may do next."""
    mount = state.mounts[at]
    for ghost in mount.ghosts:
        after = state._replace(mounts=replaced(state.mounts, at, mount._replace(ghosts=mount.ghosts - {ghost})))
        yield _applied(world, after, at, ghost._replace(phase="late"))
    if mount.crashed:
        return
    if mount.flight is not None:
        yield from _fly(world, state, at, mount.flight)
    elif mount.queue and mount.session:
        for writes in _next(world, mount):
            sent = mount._replace(flight=Flight(mount.session, writes))
            yield Step(f"{LETTERS[at]} sends what is queued: {_names(world, writes)}", put(state, at, sent))
    for directory, what in mount.events:
        if what == DROP and mount.reader.turn and mount.reader.takes == directory:
            continue  # it ends this turn, or the slice of it
        yield _hear(world, state, at, directory, what)
    for directory in range(len(mount.held)):
        yield from _keys(world, state, at, directory)


def queued(world: World, mount: Mount, directory: int) -> bool:
    """Whether something of a group is queued."""
    operations = [world.operations[write.number] for write in mount.queue]
    return any(directory in (world.directory(op.key), op.born) for op in operations)


def _names(world: World, writes: tuple[Write, ...]) -> str:
    return " and ".join(world.operations[write.number].name for write in writes)


def _next(world: World, mount: Mount) -> list[tuple[Write, ...]]:
    if not world.on("in_order"):
        return [(write,) for write in mount.queue]
    keys = tuple(world.operations[write.number].key for write in mount.queue)
    return [mount.queue[: rules.batch(keys, mount.queue)]]


# -- the committer's transaction ---------------------------------------------------------------------------------------


def _fly(world: World, state: State, at: int, flight: Flight) -> Iterator[Step]:
    mount, who = state.mounts[at], LETTERS[at]
    if flight.phase == "sent":
        yield _applied(world, state, at, flight)
    else:
        yield Step(f"{who} hears that what was queued is in etcd", put(state, at, _left(world, mount, flight)))
        if at in world.scenario.loses and not flight.resent:
            again = mount._replace(flight=flight._replace(phase="sent", resent=True))
            yield Step(f"the reply to {who} is lost, it sends again", put(state, at, again), True)
    if at in world.scenario.gives_up and not world.on("one_slot") and not mount.ghosts:
        ghosts = mount.ghosts if flight.applied else mount.ghosts | {flight}
        yield Step(f"{who} gives up, and begins anew", put(state, at, mount._replace(flight=None, ghosts=ghosts)), True)


def _applied(world: World, state: State, at: int, flight: Flight) -> Step:
    """The transaction arrives: of the session's committer, or (late) a copy that nobody waits for."""
    mount, etcd, who = state.mounts[at], state.etcd, LETTERS[at]
    alive = flight.session in etcd.leases
    if flight.applied and world.on("once") and alive:
        heard = mount._replace(flight=flight._replace(phase="replied"))
        return Step(f"etcd tells {who} that it was applied", put(state, at, heard))
    born = {world.operations[write.number].born for write in flight.writes}
    groups = {world.directory(world.operations[write.number].key) for write in flight.writes} - born
    held = all((directory, flight.session) in etcd.exclusive for directory in groups)
    if not held or (not alive and world.on("fence")):
        broken = "refused: what was answered can't be committed" if alive and flight.phase == "sent" else ""
        gone = mount._replace(flight=None, queue=()) if flight.phase == "sent" else mount
        return Step(f"etcd refuses what {who} had queued", put(state, at, gone), broken=broken)
    etcd, broken = written(world, state, flight.session, flight.writes)
    if flight.phase == "sent":
        mount = mount._replace(flight=flight._replace(phase="replied", applied=etcd.revision))
    text = f"etcd applies for {who}: {_names(world, flight.writes)}"
    return Step(text, put(state, at, mount, etcd), broken=broken)


def written(world: World, state: State, session: int, writes: tuple[Write, ...]) -> tuple[Etcd, str]:
    """etcd after what was answered ahead has been applied, and what that breaks, or ""."""
    etcd, broken = state.etcd, ""
    values = list(etcd.values)
    done = {write.number for write in writes}
    for write in writes:
        operation = world.operations[write.number]
        if values[operation.key] != write.seen:
            broken = f"lost: {operation.name} was not decided on what it replaces"
        values[operation.key] = write.number
        if operation.born >= 0:
            pair = {(operation.born, session)}
            etcd = etcd._replace(delegations=etcd.delegations | pair, exclusive=etcd.exclusive | pair)
    if session not in etcd.leases:
        broken = "dead: a transaction of an ended session commits"
    last = max((state.truth.index(number) for number in done if number in state.truth), default=0)
    before = {number for number, owner in etcd.ahead if owner == session and number in state.truth[:last]}
    etcd = etcd._replace(
        values=tuple(values),
        revision=etcd.revision + 1,
        ahead=frozenset(pair for pair in etcd.ahead if pair[0] not in done),
        owed=(etcd.owed | before) - done,
    )
    return etcd, broken


def _left(world: World, mount: Mount, flight: Flight) -> Mount:
    """What is committed leaves the queue; as of which revision it is true is known now."""
    queue = tuple(write for write in mount.queue if write not in flight.writes)
    still = {world.operations[write.number].key for write in queue}
    mount = mount._replace(queue=queue, flight=None)
    for key in {world.operations[write.number].key for write in flight.writes} - still:
        directory = world.directory(key)
        held = mount.held[directory]
        cached = held.known[key] if held is not None else None
        if held is not None and cached is not None and cached.as_of == QUEUED:
            held = held._replace(known=replaced(held.known, key, Cached(cached.value, flight.applied)))
            mount = mount._replace(held=replaced(mount.held, directory, held))
    return mount


# -- notices, and keys that go -----------------------------------------------------------------------------------------


def _hear(world: World, state: State, at: int, directory: int, what: str) -> Step:
    mount = state.mounts[at]
    mount = mount._replace(events=mount.events - {(directory, what)})
    if mount.reader.takes_turn(directory) and what == SHARE and world.on("turn_shared"):
        mount = mount._replace(reader=mount.reader._replace(poisoned=True))
    for index, caller in enumerate(mount.callers):
        if caller.phase in ("sent", "replied"):
            born = world.scenario.programs[at][index][caller.at].born == directory
            if born and what == DROP:
                mount = mount._replace(callers=replaced(mount.callers, index, caller._replace(poisoned=True)))
            elif born:
                mount = mount._replace(callers=replaced(mount.callers, index, caller._replace(shared=True)))
    if what == DROP:
        if mount.reader.takes == directory and mount.reader.phase in ("asked", "replied"):
            mount = mount._replace(reader=mount.reader._replace(poisoned=True))
        heard = returned(mount, directory)
        return Step(f"{LETTERS[at]} hears that directory {directory} is recalled", put(state, at, heard))
    heard = shared(world, mount, directory)
    return Step(f"{LETTERS[at]} hears that directory {directory} is to be shared", put(state, at, heard))


def _keys(world: World, state: State, at: int, directory: int) -> Iterator[Step]:
    """The keys of a group are deleted, once nothing of it is queued; then the reply comes."""
    mount, etcd, who = state.mounts[at], state.etcd, LETTERS[at]
    pair = frozenset({(directory, mount.session)})
    clear = not queued(world, mount, directory) or not world.on("queue_first")
    if mount.returns[directory] == ASKED and clear:
        after = mount._replace(returns=replaced(mount.returns, directory, DELETED))
        etcd = etcd._replace(delegations=etcd.delegations - pair, exclusive=etcd.exclusive - pair)
        text = f"etcd deletes {who}'s keys of directory {directory}"
        yield Step(text, gone(put(state, at, after, etcd), pair))
    elif mount.returns[directory] in (DELETED, DELETED_ASKED_AGAIN):
        phase = KEPT if mount.returns[directory] == DELETED else ASKED
        after = mount._replace(returns=replaced(mount.returns, directory, phase))
        yield Step(f"{who} hears that its keys of directory {directory} are gone", put(state, at, after))
    etcd = state.etcd
    if mount.shares[directory] == ASKED and clear:
        after = mount._replace(shares=replaced(mount.shares, directory, DELETED))
        etcd = etcd._replace(exclusive=etcd.exclusive - pair)
        yield Step(f"etcd notes that {who} shares directory {directory}", gone(put(state, at, after, etcd), pair))
    elif mount.shares[directory] in (DELETED, DELETED_ASKED_AGAIN):
        phase = KEPT if mount.shares[directory] == DELETED else ASKED
        after = mount._replace(shares=replaced(mount.shares, directory, phase))
        held = mount.held[directory]
        if held is not None and not world.on("flag_first"):
            after = after._replace(held=replaced(mount.held, directory, held._replace(exclusive=False)))
        yield Step(f"{who} hears that directory {directory} is shared", put(state, at, after))
