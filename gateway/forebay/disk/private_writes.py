# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Writes of the modes write-back and full-copy, and of overlays: they go to a private layer of the cache.

They are durable with the next sync of the cache device. How a write gets from `write` to a reply: it waits until it is
let in (:class:`forebay.disk.admission.Admission`), then the mark beside the image is set, and from there to the
record's way into the kernel (`Intent.publish`) nothing awaits. While the cache device is slow a thread writes, and when
the data is there it is looked once more whether all that still holds (:mod:`forebay_cache.blocks.slow_writes`).
"""

import errno
from time import perf_counter

import trio

from forebay.checkpoint.counters import Counters
from forebay.checkpoint.dirty import Dirty
from forebay.disk.admission import Admission
from forebay.disk.ranges import Ranges, sectors_touched, sectors_within
from forebay.latency.waits import ADMISSION, DEVICE, Waiting
from forebay_cache import CacheFull, Layer, View
from forebay_cache.blocks import private, slow_writes
from forebay_cache.blocks.early import EarlyStart
from forebay_cache.blocks.fast import write_run_of
from forebay_cache.durable.sync import Begun
from forebay_cache.format.geometry import BLOCK, SECTOR
from forebay_cache.turns import next_turn
from forebay_fast.latency import DEVICE_WRITE

PIECE = 1 << 20
"""A long request is stored in pieces of this size, so that it needs only so much room in the journal at a time."""

ZERO_PIECE = 64 << 20
"""The same for zeros, of which nothing is stored but a few bytes a block."""

ZERO_STEP = 16 * BLOCK
"""How much of that is done between two looks at the journal, and between two turns of others."""


class PrivateWrites:
    """The policy of overlays; :class:`forebay.disk.fallback.PrivateOrOrigin` adds what the modes need."""

    def __init__(
        self,
        view: View,
        size: int,
        dirty: Dirty,
        admission: Admission,
        ranges: Ranges,
        counters: Counters,
    ) -> None:
        """`size` in bytes, of the disk."""
        self._view = view
        self._cache = view.cache
        self._write_run = write_run_of(view.cache)
        self._early = EarlyStart(view.cache)
        self._size = size
        self._mark = dirty.mark
        self._admission = admission
        self._must_wait = admission.must_wait
        self._note_written = admission.note_written
        self._ranges = ranges
        self._counters = counters

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """Store as many of the writes as are of whole sectors and can be stored at once, in order; returns how many.

        0 where something has to be announced, waited for or slowed down, or is long. Raises OSError if the first one
        fails.
        """
        if self._ranges.held:
            writes = self._ranges.leading_free(writes)
        length = sum([len(data) for _, data in writes])
        if length > PIECE or self._must_wait(length):
            return 0
        top = self._view.private[0]
        sectors, slots = top.sectors, top.slots
        taken = self._write_run(top, writes)
        if taken:
            counters = self._counters
            counters.write_hits += taken
            counters.written_bytes += (
                length if taken == len(writes) else sum(len(data) for _, data in writes[:taken])
            )
            self._note_written(top, top.sectors - sectors, top.slots - slots)
            self._early.note_writes(writes, taken)
        return taken

    def answered(self) -> None:
        """What was written and answered may be begun, for a flush that is expected."""
        self._early.begin(self._open_layer)

    async def write(self, offset: int, data: memoryview) -> None:
        """Store any range, with all the waiting that it takes. Raises OSError."""
        self._counters.write_hits += 1
        start, end = sectors_touched(offset, len(data))
        async with self._ranges.hold(start, end):
            whole = await self._whole(start, end, offset, data)
            for at in range(0, len(whole), PIECE):
                if len(whole) > PIECE:
                    await next_turn()
                await self._store(start + at, whole[at : at + PIECE])

    async def _whole(self, start: int, end: int, offset: int, data: memoryview) -> memoryview:
        """The data, made whole sectors from `start` to `end` with what the disk has around it."""
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
        """What the disk reads in one sector; zeros beyond its end."""
        length = min(SECTOR, self._size - offset)
        buffers = await self._view.read(offset, length)
        return b"".join(buffers).ljust(SECTOR, b"\0")

    async def _store(self, offset: int, data: memoryview) -> None:
        """Store whole sectors, at most PIECE. Raises OSError: ENOSPC where no room for them is coming."""
        admission = self._admission
        with Waiting(ADMISSION):
            await admission.admit(len(data))
        began = trio.current_time()
        with admission.patience() as patience, Waiting(DEVICE):
            while True:
                await self._mark.set()  # a pass may have ended meanwhile, and cleared it
                if self._cache.publish.needs_thread:
                    with admission.paused(patience):
                        stored = await self._store_slowly(offset, data)
                else:
                    stored = self._try_to_store(offset, data)
                if stored:
                    return
                try:
                    await self._prepare(offset, len(data))
                except CacheFull:
                    with Waiting(ADMISSION):
                        await admission.make_room(began)
                admission.extend(patience)
        assert patience.cancelled_caught
        raise OSError(errno.ENOSPC, "the cache is full of data that could not be written back")

    @property
    def _open_layer(self) -> Layer:
        """Where writes go at this instant; another one after each await, if it was frozen meanwhile."""
        return self._view.private[0]

    async def _store_slowly(self, offset: int, data: memoryview) -> bool:
        """What :meth:`_try_to_store` does, while only threads may write to the device."""
        layer = self._open_layer
        grown = await slow_writes.write(self._cache, layer, offset, data, self._mark.is_kept)
        if grown is None:
            return False
        self._note_written(layer, grown.sectors, grown.slots)
        await self._cache.publish()
        return True

    def _try_to_store(self, offset: int, data: memoryview) -> bool:
        """Store whole sectors and have their records with the kernel, or return False. Raises OSError."""
        layer = self._open_layer
        sectors, slots = layer.sectors, layer.slots
        began = perf_counter()
        if not private.write(self._cache, layer, offset, data):
            return False
        self._cache.threads.pace.latency.note(DEVICE_WRITE, perf_counter() - began)
        self._note_written(layer, layer.sectors - sectors, layer.slots - slots)
        self._cache.intent.publish()
        return True

    async def _prepare(self, offset: int, length: int) -> None:
        """Wait for what kept data from being stored. Raises CacheFull or OSError."""
        slow = self._cache.publish.needs_thread
        prepare = slow_writes.prepare if slow else private.prepare
        await prepare(self._cache, self._open_layer, offset, length)

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Make whole sectors zeros, of which nothing is stored; parts of sectors are written. Raises OSError.

        Unless `may_trim` the image has to keep space for them: a pass provides it.
        """
        first, last = sectors_within(offset, length)
        if offset + length == self._size:
            last = -(-self._size // SECTOR) * SECTOR
        if first >= last:
            await self.write(offset, memoryview(bytes(length)))
            return
        if offset < first:
            await self.write(offset, memoryview(bytes(first - offset)))
        if offset + length > last:
            await self.write(last, memoryview(bytes(offset + length - last)))
        self._counters.write_hits += 1
        async with self._ranges.hold(first, last):
            for at in range(first, last, ZERO_PIECE):
                await self._zero(at, min(ZERO_PIECE, last - at), provisioned=not may_trim)

    async def _zero(self, offset: int, length: int, *, provisioned: bool) -> None:
        """Make whole sectors zeros, at most ZERO_PIECE. Raises OSError."""
        with Waiting(ADMISSION):
            await self._admission.admit(0)
        for at in range(offset, offset + length, ZERO_STEP):
            part = min(ZERO_STEP, offset + length - at)
            if length > ZERO_STEP:
                await next_turn()
            with Waiting(DEVICE):
                await self._zero_part(at, part, provisioned=provisioned)

    async def _zero_part(self, offset: int, length: int, *, provisioned: bool) -> None:
        """Make whole sectors zeros, at most ZERO_STEP. Raises OSError."""
        while True:
            await self._mark.set()  # a pass may have ended meanwhile, and cleared it
            if self._is_zeroed(offset, length, provisioned=provisioned):
                await self._cache.publish()
                return
            await private.prepare(self._cache, self._open_layer, offset, length, zeros=True)

    def _is_zeroed(self, offset: int, length: int, *, provisioned: bool) -> bool:
        """Make whole sectors zeros, or return False. The records still have to be published. Raises OSError."""
        layer = self._open_layer
        sectors, slots = layer.sectors, layer.slots
        if not private.zero(self._cache, layer, offset, length, provisioned):
            return False
        self._note_written(layer, layer.sectors - sectors, layer.slots - slots)
        return True

    def flush_now(self) -> bool:
        """Have everything durable and return True if the cache device is done in a moment; else False."""
        self._early.note_flush()
        return self._cache.sync.now()

    def begin_flush(self) -> Begun | None:
        """Begin to have everything durable, if nothing has to be waited for first. Raises OSError."""
        self._early.note_flush()
        return self._cache.sync.begin()

    async def flush(self) -> None:
        """Return when the cache device has everything durably. Raises OSError."""
        self._early.note_flush()
        with Waiting(DEVICE):
            await self._cache.make_durable()
