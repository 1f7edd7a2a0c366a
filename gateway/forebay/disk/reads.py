# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a disk reads: from the layers of its view as long as they have it, from the image otherwise."""

import errno
from collections.abc import Awaitable, Callable

import forebay_fast
from forebay.checkpoint.counters import ORIGIN_READ, Counters
from forebay.config.live import LiveSettings
from forebay.disk.block_status import CACHED_CONTEXT, OLD_CACHED_CONTEXT, allocation, cached
from forebay.image.image import Image
from forebay.latency.waits import DEVICE, ORIGIN, Waiting
from forebay_cache import ReadAhead, View
from forebay_cache.format.geometry import Buffer

NEVER = 1 << 63
"""As `View.lookahead`: no read is at or beyond this offset."""


def check_conflict(image: Image) -> None:
    """Raise OSError(EIO) where the image must not be touched any more: then nothing of a disk on it is served."""
    if image.conflict is not None:
        raise OSError(errno.EIO, image.conflict)


async def arrive(image: Image, timeout: float) -> None:
    """Wait until the image can be reached, as for one that hangs. Raises OSError(EIO) after `timeout` seconds.

    Called before anything is held that others wait for.
    """
    if image.origin is None:
        with Waiting(ORIGIN):
            await image.reach.wait(timeout)


class Reads:
    """The reading half of a disk. `view` has no layers at first; whoever opens the disk puts them there."""

    def __init__(self, image: Image, counters: Counters, settings: LiveSettings) -> None:
        self._image = image
        self._counters = counters
        self._settings = settings
        self._ahead = ReadAhead(image.filler, counters)
        self.view = View(image.cache, [], None, self._fetch)
        by = forebay_fast.core.Reads(self.view) if forebay_fast.serves() else self.view
        self.read_now: Callable[[int, int], Buffer | None] = by.read_now
        """See :meth:`View.read_now`; by the compiled core, where this process serves with it."""
        self.elsewhere: Callable[[int, int], Awaitable[Buffer]] | None = None
        """What serves all reads, by offset and length, while what the disk has of its own is another host's, or may be.
        The view has no layers then."""
        self.on_miss: Callable[[int, int], None] | None = None
        """Told of each range (offset, length) that a guest has to wait for, as it is not in the cache."""

    async def read(self, offset: int, length: int) -> list[Buffer]:
        """See :meth:`forebay_nbd.Export.read`. Raises OSError."""
        if not length:
            return []
        check_conflict(self._image)
        view = self.view
        misses = view.misses
        is_beyond = offset >= view.lookahead
        with Waiting(DEVICE):
            buffers = await view.read(offset, length, slices=True)
        if is_beyond or view.misses != misses:
            view.lookahead = self._look_ahead(offset, length)
        return buffers

    def join(self, offset: int, length: int, wake: Callable[[], None]) -> bool:
        """See :meth:`forebay_nbd.Export.join_read`."""
        image = self._image
        if image.conflict is not None or self.view.clean is None:
            return False
        if not image.filler.join(offset, length, wake):
            return False
        if self.on_miss is not None:
            self.on_miss(offset, length)
        self.view.lookahead = self._look_ahead(offset, length)
        return True

    def _look_ahead(self, offset: int, length: int) -> int:
        """Have read ahead what a sequential reader wants next; the offset at which to look again."""
        if self._image.conflict is not None:
            return 0  # nothing is read any more, not even from the cache
        return self._ahead.note(offset, length) if self.view.clean is not None else NEVER

    async def _fetch(self, offset: int, length: int) -> Buffer:
        """What the view lacks. Raises OSError."""
        if self.elsewhere is not None:
            return await self.elsewhere(offset, length)
        return await self.fetch(offset, length)

    async def fetch(self, offset: int, length: int) -> Buffer:
        """A range of the image; kept in the clean layer unless the disk has none. Raises OSError."""
        if self.on_miss is not None:
            self.on_miss(offset, length)
        with self._counters.errors_counted(), Waiting(ORIGIN):
            if (fresh := self._image.fresh) is not None:
                self._counters.origin_read_bytes += length
                with self._counters.timed(ORIGIN_READ):
                    return await fresh.read(offset, length)
            await arrive(self._image, self._settings.now.origin_timeout)
            if self.view.clean is None:
                self._counters.origin_read_bytes += length
                with self._counters.timed(ORIGIN_READ):
                    return await self._image.read(offset, length)
            return await self._image.filler.fetch(offset, length, self._counters)

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring a range into the cache, unless the disk has no clean layer. Raises OSError."""
        if self.view.clean is not None:
            filler = self._image.filler
            if self._image.origin is None and await filler.missing(offset, length):
                await arrive(self._image, self._settings.now.origin_timeout)
            await filler.prefetch(offset, length, self._counters)

    async def extents(
        self, context: str, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        """(length, flags) from `offset` on, of the metadata context: x-forebay:cached, or base:allocation.

        With `one` the first will do. Raises OSError.
        """
        if self.elsewhere is not None:
            return [(length, 0)]  # data, of which the cache has nothing
        if context in (CACHED_CONTEXT, OLD_CACHED_CONTEXT):
            return await cached(self.view, offset, length, one)
        return await allocation(self.view, self._image, offset, length, one)
