"""Random operations from three mounts, archived and compacted meanwhile: the log alone rebuilds the volume."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
import trio

from apollofs.metadata.changes import history, merging
from apollofs.metadata.changes.archiver import ArchiveOptions
from apollofs.metadata.errors import BodyConflict, MetadataError, NamespaceError
from apollofs.metadata.policy import Policy
from apollofs.metadata.records import (
    NOW,
    ROOT_INO,
    BodyChange,
    Inode,
    InodeFlag,
    Owner,
    RenameFlag,
    SetAttr,
)
from apollofs.metadata.retention import Retention
from apollofs.metadata.sealing import Sealing, read_seals
from apollofs.metadata.volume import Volume
from tests.support.change_logs import KEYS, World, made_world
from tests.support.rebuilt import Rebuilt, differences, volume_facts
from tests.support.retaining import set_retention
from tests.support.volumes import OPTIONS, VOLUME, mounted

pytestmark = pytest.mark.model
STEPS = int(os.environ.get("APOLLOFS_CHANGES_STEPS", "1500"))
SEEDS = (1, 2, 3)
PATIENT = replace(OPTIONS, lease_ttl_s=600, operation_deadline_s=600)
"""Nothing of these mounts ends by itself, however long the machine keeps them waiting: no lease is to run out here."""
NAMES = [b"a", b"b", b"c", b"d"]


class Player:
    """One mount that does what comes to its mind."""

    def __init__(self, volume: Volume, world: World, rng: random.Random) -> None:
        self.volume = volume
        self.world = world
        self.rng = rng
        self.done = 0
        self.calls: list[Callable[[], Awaitable[object]]] = [
            *[self.create, self.mkdir, self.rename, self.commit, self.unlink, self.setattr] * 3,
            *[self.symlink, self.link, self.rmdir, self.exchange, self.times, self.truncate, self.xattr, self.restore],
            *[self.policy, self.retention, self.seal, self.unseal],
        ]

    async def play(self, steps: int) -> None:
        for _ in range(steps):
            try:
                await self.rng.choice(self.calls)()
                self.done += 1
            except (NamespaceError, BodyConflict):
                pass  # others were quicker, or it makes no sense
            await trio.lowlevel.checkpoint()

    # -- choices -----------------------------------------------------------------------------------------------------

    async def directory(self) -> int:
        """A directory up to three levels deep."""
        ino = ROOT_INO
        for _ in range(self.rng.randrange(4)):
            found = await self.volume.lookup(ino, self.name())
            if not found.is_dir:
                break
            ino = found.ino
        return ino

    async def inode(self) -> Inode:
        return await self.volume.lookup(await self.directory(), self.name())

    def name(self) -> bytes:
        return self.rng.choice(NAMES)

    def owner(self) -> Owner:
        return Owner(self.rng.randrange(3), self.rng.choice([0, 1000, (1 << 32) - 2]))

    # -- operations --------------------------------------------------------------------------------------------------

    async def create(self) -> None:
        kind, rdev = self.rng.choice([(stat.S_IFREG, 0), (stat.S_IFREG, 0), (stat.S_IFIFO, 0), (stat.S_IFCHR, 0x103)])
        await self.volume.mknod(await self.directory(), self.name(), kind | 0o644, rdev, self.owner())

    async def mkdir(self) -> None:
        mode = self.rng.choice([0o755, 0o2775, 0o700])
        await self.volume.mkdir(await self.directory(), self.name(), mode, self.owner())

    async def symlink(self) -> None:
        await self.volume.symlink(await self.directory(), self.name(), b"to/" + self.name(), self.owner())

    async def link(self) -> None:
        await self.volume.link((await self.inode()).ino, await self.directory(), self.name())

    async def unlink(self) -> None:
        await self.volume.unlink(await self.directory(), self.name())

    async def rmdir(self) -> None:
        await self.volume.rmdir(await self.directory(), self.name())

    async def rename(self) -> None:
        flags = self.rng.choice([RenameFlag(0), RenameFlag(0), RenameFlag.NOREPLACE])
        target = await self.directory(), self.name()
        await self.volume.rename(await self.directory(), self.name(), *target, flags)

    async def exchange(self) -> None:
        target = await self.directory(), self.name()
        await self.volume.rename(await self.directory(), self.name(), *target, RenameFlag.EXCHANGE)

    async def setattr(self) -> None:
        owner = self.owner()
        flags = self.rng.choice([None, None, InodeFlag.APPEND_ONLY, InodeFlag(0)])
        attr = SetAttr(mode=self.rng.choice([None, 0o600, 0o4755]), uid=owner.uid, gid=owner.gid, flags=flags)
        await self.volume.setattr((await self.inode()).ino, attr)

    async def times(self) -> None:
        time = self.rng.choice([0, NOW, -5, 1 << 60])
        inode = await self.inode()
        await self.volume.setattr(inode.ino, SetAttr(mtime_ns=self.rng.choice([None, time, inode.btime_ns])))
        await self.volume.setattr(inode.ino, SetAttr(atime_ns=time))

    async def truncate(self) -> None:
        await self.volume.setattr((await self.inode()).ino, SetAttr(size_bytes=self.rng.choice([0, 3, 1 << 40])))

    async def commit(self) -> None:
        body = await self.volume.read_body((await self.inode()).ino)
        size = self.rng.randrange(200)
        mtime_ns = self.rng.choice([0, 0, 12345])
        change = BodyChange(body.inode.body_version, size, inline=b"x" * size, mtime_ns=mtime_ns)
        await self.volume.commit_body(body.inode.ino, change)

    async def xattr(self) -> None:
        ino, name = (await self.inode()).ino, b"user." + self.name()
        if self.rng.random() < 0.6:
            await self.volume.setxattr(ino, name, self.rng.randbytes(self.rng.choice([0, 5, 300])))
        else:
            await self.volume.removexattr(ino, name)

    async def restore(self) -> None:
        stones = await self.world.keys_in("g")
        if stones:
            await self.volume.restore(self.rng.choice(stones), await self.directory(), self.name())

    # -- of trees ----------------------------------------------------------------------------------------------------

    async def policy(self) -> None:
        policy = self.rng.choice([None, Policy(commit_any=1), Policy(soon=(1,), bound_s=self.rng.randrange(1, 9))])
        await self.volume.placement.set_policy(await self.directory(), policy)

    async def retention(self) -> None:
        policy = self.rng.choice([None, Retention(last=self.rng.randrange(1, 9))])
        await set_retention(self.volume, await self.directory(), policy)

    async def seal(self) -> None:
        """What is done in it is refused, then, until somebody unseals it."""
        tree = await self.volume.lookup(await self.directory(), self.name())
        if tree.is_dir:
            await Sealing(self.world.store, self.volume).seal(tree.ino, self.rng.choice([60.0, 3600.0]))

    async def unseal(self) -> None:
        for record in await read_seals(self.world.store, KEYS):
            await Sealing(self.world.store, self.volume).unseal(record.number)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with made_world() as world:
        yield world


async def archive_at_times(world: World, rng: random.Random) -> None:
    """Archive with segments of all sizes; let the store forget now and then."""
    while True:
        options = ArchiveOptions(changes_max=rng.choice([1, 7, 50, 1000]), lease_ttl_s=PATIENT.lease_ttl_s)
        report = await world.archive(options)
        if rng.random() < 0.3:
            try:
                await world.store.compact(report.through)
            except MetadataError:
                pass  # there was nothing new
        for _ in range(rng.randrange(3000)):
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("seed", SEEDS)
async def test_the_log_rebuilds_the_volume(world: World, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    # history in lanes too, however short it is
    monkeypatch.setattr(history, "LANE_REVISIONS", rng.randrange(1, 50))
    monkeypatch.setattr(history, "LAG_MIN", rng.choice([0, 100]))
    monkeypatch.setattr(merging, "MERGED_AT_ONCE", rng.choice([2, 3, 16]))
    async with (
        mounted(world.store, PATIENT) as a,
        mounted(world.store, PATIENT) as b,
        mounted(world.store, PATIENT) as c,
    ):
        players = [Player(volume, world, random.Random(rng.random())) for volume in (a, b, c)]
        async with trio.open_nursery() as archiving:
            archiving.start_soon(archive_at_times, world, rng)
            async with trio.open_nursery() as nursery:
                for player in players:
                    nursery.start_soon(player.play, STEPS // 3)
            archiving.cancel_scope.cancel()
        for volume in (a, b, c):
            await volume.settle()
        assert sum(player.done for player in players) > STEPS // 10
        tree = Rebuilt()
        for record in await world.read():
            tree.take(record)
        assert differences(tree.facts(), await volume_facts(world.store, VOLUME)) == []
        await world.archive()
        assert len(await world.read()) == tree.taken
