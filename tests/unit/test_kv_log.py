"""Values and the change log: what clients have put is rebuilt from the log alone."""

from __future__ import annotations

import contextlib
import random

from apollofs.blobstore.memory import MemoryStore as MemoryBlobs
from apollofs.fs.kv import Change, KeyValues
from apollofs.metadata.errors import RevisionConflict
from tests.support.bodies import BrokenBlobs
from tests.support.change_logs import made_world
from tests.support.rebuilt import Rebuilt, differences, volume_facts
from tests.support.values import kv_client
from tests.support.volumes import VOLUME, mounted

STEPS = 300
KEYS = ("a", "b", "c", "d")


async def test_a_volume_is_rebuilt_from_what_clients_have_put() -> None:
    rng = random.Random(6)
    async with made_world() as world:
        blobs = BrokenBlobs(MemoryBlobs())
        async with kv_client(world.store, blobs) as client, mounted(world.store) as mount:
            places = [await client.kv(path, create=True) for path in ("/", "/x", "/x/y")]
            for _ in range(STEPS):
                changes: list[Change] = []
                for kv, key in {(rng.choice(places), rng.choice(KEYS)) for _ in range(rng.randrange(1, 4))}:
                    changes.append(part(rng, kv, key))
                with contextlib.suppress(RevisionConflict):
                    await client.transaction(changes)
            await places[1].put("last", b"value")
            directories = [place._directory for place in places]
            await mount.link((await mount.lookup(directories[1], b"last")).ino, directories[2], b"linked")
            await places[2].put("linked", b"once more")
            tree = Rebuilt()
            for record in await world.read():
                tree.take(record)
            assert differences(tree.facts(), await volume_facts(world.store, VOLUME)) == []


def part(rng: random.Random, kv: KeyValues, key: str) -> Change:
    if rng.random() < 0.15:
        return kv.unchanged(key, 0)
    if rng.random() < 0.3:
        return kv.removal(key)
    return kv.change(key, rng.randbytes(rng.choice([0, 10, 3000, 9000])))
