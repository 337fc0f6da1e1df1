"""What may happen with the locks on one inode: calls, transactions that take their time, watches that lag, recalls.

What is pure is the product's own code: who blocks whom, who has a lock by position, who was passed over.
"""

from __future__ import annotations

from collections.abc import Iterator

from apollofs.metadata.lock_picture import SOLE_OWNER, Waiting
from apollofs.metadata.lock_queue import ahead_of, has_lock, passed_over
from apollofs.metadata.lock_ranges import add, blockers, subtract, weakens
from apollofs.metadata.lock_records import RANGE_END, Arrival, Lock, LockType
from apollofs.metadata.lock_turns import excludes_everybody
from tests.model.locks.state import OWN, Entry, Mount, Request, Scenario, State, Step, Transaction

RULES = {
    "guard": "a grant compares that nobody else has put a key since the picture's revision",
    "alone_excludes": "nobody is granted anything while another mount decides alone",
    "tell_held": "who decides alone no more says what is held",
    "tell_waiters": "and who waits there",
    "notice": "who wants something of a mount that decides alone puts a notice",
    "passed_over": "who passes others over compares that those are still there because of whom it may",
    "picture_after_strays": "after a request was withdrawn the picture is as new as that",
    "weakens": "what makes a lock shared is written",
    "turn_excludes": "a turn begins only with the end of what excluded everybody",
    "turn_ends": "a turn ends unasked",
}


