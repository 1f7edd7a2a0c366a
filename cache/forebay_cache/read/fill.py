# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Misses: fetching blocks from the origin, each once however many ask.

A *flight* is one origin read of neighbouring blocks. Whoever needs one of its blocks waits for it; when the data has
landed they go on at once, and it is stored in the clean layer behind their backs. An origin write that begins or ends
while a flight is in the air takes the flight out of the books (nobody else joins it) and marks the sectors, so that
what it read is not stored.

A flight that nobody waits for lets guests' misses go first, until somebody joins it. What it fails with is told to
nobody but who asked for it: a guest that has joined it asks anew. A flight reads whole blocks, and so more than a
guest has asked for: where one fails, the guest's own bytes are read once more, exactly. So a part of an origin that
cannot be read fails those requests that touch it, and no others.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

import trio

from forebay_cache.blocks.store import store
from forebay_cache.cache import Cache
from forebay_cache.errors import NO_ANSWER, IndexFault
from forebay_cache.format.geometry import BLOCK, BLOCK_SHIFT, FULL, PAGE_BLOCKS, SECTOR, Buffer
from forebay_cache.layers.in_flight import UNSTORED, Cells
from forebay_cache.layers.layer import Layer
from forebay_cache.read.flight import Flight

CHUNK = 1 << 20
"""Bytes of one origin read at most: enough for a slow link, short enough to spread over several."""
_PAGES_AT_ONCE = 32
"""So many pages are looked through between two turns of others."""
_SMALL_PART = 2
"""Who takes less than one part of so many of a flight gets a copy: its reply would keep all of the flight in memory."""
FAILED_SECONDS = 60.0
"""So long a block that could not be read as a whole is read by what guests ask of it, and not tried as a whole: a
medium may take seconds for each attempt to read a bad place."""
_FAILED_KEPT = 4096
"""So many such blocks are remembered at most."""


class Reader(Protocol):
    """What misses are read with: an image. ``size`` is in bytes."""

    size: int

    async def read(self, offset: int, length: int, background: bool | trio.Event = False) -> Buffer:
        """Exactly ``length`` bytes from ``offset`` on. Raises OSError.

        ``background``: nobody waits for them; an event: nobody does before that is set.
        """


class Tally(Protocol):
    """Counts for somebody the bytes that were read from the origin for him."""

    origin_read_bytes: int

    def note_origin_read(self, seconds: float) -> None:
        """A read of the origin took so long, whatever came of it."""


class Starter(Protocol):
    """Where fetches are started: a nursery, or what keeps a nursery from their exceptions."""

    def start_soon(self, task: Callable[..., Awaitable[object]], /, *args: Any) -> None:
        """As trio.Nursery.start_soon."""


