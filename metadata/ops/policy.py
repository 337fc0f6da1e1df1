"""Policy: set or clear a directory's site policy, and hand it down to what was there before."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata.errors import NotADirectory
from apollofs.metadata.journal import Kind
from apollofs.metadata.ops.common import Location, Scope
from apollofs.metadata.policy import Policy, encode_policy
from apollofs.metadata.records import ROOT_INO
from apollofs.metadata.retired_sites import refusal
from apollofs.metadata.store import Delete, Put
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View


@dataclass(frozen=True, slots=True)
class SetPolicy:
    """Gives a directory a policy of its own, or (None) that of its parent. NotADirectory, StaleInode; UnknownSite,
    SiteLeaving where it names a site that is gone or going.

    Where the parent's applies from now on, its key is put again as it was: so the agents look at the tree once more.
    """

    scope: Scope
    directory: int
    policy: Policy | None

    def decide(self, view: View) -> Decision[None]:
        keys = self.scope.keys
        home = self.scope.find(view, self.directory, None)
        if not home.inode.is_dir:
            raise NotADirectory("only a directory has a policy")
        own = keys.policy(self.directory)
        writes: list[Put | Delete] = []
        number, value = self.directory, b""
        if self.policy is None:
            is_root = self.directory == ROOT_INO
            number = 0 if is_root else self.scope.directory(view, home.inode.parent).policy
            if number == self.directory:
                number = 0  # the directory was moved below one that had inherited from it
            writes.append(Delete(own))
            above = view.get(keys.policy(number)) if number else None
            if above is not None:
                writes.append(Put(above.key, above.value))
        else:
            for site in self.policy.named:
                retired = view.get(keys.retired_site(site))
                if retired is not None:
                    raise refusal(retired.value, f"number {site}")
            value = encode_policy(self.policy)
            writes.append(Put(own, value))
        writes.append(self.scope.store(home, home.inode._replace(policy=number)))
        change = self.scope.change(Kind.POLICY, home)._replace(value=value)
        return Decision(lambda _, __: None, writes, change)


@dataclass(frozen=True, slots=True)
class InheritPolicy:
    """Gives a file or directory the number of a policy above it, if its directory has that number, and unless it is
    where another policy was set: what is below a policy that was set meanwhile is not for this one any more.

    Replies whether it has that number now. StaleInode; NoSuchEntry where the directory has been removed.
    """

    scope: Scope
    ino: int
    location: Location
    """Where it was seen. It is followed to where it is now; but one that has several names counts as here."""
    number: int

    def decide(self, view: View) -> Decision[bool]:
        home = self.scope.find(view, self.ino, self.location)
        inode = home.inode
        if inode.policy == self.number:
            return Decision(lambda _, __: True)
        parent = self.scope.place(home)[0] or self.location[0]
        if self.scope.directory(view, parent).policy != self.number:
            return Decision(lambda _, __: False)
        if inode.policy == self.ino and view.get(self.scope.keys.policy(self.ino)) is not None:
            return Decision(lambda _, __: False)
        tagged = self.scope.store(home, inode._replace(policy=self.number))
        return Decision(lambda _, __: True, [tagged], rests_elsewhere=True)
