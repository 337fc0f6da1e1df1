"""What the kernel may answer by itself, and taking that back: its cache lives under the mount's delegations.

Rules
1. The kernel may keep an entry while the group of its directory is held, attributes while the group that they are in
   is; never longer than the lease is proven. So a daemon that is stopped leaves nothing stale behind either.
2. Before the key of a group goes, the kernel has dropped all that it was given of it (`drop`).
3. Attributes are dropped without any lock. The kernel ignores a reply to a request that was sent before; of an inode
   that it does not know yet, such a reply may still be on its way: that one is asked for again until it is known.
4. Entries are expired under the directory's lock, which the kernel holds for an operation from its request to our
   reply. An operation that must wait for others would so wait for itself: until it ends (`calm`) it is let go by
   `hurry`, which outdates every entry of the mount at once and takes no lock (INC_EPOCH). So is, from the start, what a
   request of ours has locked (`locked`): a thread that waits in the kernel for that lock can't be killed, and would
   keep the device of a killed daemon open; only when that is closed does the kernel fail the requests that nobody
   answers any more, and let go of their locks.
5. A reply to a LOOKUP that revalidates takes no lock either: entries that were just given are expired once more when
   the thread that asked has run since, or outdated with all others.
6. What a thread was told about a directory before a change of ours, and has not taken in yet, is dropped before that
   change returns: the kernel drops the times of a changed directory by itself, but a late reply would bring them back.
7. A listing is kept while its group is held without a break since it was handed out (an `epoch`); `directories.py` has
   the rest. Dropping it takes no lock but those of its pages, which the kernel holds for moments.
8. Pages of files: `kernel_pages.py`. A file that gets another directory or name takes them to its new group (`moved`).
9. A change that failed may have happened all the same, as where who waited for etcd was killed: then the kernel keeps
   nothing that it knew of the names and the inodes concerned (`names_unsure`, `rehome`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import trio

from apollofs.fs.kernel_pages import KernelPages, PageTable, Shown
from apollofs.fs.kernel_shares import Share, Shares
from apollofs.fs.notifier import Notifier, in_thread
from apollofs.fs.receipts import Receipts
from apollofs.metadata.session import boot_time

NAMES_MAX = 500_000
"""Entries that the kernel may keep, negative ones too, over all directories."""
SEVERAL = -1
"""In place of a thread's number."""
THREADS_MAX = 32
FILES_AT_ONCE = 64
"""Files whose pages one thread drops: it waits for their READs in flight."""
PAGES_WAIT_S = 1.0
"""For READs in flight at a recall. What they bring is dropped after them, before attributes of the file are given."""
RETRY_FIRST_S = 0.001
RETRY_MAX_S = 0.1