class Filler:
    """Fetches for one image; all disks on it share it. ``nursery`` has to outlive every guest's request."""

    def __init__(self, cache: Cache, layer: Layer, reader: Reader, nursery: Starter) -> None:
        self.cache = cache
        self.layer = layer
        self.reader = reader
        self._nursery = nursery
        self._flights: dict[int, Flight] = {}
        self._failed: dict[int, float] = {}  # blocks that could not be read as a whole: until when
        self._exact: dict[int, Flight] = {}  # the last one of each block that was read exactly
        self.waiting = 0
        """How many guests wait for a miss: background work looks at it and stands aside."""
        self.on_ahead: Callable[[range], None] | None = None
        """Told of the blocks that are fetched before anybody asks for them, when that begins."""

    async def fetch(self, offset: int, length: int, tally: Tally) -> Buffer:
        """Bytes of the origin for a guest. Raises OSError. Cancelling leaves the flights to the others."""
        self.waiting += 1
        try:
            return await self._fetch(offset, length, tally)
        finally:
            self.waiting -= 1

    async def _fetch(self, offset: int, length: int, tally: Tally) -> Buffer:
        if self._has_failed(offset, length):
            return (await self.read_exactly(offset, length, tally)).data
        parts: list[memoryview] = []
        for flight in self.launch(offset, length, tally):
            await flight.landed.wait()
            start, stop = _overlap(flight, offset, length)
            if flight.error is None:
                parts.append(_part(flight, start, stop))
            else:
                parts += await self._fetch_again(flight, start, stop - start, tally)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def join(self, offset: int, length: int, wake: Callable[[], None]) -> bool:
        """Have `wake` called when a range is in the cache that others wait for, or when that failed.

        For guests that find one waiting already: a hundred that boot together ask for the same bytes within a
        millisecond, and a task for each costs ten times what a hit does. False, and it is not called, where no one
        flight that somebody waits for brings all of the range.
        """
        flight = self._flights.get(offset >> BLOCK_SHIFT)
        last = offset + length - 1 >> BLOCK_SHIFT
        if flight is None or self._flights.get(last) is not flight or not flight.needed.is_set():
            return False
        flight.joined.append(wake)
        return True

    async def _fetch_again(
        self, failed: Flight, offset: int, length: int, tally: Tally
    ) -> list[memoryview]:
        """Bytes of a flight that has failed: what a guest has asked for of it. Raises OSError.

        A flight that nobody waited for when it began is made anew, with all who wait now; else, and then, the bytes are
        read once more for this guest alone.
        """
        flights = [failed]
        if failed.is_ahead:
            flights = self.launch(offset, length, tally)
        parts: list[memoryview] = []
        for shared in flights:
            flight = shared
            await shared.landed.wait()
            start, stop = _overlap(shared, offset, length)
            if shared.error is not None:
                if shared.error.errno in NO_ANSWER:
                    raise _same(shared.error)
                flight = await self.read_exactly(start, stop - start, tally)
            parts.append(_part(flight, start, stop))
        return parts

    async def read_exactly(
        self, offset: int, length: int, tally: Tally, *, background: bool = False
    ) -> Flight:
        """Read these bytes of the origin and no others, in a flight that nobody joins, and keep its whole sectors.

        Returns it when it has landed. Raises OSError.
        """
        flight = Flight(offset, length, background=background, told=tally.note_origin_read)
        tally.origin_read_bytes += length
        self._nursery.start_soon(self._fly_exactly, flight)
        await flight.landed.wait()
        if flight.error is not None:
            raise _same(flight.error)
        return flight

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
                flight = self._start(block, stop, background, tally)
                tally.origin_read_bytes += flight.length
            elif not background:
                flight.needed.set()
            flights.append(flight)
            block = flight.blocks().stop
        return flights

    async def take(self, layer: Layer, offset: int, data: Buffer) -> None:
        """Keep whole blocks of the origin, as far as it has them, that came from elsewhere and were found to be right.

        Whoever needs one of them meanwhile has it from here. Nothing is kept where `layer` is not the clean layer any
        more: what was found to be right is of an origin that has changed since.
        """
        flight = Flight(offset, len(data), background=True)
        while under_way := [self._flights[n] for n in flight.blocks() if n in self._flights]:
            await under_way[0].stored.wait()
        if layer is not self.layer:
            return
        # a copy: whoever waits for it may keep a part for longer than this
        flight.data = memoryview(bytes(data))
        flight.landed.set()
        self._flights.update(dict.fromkeys(flight.blocks(), flight))
        try:
            with self.cache.in_flight.filling(self.layer, flight.blocks()) as cells:
                await self._store(flight, cells)
        finally:
            self._forget(flight)
            flight.end()

    def _start(self, block: int, stop: int, background: bool, tally: Tally) -> Flight:
        offset = block << BLOCK_SHIFT
        length = min(stop << BLOCK_SHIFT, self.reader.size) - offset
        flight = Flight(offset, length, background=background, told=tally.note_origin_read)
        for n in range(block, stop):
            self._flights[n] = flight
        if background and self.on_ahead is not None:
            self.on_ahead(flight.blocks())
        self._nursery.start_soon(self._fly, flight)
        return flight

    async def _fly_exactly(self, flight: Flight) -> None:
        """One after the other of those that bring parts of the same block is stored: a block has one slot."""
        before = {self._exact[n] for n in flight.blocks() if n in self._exact}
        self._exact.update(dict.fromkeys(flight.blocks(), flight))
        try:
            await self._fly(flight, before)
        finally:
            for n in flight.blocks():
                if self._exact.get(n) is flight:  # cancelled, they do not end in their order
                    del self._exact[n]

    async def _fly(self, flight: Flight, before: Iterable[Flight] = ()) -> None:
        """Read, say so to who waits, and store, after those that have to be stored ``before``."""
        try:
            with self.cache.in_flight.filling(self.layer, flight.blocks()) as cells:
                try:
                    background = flight.is_ahead and flight.needed
                    data = await self.reader.read(flight.offset, flight.length, background)
                    flight.data = memoryview(data)
                except OSError as error:
                    flight.error = error
                    self._note_failed(flight, error)
                flight.land()
                for other in before:
                    await other.stored.wait()
                if flight.error is None and self.cache.in_flight.unstored < UNSTORED:
                    await self._store(flight, cells)
        finally:
            if not flight.landed.is_set():
                flight.error = OSError(errno.ESHUTDOWN, "the gateway is stopping")
                flight.landed.set()
            self._forget(flight)
            flight.end()

    async def _store(self, flight: Flight, cells: Cells) -> None:
        """Keep the whole sectors of a flight that has landed."""
        skip = -flight.offset % SECTOR
        data = flight.data[skip:]
        if flight.offset + flight.length == self.reader.size:
            if len(data) % SECTOR:  # the end of an image that is not a multiple of a sector
                data = memoryview(bytes(data) + bytes(-len(data) % SECTOR))
        else:
            data = data[: len(data) // SECTOR * SECTOR]
        if not len(data):
            return
        in_flight = self.cache.in_flight
        in_flight.unstored += len(data)
        try:
            await store(self.cache, self.layer, flight.offset + skip, data, cells)
        finally:
            in_flight.unstored -= len(data)

    def _note_failed(self, flight: Flight, error: OSError) -> None:
        """Remember a block that could not be read as a whole."""
        if len(flight.blocks()) > 1 or error.errno in NO_ANSWER:
            return
        if len(self._failed) >= _FAILED_KEPT:
            del self._failed[next(iter(self._failed))]
        self._failed.pop(flight.blocks().start, None)
        self._failed[flight.blocks().start] = trio.current_time() + FAILED_SECONDS

    def _has_failed(self, offset: int, length: int) -> bool:
        """True for bytes of a block that could not be read as a whole not long ago."""
        if not self._failed:
            return False
        block = offset >> BLOCK_SHIFT
        if offset + length > block + 1 << BLOCK_SHIFT or block not in self._failed:
            return False
        if self._failed[block] > trio.current_time():
            return True
        del self._failed[block]
        return False

    def _forget(self, flight: Flight) -> None:
        for n in flight.blocks():
            if self._flights.get(n) is flight:
                del self._flights[n]

    def overtaken(self, offset: int, length: int) -> None:
        """Bytes of the origin are being written, or just were.

        Nobody joins the flights that bring any of them from now on, and these store nothing of that range.
        """
        blocks = range(offset >> BLOCK_SHIFT, (offset + length - 1 >> BLOCK_SHIFT) + 1)
        flights = self._flights
        # All of a flight is forgotten: whoever joins one takes what it needs from it.
        for flight in {flights[n] for n in _within(flights, blocks)}:
            self._forget(flight)
        for n in _within(self._failed, blocks):
            del self._failed[n]
        self.cache.in_flight.overtake(self.layer, offset, length)

    async def prefetch(
        self, offset: int, length: int, tally: Tally, *, background: bool = False
    ) -> None:
        """Fetch what the clean layer lacks of a range, and return when it is stored, as far as it can be.

        Raises OSError.
        """
        for start, part in await self.missing(offset, length):
            for flight in await self._launch_missing(start, part, tally, background=background):
                await flight.stored.wait()
                if flight.error is not None:
                    raise _same(flight.error)

    def ahead(self, offset: int, length: int, tally: Tally) -> None:
        """Start fetching a range without waiting for it, behind all that guests wait for. Nobody is told of errors."""
        self._nursery.start_soon(self._ahead, offset, length, tally)

    async def _ahead(self, offset: int, length: int, tally: Tally) -> None:
        with contextlib.suppress(IndexFault):
            for start, part in await self.missing(offset, length):
                await self._launch_missing(start, part, tally, background=True)

    async def _launch_missing(
        self, offset: int, length: int, tally: Tally, *, background: bool
    ) -> list[Flight]:
        """Flights for what a gap still lacks: others may have fetched since it was found. Raises IndexFault."""
        return [
            flight
            for start, part in await self.missing(offset, length)
            for flight in self.launch(start, part, tally, background=background)
        ]

    async def missing(self, offset: int, length: int) -> list[tuple[int, int]]:
        """``[(offset, length)]`` of whole blocks that the clean layer lacks, each at most CHUNK. Raises IndexFault."""
        length = min(length, self.reader.size - offset)
        if length <= 0:
            return []
        first, last = offset >> BLOCK_SHIFT, offset + length - 1 >> BLOCK_SHIFT
        gaps: list[tuple[int, int]] = []
        for number in range(first // PAGE_BLOCKS, last // PAGE_BLOCKS + 1):
            if number % _PAGES_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            await self.layer.pages.load([number])
            start = max(first, number * PAGE_BLOCKS)
            self._add_missing(gaps, number, start, min(last + 1, (number + 1) * PAGE_BLOCKS))
        return gaps

    def _add_missing(self, gaps: list[tuple[int, int]], number: int, first: int, end: int) -> None:
        """Add the gaps among some blocks of one page, which was loaded just now. Raises IndexFault."""
        page = self.layer.pages.page(number)
        for block in range(first, end):
            left = self.reader.size - (block << BLOCK_SHIFT)
            need = needed_of(left)
            if page[block % PAGE_BLOCKS] & need == need:
                continue
            start, part = block << BLOCK_SHIFT, min(BLOCK, left)
            if gaps and sum(gaps[-1]) == start and gaps[-1][1] + part <= CHUNK:
                gaps[-1] = (gaps[-1][0], gaps[-1][1] + part)
            else:
                gaps.append((start, part))


def _within(known: Mapping[int, object], blocks: range) -> list[int]:
    """Those of the blocks that are known: in no more steps than there are of either."""
    if len(known) < len(blocks):
        return [n for n in known if n in blocks]
    return [n for n in blocks if n in known]


def needed_of(left: int) -> int:
    """The mask of the sectors that a block has, of which there are ``left`` bytes in the image, or more."""
    return FULL if left >= BLOCK else (1 << (left + SECTOR - 1) // SECTOR) - 1


def _overlap(flight: Flight, offset: int, length: int) -> tuple[int, int]:
    """From where to where in the image a flight brings bytes of a range."""
    return max(offset, flight.offset), min(offset + length, flight.offset + flight.length)


def _part(flight: Flight, start: int, stop: int) -> memoryview:
    """What a flight has brought of a range, which it covers."""
    part = flight.data[start - flight.offset : stop - flight.offset]
    is_small = len(part) * _SMALL_PART < len(flight.data)
    return memoryview(bytes(part)) if is_small else part


def _same(error: OSError) -> OSError:
    """The error once more, for somebody else."""
    return OSError(error.errno or errno.EIO, error.strerror)
