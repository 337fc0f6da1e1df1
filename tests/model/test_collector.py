"""Two mounts change, replace, clone and unlink files at random, some of which share a blob, while the collector runs
without a break and without grace, and rewrites every pack of which anything is dead: whatever is open or has a name is
whole at every read, and in the end nothing else is left.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field, replace

import pytest
import trio

from apollofs.fs.collection import CollectReport
from apollofs.fs.filesystem import Filesystem
from apollofs.metadata.errors import NoSuchEntry
from apollofs.metadata.records import ROOT_INO, RenameFlag, SetAttr
from tests.support.collecting import AT_ONCE, clone, collect, keys_in, objects
from tests.support.filesystems import USER, Pair, close
from tests.support.filesystems import pair as pair
from tests.support.packs import pack_bodies

pytestmark = [pytest.mark.model, pytest.mark.slow]
STEPS = 150
NAMES = [b"%d" % number for number in range(6)]
EAGER = replace(AT_ONCE, pack_used_min=1.0)


@dataclass
class Walk:
    """The volume as it should be: what each name means, and what is open where."""

    pair: Pair
    rng: random.Random
    names: dict[bytes, int] = field(default_factory=dict)
    bodies: dict[int, bytes] = field(default_factory=dict)
    opened: list[tuple[Filesystem, int, int]] = field(default_factory=list)
    """(mount, handle, inode)."""
    collecting: trio.Lock = field(default_factory=trio.Lock)
    """Held while the collector runs."""

    def mount(self) -> Filesystem:
        return self.rng.choice((self.pair.here, self.pair.there))

    def content(self) -> bytes:
        return self.rng.randbytes(self.rng.choice((100, 1000, 5000)))

    async def step(self) -> None:
        name = self.rng.choice(NAMES)
        known = name in self.names
        deeds = (
            [self.open, self.change, self.truncate, self.unlink, self.replace, self.clone]
            if known
            else [self.create, self.create_pack]
        )
        await self.rng.choice(deeds)(name)
        while len(self.opened) > 4:
            fs, fh, _ = self.opened.pop(self.rng.randrange(len(self.opened)))
            await close(fs, fh)
        for fs in (self.pair.here, self.pair.there):
            await fs._bodies.cache.make_room(1 << 40)  # what is read must come from the store
        for fs, fh, ino in self.opened:
            assert await fs.read(fh, 0, 1 << 20) == self.bodies[ino]

    async def handle(self, fs: Filesystem, name: bytes) -> tuple[int, int]:
        ino = (await fs.lookup(ROOT_INO, name)).ino
        assert ino == self.names[name]
        return (await fs.open(ino, os.O_RDWR | os.O_DIRECT, USER)).fh, ino

    async def create(self, name: bytes) -> None:
        fs, body = self.mount(), self.content()
        attributes, opened = await fs.create(ROOT_INO, name, 0o644, os.O_RDWR | os.O_CREAT, USER)
        await fs.write(opened.fh, 0, body)
        await close(fs, opened.fh)
        self.names[name], self.bodies[attributes.ino] = attributes.ino, body

    async def create_pack(self, name: bytes) -> None:
        """All names that are free get files that share a blob."""
        free = {each: self.content()[:2000] for each in NAMES if each not in self.names}
        # their blob's reference is only put by their commits, and no mount's packer tells the collector of it
        async with self.collecting:
            inos = await pack_bodies(self.pair, free)
        for each, ino in zip(free, inos, strict=True):
            self.names[each], self.bodies[ino] = ino, free[each]

    async def open(self, name: bytes) -> None:
        fs = self.mount()
        self.opened.append((fs, *await self.handle(fs, name)))

    async def change(self, name: bytes) -> None:
        """A range is overwritten, in as many extents as chance wants."""
        fs, body = self.mount(), self.content()
        fh, ino = await self.handle(fs, name)
        before = self.bodies[ino]
        at = self.rng.randrange(len(before) + 1)
        await fs.write(fh, at, body)
        await close(fs, fh)
        self.bodies[ino] = before[:at] + body + before[at + len(body) :]

    async def truncate(self, name: bytes) -> None:
        ino = self.names[name]
        size = self.rng.choice((0, len(self.bodies[ino]) // 2))
        fs = self.mount()
        await fs.lookup(ROOT_INO, name)
        await fs.setattr(ino, SetAttr(size_bytes=size))
        self.bodies[ino] = self.bodies[ino][:size]

    async def unlink(self, name: bytes) -> None:
        await self.mount().unlink(ROOT_INO, name)
        del self.names[name]

    async def replace(self, name: bytes) -> None:
        target = self.rng.choice(NAMES)
        if target != name:
            await self.mount().rename(ROOT_INO, name, ROOT_INO, target, RenameFlag(0))
            self.names[target] = self.names.pop(name)

    async def clone(self, name: bytes) -> None:
        others = [other for other in self.names if other != name]
        source = self.names[name]
        if others and len(self.bodies[source]) > 64:
            target = self.names[self.rng.choice(others)]
            if self.bodies[target] == b"":
                for each in (name, self.rng.choice(others)):
                    await self.pair.here.lookup(ROOT_INO, each)
                await self.pair.volume.settle()
                await clone(self.pair.store, self.pair.volume, source, target)
                self.bodies[target] = self.bodies[source]

    async def finish(self) -> None:
        for fs, fh, _ in self.opened:
            await close(fs, fh)
        for name in NAMES:
            for fs in (self.pair.here, self.pair.there):
                if name not in self.names:
                    with pytest.raises(NoSuchEntry):
                        await fs.lookup(ROOT_INO, name)
                    continue
                fh, ino = await self.handle(fs, name)
                assert await fs.read(fh, 0, 1 << 20) == self.bodies[ino]
                await close(fs, fh)


async def collect_for_ever(walk: Walk, runs: list[CollectReport]) -> None:
    while True:
        async with walk.collecting:
            report = await collect(walk.pair.store, walk.pair.blobs, EAGER)
        assert report.errors == []
        runs.append(report)


@pytest.mark.parametrize("seed", range(5))
async def test_nothing_that_is_used_goes_and_nothing_else_stays(pair: Pair, seed: int) -> None:
    walk = Walk(pair, random.Random(seed))
    runs: list[CollectReport] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect_for_ever, walk, runs)
        for _ in range(STEPS):
            await walk.step()
        nursery.cancel_scope.cancel()
    await walk.finish()
    await pair.volume.settle()
    while (await collect(pair.store, pair.blobs, EAGER)).tombstones:
        pass  # a pack that is rewritten goes one run later
    assert sum(report.tombstones for report in runs) > 0
    assert sum(report.rewritten.files for report in runs) > 0
    referred = set()
    for ino in walk.names.values():
        referred |= {extent.blob for extent in (await pair.volume.read_body(ino)).inode.extents}
    assert len(await objects(pair.blobs)) == len(referred)
    assert await keys_in(pair.store, "gQAC") == []
