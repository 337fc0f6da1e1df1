"""Images that decayed on the disk are found by the scrub, and read right after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from apollofs.fs.images import Scrub
from tests.support.bodies import body_world
from tests.unit.test_images import BLOCK, content, opened, overwrite, stored, whole


@pytest.mark.expects_log(r"has decayed on the disk")
async def test_a_block_that_decayed_is_found_and_fetched_again(tmp_path: Path) -> None:
    data, sound = content(1), content(2)
    async with body_world(tmp_path, block_bytes=BLOCK) as world, world.mount() as mount:
        bodies = [await stored(mount, data, b"decays"), await stored(mount, sound, b"stays")]
        for body in bodies:
            await whole(mount, body)
        image = await opened(mount, bodies[0])
        path = Path(image.path)
        mount.bodies.images.release(image)
        overwrite(path, 2 * BLOCK + 7, b"x")
        scrub = Scrub(mount.bodies.images)
        await scrub.run(pause_s=0)
        assert scrub.damaged == 1
        assert not mount.bodies.images.find(bodies[0])
        assert mount.bodies.images.find(bodies[1])
        world.blobs.reads.clear()
        assert await whole(mount, bodies[0]) == data
        assert len(world.blobs.reads) == 1
        await scrub.run(pause_s=0)
        assert scrub.damaged == 1


async def test_what_is_open_is_left_to_its_readers(tmp_path: Path) -> None:
    async with body_world(tmp_path, block_bytes=BLOCK) as world, world.mount() as mount:
        body = await stored(mount, content(1))
        await whole(mount, body)
        image = await opened(mount, body)
        overwrite(Path(image.path), 7, b"x")
        scrub = Scrub(mount.bodies.images)
        await scrub.run(pause_s=0)
        assert scrub.damaged == 0
        mount.bodies.images.release(image)
