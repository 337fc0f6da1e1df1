"""The protocol of seals as a small state machine: one tree, who unseals it, and mounts that cache it under its seal.

A mount that is cut off or frozen is one that takes no step while time goes on, so that needs no step of its own. Time
is counted in ticks; a term is TERM of them. What a mount asks takes its time on the way to the store and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

OPEN, SEALED, ENDING, OPENING, CHANGED = "open", "sealed", "ending", "opening", "changed"
TERM = 2
TICKS_MAX = 5
"""No term begins later; one that runs comes to its end."""
RULES = {
    "compare": "trust begins only if the seal stands",
    "key": "the store knows who trusts a seal, until that has dropped everything",
    "sent": "a term counts from before the request was sent",
    "recent": "what was read before the tree was sealed is not kept",
    "order": "the kernel's cache goes before the key",
    "kernel": "the kernel may keep nothing for longer than the trust lasts",
    "wait": "unsealing waits for the silent, for a term that begins when nobody can begin to trust any more",
    "confirmed": "only a seal that stands as it was is confirmed",
}


@dataclass(frozen=True, slots=True)
class Mount:
    key: bool = False
    """In the store: it trusts the seal."""
    until: int = 0
    """Its trust lasts before that tick."""
    trusted: bool = False
    """It has not noticed the end of its trust."""
    cached: int = -1
    """The version of the tree that it has; -1: none."""
    kernel: int = -1
    kernel_until: int = 0
    request: tuple[str, int, str] = ("", 0, "")
    """What is asked ("begin", "confirm"), when it was sent, and the answer that is on its way ("": it is not there)."""
    reading: int = -2
    """The version that a read on its way back has seen; -2: none is. Negative ones less than that are older."""
    was_sealed: bool = False
    """The tree was sealed when that was read."""
    dead: bool = False


@dataclass(frozen=True, slots=True)
class State:
    phase: str
    version: int
    now: int
    term_ends: int
    """-1: no term runs."""
    mounts: tuple[Mount, ...]


@dataclass(frozen=True, slots=True)
class Step:
    text: str
    state: State
    misfortune: bool = False
    broken: str = ""


@dataclass(frozen=True, slots=True)
class Sealing:
    """A world with so many mounts, and without some of the rules."""

    mounts: int
    off: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.mounts} mounts"

    def first(self) -> State:
        return State(OPEN, 0, 0, -1, (Mount(),) * self.mounts)

    def stale(self, state: State) -> str:
        for number, mount in enumerate(state.mounts):
            if not mount.dead and mount.cached not in (-1, state.version) and state.now < mount.until:
                return f"stale: mount {number} answers version {mount.cached}, which is {state.version} by now"
            if not mount.dead and mount.kernel not in (-1, state.version) and state.now < mount.kernel_until:
                return f"stale: the kernel of mount {number} answers version {mount.kernel}, not {state.version}"
        return ""

    def has_ended(self, state: State) -> bool:
        return state.phase == CHANGED

    def steps(self, state: State) -> Iterator[Step]:
        if state.now < max(TICKS_MAX, state.term_ends):
            yield Step("time goes on", replace(state, now=state.now + 1))
        yield from self._owner(state)
        for number, mount in enumerate(state.mounts):
            if not mount.dead:
                for text, after in self._mount(state, mount):
                    yield Step(f"mount {number} {text}", _with(state, number, after))
                # what its kernel had is gone with it; the key stays
                yield Step(f"mount {number} dies", _with(state, number, Mount(mount.key, dead=True)), misfortune=True)

    # -- who seals and unseals ---------------------------------------------------------------------------------------

    def _owner(self, state: State) -> Iterator[Step]:
        if state.phase == OPEN and state.version == 0:
            yield Step("the tree is changed before it is sealed", replace(state, version=1))
        if state.phase == OPEN:
            yield Step("the tree is sealed", replace(state, phase=SEALED))
        if state.phase == SEALED:
            yield Step("the seal ends", replace(state, phase=ENDING))
        if state.phase == ENDING and state.term_ends < 0:
            yield Step("the term begins for the silent", replace(state, term_ends=state.now + TERM))
        if state.phase == ENDING and self._may_release(state):
            freed = tuple(replace(mount, key=False) for mount in state.mounts)
            yield Step("the tree is free", replace(state, phase=OPENING, mounts=freed))
        if state.phase == OPENING:
            yield Step("the tree is changed", replace(state, phase=CHANGED, version=state.version + 1))

    def _may_release(self, state: State) -> bool:
        if not any(mount.key for mount in state.mounts):
            return True
        return "wait" in self.off or 0 <= state.term_ends <= state.now

    # -- a mount -----------------------------------------------------------------------------------------------------

    def _mount(self, state: State, mount: Mount) -> Iterator[tuple[str, Mount]]:
        kind, sent, answer = mount.request
        if not kind:
            asks = "confirm" if mount.trusted else "begin"
            yield f"asks to {asks}", replace(mount, request=(asks, state.now, ""))
        elif not answer:
            yield "is heard by the store", self._heard(state, mount)
        else:
            yield f"hears: {answer}", self._told(state, replace(mount, request=("", 0, "")), kind, sent, answer)
        if mount.reading == -2 and mount.cached == -1:
            yield "reads", replace(mount, reading=state.version, was_sealed=state.phase != OPEN)
        if mount.reading != -2:
            yield "has read", self._has_read(state, mount)
        if mount.cached != -1 and state.now < mount.until:
            kernel_until = state.now + TERM if "kernel" in self.off else mount.until
            yield "tells its kernel", replace(mount, kernel=mount.cached, kernel_until=kernel_until)
        if mount.trusted and state.now >= mount.until:
            yield "sees that its term is over", _distrusting(mount)
        if not mount.trusted and mount.kernel != -1:
            yield "drops what its kernel has", replace(mount, kernel=-1, kernel_until=0)
        if mount.key and not mount.trusted and not kind and (mount.kernel == -1 or "order" in self.off):
            yield "takes its key away", replace(mount, key=False)

    def _heard(self, state: State, mount: Mount) -> Mount:
        kind, sent, _ = mount.request
        stands = state.phase == SEALED
        if kind == "begin":
            granted = stands or ("compare" in self.off and state.phase != OPEN)
            key = mount.key or (granted and "key" not in self.off)
            return replace(mount, key=key, request=(kind, sent, "yes" if granted else "no"))
        return replace(mount, request=(kind, sent, "yes" if stands or "confirmed" in self.off else "no"))

    def _told(self, state: State, mount: Mount, kind: str, sent: int, answer: str) -> Mount:
        if answer == "no":
            return _distrusting(mount)
        if kind == "confirm" and not (mount.trusted and state.now < mount.until):
            return mount
        since = state.now if "sent" in self.off else sent
        return replace(mount, trusted=True, until=max(mount.until, since + TERM))

    def _has_read(self, state: State, mount: Mount) -> Mount:
        keeps = mount.trusted and state.now < mount.until and (mount.was_sealed or "recent" in self.off)
        cached = mount.reading if keeps else mount.cached
        return replace(mount, cached=cached, reading=-2, was_sealed=False)


def _distrusting(mount: Mount) -> Mount:
    return replace(mount, trusted=False, until=0, cached=-1)


def _with(state: State, number: int, mount: Mount) -> State:
    mounts = tuple(mount if at == number else each for at, each in enumerate(state.mounts))
    return replace(state, mounts=mounts)
