"""META_URL: where a volume's metadata is, as text and as a frozen record.

    etcd://[user@]host:2379,host2:2379/volume[?ca=FILE&cert=FILE&key=FILE&password-file=FILE]
    etcds://...        the same over TLS, verified with the system's authorities where `ca` is not given

A URL never holds a password: it comes from a file, or from the environment of the command.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, quote, unquote

from apollofs.fs.user_error import UserError

EXAMPLE: Final = "etcd://host1:2379,host2:2379/volume"
PORT_DEFAULT: Final = 2379
ENDPOINTS_MAX: Final = 32
PASSWORD_BYTES_MAX: Final = 4096
_SCHEMES: Final = {"etcd": False, "etcds": True}
_OPTIONS: Final = ("ca", "cert", "key", "password-file")
_VOLUME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST: Final = re.compile(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})")


class BadMetaURL(UserError):
    """The URL does not parse; the message shows a good one and nothing that may be a secret."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}; write it as {EXAMPLE}")


class Endpoint(NamedTuple):
    """One etcd member. `host` is a name or an address, IPv6 without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class MetaURL:
    """A volume and the etcd cluster that holds it. Made by `parse_meta_url`."""

    endpoints: tuple[Endpoint, ...]
    volume: str
    user: str = ""
    password_file: str = ""
    tls: bool = False
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @property
    def servers(self) -> str:
        """The endpoints, for messages."""
        return ",".join(map(str, self.endpoints))

    def __str__(self) -> str:
        """The URL that parses to this record."""
        named = {"ca": self.ca_file, "cert": self.cert_file, "key": self.key_file, "password-file": self.password_file}
        options = "&".join(f"{name}={quote(value)}" for name, value in named.items() if value)
        scheme = "etcds" if self.tls else "etcd"
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        return f"{scheme}://{user}{self.servers}/{self.volume}" + (f"?{options}" if options else "")


@dataclass(frozen=True, slots=True)
class MetaAccess:
    """A URL with what is needed to be let in."""

    url: MetaURL
    password: str = field(default="", repr=False)


def parse_meta_url(text: str) -> MetaURL:
    """Parse a META_URL. Raises BadMetaURL with one line that says what is wrong and shows a good URL."""
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise BadMetaURL("the metadata URL must start with etcd:// or etcds://")
    rest, _, query = rest.partition("?")
    if "#" in rest or "#" in query:
        raise BadMetaURL("the metadata URL has no part after '#'")
    place, _, path = rest.partition("/")
    userinfo, at, hosts = place.rpartition("@")
    # An "@" further on ends a password with a slash in it.
    if ":" in userinfo or "@" in path or (at and not userinfo):
        raise BadMetaURL(
            "the metadata URL holds no password (only user@); put it in APOLLOFS_ETCD_PASSWORD or in a file "
            "named by ?password-file="
        )
    options = _parse_options(query)
    volume = unquote(path.rstrip("/"))
    if not _VOLUME.fullmatch(volume):
        raise BadMetaURL(
            f"the metadata URL names no valid volume ({volume!r}: 1 to 64 letters, digits, '.', '_', '-')"
            if volume
            else "the metadata URL names no volume"
        )
    url = MetaURL(
        endpoints=_parse_endpoints(hosts),
        volume=volume,
        user=unquote(userinfo),
        password_file=options.get("password-file", ""),
        tls=_SCHEMES[scheme] or "ca" in options or "cert" in options,
        ca_file=options.get("ca", ""),
        cert_file=options.get("cert", ""),
        key_file=options.get("key", ""),
    )
    if bool(url.cert_file) != bool(url.key_file):
        raise BadMetaURL("a client certificate needs both cert= and key=")
    if url.password_file and not url.user:
        raise BadMetaURL("password-file= needs a user, as etcd://user@host:2379/volume?password-file=FILE")
    return url


def _parse_endpoints(hosts: str) -> tuple[Endpoint, ...]:
    found = tuple(_parse_endpoint(part) for part in hosts.split(","))
    if len(found) > ENDPOINTS_MAX:
        raise BadMetaURL(f"the metadata URL names more than {ENDPOINTS_MAX} servers")
    if len(set(found)) != len(found):
        raise BadMetaURL("the metadata URL names a server twice")
    return found


def _parse_endpoint(text: str) -> Endpoint:
    matched = _HOST.match(text)
    if not matched:
        raise BadMetaURL(f"{text!r} is no server" if text else "the metadata URL lacks a server")
    host, rest = matched.group(), text[matched.end() :]
    if not rest:
        return Endpoint(host.strip("[]"), PORT_DEFAULT)
    digits = rest[1:]
    if rest[0] != ":" or not (digits.isascii() and digits.isdigit()) or not 1 <= int(digits) <= 65535:
        raise BadMetaURL(f"{text!r} is no server: HOST:PORT with a port from 1 to 65535 is needed")
    return Endpoint(host.strip("[]"), int(digits))


def _parse_options(query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            # The value isn't shown: somebody may have tried to pass a password here.
            raise BadMetaURL(f"unknown option {name!r} in the metadata URL (known: {', '.join(_OPTIONS)})")
        if name in options:
            raise BadMetaURL(f"option {name!r} stands twice in the metadata URL")
        if not value.startswith("/") or "\0" in value:
            raise BadMetaURL(f"option {name!r} of the metadata URL needs an absolute path")
        options[name] = value
    return options


def resolve_password(url: MetaURL, from_environment: str, password_file: str = "") -> MetaAccess:
    """Find the password: `password_file` (an option of the command), then the URL's file, then the environment.

    Raises UserError where a user has none, or the file can't be read. Without a user there is no password.
    """
    path = password_file or url.password_file
    if not url.user:
        if password_file:
            raise BadMetaURL("a password file needs a user in the metadata URL, as etcd://user@host:2379/volume")
        return MetaAccess(url)
    password = _read_password(path) if path else from_environment
    if not password:
        raise UserError(
            f"user {url.user!r} needs a password: set APOLLOFS_ETCD_PASSWORD or give --password-file FILE"
            if not path
            else f"the password file {path} is empty"
        )
    return MetaAccess(url, password)


def _read_password(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(PASSWORD_BYTES_MAX + 1)
        if len(content) > PASSWORD_BYTES_MAX:
            raise UserError(f"the password file {path} is larger than {PASSWORD_BYTES_MAX} bytes")
        return content.decode().rstrip("\r\n")
    except OSError as exc:
        raise UserError(f"the password file {path} can't be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise UserError(f"the password file {path} is not UTF-8") from exc
