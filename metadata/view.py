"""What an operation knows when it decides, and what its transaction must therefore compare.

A `Recollection` keeps what the store last said of single keys. It may be old, so nothing is ever answered from it: it
only lets an operation prepare its transaction without asking first. A `View` is one operation's look at it: each key
that `decide` takes from the view becomes a compare of the transaction, so an operation commits only on what is true.
"""

from __future__ import annotations

from collections.abc import Iterable

from apollofs.metadata.group_cache import GroupCache
from apollofs.metadata.keys import Keys
from apollofs.metadata.store import Compare, KeyValue, Range, RangeResult, Relation, Target, prefix_end


class Unread(Exception):
    """`decide` needs a key that the view doesn't hold; the view has noted which."""


class Recollection:
    """Bounded memory of keys: value or absence, and as of which revision. Oldest leave first."""

    def __init__(self, keys_max: int = 16_384, bytes_max: int = 16 << 20) -> None:
        """`bytes_max`: of all values together."""
        self._keys_max = keys_max
        self._bytes_max = bytes_max
        self._known: dict[bytes, tuple[KeyValue | None, int]] = {}
        self._bytes = 0

    def get(self, key: bytes) -> tuple[KeyValue | None, int] | None:
        return self._known.get(key)

    def note(self, key: bytes, kv: KeyValue | None, revision: int) -> None:
        """What the store said of `key` as of `revision`; an older saying never replaces a newer one."""
        known = self._known.get(key)
        if known is not None and known[1] > revision:
            kv, revision = known
        self._drop(key)
        self._known[key] = (kv, revision)
        self._bytes += _size(kv)
        if len(self._known) > self._keys_max:
            for oldest in list(self._known)[: self._keys_max // 8]:
                self._drop(oldest)
        while self._bytes > self._bytes_max:
            self._drop(next(iter(self._known)))

    def note_range(self, asked: Range, found: RangeResult) -> None:
        """Take over what a read returned. Only a read of a single key tells that something is absent, and one that
        asked for keys only tells nothing of their values."""
        if asked.keys_only:
            return
        revision = asked.revision or found.revision
        for kv in found.kvs:
            self.note(kv.key, kv, revision)
        if not asked.range_end and not found.kvs:
            self.note(asked.key, None, revision)

    def forget(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._drop(key)

    def clear(self) -> None:
        self._known.clear()
        self._bytes = 0

    def _drop(self, key: bytes) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._bytes -= _size(known[0])


def _size(kv: KeyValue | None) -> int:
    return len(kv.value) if kv is not None else 0


class NotHeld(Exception):
    """`decide` needs what this mount does not hold exclusively: the store must be asked."""


class View:
    """One attempt of one operation. `fresh` views were read in one transaction; what they say is the truth then."""

    def __init__(self, recollection: Recollection) -> None:
        self._recollection = recollection
        self._fresh: dict[bytes, tuple[KeyValue | None, int]] = {}
        self._fresh_empty: dict[bytes, bool] = {}
        self.reset()

    def reset(self) -> None:
        """Begin another attempt; what was read stays."""
        self.touched: dict[bytes, int] = {}
        self.unchanged: dict[bytes, int] = {}
        self.emptied: list[bytes] = []
        self.missing: list[bytes] = []
        self.guessed = False

    def _find(self, key: bytes) -> tuple[KeyValue | None, int] | None:
        found = self._fresh.get(key)
        if found is None:
            found = self._recollection.get(key)
            self.guessed = self.guessed or found is not None
        return found

    # -- for decide --------------------------------------------------------------------------------------------------

    def get(self, key: bytes, *, likely_absent: bool = False) -> KeyValue | None:
        """The key as known; the transaction will compare that it still is so.

        A key that was never read raises Unread; with `likely_absent` it is taken to be absent, and compared so.
        """
        found = self._find(key)
        if found is None:
            if not likely_absent:
                self.touched.setdefault(key, 0)
                self.missing.append(key)
                raise Unread
            self.guessed = True
            found = (None, 0)
        self.touched[key] = found[0].mod_revision if found[0] else 0
        return found[0]

    def get_since(self, key: bytes, revision: int) -> KeyValue | None:
        """The key as known at `revision` or later; the transaction will not compare it. For what something else that
        is compared keeps as it is (a directory's place, while nobody has moved any directory since `revision`)."""
        found = self._find(key)
        if found is None or found[1] < revision:
            self.unchanged[key] = revision
            self.missing.append(key)
            raise Unread
        self.unchanged[key] = revision
        return found[0]

    def is_empty(self, prefix: bytes) -> bool:
        """Whether no key has this prefix; taken to be so unless a read has said otherwise, and compared."""
        if self._fresh_empty.get(prefix) is False:
            return False
        self.guessed = self.guessed or prefix not in self._fresh_empty
        self.emptied.append(prefix)
        return True

    # -- for the engine ----------------------------------------------------------------------------------------------

    def compares(self) -> list[Compare]:
        found = [Compare(key, Target.MOD, Relation.EQUAL, revision) for key, revision in self.touched.items()]
        found += [Compare(prefix, Target.CREATE, Relation.EQUAL, 0, prefix_end(prefix)) for prefix in self.emptied]
        return found

    def questions(self) -> list[Range]:
        """What to read so that the next attempt decides on one consistent state."""
        keys = dict.fromkeys([*self.touched, *self.unchanged, *self.missing])
        asked = [Range(key) for key in keys]
        asked += [Range(prefix, prefix_end(prefix), limit=1, keys_only=True) for prefix in dict.fromkeys(self.emptied)]
        return asked

    def unlearn(self) -> None:
        """What was read may have been behind what another mount had answered: nothing is fresh any more."""
        self._fresh.clear()
        self._fresh_empty.clear()

    def learn(self, asked: Iterable[Range], answers: Iterable[RangeResult | None], revision: int) -> None:
        """Take the answers to `questions`, all as of one `revision`."""
        self._fresh.clear()
        self._fresh_empty.clear()
        for question, answer in zip(asked, answers, strict=True):
            assert answer is not None
            if question.range_end:
                self._fresh_empty[question.key] = not answer.kvs
                continue
            kv = answer.kvs[0] if answer.kvs else None
            self._fresh[question.key] = (kv, revision)
            self._recollection.note(question.key, kv, revision)


class HeldView(View):
    """What this mount holds exclusively: facts that nobody else can change, with nothing to compare."""

    def __init__(self, keys: Keys, cache: GroupCache) -> None:
        super().__init__(Recollection(0))
        self._keys = keys
        self._cache = cache
        self.unheld: int | None = None
        """The group of the fact that was asked for last and is not held."""

    def get(self, key: bytes, *, likely_absent: bool = False) -> KeyValue | None:
        """As `View.get`; raises NotHeld."""
        group = self._keys.group_of(key)
        if group is None or not self._cache.is_exclusive(group):
            self.unheld = group
            raise NotHeld
        known = self._cache.peek(group, key)
        if known is None:
            raise NotHeld
        return known[0]

    def get_since(self, key: bytes, revision: int) -> KeyValue | None:
        """Raises NotHeld: what this is for concerns the whole volume."""
        raise NotHeld

    def is_empty(self, prefix: bytes) -> bool:
        """As `View.is_empty`; raises NotHeld."""
        group = self._keys.group_of(prefix)
        if group is None or not self._cache.is_exclusive(group):
            self.unheld = group
            raise NotHeld
        has_any = self._cache.has_dentries(group)
        if has_any is None:
            raise NotHeld
        return not has_any
