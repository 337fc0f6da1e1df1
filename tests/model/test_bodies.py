"""Random operations on one file through two mounts, with commits that fail at every step, against plain bytes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apollofs.blobstore import BlobStoreUnavailable
from apollofs.fs.errors import BodyUnavailable
from apollofs.fs.open_file import OpenFile
from apollofs.fs.user_error import leaves
from apollofs.metadata.errors import OutcomeUnknown, StoreUnavailable
from apollofs.metadata.records import SetAttr
from tests.support.bodies import Mount, World, body_world
from tests.support.volumes import assert_sound

pytestmark = pytest.mark.model

SPACE = 160
EVERYTHING = 100_000


@dataclass
class Local:
    """What one mount should show: the base it knows, and what it has written since."""

    base: bytearray = field(default_factory=bytearray)
    dirty: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Offset to (number of the write, byte)."""
    holes: set[int] = field(default_factory=set)
    grown: int = 0
    append_from: int | None = None

    @property
    def is_dirty(self) -> bool:
        return bool(self.dirty or self.holes or self.grown)

    @property
    def staged_end(self) -> int:
        return max(self.dirty, default=-1) + 1

    @property
    def size(self) -> int:
        return max(len(self.base), self.staged_end, self.grown)

    def view(self) -> bytes:
        shown = bytearray(self.base.ljust(self.size, b"\0"))
        for offset in self.holes:
            if offset < len(shown):
                shown[offset] = 0
        for offset, (_, byte) in self.dirty.items():
            shown[offset] = byte
        return bytes(shown)

    def rebase(self, committed: bytearray) -> None:
        start, old_size = self.append_from, len(self.base)
        self.base = bytearray(committed)
        if start is not None and (len(committed) > start or start == old_size):
            fixed = max((at + 1 for at in self.dirty if at < start), default=0)
            end = max(len(committed), fixed, self.grown if self.grown <= start else 0)
            distance = end - start
            self.dirty = {at + distance if at >= start else at: byte for at, byte in sorted(self.dirty.items())}
            self.grown += distance if self.grown > start else 0
            self.append_from = start + distance

    def commit_over(self, committed: bytearray) -> bytearray:
        """The file after this mount's commit."""
        start = self.append_from
        distance = max(0, len(committed) - start) if start is not None else 0
        size = max(self.staged_end, self.grown) + distance
        after = bytearray(committed.ljust(size, b"\0"))
        for offset in self.holes:
            if offset < len(after):
                after[offset] = 0
        for offset, (_, byte) in self.dirty.items():
            after[offset + distance if start is not None and offset >= start else offset] = byte
        return after

    def landed(self, after: bytearray) -> None:
        self.base, self.dirty, self.holes, self.grown, self.append_from = bytearray(after), {}, set(), 0, None


@dataclass(frozen=True)
class Step:
    kind: str
    mount: int
    offset: int
    length: int
    refresh: bool
    fault: str


