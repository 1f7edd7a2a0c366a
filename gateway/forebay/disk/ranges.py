"""Byte ranges that somebody is changing: overlapping changes wait for each other, all others go on."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Ranges:
    """Locks on byte ranges of one disk. First come, first served among those that overlap."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] = []
        self._changed = trio.Event()

    def free(self, start: int, end: int) -> bool:
        """Whether nobody holds a byte of start..end."""
        return all(end <= a or b <= start for a, b in self.held)

    def free_ones(self, writes: list[tuple[int, memoryview]]) -> list[tuple[int, memoryview]]:
        """Those (offset, data) that come before the first one of which somebody holds a byte."""
        for n, (offset, data) in enumerate(writes):
            if not self.free(offset, offset + len(data)):
                return writes[:n]
        return writes

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Wait until the range is free, then hold it. Cancelled while waiting, nothing is held."""
        while not self.free(start, end):
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
    """Lets writes through, or holds them while the way they take is being changed."""

    def __init__(self) -> None:
        self.shut = False
        self._inside = 0
        self._closing = trio.Lock()
        self._opened = trio.Event()
        self._emptied = trio.Event()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """One write. Waits while the gate is shut."""
        while self.shut:
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
        """Hold new writes, wait for those inside; reads do not notice."""
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
