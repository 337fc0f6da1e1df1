"""Where the bodies of one volume lie at a site, so that no two volumes meet, and what removes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollofs.blobstore import BlobStoreOptions, LocalLocation, open_blob_store, parse_blob_url, prepare_blob_store
from apollofs.fs.site_stores import location_of, remove_objects
from apollofs.metadata.records import SiteRecord


def site(url: str) -> SiteRecord:
    return SiteRecord(1, "here", tuple(parse_blob_url(url).to_dict().items()))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:///srv/blobs", "file:///srv/blobs/volume-u-1"),
        ("s3://bucket", "s3://bucket/volume-u-1"),
        ("s3://bucket/a/b?endpoint=http://h:9000", "s3://bucket/a/b/volume-u-1?endpoint=http://h:9000"),
    ],
)
def test_each_volume_has_its_own_part(url: str, expected: str) -> None:
    assert location_of(site(url), "u-1").url() == expected


async def test_objects_of_one_volume_are_removed_and_no_others(tmp_path: Path) -> None:
    base = site(tmp_path.as_uri())
    options = BlobStoreOptions()
    for volume in ("one", "two"):
        location = location_of(base, volume)
        await prepare_blob_store(location, options, create=True)
        store = await open_blob_store(location, options)
        for number in range(40):
            await store.put(f"{number:02}/block", b"bytes")
        await store.aclose()
    unfinished = tmp_path / "volume-one" / "incoming" / "half"
    unfinished.write_bytes(b"what a writer that died has left")
    assert await remove_objects(location_of(base, "one"), options) == 40
    assert not (tmp_path / "volume-one").exists()
    assert await remove_objects(location_of(base, "one"), options) == 0
    assert await remove_objects(location_of(base, "never used"), options) == 0
    other = location_of(base, "two")
    assert isinstance(other, LocalLocation)
    store = await open_blob_store(other, options)
    assert await store.read("39/block") == b"bytes"
    await store.aclose()