class Machine:
    """Does each step on the real thing and on the model, and compares."""

    def __init__(self, world: World, mounts: tuple[Mount, Mount], files: tuple[OpenFile, OpenFile]) -> None:
        self.world = world
        self.mounts = mounts
        self.files = files
        self.locals = (Local(), Local())
        self.committed = bytearray()
        self.writes = 0

    async def step(self, step: Step) -> None:
        if step.refresh:
            await self.refresh(step.mount)
        await getattr(self, step.kind)(step)
        for index in (0, 1):
            await self.compare(index)

    async def compare(self, index: int) -> None:
        file, local = self.files[index], self.locals[index]
        assert await file.read(0, EVERYTHING) == local.view()
        assert file.size_bytes == file.inode.size_bytes == local.size
        assert file.is_dirty == local.is_dirty
        assert file.allocated_bytes <= local.size

    async def refresh(self, index: int) -> None:
        known = self.files[index].inode.body_version
        inode = await self.mounts[index].volume.inner.getattr(self.files[index].ino)
        await self.files[index].refresh(inode)
        if inode.body_version > known:
            self.locals[index].rebase(self.committed)

    def data(self, length: int) -> bytes:
        self.writes += 1
        return bytes([self.writes % 255 + 1]) * length

    async def write(self, step: Step) -> None:
        data = self.data(step.length)
        await self.files[step.mount].write(step.offset, data)
        self.note(self.locals[step.mount], step.offset, data)

    async def append(self, step: Step) -> None:
        data, local = self.data(step.length), self.locals[step.mount]
        await self.files[step.mount].append(data)
        if local.append_from is None:
            local.append_from = local.size
        self.note(local, local.size, data)

    def note(self, local: Local, offset: int, data: bytes) -> None:
        for index, byte in enumerate(data):
            local.dirty[offset + index] = (self.writes, byte)

    async def truncate(self, step: Step) -> None:
        local, size = self.locals[step.mount], step.offset
        await self.files[step.mount].truncate(SetAttr(size_bytes=size))
        self.committed = bytearray(self.committed[:size].ljust(size, b"\0"))
        local.base = bytearray(self.committed)
        local.dirty = {at: byte for at, byte in local.dirty.items() if at < size}
        local.holes = {at for at in local.holes if at < size}
        local.grown, local.append_from = 0, None

    async def punch(self, step: Step, *, keep_size: bool = True) -> None:
        local, end = self.locals[step.mount], step.offset + step.length
        size = local.size
        for offset in range(step.offset, min(end, size)):
            local.dirty.pop(offset, None)
            local.holes.add(offset)
        if local.size < size:
            local.grown = size
        if local.append_from is not None and local.staged_end <= local.append_from:
            local.append_from = None
        if not keep_size and end > size:
            local.grown = end
        file = self.files[step.mount]
        await self.commit(step, lambda: file.punch(step.offset, step.length, keep_size=keep_size))

    async def zero(self, step: Step) -> None:
        await self.punch(step, keep_size=False)

    async def grow(self, step: Step) -> None:
        local = self.locals[step.mount]
        if step.offset > local.size:
            local.grown = step.offset
        await self.commit(step, lambda: self.files[step.mount].grow(step.offset))

    async def commit(self, step: Step, act=None) -> None:  # type: ignore[no-untyped-def]
        volume = self.mounts[step.mount].volume
        if step.fault == "put":
            self.world.blobs.fail_puts = [BlobStoreUnavailable("broken by the test")]
        elif step.fault:
            volume.faults = [step.fault]
        failed: Exception | None = None
        reads = volume.body_reads
        try:
            await (act or self.files[step.mount].commit)()
        except (BodyUnavailable, StoreUnavailable, OutcomeUnknown) as exc:
            failed = exc
        self.world.blobs.fail_puts, volume.faults = [], []
        local = self.locals[step.mount]
        if volume.body_reads > reads and local.is_dirty:
            # It could not be merged, so it was prepared anew over the newest body.
            local.rebase(self.committed)
        if isinstance(failed, OutcomeUnknown):
            await self.settle(step)
        elif failed is None and local.is_dirty:
            self.committed = local.commit_over(self.committed)
            local.landed(self.committed)

    async def settle(self, step: Step) -> None:
        """A commit's outcome is unknown. More is written, and the next commit must find out."""
        local, file = self.locals[step.mount], self.files[step.mount]
        later = Local()
        distance = 0
        if step.fault == "applied":
            if local.append_from is not None:
                distance = max(0, len(self.committed) - local.append_from)
            self.committed = local.commit_over(self.committed)
        data = self.data(step.length)
        later.append_from = max(local.staged_end, local.grown) + distance if local.append_from is not None else None
        if step.refresh and local.append_from is not None:
            await file.append(data)
            self.note(later if step.fault == "applied" else local, local.size + distance, data)
        else:
            offset = min(step.offset, local.append_from if local.append_from is not None else step.offset)
            data = data[: max(0, local.append_from - offset)] if local.append_from is not None else data
            await file.write(offset, data)
            self.note(later if step.fault == "applied" else local, offset, data)
        await file.commit()
        if step.fault == "applied":
            local.landed(self.committed)
            local.dirty = later.dirty
            local.append_from = later.append_from if later.staged_end > (later.append_from or 0) else None
        else:
            local.rebase(self.committed)
        self.committed = local.commit_over(self.committed)
        local.landed(self.committed)


