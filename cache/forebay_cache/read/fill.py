# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Misses: fetching blocks from the origin, each once however many ask.

A *flight* is one origin read of neighbouring blocks. Whoever needs one of its blocks waits for it; when the data has
landed they go on at once, and it is stored in the clean layer behind their backs. An origin write that begins or ends
while a flight is in the air takes the flight out of the books (nobody else joins it) and marks the sectors, so that
what it read is not stored.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

import trio

from forebay_cache.blocks.store import store
from forebay_cache.cache import Cache
from forebay_cache.errors import IndexFault
from forebay_cache.format.geometry import BLOCK, BLOCK_SHIFT, FULL, PAGE_BLOCKS, SECTOR, Buffer
from forebay_cache.layers.in_flight import Cells
from forebay_cache.layers.layer import Layer

CHUNK = 1 << 20
"""Bytes of one origin read at most: enough for a slow link, short enough to spread over several."""
UNSTORED = 64 << 20
"""Bytes that have landed and wait to be stored, at most; beyond this data is served and not kept."""


class Reader(Protocol):
    """What misses are read with: an image. ``size`` is in bytes."""

    size: int

    async def read(self, offset: int, length: int, background: bool = False) -> Buffer:
        """Exactly ``length`` bytes from ``offset`` on. ``background``: nobody waits for them. Raises OSError."""


class Tally(Protocol):
    """Counts for somebody the bytes that were read from the origin for him."""

    origin_read_bytes: int


class Starter(Protocol):
    """Where fetches are started: a nursery, or what keeps a nursery from their exceptions."""

    def start_soon(self, task: Callable[..., Awaitable[object]], /, *args: Any) -> None:
        """As trio.Nursery.start_soon."""


class Flight:
    """One origin read that is on its way, of whole blocks, as far as the image has them."""

    __slots__ = ("data", "error", "landed", "length", "offset", "stored")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length
        self.landed = trio.Event()
        self.stored = trio.Event()  # what could be kept of it is kept
        self.data = memoryview(b"")
        self.error: OSError | None = None

    def blocks(self) -> range:
        """The numbers of the blocks that it brings."""
        return range(self.offset >> BLOCK_SHIFT, (self.offset + self.length - 1 >> BLOCK_SHIFT) + 1)


