# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Writes of the modes none, write-around and write-through: they go to the image first.

The order is what promise 2 asks for: the region is marked hot, durably, and the sectors leave the cache, before the
image is written. After a power loss the clean blocks of hot regions are dropped, whatever the image has of the write.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from forebay.checkpoint.counters import ORIGIN_SYNC, ORIGIN_WRITE, Counters
from forebay.checkpoint.dirty import Dirty
from forebay.disk.ranges import Ranges, sectors_touched, sectors_within
from forebay.image.image import Image
from forebay.latency.waits import DEVICE, ORIGIN, Waiting
from forebay_cache import invalidate, mark_hot
from forebay_cache.blocks.store import store
from forebay_cache.format.geometry import block_runs


class OriginWrites:
    """The policy of these modes; with `keep`, as in write-through, what was written stays cached."""

    def __init__(
        self, image: Image, dirty: Dirty, ranges: Ranges, counters: Counters, *, keep: bool
    ) -> None:
        self._image = image
        self._cache = image.cache
        self._dirty = dirty
        self._ranges = ranges
        self._counters = counters
        self._keep = keep

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """Returns 0: it takes none, for the image is not on this host."""
        del writes
        return 0

    async def write(self, offset: int, data: memoryview) -> None:
        """Write to the image, and in write-through to the cache. Raises OSError."""
        await self._write(offset, data, only_if=_always)

    async def write_if_clean(self, offset: int, data: memoryview) -> bool:
        """Do as :meth:`write` and return True, unless a private layer holds anything, which would hide the write from
        readers: then nothing is done, and False returned.
        """
        return await self._write(offset, data, only_if=self._has_nothing_dirty)

    def _has_nothing_dirty(self) -> bool:
        return not self._dirty.bytes

    async def _write(self, offset: int, data: memoryview, *, only_if: Callable[[], bool]) -> bool:
        start, end = sectors_touched(offset, len(data))
        await self._image.writes.make_room()
        async with self._ranges.hold(start, end), self._image.writing():
            if not only_if():
                return False
            self._counters.write_misses += 1
            with self._counters.errors_counted(), self._overwriting(start, end):
                await self._announce(start, end)
                with Waiting(ORIGIN), self._counters.timed(ORIGIN_WRITE):
                    await self._image.writes.write(offset, data)
            self._counters.origin_written_bytes += len(data)
            if self._keep:
                with Waiting(DEVICE):
                    await self._store(offset, data)
        return True

    async def _announce(self, start: int, end: int) -> None:
        """Have on record, before the image is written, that the cache must not be believed there."""
        layer = self._image.layer
        with Waiting(DEVICE):
            await mark_hot(self._cache, layer, start, end - start)
            await invalidate(self._cache, layer, start, end - start)

    @contextmanager
    def _overwriting(self, start: int, end: int) -> Iterator[None]:
        """Around the write itself: what fills read meanwhile is neither kept nor given to whoever asks later."""
        image = self._image
        image.filler.overtaken(start, end - start)
        with self._cache.in_flight.overwriting(image.layer, start, end - start):
            try:
                yield
            finally:
                image.filler.overtaken(start, end - start)

    async def _store(self, offset: int, data: memoryview) -> None:
        """Keep the whole sectors of what was written in the clean layer."""
        first, last = sectors_within(offset, len(data))
        if first < last:
            layer = self._image.layer
            blocks = [block for block, _, _ in block_runs(first, last - first)]
            with self._cache.in_flight.filling(layer, blocks) as cells:
                whole = data[first - offset : last - offset]
                await store(self._cache, layer, first, whole, cells)

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Zero the range in the image. Nothing of it is kept, in no mode. Raises OSError."""
        await self._zero(offset, length, may_trim, only_if=_always)

    async def zero_if_clean(self, offset: int, length: int, may_trim: bool) -> bool:
        """What :meth:`write_if_clean` is to :meth:`write`."""
        return await self._zero(offset, length, may_trim, only_if=self._has_nothing_dirty)

    async def _zero(
        self, offset: int, length: int, may_trim: bool, *, only_if: Callable[[], bool]
    ) -> bool:
        start, end = sectors_touched(offset, length)
        await self._image.writes.make_room()
        async with self._ranges.hold(start, end), self._image.writing():
            if not only_if():
                return False
            self._counters.write_misses += 1
            with self._counters.errors_counted(), self._overwriting(start, end):
                await self._announce(start, end)
                with Waiting(ORIGIN), self._counters.timed(ORIGIN_WRITE):
                    await self._image.writes.zero(offset, length, may_trim)
        return True

    def answered(self) -> None:
        """Nothing to do: the image has what was answered."""

    def flush_now(self) -> bool:
        """Returns False: the image is not on this host."""
        return False

    def begin_flush(self) -> None:
        """Begins nothing, for the same reason."""

    async def flush(self) -> None:
        """Return when the image has everything durably. Raises OSError, each time until that is so."""
        if self._image.is_all_durable():
            return  # it counts as none
        with self._counters.errors_counted(), Waiting(ORIGIN), self._counters.timed(ORIGIN_SYNC):
            await self._image.flush()


def _always() -> bool:
    return True
