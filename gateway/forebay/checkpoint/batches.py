# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Reading a frozen layer from the cache, a batch of blocks at a time, into the image or the journal beside it."""

import contextlib
import errno
from collections.abc import Sequence

import trio

from forebay.checkpoint.counters import ORIGIN_SYNC, ORIGIN_WRITE, Counters
from forebay.checkpoint.steps import Steps
from forebay.image.image import Image
from forebay.sidecar.applying import BEGUN, Place
from forebay.sidecar.claim import RedoJournal
from forebay_cache import Layer, View
from forebay_cache.blocks.frozen import Block, Range, blocks_of, read_blocks
from forebay_cache.format.geometry import BLOCK, Buffer

BATCH_MOST = 1 << 20
BATCH_BLOCKS = 128
"""Bytes, and blocks, that are read and written at a time: handing over to a thread costs as much as a few writes."""

PAGES_AT_ONCE = 16
"""Pages whose blocks are listed between two turns of others: at most half a millisecond."""

SYNC_EVERY = 64 << 20
"""Bytes after which the image is flushed already, so that the last flush is not so long that it is given up."""

BEFORE_SECONDS = 1.0
"""How long a pass waits for what the image holds at some places before it writes."""

NOTE_EVERY = 8 << 20
"""Bytes of the image after which it is noted in the journal how far that is applied."""

WRITERS = 4
"""Writes to the origin at the same time: enough to hide its latency, few enough to leave it to the guests' misses."""

YIELD_SECONDS = 0.002
YIELD_MOST = 25
"""How long, and how often at most, a write of write-back stands aside for misses that guests wait for."""


class Batches:
    """Reads all of one frozen layer and puts it somewhere, up to WRITERS batches at the same time."""

    def __init__(self, image: Image, layer: Layer, steps: Steps) -> None:
        self._image = image
        self._cache = image.cache
        self._layer = layer
        self._steps = steps
        self._view = View(image.cache, [layer], None, _refuse)
        self._errors: list[OSError] = []
        self._slots = trio.Semaphore(WRITERS)

    async def put_all(self) -> None:
        """Put everything that the layer holds. Raises OSError, the first one; then some of it was put, some not."""
        async with trio.open_nursery() as nursery:
            try:
                await self._start_all(nursery)
            except OSError as error:  # of the index; out of a nursery it would come in a group
                self._errors.append(error)
        if self._errors:
            raise self._errors[0]

    async def _start_all(self, nursery: trio.Nursery) -> None:
        batch: list[Block] = []
        stored = 0
        for n, number in enumerate(await self._layer.pages.numbers()):
            await self._layer.pages.load([number])
            if n % PAGES_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()  # a page that is loaded already awaits nothing
            for block in blocks_of(self._layer.pages.page(number), number):
                batch.append(block)
                stored += block.stored
                if len(batch) == BATCH_BLOCKS or stored >= BATCH_MOST:
                    await self._begin(nursery, batch)
                    batch, stored = [], 0
        if batch:
            await self._begin(nursery, batch)

    async def _begin(self, nursery: trio.Nursery, batch: list[Block]) -> None:
        await self._steps.wait_for_turn()
        await self._slots.acquire()
        if self._errors:
            self._slots.release()
        else:
            nursery.start_soon(self._one, batch)

    async def _one(self, batch: list[Block]) -> None:
        try:
            await self._let_misses_go_first()
            ranges = await read_blocks(self._cache, self._view, batch, self._image.size)
            await self._put(ranges)
            self._steps.advance(sum(r.length for r in ranges))
        except OSError as error:
            self._errors.append(error)
        finally:
            self._slots.release()

    async def _let_misses_go_first(self) -> None:
        for _ in range(YIELD_MOST):
            if not self._image.filler.waiting:
                break
            await trio.sleep(YIELD_SECONDS)

    async def _put(self, ranges: list[Range]) -> None:
        """Write what one batch holds. Raises OSError."""
        raise NotImplementedError


