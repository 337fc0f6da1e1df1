"""Is a history linearizable? Looks for an order of its changes that explains all that was seen (Wing and Gong, Lowe).

Names that no rename connects are independent of each other and are checked apart. In each part every process is a
lane, and so is every operation whose outcome is unknown; a node says how far each lane has come and what the namespace
is then. From a node the search branches only over changes: an operation that only looks ends as soon as the present
state explains it, which can't make anything else impossible. Nodes that were met before are not searched again.

An operation may take effect only when all that returned before its call have.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tests.support.history.namespace import State, changed, is_explained, meanings, without_the_past
from tests.support.history.records import Kind, Operation

NODES_MAX = 300_000
"""Of each part; a history that needs more has too much at once to be decided."""
SHOWN_MAX = 40


class NotLinearizable(AssertionError):
    """No order explains the history; the message has where the search came furthest."""


class Undecided(Exception):
    """The search was given up."""


class Node(NamedTuple):
    """How far each lane has come; for the next operation of each, which inodes it may have taken its name for."""

    at: tuple[int, ...]
    known: tuple[frozenset[int], ...]
    state: State


def check(history: Iterable[Operation], *, nodes_max: int = NODES_MAX) -> int:
    """Returns how many nodes were searched. Raises NotLinearizable, Undecided. All names are absent at the start."""
    return sum(_Search(part, nodes_max).run() for part in _parts(list(history)))


def _parts(history: Sequence[Operation]) -> list[list[Operation]]:
    """The history by sets of names that renames connect."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    for operation in history:
        root[find(operation.names[0])] = find(operation.names[-1])
    parts: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        parts[find(operation.names[0])].append(operation)
    return list(parts.values())


class _Search:
    """One part of a history."""

    def __init__(self, operations: Sequence[Operation], nodes_max: int) -> None:
        self._operations = sorted(operations, key=lambda operation: operation.invoked_s)
        self._nodes_max = nodes_max
        lanes: dict[str, list[Operation]] = defaultdict(list)
        for operation in self._operations:
            if not operation.unknown:
                lanes[operation.process].append(operation)
        self._required = len(lanes)
        """The lanes after these are of unknown outcome and need not be finished."""
        self._lanes = [*lanes.values(), *([operation] for operation in self._operations if operation.unknown)]
        makers = (Kind.CREATE, Kind.REPLACE)
        self._inos = {each.number: each.ino for each in operations if each.kind in makers and each.ino}

    def run(self) -> int:
        lanes = len(self._lanes)
        start = self._settled(Node((0,) * lanes, (frozenset(),) * lanes, State()))
        seen, waiting, furthest = {start}, [start], start
        while waiting:
            node = waiting.pop()
            if self._is_done(node):
                return len(seen)
            if self._progress(node) > self._progress(furthest):
                furthest = node
            if len(seen) > self._nodes_max:
                raise Undecided(f"more than {self._nodes_max} nodes; the furthest:\n{self._account(furthest)}")
            for following in reversed(list(self._following(node))):
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
        raise NotLinearizable(self._account(furthest))

    def _is_done(self, node: Node) -> bool:
        return all(at == len(lane) for at, lane in zip(node.at[: self._required], self._lanes, strict=False))

    def _progress(self, node: Node) -> int:
        return sum(node.at[: self._required])

    def _heads(self, node: Node) -> list[tuple[int, Operation]]:
        """The next operation of each lane."""
        return [
            (number, lane[at])
            for number, (at, lane) in enumerate(zip(node.at, self._lanes, strict=True))
            if at < len(lane)
        ]

    def _open(self, node: Node) -> list[tuple[int, Operation]]:
        """The heads that may take effect now."""
        heads = self._heads(node)
        horizon = min((head.returned_s for _, head in heads if not head.unknown), default=math.inf)
        return [(number, head) for number, head in heads if head.invoked_s <= horizon]

    def _following(self, node: Node) -> Iterator[Node]:
        """The nodes one change further, the operation that returned first at the front."""
        changes = [(number, head) for number, head in self._open(node) if not head.only_looks]
        changes.sort(key=lambda item: (item[1].unknown, item[1].returned_s))
        for number, head in changes:
            for state in changed(node.state, head, sorted(node.known[number])):
                yield self._settled(_passed(node, number)._replace(state=state))

    def _settled(self, node: Node) -> Node:
        """The node when all that only looks, and is explained, has ended."""
        while True:
            node = self._looked(node)
            explained = [
                number for number, head in self._open(node) if head.only_looks and self._explains(node, number)
            ]
            if not explained:
                return self._trimmed(node)
            for number in explained:
                node = _passed(node, number)

    def _looked(self, node: Node) -> Node:
        """With what each open head that goes through a name may take it for now."""
        known = list(node.known)
        for number, head in self._open(node):
            if head.goes_through_name:
                found = meanings(node.state, head, head.names[0]) - {0}
                known[number] = known[number].union(inode for inode in found if self._is_it(head, inode))
        return node._replace(known=tuple(known))

    def _is_it(self, operation: Operation, inode: int) -> bool:
        return not operation.ino or self._inos.get(inode, operation.ino) == operation.ino

    def _explains(self, node: Node, number: int) -> bool:
        operation = self._lanes[number][node.at[number]]
        staged = [
            (inode, head.number)
            for other, head in self._heads(node)
            if head.kind is Kind.APPEND and not head.error and head.host == operation.host
            for inode in node.known[other]
        ]
        return is_explained(node.state, operation, node.known[number], staged)

    def _trimmed(self, node: Node) -> Node:
        """Without what nobody can see any more, so that nodes are equal that differ in that only."""
        heads = [head for _, head in self._heads(node)]
        former = frozenset(
            each
            for each in node.state.former
            if any(head.host == each.host and head.invoked_s < each.until_s for head in heads)
        )
        known = {inode for inodes in node.known for inode in inodes}
        return node._replace(state=without_the_past(node.state, former, known))

    def _account(self, node: Node) -> str:
        """Where the search came no further, for a person."""
        heads = self._heads(node)
        stuck_s = min((head.returned_s for _, head in heads if not head.unknown), default=math.inf)
        before = [each for each in self._operations if each.invoked_s <= stuck_s][-SHOWN_MAX:]
        lines = ["no order of these operations explains what was seen. They are, up to there:"]
        lines += [f"  {each}" for each in before]
        lines += [f"the names are then {dict(node.state.names)}, the bodies {dict(node.state.bodies)}, and next are:"]
        lines += [f"  {head}, its name taken for {sorted(node.known[number])}" for number, head in heads]
        return "\n".join(lines)


def _passed(node: Node, number: int) -> Node:
    """The node with one lane a step further."""
    at, known = list(node.at), list(node.known)
    at[number] += 1
    known[number] = frozenset()
    return Node(tuple(at), tuple(known), node.state)