class World:
    def __init__(self, scenario: Scenario, off: frozenset[str]) -> None:
        assert off <= RULES.keys()
        self._programs = scenario.programs
        self._alone = scenario.alone
        self._off = off

    def first(self) -> State:
        mounts = tuple(Mount(at=(0,) * len(owners), paused=not self._alone) for owners in self._programs)
        return State(0, ((0, frozenset()),), frozenset(), mounts)

    def is_over(self, state: State) -> bool:
        return all(
            mount.sent is None and all(at == len(calls) for at, calls in zip(mount.at, program, strict=True))
            for mount, program in zip(state.mounts, self._programs, strict=True)
        )

    def _on(self, rule: str) -> bool:
        return rule not in self._off

    def steps(self, state: State) -> Iterator[Step]:
        for at, mount in enumerate(state.mounts):
            if mount.seen < state.revision:
                seen, entries = next((r, entries) for r, entries in state.past if r > mount.seen)
                yield self._step(f"{at} hears", state, at, mount._replace(seen=seen, picture=_others(entries, at)))
            for request in mount.requests:
                busy = mount.sent is not None and mount.sent.owner == request.owner  # a transaction is not interrupted
                if self._programs[at][request.owner][mount.at[request.owner]].may_leave and not busy:
                    yield self._step(f"{at}.{request.owner} leaves", state, at, _leave(mount, request), misfortune=True)
            if mount.sent is not None:
                yield self._apply(state, at, mount, mount.sent)
            elif mount.strays:
                yield self._send(state, at, mount, Transaction("mend", -1, mount.held))
            else:
                yield from self._turn(state, at, mount)

    def _turn(self, state: State, at: int, mount: Mount) -> Iterator[Step]:
        if (mount.alone and at in state.notices) or (mount.in_turn and self._on("turn_ends")):
            yield self._send(state, at, _behind(state, at, mount), Transaction("tell", -1, mount.held))
        keeper = next((entry for entry in mount.picture if entry.alone), None)
        asks = keeper is not None and mount.told != keeper.mount and not state.mounts[keeper.mount].in_turn
        if mount.requests and asks and self._on("notice"):
            yield self._send(state, at, mount, Transaction("notice", -1, mount.held, keeper=keeper))
        waiting = {request.owner: request for request in mount.requests}
        for owner, calls in enumerate(self._programs[at]):
            if mount.at[owner] == len(calls):
                continue
            call = calls[mount.at[owner]]
            if call.lock is None:
                yield self._unlock(state, at, mount, owner)
            else:
                yield from self._lock(state, at, mount, owner, call.lock, waiting.get(owner))

    def _unlock(self, state: State, at: int, mount: Mount, owner: int) -> Step:
        left = subtract(mount.held, owner, 0, RANGE_END)
        after = _next_call(mount._replace(held=left), owner)
        if mount.alone or left == mount.held:
            return self._step(f"{at}.{owner} unlocks", state, at, after)
        excludes = excludes_everybody(mount.held) or not self._on("turn_excludes")
        if mount.requests and not left and excludes and not mount.passes_on:
            return self._send(state, at, after, Transaction("turn", owner, left))
        return self._send(state, at, after, Transaction("release", owner, left))

    def _lock(
        self, state: State, at: int, mount: Mount, owner: int, lock: Lock, request: Request | None
    ) -> Iterator[Step]:
        holders, queue = self._standing(at, mount)
        ahead = list(ahead_of(request.arrival if request else None, queue))
        if next(blockers(lock, holders, (each.lock for each in ahead)), None) is not None:
            if request is None:
                yield self._enqueue(state, at, mount, owner, lock)
            return
        after = add(mount.held, lock)
        granted = _granted(mount._replace(held=after), owner, request)
        if mount.alone:
            yield self._step(f"{at}.{owner} gets {_text(lock)}", state, at, granted)
            return
        if not mount.paused and not mount.picture:
            yield self._send(state, at, mount, Transaction("alone", owner, after, since=mount.seen))
            return
        place = Waiting(request.arrival, lock) if request else None
        weaker = weakens(mount.held, lock) and self._on("weakens")
        if request is not None and place is not None and has_lock(place, holders, queue) and not weaker:
            here = granted._replace(by_place=mount.by_place | {request.ticket}, passes_on=False)
            yield self._step(f"{at}.{owner} has {_text(lock)} by position", state, at, here)
            return
        present = frozenset(passed_over(lock, mount.held, ahead)) if self._on("passed_over") else frozenset()
        sent = Transaction("grant", owner, after, mount.seen, request is not None, present)
        yield self._send(state, at, mount, sent)

    def _enqueue(self, state: State, at: int, mount: Mount, owner: int, lock: Lock) -> Step:
        if not mount.alone:
            return self._send(state, at, mount, Transaction("enqueue", owner, mount.held))
        own = next(entry for entry in state.store if entry.mount == at and entry.ticket == OWN)
        request = Request(owner, mount.tickets, lock, Arrival(own.modified, 1 + mount.tickets), placed=False)
        after = mount._replace(requests=(*mount.requests, request), tickets=mount.tickets + 1)
        return self._step(f"{at}.{owner} waits for {_text(lock)}", state, at, after)

    def _standing(self, at: int, mount: Mount) -> tuple[list[Lock], list[Waiting]]:
        holders = list(mount.held)
        queue = [Waiting(each.arrival, each.lock, b"%d/%d" % (at, each.ticket)) for each in mount.requests]
        for entry in mount.picture if not mount.alone else ():
            if entry.ticket != OWN:
                queue.append(Waiting(entry.arrival, entry.locks[0], entry.key))
            elif entry.alone and self._on("alone_excludes"):
                holders.append(Lock(entry.mount, SOLE_OWNER, 0, RANGE_END, LockType.EXCLUSIVE, 0))
            else:
                holders += entry.locks
        return holders, sorted(queue, key=lambda each: each.arrival)

    # -- the store ---------------------------------------------------------------------------------------------------

    def _apply(self, state: State, at: int, mount: Mount, sent: Transaction) -> Step:
        """The transaction arrives, and so does its reply."""
        store, done = state.store, mount._replace(sent=None)
        if not self._holds(store, at, sent):
            seen = done._replace(seen=state.revision, picture=_others(store, at))
            return self._step(f"{at}'s {sent.what} is refused", state, at, seen)
        revision = state.revision + 1
        notices = state.notices
        kept = {entry for entry in store if entry.mount != at}
        own = {entry for entry in store if entry.mount == at}
        if sent.what == "notice":
            assert sent.keeper is not None
            notices |= {sent.keeper.mount}
            done = done._replace(told=sent.keeper.mount)
        elif sent.what == "enqueue":
            owner_at = done.at[sent.owner]
            lock = self._programs[at][sent.owner][owner_at].lock
            assert lock is not None
            request = Request(sent.owner, done.tickets, lock, Arrival(revision), placed=True)
            own.add(Entry(at, request.ticket, revision, (lock,), arrival=request.arrival))
            done = done._replace(requests=(*done.requests, request), tickets=done.tickets + 1)
        elif sent.what == "mend":
            own = {entry for entry in own if entry.ticket not in mount.strays}
            done = done._replace(strays=frozenset())
        else:
            done, own = self._write(done, at, sent, own, revision)
            notices -= {at} if sent.what == "tell" else frozenset()
        after = frozenset(kept | own)
        if sent.what in ("enqueue", "tell", "release") or (sent.what == "mend" and self._on("picture_after_strays")):
            done = done._replace(seen=revision, picture=_others(after, at))
        changed = State(revision, (*state.past, (revision, after)), notices, state.mounts)
        return self._step(f"{at}'s {sent.what} is applied", changed, at, done)

    def _holds(self, store: frozenset[Entry], at: int, sent: Transaction) -> bool:
        others = _others(store, at)
        if sent.keeper is not None and sent.keeper not in others:
            return False
        if not sent.present <= {entry.key for entry in store}:
            return False
        looked_at = [entry for entry in others if entry.ticket == OWN or not sent.queued]
        return sent.since < 0 or not self._on("guard") or all(entry.modified <= sent.since for entry in looked_at)

    def _write(
        self, mount: Mount, at: int, sent: Transaction, own: set[Entry], revision: int
    ) -> tuple[Mount, set[Entry]]:
        """The own key says what is held; requests that it speaks for go, and those that came meanwhile are put."""
        held = sent.after if self._on("tell_held") or sent.what != "tell" else ()
        gone = set(mount.by_place) | {OWN}
        requests = mount.requests
        granted = next((each for each in requests if each.owner == sent.owner), None)
        if sent.what in ("grant", "alone"):
            gone |= {granted.ticket} if granted else set()
            mount = _granted(mount._replace(held=sent.after, passes_on=False), sent.owner, granted)
        if sent.what in ("alone", "turn"):
            own = {Entry(at, OWN, revision, (), alone=True)}
            waiting = tuple(each._replace(placed=False) for each in mount.requests)
            mount = mount._replace(alone=True, in_turn=sent.what == "turn", by_place=frozenset(), strays=frozenset())
            return mount._replace(requests=waiting), own
        own = {entry for entry in own if entry.ticket not in gone}
        if held:
            own.add(Entry(at, OWN, revision, held))
        if sent.what == "tell":
            told = requests if self._on("tell_waiters") else ()
            own |= {Entry(at, each.ticket, revision, (each.lock,), arrival=each.arrival) for each in told}
            mount = mount._replace(alone=False, paused=True, in_turn=False, passes_on=bool(held))
            mount = mount._replace(requests=tuple(each._replace(placed=True) for each in requests))
        return mount._replace(by_place=frozenset()), own

    def _send(self, state: State, at: int, mount: Mount, sent: Transaction) -> Step:
        return self._step(f"{at} sends {sent.what}", state, at, mount._replace(sent=sent))

    def _step(self, text: str, state: State, at: int, mount: Mount, *, misfortune: bool = False) -> Step:
        mounts = (*state.mounts[:at], mount, *state.mounts[at + 1 :])
        oldest = min(each.seen for each in mounts)
        past = tuple(each for each in state.past if each[0] >= oldest) or state.past[-1:]
        return Step(text, state._replace(mounts=mounts, past=past), misfortune)


