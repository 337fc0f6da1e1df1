"""Steps of reading: plainly, or taking a group; asking who holds exclusively, and having that shared."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.write_back.callers import notified
from tests.model.write_back.state import KEPT, SHARE, Held, Mount, Reader, State, Step
from tests.model.write_back.world import LETTERS, World, put, replaced, returned


def steps(world: World, state: State, at: int) -> Iterator[Step]:
    """What reading may do next on one mount."""
    mount = state.mounts[at]
    reader = mount.reader
    if mount.crashed:
        return
    if reader.phase == "idle":
        yield from _begin(world, state, at, mount)
    elif reader.phase == "begun":
        yield from _ask(world, state, at, mount)
    elif reader.phase == "asked":
        yield _asked(world, state, at, mount)
    elif reader.phase == "replied":
        yield _reply(world, state, at, mount)
    elif not reader.holders:
        again = mount._replace(reader=_again(reader))
        yield Step(f"{LETTERS[at]} sees that all is shared", put(state, at, again))


def _asked(world: World, state: State, at: int, mount: Mount) -> Step:
    reader = mount.reader
    if reader.takes < 0:
        return _read(world, state, at, mount)
    return _take_turn(world, state, at, mount) if reader.turn else _take(world, state, at, mount)


def _names(keys: tuple[int, ...]) -> str:
    return " and ".join(f"name {key}" for key in keys)


def _again(reader: Reader) -> Reader:
    return Reader("begun", reader.keys, floor=reader.floor)


def _begin(world: World, state: State, at: int, mount: Mount) -> Iterator[Step]:
    if not mount.reads_left:
        return
    for keys in world.scenario.reads[at]:
        there = all(_exists(world, state, world.directory(key)) for key in keys)
        known = all(world.known(at, mount, key) is not None for key in keys)
        if there and (not known or world.scenario.rereads):
            begun = mount._replace(
                reader=Reader("begun", keys, floor=len(state.truth)), reads_left=mount.reads_left - 1
            )
            yield Step(f"{LETTERS[at]} wants to read {_names(keys)}", put(state, at, begun))


def _exists(world: World, state: State, directory: int) -> bool:
    made = [number for number, operation in enumerate(world.operations) if operation.born == directory]
    return not made or any(number in state.truth and number in state.etcd.values for number in made)


def _ask(world: World, state: State, at: int, mount: Mount) -> Iterator[Step]:
    reader = mount.reader
    queued = {world.operations[write.number].key for write in mount.queue}
    if not mount.session or (world.on("read_after_queue") and queued & set(reader.keys)):
        return
    directories = {world.directory(key) for key in reader.keys}
    relied = frozenset(directory for directory in directories if world.usable(mount, directory) is not None)
    plain = reader._replace(phase="asked", session=mount.session, relied=relied)
    who = LETTERS[at]
    first = world.directory(reader.keys[0])
    if world.scenario.takes and _may_take(state, mount, first):
        asked = mount._replace(reader=plain._replace(takes=first, relied=frozenset()))
        yield Step(f"{who} asks for {_names(reader.keys)}, to take directory {first}", put(state, at, asked))
    if at in world.scenario.turns and _may_take_turn(world, mount, first):
        asked = mount._replace(reader=plain._replace(takes=first, turn=True, relied=frozenset()))
        yield Step(f"{who} asks for its turn on directory {first}", put(state, at, asked))
    yield Step(f"{who} asks for {_names(reader.keys)}", put(state, at, mount._replace(reader=plain)))


def _may_take(state: State, mount: Mount, directory: int) -> bool:
    if not mount.valid or mount.held[directory] is not None or mount.returns[directory] != KEPT:
        return False
    return (directory, mount.session) not in state.etcd.waiting


def _may_take_turn(world: World, mount: Mount, directory: int) -> bool:
    if not mount.valid or mount.held[directory] is not None:
        return False
    under_way = mount.returns[directory] != KEPT or mount.shares[directory] != KEPT
    return not under_way or not world.on("turn_after_keys")


def _holders(world: World, state: State, reader: Reader, but: frozenset[int]) -> frozenset[tuple[int, int]]:
    directories = {world.directory(key) for key in reader.keys} - but
    return frozenset(pair for pair in state.etcd.exclusive if pair[0] in directories and pair[1] != reader.session)


def _read(world: World, state: State, at: int, mount: Mount) -> Step:
    reader, etcd = mount.reader, state.etcd
    holders = _holders(world, state, reader, reader.relied) if world.on("reads_ask") else frozenset()
    values = tuple(etcd.values[key] for key in reader.keys)
    reader = reader._replace(phase="replied", values=values, revision=etcd.revision, holders=holders)
    text = f"etcd reads {_told(world, values)} for {LETTERS[at]}{', with who is exclusive' if holders else ''}"
    return Step(text, put(state, at, mount._replace(reader=reader)))


def _told(world: World, values: tuple[int, ...]) -> str:
    return " and ".join(f"<{world.operations[value].name}>" for value in values)


def _take(world: World, state: State, at: int, mount: Mount) -> Step:
    reader, etcd = mount.reader, state.etcd
    if reader.session not in etcd.leases:
        text = f"etcd refuses {LETTERS[at]}'s acquisition: its session has ended"
        return Step(text, put(state, at, mount._replace(reader=_again(reader))))
    directory = reader.takes
    waiting = any(wanted == directory for wanted, _ in etcd.waiting)
    exclusive = any(group == directory for group, _ in etcd.exclusive) and world.on("take_compares")
    got = not waiting and not exclusive
    but = frozenset({directory}) if got else frozenset[int]()
    holders = _holders(world, state, reader, but) if world.on("takes_ask") else frozenset()
    if not world.on("take_compares"):
        holders = frozenset(pair for pair in holders if pair[0] != directory)
    if got:
        etcd = etcd._replace(delegations=etcd.delegations | {(directory, reader.session)})
    values = tuple(etcd.values[key] for key in reader.keys)
    reader = reader._replace(phase="replied", values=values, revision=etcd.revision, holders=holders, got=got)
    text = f"etcd reads {_told(world, values)} for {LETTERS[at]}{', and delegates' if got else ''}"
    return Step(text, put(state, at, mount._replace(reader=reader), etcd))


def _take_turn(world: World, state: State, at: int, mount: Mount) -> Step:
    reader, etcd, who = mount.reader, state.etcd, LETTERS[at]
    directory = reader.takes
    others = any(group == directory and session != reader.session for group, session in etcd.delegations)
    waiting = any(group == directory and session != reader.session for group, session in etcd.waiting)
    if reader.session not in etcd.leases or waiting or (others and world.on("turn_guard")):
        return Step(f"etcd refuses {who}'s turn", put(state, at, mount._replace(reader=_again(reader))))
    pair = {(directory, reader.session)}
    etcd = etcd._replace(delegations=etcd.delegations | pair, exclusive=etcd.exclusive | pair)
    values = tuple(etcd.values[key] for key in reader.keys)
    reader = reader._replace(phase="replied", values=values, revision=etcd.revision, got=True)
    text = f"etcd gives {who} its turn, and reads {_told(world, values)}"
    return Step(text, put(state, at, mount._replace(reader=reader), etcd))


def _reply(world: World, state: State, at: int, mount: Mount) -> Step:
    reader, who = mount.reader, LETTERS[at]
    if reader.takes >= 0:
        mount = _taken(world, mount)
        if reader.holders:
            again = mount._replace(reader=_again(reader))
            return Step(f"{who} must ask again: others are exclusive", put(state, at, again))
    elif reader.holders:
        holders = reader.holders & state.etcd.exclusive
        sharing = mount._replace(reader=reader._replace(phase="sharing", holders=holders))
        after = put(state, at, sharing)
        for directory, session in reader.holders:
            after = notified(after, {session}, (directory, SHARE))
        return Step(f"{who} asks the holders to share", after)
    elif world.on("held_meanwhile") and any(world.usable(mount, directory) is None for directory in reader.relied):
        return Step(
            f"{who} does not hold it any more: it reads again", put(state, at, mount._replace(reader=_again(reader)))
        )
    if reader.session == mount.session:
        for key, value in zip(reader.keys, reader.values, strict=True):
            mount = world.learnt(mount, key, value, reader.revision)
    broken = ""
    if not world.fits(state, reader.floor, reader.keys, reader.values):
        alone = (world.fits(state, reader.floor, (k,), (v,)) for k, v in zip(reader.keys, reader.values, strict=True))
        broken = (
            "torn: a read shows what was never true at once" if all(alone) else "stale: a read shows what was replaced"
        )
    text = f"{who} has read {_told(world, reader.values)}"
    return Step(text, put(state, at, mount._replace(reader=Reader()), None), broken=broken)


def _taken(world: World, mount: Mount) -> Mount:
    reader = mount.reader
    if reader.session != mount.session:
        return mount
    if not reader.got or reader.poisoned:
        return returned(mount, reader.takes)
    group = Held(reader.revision, (None,) * len(world.scenario.keys), exclusive=reader.turn)
    mount = mount._replace(held=replaced(mount.held, reader.takes, group))
    for key, value, revision in reader.own if world.on("turn_own") or not reader.turn else ():
        mount = world.learnt(mount, key, value, revision)
    return mount
