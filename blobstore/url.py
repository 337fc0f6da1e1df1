"""BLOB_URL: where a site keeps its bodies, as text, as a frozen record, and as the plain dict that is kept in etcd.

    s3://bucket/prefix?endpoint=http://host:port&region=REGION&addressing=path|virtual&client=obstore|boto3
    file:///directory

A location never holds credentials: they come from the usual AWS chain of the host that mounts (environment, shared
credentials file, profile, instance role).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, cast, get_args
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from .errors import BadBlobURL
from .names import check_name

Addressing: TypeAlias = Literal["path", "virtual"]
Client: TypeAlias = Literal["auto", "obstore", "boto3"]

S3_EXAMPLE: Final = "s3://bucket/prefix?endpoint=http://host:9000&region=us-east-1"
FILE_EXAMPLE: Final = "file:///srv/blobs"
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_OPTIONS: Final = ("endpoint", "region", "addressing", "client")


@dataclass(frozen=True, slots=True)
class S3Location:
    """A prefix in a bucket. Empty `endpoint`: AWS, or what the host's AWS configuration names."""

    bucket: str
    prefix: str = ""
    """Without slashes at its ends; empty: the whole bucket."""
    endpoint: str = ""
    region: str = ""
    addressing: Addressing = "virtual"
    client: Client = "auto"
    """Which library moves bodies: `auto` is obstore where it is installed, else boto3."""

    @property
    def where(self) -> str:
        """For messages: endpoint and bucket, nothing secret."""
        return f"bucket {self.bucket!r} at {self.endpoint or 'AWS'}"

    def url(self) -> str:
        """The URL that parses to this location."""
        query = {"endpoint": self.endpoint, "region": self.region}
        if self.addressing != _default_addressing(self.endpoint):
            query["addressing"] = self.addressing
        if self.client != "auto":
            query["client"] = self.client
        text = urlencode({key: value for key, value in query.items() if value}, safe=":/")
        path = f"/{self.prefix}" if self.prefix else ""
        return f"s3://{self.bucket}{path}" + (f"?{text}" if text else "")

    def to_dict(self) -> dict[str, str]:
        """Plain strings for etcd."""
        return {
            "kind": "s3",
            "bucket": self.bucket,
            "prefix": self.prefix,
            "endpoint": self.endpoint,
            "region": self.region,
            "addressing": self.addressing,
            "client": self.client,
        }


@dataclass(frozen=True, slots=True)
class LocalLocation:
    """A directory of this host, or one that every mount of the site sees at the same path."""

    directory: str
    """Absolute."""

    @property
    def where(self) -> str:
        return f"directory {self.directory!r}"

    def url(self) -> str:
        """The URL that parses to this location."""
        return f"file://{quote(self.directory)}"

    def to_dict(self) -> dict[str, str]:
        """Plain strings for etcd."""
        return {"kind": "file", "directory": self.directory}


Location: TypeAlias = S3Location | LocalLocation


def parse_blob_url(url: str) -> Location:
    """Parse a BLOB_URL. Raises `BadBlobURL` with one line that says what is wrong and shows a good URL."""
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        raise BadBlobURL(f"the blob URL does not parse; write it as {S3_EXAMPLE} or {FILE_EXAMPLE}") from exc
    if parts.scheme not in ("s3", "file"):
        raise BadBlobURL(f"a blob URL starts with s3:// or file://, as {S3_EXAMPLE} or {FILE_EXAMPLE}")
    # The URL is shown in no message before this check, so a secret in it stays out of logs.
    _refuse_credentials(parts)
    if parts.fragment:
        raise BadBlobURL(f"a blob URL has no part after '#': {url!r}")
    return _parse_s3(url, parts) if parts.scheme == "s3" else _parse_file(url, parts)


def location_from_dict(record: Mapping[str, str]) -> Location:
    """The location that `to_dict` made. Raises `BadBlobURL` if the record is damaged or of an unknown kind."""
    try:
        if record["kind"] == "file":
            return _checked_local(record["directory"], repr(dict(record)))
        if record["kind"] == "s3":
            return _checked_s3(
                {key: record[key] for key in _OPTIONS}, record["bucket"], record["prefix"], repr(record["bucket"])
            )
    except KeyError as exc:
        raise BadBlobURL(f"the stored blob location lacks {exc}") from exc
    raise BadBlobURL(f"the stored blob location has the unknown kind {record['kind']!r}; is this apollofs too old?")


def _refuse_credentials(parts: SplitResult) -> None:
    endpoint = dict(parse_qsl(parts.query)).get("endpoint", "")
    if "@" in parts.netloc or "@" in endpoint:
        raise BadBlobURL(
            "a blob URL holds no credentials (user:password@); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE, or give the host an instance role"
        )


def _parse_s3(url: str, parts: SplitResult) -> S3Location:
    options: dict[str, str] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key not in _OPTIONS:
            # The value isn't shown: it may be a secret key that somebody tried to pass here.
            raise BadBlobURL(f"unknown option {key!r} in the blob URL; known are {', '.join(_OPTIONS)}")
        if key in options:
            raise BadBlobURL(f"option {key!r} stands twice in {url!r}")
        options[key] = value
    return _checked_s3(options, parts.netloc, unquote(parts.path).strip("/"), repr(url))


def _checked_s3(options: Mapping[str, str], bucket: str, prefix: str, shown: str) -> S3Location:
    if not _BUCKET.fullmatch(bucket):
        raise BadBlobURL(f"{shown} names no valid bucket (3 to 63 of a-z 0-9 . -); write it as {S3_EXAMPLE}")
    if prefix:
        try:
            check_name(prefix)
        except Exception as exc:
            raise BadBlobURL(f"the prefix in {shown} may only have components of [A-Za-z0-9._-]") from exc
    endpoint = options.get("endpoint", "").rstrip("/")
    if endpoint:
        _check_endpoint(endpoint)
    addressing = options.get("addressing") or _default_addressing(endpoint)
    if addressing not in get_args(Addressing):
        raise BadBlobURL(f"addressing is path or virtual, not {addressing!r}")
    client = options.get("client") or "auto"
    if client not in get_args(Client):
        raise BadBlobURL(f"client is obstore, boto3 or auto, not {client!r}")
    return S3Location(
        bucket=bucket,
        prefix=prefix,
        endpoint=endpoint,
        region=options.get("region", ""),
        addressing=cast(Addressing, addressing),
        client=cast(Client, client),
    )


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.path or parts.query or parts.fragment:
        raise BadBlobURL(f"the endpoint is http://host:port or https://host:port, not {endpoint!r}")


def _default_addressing(endpoint: str) -> Addressing:
    """AWS asks for virtual hosts; servers of one's own rarely have the wildcard name in DNS that those need."""
    return "path" if endpoint else "virtual"


def _parse_file(url: str, parts: SplitResult) -> LocalLocation:
    if parts.netloc not in ("", "localhost") or parts.query:
        raise BadBlobURL(f"{url!r} names a host or an option; a local directory is three slashes: {FILE_EXAMPLE}")
    return _checked_local(unquote(parts.path), repr(url))


def _checked_local(directory: str, shown: str) -> LocalLocation:
    components = directory.strip("/").split("/")
    if not directory.startswith("/") or "\0" in directory or ".." in components or components == [""]:
        raise BadBlobURL(f"{shown} is no absolute directory without '..'; write it as {FILE_EXAMPLE}")
    return LocalLocation("/" + "/".join(part for part in components if part not in ("", ".")))