steps = st.builds(
    Step,
    st.sampled_from(["write", "write", "append", "append", "truncate", "punch", "zero", "grow", "commit", "commit"]),
    st.integers(0, 1),
    st.integers(0, SPACE),
    st.integers(1, 50),
    st.booleans(),
    st.sampled_from(["", "", "put", "refused", "lost", "applied"]),
)


async def run_steps(directory: Path, plan: list[Step]) -> None:
    async with body_world(directory, inline_bytes_max=40, block_bytes=32) as world:
        async with world.mount("a") as a, world.mount("b") as b:
            ino = await a.create()
            await b.volume.inner.lookup(1, b"f")
            machine = Machine(world, (a, b), (await a.bodies.open(ino), await b.bodies.open(ino)))
            for step in plan:
                await machine.step(step)
            for index in (0, 1):
                await machine.refresh(index)
                await machine.commit(Step("commit", index, 0, 0, False, ""))
            for mount in (a, b):
                assert await mount.content(ino) == machine.committed
        await assert_sound(world.store)


def run(plan: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        try:
            trio.run(run_steps, Path(directory), plan)
        except BaseExceptionGroup as group:
            # One failure, in as many groups as there are nurseries around it.
            raise leaves(group)[0] from None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(steps, max_size=30))
def test_two_mounts_against_plain_bytes(plan: list[Step]) -> None:
    run(plan)


async def write_at_once(directory: Path, seed: int) -> None:
    """Tasks on two mounts write ranges of their own, small and large, and append, while all of them commit."""
    random = Random(seed)
    stripe, stripes = 3000, 6
    expected = bytearray(stripe * stripes)

    async def work(file: OpenFile, number: int) -> None:
        shuffled = Random(seed * 100 + number)
        for turn in range(8):
            start = number * stripe + shuffled.randrange(stripe)
            data = bytes([number * 8 + turn + 1]) * shuffled.randint(1, (number + 1) * stripe - start)
            expected[start : start + len(data)] = data
            await file.write(start, data)
            if shuffled.random() < 0.5:
                await file.commit()
            await trio.lowlevel.checkpoint()

    async def append(file: OpenFile, letter: bytes) -> None:
        for _ in range(10):
            await file.append(letter * 10)
            if random.random() < 0.5:
                await file.commit()

    async with body_world(directory) as world:
        async with world.mount("a") as a, world.mount("b") as b:
            ino = await a.create()
            await b.volume.inner.lookup(1, b"f")
            files = (await a.bodies.open(ino), await b.bodies.open(ino))
            await files[0].truncate(SetAttr(size_bytes=len(expected)))
            await files[1].refresh(await b.volume.inner.getattr(ino))
            world.blobs.before_put = trio.lowlevel.checkpoint
            async with trio.open_nursery() as nursery:
                for number in range(stripes):
                    nursery.start_soon(work, files[number % 2], number)
                nursery.start_soon(append, files[0], b"A")
                nursery.start_soon(append, files[1], b"B")
            for file in files:
                await file.commit()
            found = await a.content(ino)
            assert found[: len(expected)] == expected
            appended = found[len(expected) :]
            assert len(appended) == 200
            assert {appended[at : at + 10] for at in range(0, 200, 10)} == {b"A" * 10, b"B" * 10}
            assert appended.count(b"A") == 100
        await assert_sound(world.store)


@pytest.mark.parametrize("seed", range(10))
def test_many_writers_on_two_mounts(tmp_path: Path, seed: int) -> None:
    trio.run(write_at_once, tmp_path, seed)
