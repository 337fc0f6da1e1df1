"""Steps of reading: asking etcd, taking delegations in passing, hearing recalls, giving back."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.protocol import rules
from tests.model.protocol.state import (
    DELETED,
    DELETED_ASKED_AGAIN,
    KEPT,
    READY,
    Cached,
    Mount,
    Reader,
    Reply,
    State,
    Step,
)
from tests.model.protocol.world import (
    LETTERS,
    World,
    answer,
    asked_back,
    begun,
    kept,
    poisoned,
    put,
    replaced,
)


def steps(world: World, state: State, at: int) -> Iterator[Step]:
    """What reading and giving back may do next on one mount."""
    mount = state.mounts[at]
    if mount.reader.phase == "idle":
        yield from _ask(world, state, at, mount)
    elif mount.reader.phase == "asked":
        yield _read(world, state, at, mount)
    else:
        yield _reply(world, state, at, mount)
    if at in world.scenario.plain:
        yield from _plainly(world, state, at, mount)
    for directory in mount.events:
        recalled = asked_back(world, poisoned(world, mount, directory) if world.on("poison") else mount, directory)
        text = f"{LETTERS[at]} hears that directory {directory} is recalled"
        yield Step(text, put(state, at, recalled._replace(events=mount.events - {directory})))
    for directory, phase in enumerate(mount.returns):
        if phase != KEPT:
            yield from _give_back(world, state, at, directory)


def _ask(world: World, state: State, at: int, mount: Mount) -> Iterator[Step]:
    for key in world.reads(at, mount):
        if not world.exists(state, world.directory(key)):
            continue
        if answer(world, mount, key) is None and _may_take(world, mount, world.directory(key)):
            asked = mount._replace(reader=Reader("asked", key, mount.session))
            yield Step(f"{LETTERS[at]} asks for {world.name(key)}, to take its group", put(state, at, asked))


def _plainly(world: World, state: State, at: int, mount: Mount) -> Iterator[Step]:
    """A read that takes nothing: what it shows is true when etcd answers; only keeping it may be wrong."""
    if mount.reply is not None:
        key, cached = mount.reply
        after = put(state, at, kept(world, mount._replace(reply=None), key, cached))
        yield Step(f"{LETTERS[at]} hears version {cached.version} of {world.name(key)}", after)
        return
    for key in world.reads(at, mount):
        cached = Cached(state.etcd.versions[key], len(state.etcd.history))
        text = f"etcd reads version {cached.version} of {world.name(key)} for {LETTERS[at]}"
        yield Step(text, put(state, at, mount._replace(reply=Reply(key, cached))))


def _may_take(world: World, mount: Mount, directory: int) -> bool:
    if not mount.session or not mount.valid or mount.in_doubt or mount.held[directory] is not None:
        return False
    if mount.returns[directory] != KEPT and world.on("no_take_while_returning"):
        return False
    if mount.deaf and world.on("hearing"):
        return False
    born = {mutation.born for caller in mount.callers if caller.phase != "idle" for mutation in caller.batch}
    return directory not in born or not world.on("no_take_at_birth")


def _read(world: World, state: State, at: int, mount: Mount) -> Step:
    """A take reaches etcd: a transaction of the session. With a writer waiting it only reads."""
    etcd, reader = state.etcd, mount.reader
    directory = world.directory(reader.key)
    if reader.session not in etcd.leases:
        text = f"etcd refuses {LETTERS[at]}'s acquisition: its session has ended"
        return Step(text, put(state, at, mount._replace(reader=Reader())))
    version, revision = etcd.versions[reader.key], len(etcd.history)
    text = f"etcd reads version {version} of {world.name(reader.key)} for {LETTERS[at]}"
    got = not (any(wanted == directory for wanted, _, _ in etcd.waiting) and world.on("writers_first"))
    if got:
        etcd = etcd._replace(delegations=etcd.delegations | {(directory, reader.session)})
        text += ", and delegates its group"
    reader = reader._replace(phase="replied", version=version, revision=revision, got=got)
    return Step(text, put(state, at, mount._replace(reader=reader), etcd))


def _reply(world: World, state: State, at: int, mount: Mount) -> Step:
    reader = mount.reader
    mount = mount._replace(reader=Reader())
    same = mount.session == reader.session or not world.on("session_of_reply")
    if same and reader.got and not reader.poisoned and mount.session:
        mount = _hold(world, mount, reader, Cached(reader.version, reader.revision))
    elif mount.session == reader.session:
        mount = asked_back(world, mount, world.directory(reader.key))
    text = f"{LETTERS[at]} hears version {reader.version} of {world.name(reader.key)}"
    return Step(text, put(state, at, mount))


def _hold(world: World, mount: Mount, reader: Reader, cached: Cached) -> Mount:
    keys, directory = world.scenario.keys, world.directory(reader.key)
    group = rules.taken(reader.revision, len(keys))
    group = rules.learnt(group, reader.key, keys[reader.key], cached)
    if world.on("own_write_while_taking"):
        for key, own in reader.own:
            group = rules.written(group, key, keys[key], own)
    return mount._replace(held=replaced(mount.held, directory, group))


def _give_back(world: World, state: State, at: int, directory: int) -> Iterator[Step]:
    """The key of a group is deleted, once the caches have dropped the group; then the reply comes."""
    mount, etcd = state.mounts[at], state.etcd
    phase = mount.returns[directory]
    if phase == READY:
        etcd = etcd._replace(
            delegations=etcd.delegations - {(directory, mount.session)},
            notices=frozenset(n for n in etcd.notices if n[:2] != (mount.session, directory)),
        )
        after = mount._replace(returns=replaced(mount.returns, directory, DELETED))
        yield Step(f"etcd deletes {LETTERS[at]}'s key of directory {directory}", put(state, at, after, etcd))
    elif phase in (DELETED, DELETED_ASKED_AGAIN):
        next_phase = KEPT if phase == DELETED else begun(world)
        after = mount._replace(returns=replaced(mount.returns, directory, next_phase))
        if not world.on("cache_before_key"):
            after = after._replace(held=replaced(after.held, directory, None))
        yield Step(f"{LETTERS[at]} hears that its key of directory {directory} is gone", put(state, at, after))
