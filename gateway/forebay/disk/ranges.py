# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Who may change a disk at the same time: locks on byte ranges, and the gate that stops all writes.

Writes that overlap wait for each other; a change of mode, and the end of a drain, wait for all writes under way.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from forebay.latency.waits import ADMISSION, TURN, Waiting
from forebay_cache.format.geometry import SECTOR


class Ranges:
    """Locks on byte ranges of one disk. A byte has one holder; those that wait for it get it in no particular order."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] = []
        """(start, end) in bytes of each range that somebody holds."""
        self._changed = trio.Event()

    def is_free(self, start: int, end: int) -> bool:
        """True if nobody holds any byte from `start` up to `end`."""
        return all(end <= a or b <= start for a, b in self.held)

    def leading_free(self, writes: list[tuple[int, memoryview]]) -> list[tuple[int, memoryview]]:
        """Those of the (offset, data) that come before the first one of which somebody holds a byte."""
        for n, (offset, data) in enumerate(writes):
            if not self.is_free(offset, offset + len(data)):
                return writes[:n]
        return writes

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Wait until the bytes from `start` up to `end` are free, and hold them as long as the block runs.

        Cancelled while it waits, it holds nothing.
        """
        while not self.is_free(start, end):
            with Waiting(TURN):
                await self._changed.wait()
        mine = (start, end)
        self.held.append(mine)
        try:
            yield
        finally:
            self.held.remove(mine)
            event, self._changed = self._changed, trio.Event()
            event.set()


class Gate:
    """Lets the writes of one disk through, or holds them while the way that they take is being changed."""

    def __init__(self) -> None:
        self.shut = False
        """True while writes are held; whoever writes without :meth:`passing` looks here first, and does not await."""
        self._inside = 0
        self._closing = trio.Lock()
        self._opened = trio.Event()
        self._emptied = trio.Event()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Around one write: wait while the gate is shut, then count as being inside."""
        while self.shut:
            with Waiting(ADMISSION):
                await self._opened.wait()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                event, self._emptied = self._emptied, trio.Event()
                event.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        """Around a change: hold new writes, wait for those inside, and let the held ones go on afterwards.

        Reads do not notice. Cancelled while it waits, it opens the gate again.
        """
        async with self._closing:
            self.shut = True
            try:
                while self._inside:
                    await self._emptied.wait()
                yield
            finally:
                self.shut = False
                event, self._opened = self._opened, trio.Event()
                event.set()


def sectors_touched(offset: int, length: int) -> tuple[int, int]:
    """The whole sectors that a range touches: (start, end) in bytes."""
    return offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR


def sectors_within(offset: int, length: int) -> tuple[int, int]:
    """The whole sectors that lie in a range: (start, end) in bytes; start >= end where there is none."""
    return -(-offset // SECTOR) * SECTOR, (offset + length) // SECTOR * SECTOR
