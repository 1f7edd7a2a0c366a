# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Private writes of a disk whose data has a home, past the cache while its device does not work (promise 4).

Past it as well where it is full of what other disks hold in it, overlays above all, which nothing can write back.
What only the cache has goes to the image first, as far as it can be read; if it cannot, writes fail.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVarTuple, Unpack

from forebay.checkpoint.schedule import WriteBack
from forebay.disk.admission import NoRoom
from forebay.disk.origin_writes import OriginWrites
from forebay.disk.private_writes import PrivateWrites
from forebay.image.image import Image
from forebay_cache.durable.sync import Begun

Ts = TypeVarTuple("Ts")


class PrivateOrOrigin:
    """The policy of write-back and full-copy: `to_cache` takes the writes as long as it can, else the image."""

    def __init__(
        self,
        to_cache: PrivateWrites,
        to_origin: Callable[[], OriginWrites],
        image: Image,
        writeback: WriteBack,
    ) -> None:
        """`to_origin` makes the policy for the image, each time the cache begins to fail."""
        self._to_cache = to_cache
        self._write_now = to_cache.write_now
        self.answered = to_cache.answered
        self._to_origin = to_origin
        self._image = image
        self._cache = image.cache
        self._writeback = writeback
        self._origin: OriginWrites | None = None
        """The way past the cache; None where all that went there is durable."""
        self._failed: OSError | None = None
        """For which failure of the device it was made; None: for none, the cache was full."""

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """Store in the cache what can be stored at once; 0 while its device does not work. Raises OSError."""
        try:
            return self._write_now(writes)
        except OSError:
            if self._cache.failed is None:
                raise
            return 0

    async def write(self, offset: int, data: memoryview) -> None:
        """Store in the cache, or write to the image. Raises OSError."""
        while not await self._kept(self._to_cache.write, offset, data):
            if await (await self._past()).write_if_clean(offset, data):
                break

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Zero in the cache, or in the image. Raises OSError."""
        while not await self._kept(self._to_cache.zero, offset, length, may_trim):
            if await (await self._past()).zero_if_clean(offset, length, may_trim):
                break

    def flush_now(self) -> bool:
        """Have everything durable and return True if the cache has all of it and is done in a moment; else False."""
        if self._origin is not None:
            return False
        try:
            return self._to_cache.flush_now()
        except OSError:
            if self._cache.failed is None:
                raise
            return False

    def begin_flush(self) -> Begun | None:
        """Begin to have everything durable if the cache has all of it, and nothing has to be waited for first."""
        if self._origin is not None:
            return None
        try:
            return self._to_cache.begin_flush()
        except OSError:
            return None

    async def flush(self) -> None:
        """Return when everything is durable, in the cache and in the image. Raises OSError."""
        if not await self._kept(self._to_cache.flush):
            await (await self._past()).flush()
        elif self._origin is not None:
            await self._origin.flush()
            if self._image.is_all_durable():
                self._origin = None

    async def _kept(self, do: Callable[[Unpack[Ts]], Awaitable[None]], *args: *Ts) -> bool:
        """Have the cache do it and return True; False: its device does not work, or is full. Raises OSError."""
        while self._cache.failed is None:
            with self._cache.failure.passed_over():
                try:
                    await do(*args)
                except NoRoom:
                    return False
                return True
        return False

    async def _past(self) -> OriginWrites:
        """The way past the cache, once the image has what only the cache had. Raises OSError where it cannot get it."""
        await self._writeback.leave_cache()
        failed = self._cache.failed
        if self._origin is None or failed is not self._failed:
            self._origin, self._failed = self._to_origin(), failed
        return self._origin
