"""Extended attributes: set and remove. The inode counts them, so an inode without any is known without asking."""

from __future__ import annotations

from dataclasses import dataclass

from apollofs.metadata.errors import (
    AttributeExists,
    AttributeTooLarge,
    InvalidArgument,
    NoSuchAttribute,
    OperationNotPermitted,
)
from apollofs.metadata.journal import Change, Kind
from apollofs.metadata.ops.common import Home, Location, Scope, check_unsealed
from apollofs.metadata.records import (
    XATTR_NAME_BYTES_MAX,
    XATTR_VALUE_BYTES_MAX,
    XATTRS_MAX,
    InodeFlag,
)
from apollofs.metadata.store import Delete, KeyValue, Put
from apollofs.metadata.transact import Decision
from apollofs.metadata.view import View


def check_attribute(name: bytes, value: bytes = b"") -> None:
    """Raises InvalidArgument, AttributeTooLarge."""
    if not name or b"\0" in name:
        raise InvalidArgument("not an attribute name")
    if len(name) > XATTR_NAME_BYTES_MAX or len(value) > XATTR_VALUE_BYTES_MAX:
        raise AttributeTooLarge(
            f"an attribute has a name of at most {XATTR_NAME_BYTES_MAX} bytes and a value of {XATTR_VALUE_BYTES_MAX}"
        )


@dataclass(frozen=True, slots=True)
class SetXattr:
    """value None removes. `create`: it must not exist; `replace`: it must."""

    scope: Scope
    ino: int
    location: Location | None
    name: bytes
    value: bytes | None
    create: bool = False
    replace: bool = False

    def decide(self, view: View) -> Decision[None]:
        home = self.scope.find(view, self.ino, self.location)
        check_unsealed(home.inode)
        if home.inode.flags & (InodeFlag.IMMUTABLE | InodeFlag.APPEND_ONLY):
            raise OperationNotPermitted("the inode is immutable or append-only")
        key = self.scope.keys.xattr(self.ino, self.name)
        standing = view.get(key, likely_absent=home.inode.xattrs == 0)
        self._check(standing, home)
        count = home.inode.xattrs + (standing is None) - (self.value is None)
        inode = home.inode._replace(xattrs=count, ctime_ns=self.scope.now_ns)
        writes: list[Put | Delete] = [self.scope.store(home, inode)]
        writes.append(Delete(key) if self.value is None else Put(key, self.value))
        kind = Kind.REMOVEXATTR if self.value is None else Kind.SETXATTR
        parent, name = self.scope.place(home)
        change = Change(
            kind,
            self.ino,
            parent,
            name,
            self.scope.now_ns,
            inode.mode,
            attribute=self.name,
            value=self.value or b"",
        )
        return Decision(lambda _, __: None, writes, change)

    def _check(self, standing: KeyValue | None, home: Home) -> None:
        if standing is None and (self.replace or self.value is None):
            raise NoSuchAttribute("no such attribute")
        if standing is not None and self.create:
            raise AttributeExists("the attribute exists")
        if standing is None and home.inode.xattrs >= XATTRS_MAX:
            raise AttributeTooLarge(f"an inode has at most {XATTRS_MAX} attributes")
