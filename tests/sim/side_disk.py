# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A cache as the export of a connection, and plain requests to it."""

import errno
from collections.abc import Callable

from forebay_cache.blocks import private
from forebay_cache.durable.sync import Begun
from forebay_cache.format.geometry import BLOCK, SECTOR, Buffer
from forebay_nbd import Timing
from forebay_nbd.protocol.wire import REQUEST, REQUEST_MAGIC
from sim.twins import BLOCKS, Side

DISK = BLOCKS * BLOCK
READ, WRITE, DISC, FLUSH, TRIM = range(5)


class Disk:
    """An export of one side."""

    name, read_only, rotational = "d", False, False
    preferred_block = SECTOR
    contexts: tuple[str, ...] = ()
    throttle = None

    def __init__(self, side: Side, size: int = DISK) -> None:
        self.size = size
        self._side = side
        self.read_now = side.read_now
        self.pins = 0
        self.timing = Timing()
        self.on_answer: Callable[[], None] = lambda: None
        side.view.fetch = self.fetch

    async def fetch(self, offset: int, length: int) -> Buffer:
        return b"".join(b"%8d" % at for at in range(offset & -8, offset + length + 8, 8))[
            offset % 8 :
        ][:length]

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        return self._side.run(self._side.view.private[0], writes)

    def publish(self) -> None:
        self._side.cache.intent.publish()

    def answered(self) -> None:
        self.on_answer()

    def join_read(self, offset: int, length: int, wake: Callable[[], None]) -> bool:
        return False

    def begin_flush(self) -> Begun | None:
        return self._side.cache.sync.begin()

    def flush_now(self) -> bool:
        return False

    def unreadable(self) -> None:
        raise AssertionError("memory can be read")

    def pin(self) -> int:
        self.pins += 1
        return self.pins

    def unpin(self, token: int) -> None:
        pass

    async def read(self, offset: int, length: int) -> list[Buffer]:
        return await self._side.view.read(offset, length, slices=True)

    async def write(self, offset: int, data: memoryview, fua: bool) -> None:
        if offset % SECTOR or len(data) % SECTOR:
            raise OSError(errno.EINVAL, "whole sectors only")
        cache, layer = self._side.cache, self._side.view.private[0]
        while not private.write(cache, layer, offset, data):
            await private.prepare(cache, layer, offset, len(data))
        cache.intent.publish()

    async def flush(self) -> None:
        await self._side.cache.make_durable()

    async def trim(self, offset: int, length: int, fua: bool) -> None:
        raise OSError(errno.ENOSPC, "no trim")

    async def zero(self, offset: int, length: int, fua: bool, no_hole: bool, fast: bool) -> None:
        raise AssertionError

    async def cache(self, offset: int, length: int) -> None:
        raise AssertionError

    async def extents(
        self, context: str, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        raise AssertionError

    def opened(self) -> None:
        pass

    def closed(self) -> None:
        pass


def packed(command: int, cookie: int, offset: int, length: int, flags: int = 0) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