class Filler:
    """Fetches for one image; all disks on it share it. ``nursery`` has to outlive every guest's request."""

    def __init__(self, cache: Cache, layer: Layer, reader: Reader, nursery: Starter) -> None:
        self.cache = cache
        self.layer = layer
        self.reader = reader
        self._nursery = nursery
        self._flights: dict[int, Flight] = {}
        self._unstored = 0
        self.waiting = 0
        """How many guests wait for a miss: background work looks at it and stands aside."""

    async def fetch(self, offset: int, length: int, tally: Tally) -> Buffer:
        """Bytes of the origin for a guest. Raises OSError. Cancelling leaves the flights to the others."""
        self.waiting += 1
        try:
            return await self._fetch(offset, length, tally)
        finally:
            self.waiting -= 1

    async def _fetch(self, offset: int, length: int, tally: Tally) -> Buffer:
        flights = self.launch(offset, length, tally)
        for flight in flights:
            await flight.landed.wait()
            if flight.error is not None:
                raise OSError(flight.error.errno or errno.EIO, flight.error.strerror)
        parts = [_part(flight, offset, length) for flight in flights]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def launch(
        self, offset: int, length: int, tally: Tally, *, background: bool = False
    ) -> list[Flight]:
        """Flights that together cover a range, in order: those on their way already, and new ones for the rest."""
        flights: list[Flight] = []
        block, end = offset >> BLOCK_SHIFT, (offset + length - 1 >> BLOCK_SHIFT) + 1
        while block < end:
            flight = self._flights.get(block)
            if flight is None:
                stop = block + 1
                most = min(end, block + CHUNK // BLOCK)
                while stop < most and stop not in self._flights:
                    stop += 1
                flight = self._start(block, stop, background)
                tally.origin_read_bytes += flight.length
            flights.append(flight)
            block = flight.blocks().stop
        return flights

    def _start(self, block: int, stop: int, background: bool) -> Flight:
        offset = block << BLOCK_SHIFT
        flight = Flight(offset, min(stop << BLOCK_SHIFT, self.reader.size) - offset)
        for n in range(block, stop):
            self._flights[n] = flight
        self._nursery.start_soon(self._fly, flight, background)
        return flight

    async def _fly(self, flight: Flight, background: bool) -> None:
        try:
            with self.cache.in_flight.filling(self.layer, flight.blocks()) as cells:
                try:
                    data = await self.reader.read(flight.offset, flight.length, background)
                    flight.data = memoryview(data)
                except OSError as error:
                    flight.error = error
                flight.landed.set()
                if flight.error is None and self._unstored < UNSTORED:
                    await self._store(flight, cells)
        finally:
            if not flight.landed.is_set():
                flight.error = OSError(errno.ESHUTDOWN, "the gateway is stopping")
                flight.landed.set()
            self._forget(flight)
            flight.stored.set()

    async def _store(self, flight: Flight, cells: Cells) -> None:
        data = flight.data
        if len(data) % SECTOR:  # the end of an image that is not a multiple of a sector
            data = memoryview(bytes(data) + bytes(-len(data) % SECTOR))
        self._unstored += len(data)
        try:
            await store(self.cache, self.layer, flight.offset, data, cells)
        finally:
            self._unstored -= len(data)

    def _forget(self, flight: Flight) -> None:
        for n in flight.blocks():
            if self._flights.get(n) is flight:
                del self._flights[n]

    def overtaken(self, offset: int, length: int) -> None:
        """Bytes of the origin are being written, or just were.

        Nobody joins the flights that bring any of them from now on, and these store nothing of that range.
        """
        flights = self._flights
        if flights:
            blocks: Iterable[int] = range(
                offset >> BLOCK_SHIFT, (offset + length - 1 >> BLOCK_SHIFT) + 1
            )
            if len(flights) < length >> BLOCK_SHIFT:  # however long the range is
                blocks = [n for n in flights if n in blocks]
            # All of a flight is forgotten: whoever joins one takes what it needs from it.
            for flight in {flights[n] for n in blocks if n in flights}:
                self._forget(flight)
        self.cache.in_flight.overtake(self.layer, offset, length)

    async def prefetch(
        self, offset: int, length: int, tally: Tally, *, background: bool = False
    ) -> None:
        """Fetch what the clean layer lacks of a range, and return when it is stored, as far as it can be.

        Raises OSError.
        """
        for start, part in await self.missing(offset, length):
            for flight in self.launch(start, part, tally, background=background):
                await flight.stored.wait()
                if flight.error is not None:
                    raise OSError(flight.error.errno or errno.EIO, flight.error.strerror)

    def ahead(self, offset: int, length: int, tally: Tally) -> None:
        """Start fetching a range without waiting for it; errors are the next reader's to see."""
        self._nursery.start_soon(self._ahead, offset, length, tally)

    async def _ahead(self, offset: int, length: int, tally: Tally) -> None:
        with contextlib.suppress(IndexFault):
            for start, part in await self.missing(offset, length):
                self.launch(start, part, tally)

    async def missing(self, offset: int, length: int) -> list[tuple[int, int]]:
        """``[(offset, length)]`` of whole blocks that the clean layer lacks, each at most CHUNK."""
        length = min(length, self.reader.size - offset)
        if length <= 0:
            return []
        first, last = offset >> BLOCK_SHIFT, offset + length - 1 >> BLOCK_SHIFT
        await self.layer.pages.load(range(first // PAGE_BLOCKS, last // PAGE_BLOCKS + 1))
        gaps: list[tuple[int, int]] = []
        for block in range(first, last + 1):
            page = self.layer.pages.look(block // PAGE_BLOCKS)
            need = FULL
            left = self.reader.size - (block << BLOCK_SHIFT)
            if left < BLOCK:
                need = (1 << (left + SECTOR - 1) // SECTOR) - 1
            if page is not None and page[block % PAGE_BLOCKS] & need == need:
                continue
            start, part = block << BLOCK_SHIFT, min(BLOCK, left)
            if gaps and sum(gaps[-1]) == start and gaps[-1][1] + part <= CHUNK:
                gaps[-1] = (gaps[-1][0], gaps[-1][1] + part)
            else:
                gaps.append((start, part))
        return gaps


def _part(flight: Flight, offset: int, length: int) -> memoryview:
    start = max(offset, flight.offset) - flight.offset
    stop = min(offset + length, flight.offset + flight.length) - flight.offset
    return flight.data[start:stop]