def _others(entries: frozenset[Entry], at: int) -> frozenset[Entry]:
    return frozenset(entry for entry in entries if entry.mount != at)


def _next_call(mount: Mount, owner: int) -> Mount:
    return mount._replace(at=(*mount.at[:owner], mount.at[owner] + 1, *mount.at[owner + 1 :]))


def _granted(mount: Mount, owner: int, request: Request | None) -> Mount:
    left = tuple(each for each in mount.requests if each is not request)
    return _next_call(mount._replace(requests=left), owner)


def _behind(state: State, at: int, mount: Mount) -> Mount:
    """At the end of a turn it reads who waits; its own requests come behind them."""
    if not mount.in_turn or not mount.requests:
        return mount
    requests = sorted(mount.requests, key=lambda each: each.arrival)
    moved = [
        each._replace(arrival=Arrival(state.revision, mount.tickets + number))
        for number, each in enumerate(requests, start=1)
    ]
    seen = mount._replace(seen=state.revision, picture=_others(state.store, at))
    return seen._replace(requests=tuple(moved), tickets=mount.tickets + len(moved))


def _leave(mount: Mount, request: Request) -> Mount:
    """It is interrupted; its key, if it has one, is removed later."""
    strays = mount.strays | {request.ticket} if request.placed else mount.strays
    left = tuple(each for each in mount.requests if each is not request)
    return _next_call(mount._replace(requests=left, strays=strays), request.owner)


def _text(lock: Lock) -> str:
    return f"{lock.type.name.lower()} {lock.start}..{lock.end}"
