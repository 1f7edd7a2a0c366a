"""Where a disk's writes go: to the origin, or to a private layer of the cache. One policy for each; modes choose.

Both take the same calls. Offsets and lengths are bytes, any; what is not whole sectors is completed from what the disk
reads there, under a lock on the sectors concerned.
"""

import errno
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVarTuple, Unpack

import trio

from forebay_cache import CacheFull, invalidate, mark_hot
from forebay_cache.blocks import clean, private
from forebay_cache.device.device import Buffer
from forebay_cache.format.geometry import BLOCK, SECTOR, block_runs

if TYPE_CHECKING:
    from forebay.disk.disk import Disk

Ts = TypeVarTuple("Ts")

PIECE = 1 << 20
"""A long request is stored in pieces of this size, so that it needs only so much room in the journal at a time."""

ZERO_PIECE = 64 << 20
"""The same for zeros, of which nothing is stored but a few bytes a block."""


class NoRoom(OSError):
    """The cache is full, and nothing of it is this disk's to write back."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "the cache is full of what other disks hold in it")


class Policy(Protocol):
    """What a mode does with writes. Raises OSError; ENOSPC when there is no room and none is coming."""

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """See :meth:`forebay_nbd.Export.write_now`."""

    async def write(self, offset: int, data: memoryview) -> None:
        """Store; may be acknowledged afterwards."""

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Make the range read as zeros; may be acknowledged afterwards."""

    def flush_now(self) -> bool:
        """:meth:`flush`, if that takes but a moment."""

    async def flush(self) -> None:
        """Make all that was acknowledged durable."""