class IntoImage(Batches):
    """Writes the layer to the image. Nothing of it is durable before the image is flushed."""

    def __init__(
        self,
        image: Image,
        layer: Layer,
        steps: Steps,
        counters: Counters,
        journal: RedoJournal | None = None,
    ) -> None:
        """`journal` is the committed one that has the same; None where the image is not a file."""
        super().__init__(image, layer, steps)
        self._counters = counters
        self._journal = journal
        self._unsynced = 0
        self._under_way: dict[int, bool] = {}
        """Of each batch, in order, by the byte behind it: True if the image has it; without those at the beginning."""
        self._noted = 0
        self._beginning = trio.Lock()

    async def _begin(self, nursery: trio.Nursery, batch: list[Block]) -> None:
        self._under_way[_end_of(batch)] = False
        await super()._begin(nursery, batch)

    async def _one(self, batch: list[Block]) -> None:
        await super()._one(batch)
        if self._journal is not None and not self._errors:
            await self._note(self._journal, _end_of(batch))

    async def _note(self, journal: RedoJournal, end: int) -> None:
        """Note in the journal how far it is applied, after the first batch and then every NOTE_EVERY bytes."""
        self._under_way[end] = True
        below = 0
        for behind, is_done in list(self._under_way.items()):
            if not is_done:
                break
            below = behind
            del self._under_way[behind]
        if below and (self._noted == BEGUN or below - self._noted >= NOTE_EVERY):
            self._noted = below
            with contextlib.suppress(OSError):  # a later start compares less
                await journal.note_applied(below)

    async def _note_begin(self, journal: RedoJournal) -> None:
        """Note in the journal, before the first write, that the image is written. Raises OSError."""
        async with self._beginning:
            if not self._noted:
                await journal.note_applied(BEGUN, await self._held_before(journal.places))
                self._image.identity.is_committing = False
                self._noted = BEGUN

    async def _held_before(self, places: Sequence[Place]) -> list[tuple[Place, Buffer]]:
        """What the image holds at those places, as far as it says so soon."""
        origin = self._image.require_origin()
        found: list[tuple[Place, Buffer]] = []

        async def read(place: Place) -> None:
            with contextlib.suppress(OSError):
                found.append((place, await origin.read(place.offset, place.length, True)))

        with trio.move_on_after(BEFORE_SECONDS):
            async with trio.open_nursery() as nursery:
                for place in places:
                    nursery.start_soon(read, place)
        return found

    async def _put(self, ranges: list[Range]) -> None:
        if self._journal is not None and not self._noted:
            await self._note_begin(self._journal)
        origin = self._image.require_origin()
        for part in ranges:
            if part.data is None:
                await origin.zero(part.offset, part.length, may_trim=not part.is_provisioned)
        writes = [(r.offset, r.data) for r in ranges if r.data is not None]
        if not writes:
            return
        with self._counters.timed(ORIGIN_WRITE):
            await origin.write_ranges(writes, background=True)
        stored = sum(len(data) for _, data in writes)
        self._counters.origin_written_bytes += stored
        self._unsynced += stored
        if self._unsynced >= SYNC_EVERY:
            self._unsynced = 0
            with self._counters.timed(ORIGIN_SYNC):
                await self._image.flush()


class IntoJournal(Batches):
    """Writes the layer to a redo journal, which is not committed by that."""

    def __init__(
        self, image: Image, layer: Layer, steps: Steps, counters: Counters, journal: RedoJournal
    ) -> None:
        super().__init__(image, layer, steps)
        self._counters = counters
        self._journal = journal

    async def _put(self, ranges: list[Range]) -> None:
        await self._journal.add(ranges)
        self._counters.journal_written_bytes += sum(r.length for r in ranges if r.data is not None)


def _end_of(batch: list[Block]) -> int:
    """The byte of the image behind the last block of a batch."""
    return (batch[-1].number + 1) * BLOCK


async def _refuse(offset: int, length: int) -> Buffer:
    """For a view of a frozen layer alone: what that layer does not hold is nobody's to ask for."""
    raise OSError(errno.EIO, f"no private data in {length} bytes at {offset}")
