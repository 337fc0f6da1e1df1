"""BLOB_URL: what parses, what is refused and how."""

from __future__ import annotations

import json

import pytest

from apollofs.blobstore import BadBlobURL, LocalLocation, Location, S3Location, location_from_dict, parse_blob_url

GOOD: list[tuple[str, Location]] = [
    ("s3://bucket", S3Location("bucket")),
    ("s3://bucket/a/b/?region=eu-west-1", S3Location("bucket", "a/b", region="eu-west-1")),
    ("s3://my.bucket?endpoint=http://[::1]:9000", S3Location("my.bucket", "", "http://[::1]:9000", addressing="path")),
    (
        "s3://bucket/p?endpoint=https://s3.example&addressing=virtual&client=boto3",
        S3Location("bucket", "p", "https://s3.example", addressing="virtual", client="boto3"),
    ),
    ("s3://bucket?endpoint=http://h:1/", S3Location("bucket", "", "http://h:1", addressing="path")),
    ("s3://bucket?addressing=path&client=obstore", S3Location("bucket", addressing="path", client="obstore")),
    ("file:///srv/blobs", LocalLocation("/srv/blobs")),
    ("file:///srv//with%20space/./x/", LocalLocation("/srv/with space/x")),
    ("file://localhost/srv", LocalLocation("/srv")),
]

BAD = [
    ("", "s3:// or file://"),
    ("bucket", "s3:// or file://"),
    ("http://host/bucket", "s3:// or file://"),
    ("s3://", "no valid bucket"),
    ("s3://UPPER", "no valid bucket"),
    ("s3://a", "no valid bucket"),
    ("s3://bucket:9000/x", "no valid bucket"),
    ("s3://bucket/../x", "prefix"),
    ("s3://bucket/a b", "prefix"),
    ("s3://bucket?endpoint=host:9000", "endpoint is http"),
    ("s3://bucket?endpoint=ftp://host", "endpoint is http"),
    ("s3://bucket?endpoint=http://host:port", "endpoint is http"),
    ("s3://bucket?endpoint=http://host/path", "endpoint is http"),
    ("s3://bucket?addressing=host", "path or virtual"),
    ("s3://bucket?client=aws", "obstore, boto3 or auto"),
    ("s3://bucket?region=a&region=b", "twice"),
    ("s3://bucket?secret=x", "unknown option 'secret'"),
    ("s3://bucket#x", "'#'"),
    ("s3://[bucket", "does not parse"),
    ("file://host/srv", "three slashes"),
    ("file:///srv?x=1", "three slashes"),
    ("file:relative", "absolute"),
    ("file:///", "absolute"),
    ("file:///srv/../etc", "absolute"),
    ("file:///a%00b", "absolute"),
]


@pytest.mark.parametrize(("url", "location"), GOOD)
def test_good_urls(url: str, location: Location) -> None:
    assert parse_blob_url(url) == location
    assert parse_blob_url(location.url()) == location
    assert location_from_dict(json.loads(json.dumps(location.to_dict()))) == location


@pytest.mark.parametrize(("url", "text"), BAD)
def test_bad_urls_say_what_is_wrong_in_one_line(url: str, text: str) -> None:
    with pytest.raises(BadBlobURL) as caught:
        parse_blob_url(url)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["s3://AKIA:hunter2@bucket/x", "s3://bucket?endpoint=http://AKIA:hunter2@host", "file://me:hunter2@/srv"],
)
def test_credentials_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(BadBlobURL, match="AWS_ACCESS_KEY_ID") as caught:
        parse_blob_url(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [{}, {"kind": "ftp"}, {"kind": "file"}, {"kind": "file", "directory": "x"}, {"kind": "s3", "bucket": "bucket"}],
)
def test_damaged_records(record: dict[str, str]) -> None:
    with pytest.raises(BadBlobURL):
        location_from_dict(record)