class OriginWrites:
    """none, write-around, write-through: the origin first, then (write-through) the clean layer."""

    def __init__(self, disk: "Disk", *, keep: bool) -> None:
        """`keep`: what was written stays cached."""
        self._disk = disk
        self._keep = keep
        self._failures = disk.image.sync_failures

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """None: the origin is not on this host."""
        del writes
        return 0

    async def write(self, offset: int, data: memoryview) -> None:
        """Forget the sectors, durably enough; write the origin; remember what was written."""
        await self._write(offset, data, only_if=_always)

    async def write_if_clean(self, offset: int, data: memoryview) -> bool:
        """The same; False, and nothing is done, while a private layer holds anything, which would hide it."""
        return await self._write(offset, data, only_if=self._clean)

    def _clean(self) -> bool:
        return not self._disk.dirty.bytes

    async def _write(self, offset: int, data: memoryview, *, only_if: Callable[[], bool]) -> bool:
        disk = self._disk
        start, end = _sectors(offset, len(data))
        async with disk.ranges.hold(start, end), disk.image.writing():
            if not only_if():
                return False
            disk.counters.write_misses += 1
            with self._overwriting(start, end):
                await self._announce(start, end)
                await disk.image.reached().write(offset, [data])
            disk.counters.origin_written_bytes += len(data)
            if self._keep:
                await self._store(offset, data)
        return True

    async def _announce(self, start: int, end: int) -> None:
        disk = self._disk
        image = disk.image
        await mark_hot(disk.block_cache, image.layer, start, end - start)
        await invalidate(disk.block_cache, image.layer, start, end - start)

    @contextmanager
    def _overwriting(self, start: int, end: int) -> Iterator[None]:
        """Around the write itself: what fills read meanwhile is neither kept nor given to whoever asks later."""
        image = self._disk.image
        image.filler.overtaken(start, end - start)
        with clean.overwriting(self._disk.block_cache, image.layer, start, end - start):
            try:
                yield
            finally:
                image.filler.overtaken(start, end - start)

    async def _store(self, offset: int, data: memoryview) -> None:
        first = -(-offset // SECTOR) * SECTOR
        last = (offset + len(data)) // SECTOR * SECTOR
        if first < last:
            layer = self._disk.image.layer
            blocks = [block for block, _, _ in block_runs(first, last - first)]
            with clean.filling(self._disk.block_cache, layer, blocks) as cells:
                whole = data[first - offset : last - offset]
                await clean.store(self._disk.block_cache, layer, first, whole, cells)

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """The same with zeros, which need no slot."""
        await self._zero(offset, length, may_trim, only_if=_always)

    async def zero_if_clean(self, offset: int, length: int, may_trim: bool) -> bool:
        """The same as :meth:`write_if_clean`."""
        return await self._zero(offset, length, may_trim, only_if=self._clean)

    async def _zero(
        self, offset: int, length: int, may_trim: bool, *, only_if: Callable[[], bool]
    ) -> bool:
        disk = self._disk
        start, end = _sectors(offset, length)
        async with disk.ranges.hold(start, end), disk.image.writing():
            if not only_if():
                return False
            disk.counters.write_misses += 1
            with self._overwriting(start, end):
                await self._announce(start, end)
                await disk.image.reached().zero(offset, length, may_trim)
        return True

    def flush_now(self) -> bool:
        """Never, as write_now()."""
        return False

    async def flush(self) -> None:
        """The origin has it durably. A failure that somebody else was told of is told here once too."""
        image = self._disk.image
        try:
            await image.flush()
            if image.sync_failures != self._failures:
                raise OSError(
                    errno.EIO, "a flush of the image failed: what was written may be lost"
                )
        finally:
            self._failures = image.sync_failures


class PrivateWrites:
    """write-back, full-copy and overlays: a private layer of the cache, durable with the device's next sync."""

    def __init__(self, disk: "Disk") -> None:
        self._disk = disk

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """Whole sectors that can be stored at once, where nothing has to be announced, waited for or slowed down."""
        disk = self._disk
        if disk.ranges.held:
            writes = disk.ranges.free_ones(writes)
        length = sum([len(data) for _, data in writes])
        if disk.must_wait(length):
            return 0
        top = disk.view.private[0]
        sectors, slots = top.sectors, top.slots
        taken = private.write_run(disk.block_cache, top, writes)
        if taken:
            disk.counters.write_hits += taken
            disk.counters.written_bytes += (
                length if taken == len(writes) else sum(len(data) for _, data in writes[:taken])
            )
            disk.note_dirty(top, top.sectors - sectors, top.slots - slots)
        return taken

    async def write(self, offset: int, data: memoryview) -> None:
        """Any range, with all the waiting there may be."""
        disk = self._disk
        disk.counters.write_hits += 1
        start, end = _sectors(offset, len(data))
        async with disk.ranges.hold(start, end):
            whole = await self._whole(start, end, offset, data)
            for at in range(0, len(whole), PIECE):
                await self._store(start + at, whole[at : at + PIECE])

    async def _whole(self, start: int, end: int, offset: int, data: memoryview) -> memoryview:
        """The data, made whole sectors with what the disk has around it."""
        if start == offset and end == offset + len(data):
            return data
        merged = bytearray(end - start)
        if start < offset:
            merged[:SECTOR] = await self._sector(start)
        if end > offset + len(data) and (end - start > SECTOR or start == offset):
            merged[-SECTOR:] = await self._sector(end - SECTOR)
        merged[offset - start : offset - start + len(data)] = data
        return memoryview(merged)

    async def _sector(self, offset: int) -> bytes:
        length = min(SECTOR, self._disk.size - offset)
        buffers = await self._disk.view.read(offset, length)
        return b"".join(buffers).ljust(SECTOR, b"\0")

    async def _store(self, offset: int, data: memoryview) -> None:
        disk = self._disk
        await disk.admit(len(data))
        began, timeout = trio.current_time(), disk.settings.origin_timeout
        with trio.move_on_after(timeout) as patience:
            while True:
                await disk.dirty.mark.set()
                layer = disk.view.private[0]  # a new one, if it was frozen meanwhile
                sectors, slots = layer.sectors, layer.slots
                if private.write(disk.block_cache, layer, offset, data):
                    disk.note_dirty(layer, layer.sectors - sectors, layer.slots - slots)
                    return disk.block_cache.publish()
                try:
                    await private.prepare(disk.block_cache, layer, offset, len(data))
                except CacheFull:
                    await disk.write_back_some(began)
                patience.deadline = max(patience.deadline, disk.writeback.moved + timeout)
        assert patience.cancelled_caught
        raise OSError(errno.ENOSPC, "the cache is full of data that could not be written back")

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Whole sectors become zeros without being stored; the rest is written."""
        del may_trim  # nothing is allocated for zeros anyway
        disk = self._disk
        first = -(-offset // SECTOR) * SECTOR
        last = (offset + length) // SECTOR * SECTOR
        if offset + length == disk.size:
            last = -(-disk.size // SECTOR) * SECTOR
        if first >= last:
            await self.write(offset, memoryview(bytes(length)))
            return
        if offset < first:
            await self.write(offset, memoryview(bytes(first - offset)))
        if offset + length > last:
            await self.write(last, memoryview(bytes(offset + length - last)))
        disk.counters.write_hits += 1
        async with disk.ranges.hold(first, last):
            for at in range(first, last, ZERO_PIECE):
                await self._zero(at, min(ZERO_PIECE, last - at))

    async def _zero(self, offset: int, length: int) -> None:
        disk = self._disk
        await disk.admit(0)
        for at in range(offset, offset + length, 16 * BLOCK):
            part = min(16 * BLOCK, offset + length - at)
            while True:
                await disk.dirty.mark.set()
                layer = disk.view.private[0]
                sectors, slots = layer.sectors, layer.slots
                if private.zero(disk.block_cache, layer, at, part):
                    break
                await private.prepare(disk.block_cache, layer, at, part, zeros=True)
            disk.note_dirty(layer, layer.sectors - sectors, layer.slots - slots)
            disk.block_cache.publish()

    def flush_now(self) -> bool:
        """The same, if the cache device is done in a moment."""
        return self._disk.block_cache.sync_now()

    async def flush(self) -> None:
        """The cache device has it durably."""
        await self._disk.block_cache.sync()


class PrivateOrOrigin(PrivateWrites):
    """The same for a disk whose data has a home, past the cache while its device does not work (promise 4).

    Past it as well where it is full of what other disks hold in it, overlays above all, which nothing can write back.
    What only the cache has goes to the image first, as far as it can be read; if it cannot, writes fail.
    """

    def __init__(self, disk: "Disk") -> None:
        super().__init__(disk)
        self._origin: OriginWrites | None = None  # while it has writes that may not be durable
        self._failed: OSError | None = None  # for which failure of the device

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """None while the device does not work."""
        try:
            return super().write_now(writes)
        except OSError:
            if self._disk.block_cache.failed is None:
                raise
            return 0

    async def write(self, offset: int, data: memoryview) -> None:
        """To the cache, or to the origin."""
        while not await self._kept(super().write, offset, data):
            if await (await self._past()).write_if_clean(offset, data):
                break

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """The same with zeros."""
        while not await self._kept(super().zero, offset, length, may_trim):
            if await (await self._past()).zero_if_clean(offset, length, may_trim):
                break

    def flush_now(self) -> bool:
        """Never while the origin may have something that is not durable."""
        if self._origin is not None:
            return False
        try:
            return super().flush_now()
        except OSError:
            if self._disk.block_cache.failed is None:
                raise
            return False

    async def flush(self) -> None:
        """Whoever has it has it durably."""
        if not await self._kept(super().flush):
            await (await self._past()).flush()
        elif self._origin is not None:
            await self._origin.flush()
            if self._disk.image.all_durable():
                self._origin = None

    async def _kept(self, do: Callable[[Unpack[Ts]], Awaitable[None]], *args: *Ts) -> bool:
        """Have the cache do it. False: its device does not work, or is full. Raises OSError."""
        cache = self._disk.block_cache
        if cache.failed is None:
            try:
                await do(*args)
            except NoRoom:
                return False
            except OSError:
                if cache.failed is None:
                    raise
            else:
                return True
        return False

    async def _past(self) -> OriginWrites:
        await self._disk.writeback.leave_cache()
        failed = self._disk.block_cache.failed
        if self._origin is None or failed is not self._failed:
            self._origin, self._failed = OriginWrites(self._disk, keep=False), failed
        return self._origin


def _always() -> bool:
    return True


def _sectors(offset: int, length: int) -> tuple[int, int]:
    """The whole sectors that a range touches: (start, end) in bytes."""
    return offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR


__all__ = ["Buffer", "NoRoom", "OriginWrites", "Policy", "PrivateOrOrigin", "PrivateWrites"]