class KernelCache:
    """One mount's. Gives nothing until it is attached to a mount."""

    def __init__(
        self,
        validity_s: Callable[[int], float],
        *,
        group_of: Callable[[int], int] = lambda _: 0,
        entries: bool = True,
        make_room: Callable[[], None] = lambda: None,
        give_back: Callable[[int], None] = lambda _: None,
        table: PageTable | None = None,
    ) -> None:
        """`validity_s` says for how many seconds what is held of a group is proven, `group_of` in which held group the
        attributes of an inode are (0: in none). Without `entries` only attributes and pages are given. `make_room` is
        called when NAMES_MAX is reached: something that is held should be given back; `give_back` says which group
        should. `table` is told of the files that have pages."""
        self.pages = KernelPages(table)
        self._validity_s = validity_s
        self._group_of = group_of
        self._make_room = make_room
        self._give_back = give_back
        self._entries = entries
        self._notifier: Notifier | None = None
        self._is_referenced: Callable[[int], bool] = lambda _: False
        self._has_submounts: Callable[[], bool] = lambda: False
        self._shares = Shares()
        self._told: dict[int, int] = {}
        """The thread that was given a directory's attributes since these were last dropped, or SEVERAL."""
        self._locked: Counter[int] = Counter()
        """Directories that the kernel has locked for requests which are being answered here; how many these are."""
        self._epochs = 0
        self._receipts = Receipts()
        self._expiring = trio.CapacityLimiter(THREADS_MAX)
        self._invalidating = trio.CapacityLimiter(THREADS_MAX)
        self._dropping = trio.CapacityLimiter(THREADS_MAX)
        self.drops = 0
        self.epochs = 0

    def attach(
        self, notifier: Notifier, is_referenced: Callable[[int], bool], has_submounts: Callable[[], bool]
    ) -> None:
        """The mount answers now. `is_referenced` tells whether the kernel was given an inode that it has not forgotten.

        Where the kernel has no INC_EPOCH (before Linux 6.16) it is given no entries.
        """
        self._notifier = notifier
        self._is_referenced = is_referenced
        self._has_submounts = has_submounts
        self._entries = self._entries and notifier.inc_epoch()

    def knows(self, ino: int) -> bool:
        """Whether the kernel was given an inode, and has not forgotten it."""
        return self._is_referenced(ino)

    def detach(self) -> None:
        """The mount has ended, and the kernel's cache with it."""
        self._notifier = None
        self._shares.clear()
        self._told.clear()

    def statistics(self) -> dict[str, float]:
        """Counters for `status`."""
        return {
            "directories": len(self._shares),
            "names": self._shares.names,
            "inodes": self._shares.inodes,
            "drops": self.drops,
            "epochs": self.epochs,
            "files_with_pages": len(self.pages),
            "pages_kept": self.pages.kept,
            "page_drops": self.pages.drops,
        }

    # -- giving: without a checkpoint between this and the reply -----------------------------------------------------

    def attributes(self, group: int, ino: int) -> float:
        """For how many seconds the kernel may keep the attributes of `ino`, which are in a held group."""
        validity_s = self._validity_s(group) if self._notifier is not None else 0.0
        if validity_s <= 0:
            return 0.0
        share = self._shares.lengthen(group, validity_s)
        self._shares.add(share, ino)
        if ino in self.pages:
            share.paged.add(ino)
        return validity_s

    def reading(self, ino: int) -> None:
        """A READ of a file has come: if the group of the file is held, a recall from now on drops what it brings."""
        self.pages.expect(ino)
        share = self._shares.home(ino)
        if share is not None:
            share.paged.add(ino)
        else:
            self._settle(ino)

    def _settle(self, ino: int) -> bool:
        """Find an inode its group. Whether that is held."""
        group = self._group_of(ino)
        return group != 0 and self.attributes(group, ino) > 0

    def reads(self, ino: int, version: int, shown: Shown) -> None:
        """Bytes of a file are about to be handed out for the page cache, of this version of its body."""
        self.pages.read(ino, version, shown)
        share = self._shares.home(ino)
        if share is not None:
            share.paged.add(ino)

    def entry(self, group: int, name: bytes) -> float:
        """For how many seconds the kernel may keep what it is told about a name, also that there is none."""
        validity_s = self._validity_s(group) if self._notifier is not None and self._entries else 0.0
        if validity_s <= 0:
            return 0.0
        share = self._shares.lengthen(group, validity_s)
        if name not in share.names:
            if self._shares.names >= NAMES_MAX:
                self._make_room()
                return 0.0
            self._shares.add_name(share, name)
        return validity_s

    def answers_lookup(self, group: int, tid: int) -> None:
        """A thread is about to be told what a name in a directory means, for some time."""
        self._receipts.sent(tid, group)

    def answers_getattr(self, ino: int, tid: int) -> None:
        """A thread is about to be told a directory's attributes, for some time."""
        self._told[ino] = tid if self._told.get(ino, tid) == tid else SEVERAL

    @property
    def takes_listings(self) -> bool:
        """Whether the kernel may have listings at all."""
        return self._notifier is not None and self._entries

    def gives_listing(self, group: int) -> int:
        """A listing of a held, completely known directory is about to be handed out; its epoch, or 0: don't keep it."""
        validity_s = self._validity_s(group) if self.takes_listings else 0.0
        if validity_s <= 0:
            return 0
        share = self._shares.lengthen(group, validity_s)
        if not share.epoch:
            self._epochs += 1
            share.epoch = self._epochs
        share.listed_until = share.until
        return share.epoch

    def holds_listing(self, group: int, epoch: int) -> bool:
        """Whether the group is held without a break since a listing of this epoch was handed out."""
        share = self._shares.find(group)
        return share is not None and 0 < epoch == share.epoch

    def keeps_listing(self, group: int) -> bool:
        """Whether the kernel's listing may be answered from, and what came along with it has not run out."""
        share = self._shares.find(group)
        return share is not None and share.epoch > 0 and boot_time() < share.listed_until

    @contextmanager
    def locked(self, *directories: int) -> Iterator[None]:
        """A request is answered in this block for which the kernel has locked directories, to look up, list or change
        names there."""
        self._locked.update(directories)
        try:
            yield
        finally:
            self._locked.subtract(directories)
            for directory in directories:
                if not self._locked[directory]:
                    del self._locked[directory]

    # -- changes of our own ------------------------------------------------------------------------------------------

    def changed(self, ino: int) -> None:
        """The attributes of an inode have changed, and the kernel can't know. It is in use by the request that is
        being answered."""
        if self._notifier is not None and self._shares.home(ino) is not None:
            self._notifier.invalidate_attributes(ino)

    def rehome(self, ino: int) -> bool:
        """As `changed`, of an inode that is in another group now: if that is held, its recall drops the pages from now
        on. False where nothing would, so that they have to be dropped (`moved`)."""
        self.changed(ino)
        before = self._shares.move_out(ino)
        if ino in self.pages and not self._settle(ino):
            return False
        if before is not None and before is not self._shares.home(ino):
            before.forget(ino)
        return True

    async def moved(self, ino: int) -> None:
        """As `rehome`; drops the pages if they have to be, for a second at most as at a recall."""
        before = self._shares.home(ino)
        if not self.rehome(ino):
            with trio.move_on_after(PAGES_WAIT_S):
                await self.drop_pages((ino,), recalled=True)
                if before is not None:
                    before.forget(ino)

    def names_changed(self, directory: int, tid: int) -> None:
        """A name in a directory was made or taken away; to be called before that is answered."""
        told = self._told.pop(directory, tid)
        if told != tid and self._notifier is not None:
            self._notifier.invalidate_attributes(directory)

    def names_unsure(self, directory: int) -> None:
        """A change of names has failed, and may have happened all the same: the kernel does not count on any."""
        share = self._shares.find(directory)
        if share is None or self._notifier is None:
            return
        share.epoch = 0
        with contextlib.suppress(OSError):  # the mount is ending
            self._notifier.invalidate_attributes(directory)
            if share.names and not self._has_submounts():
                self._outdate()
            elif share.names:
                self._give_back(directory)

    def renamed(self, parent: int, name: bytes, new_parent: int, new_name: bytes) -> None:
        """The kernel is about to move an entry, with the time that it was given, to another name."""
        source = self._shares.find(parent)
        if self._notifier is None or source is None or name not in source.names:
            return
        target = self._shares.find(new_parent)
        if target is None:
            self._outdate()  # nobody would expire it there
            return
        target.until = max(target.until, source.until)
        self._shares.add_name(target, new_name)

    def gone(self, directory: int, name: bytes) -> None:
        """A name was taken away, and that is about to be answered: then the kernel drops its entry by itself.

        Until then it may answer the name, as the call has not returned. A lookup that is under way brings it no new
        time: an entry that somebody is using is taken out of the directory, not kept there as an absent one.
        """
        share = self._shares.find(directory)
        if share is not None:
            self._shares.remove_names(share, (name,))

    def forget(self, ino: int) -> None:
        """The kernel knows the inode no more."""
        self._shares.forget(ino)
        self._told.pop(ino, None)
        self.pages.forget(ino)

    # -- taking back -------------------------------------------------------------------------------------------------

    def holds(self, group: int) -> bool:
        """Whether the kernel may have something of a group, so that `drop` has work to do."""
        share = self._shares.find(group)
        if share is None or self._notifier is None:
            return False
        return bool(share.paged) or share.epoch > 0 or boot_time() < share.until

    async def drop(self, group: int) -> None:
        """Have the kernel drop all that it was given of a group, which is no longer held. One call at a time."""
        share = self._shares.find(group)
        if share is None:
            return
        self.drops += 1
        if share.epoch:
            share.epoch = 0
            await self.drop_listing(group)
        while self.holds(group) and (share.inodes or share.names or share.paged):
            inodes, names, paged = set(share.inodes), set(share.names), set(share.paged)
            await self._drop_attributes(share, inodes)
            with trio.move_on_after(PAGES_WAIT_S):
                await self.drop_pages(paged, recalled=True)
            await self._drop_names(share, names)
            # what came meanwhile came by a rename
            share.inodes -= inodes
            share.paged -= paged
            self._shares.remove_names(share, names)
        self.discard(group)

    async def drop_listing(self, directory: int) -> None:
        """On return the kernel has nothing of what it was told of a directory's names, but for what is on its way."""
        if self._notifier is not None:
            await in_thread(self._notifier.invalidate_pages_of, self._invalidating, (directory,))

    async def drop_pages(self, inos: Collection[int], *, recalled: bool = False) -> None:
        """On return the kernel has no pages of these files but what was read after the call, which is recorded.

        Waits for READs in flight. Cancelled, they count as outdated.
        """
        if self._notifier is None:
            return
        wanted = [ino for ino in inos if ino in self.pages]
        async with trio.open_nursery() as nursery:
            for at in range(0, len(wanted), FILES_AT_ONCE):
                nursery.start_soon(self._drop_pages, self._notifier, wanted[at : at + FILES_AT_ONCE], recalled)

    async def _drop_pages(self, notifier: Notifier, inos: Sequence[int], recalled: bool) -> None:
        done = False
        for ino in inos:
            self.pages.begin_drop(ino, recalled=recalled)
        try:
            await in_thread(notifier.invalidate_pages_of, self._dropping, inos)
            done = True
        finally:
            for ino in inos:
                self.pages.end_drop(ino, done=done)

    def discard(self, group: int) -> None:
        """The directory is gone, or what the kernel had of it has run out."""
        self._shares.discard(group)
        self._told.pop(group, None)

    def hurry(self, group: int) -> None:
        """An operation of this host that has locked the directory waits for others: nobody may wait for its lock."""
        share = self._shares.find(group)
        if share is not None:
            share.hurried.set()

    def calm(self, group: int) -> None:
        """None does any more."""
        share = self._shares.find(group)
        if share is not None and share.hurried.is_set():
            share.hurried = trio.Event()

    async def drop_all(self, kept: Collection[int] = ()) -> None:
        """As `drop`, of all groups but `kept`; no other is held. Ends at the latest when everything has run out."""
        groups = [group for group in self._shares if group not in kept]
        left_s = (
            max((share.until for group in groups if (share := self._shares.find(group))), default=0.0) - boot_time()
        )
        with trio.move_on_after(max(0.0, left_s)):
            async with trio.open_nursery() as nursery:
                for group in groups:
                    nursery.start_soon(self.drop, group)
        with trio.move_on_after(PAGES_WAIT_S):
            await self.drop_pages(self.pages.all(), recalled=True)
        for group in groups:
            self.discard(group)

    async def _drop_attributes(self, share: Share, inodes: Collection[int]) -> None:
        notifier, unknown, pause_s = self._notifier, list(inodes), RETRY_FIRST_S
        self._shares.leave(share, inodes)
        self._told.pop(share.group, None)
        while notifier is not None and unknown:
            found = await in_thread(notifier.invalidate_attributes_of, self._invalidating, unknown)
            unknown = [ino for ino in found or () if self._is_referenced(ino)]
            if not unknown or boot_time() > share.until:
                return
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _drop_names(self, share: Share, names: Collection[bytes]) -> None:
        left_s = share.until - boot_time()
        if not names or left_s <= 0:
            return
        with trio.move_on_after(left_s):
            await self._expire_or_outdate(share, names)

    async def _expire_or_outdate(self, share: Share, names: Collection[bytes]) -> None:
        if share.group in self._locked and not self._has_submounts():
            self._outdate()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._expire, share.group, tuple(names), nursery.cancel_scope)
            await share.hurried.wait()
            if self._has_submounts():
                await trio.sleep_forever()  # until it has run out: outdating would detach the mounts below
            else:
                self._outdate()
            nursery.cancel_scope.cancel()

    async def _expire(self, group: int, names: tuple[bytes, ...], done: trio.CancelScope) -> None:
        notifier = self._notifier
        assert notifier is not None
        await in_thread(notifier.expire_entries, self._expiring, group, names)
        late = self._receipts.missing(group)
        if late:
            if not await self._receipts.wait(late):
                self._outdate()
            await in_thread(notifier.expire_entries, self._expiring, group, names)
        done.cancel()

    def let_go_of_names(self) -> None:
        """Have the kernel forget the names that nobody uses, those that have run out too."""
        if self._notifier is not None and not self._has_submounts():
            self._outdate()

    def _outdate(self) -> None:
        if self._notifier is not None:
            self.epochs += 1
            self._notifier.inc_epoch()
