"""Write-back: what only the cache has, written to the image, one instant at a time.

A pass freezes the open private layer (a new one takes its place between two awaits), makes it durable, writes all of
it to the origin, makes that durable, and only then lets it become clean. Until then reads find it in the frozen
layer, and a crash finds it there again: the pass is done once more. So what is written is always what the disk held
at one instant, all of it.

Should the host be lost in the middle of that, the image would hold a part. So where the image is a file, all of it goes
into a redo journal beside the image first (`redo.py`).
"""

import contextlib
import errno
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from forebay.checkpoint.pace import LOW, Amount
from forebay.image.source import Journal
from forebay_cache import Layer, View, pages_of, past_failure, uncover
from forebay_cache.blocks.frozen import Block, Range, blocks_of, read_blocks
from forebay_cache.blocks.settle import settle
from forebay_cache.device.device import Buffer
from forebay_cache.format.geometry import SECTOR

if TYPE_CHECKING:
    from forebay.disk.disk import Disk, Progress

log = logging.getLogger("forebay.writeback")

BATCH_MOST = 1 << 20
BATCH_BLOCKS = 128
"""Bytes, and blocks, that are read and written at a time: handing over to a thread costs as much as a few writes."""

SYNC_EVERY = 64 << 20
"""Bytes after which the image is flushed already, so that the last flush is not so long that it is given up."""

WRITERS = 4
"""Writes to the origin at the same time: enough to hide its latency, few enough to leave it to the guests' misses."""

SPREAD = 0.4
"""Of `max_lag`, over how much a pass is spread while guests are served: it begins at half of it."""

TURN_SECONDS = 0.05
"""How long it takes at most until a pass that is being spread notices that it is waited for, or that guests rest."""

ASIDE_SECONDS = 0.001
"""Between two pieces of settling, while guests are served: each of these takes some tenths of it."""

YIELD_SECONDS = 0.002
YIELD_MOST = 25
"""How long, and how often at most, a write-back write stands aside for misses that guests wait for."""

PASSES_BESIDE_WRITES = 2
"""How often a drain tries to catch up with a VM that writes, before it has it wait."""

AGAIN_SECONDS = 1.0
"""How soon a guest's write tries a pass again that failed, while the cache device does not work."""

IDLE_SECONDS = 10.0
"""After how long without anything dirty the marker beside the image is to say so, where no pass has cleared it."""

FREEZE_ROOM = 1 << 19
"""As room for the journal records of a write of so many bytes: more than the longest name of a layer takes."""

RETRY_MOST = 30.0
"""Most seconds between two tries at an origin that fails; the first pause is one second."""


class WriteBack:
    """The write-back of one disk. `frozen`, oldest first, are the layers that a pass has not finished with."""

    def __init__(self, disk: "Disk") -> None:
        self._disk = disk
        self._lock = trio.Lock()
        self._wanted = trio.Event()
        self._passed = trio.Event()
        self.error: str | None = None
        self._tried = 0.0  # when a pass failed last
        self.failure: int | None = None
        """Why the last pass failed: text and error number; None: it did not."""
        self.hurried = 0
        """How many wait for passes to end."""
        self.moved = 0.0
        """Trio time at which write-back was seen to go on last."""

    @property
    def frozen(self) -> list[Layer]:
        """Oldest first."""
        return self._disk.view.private[:0:-1]

    def want(self) -> None:
        """Begin a pass as soon as possible."""
        self._wanted.set()

    async def passed(self) -> None:
        """Wait for the end of a pass, or a second."""
        if not self._lock.locked():
            self.want()
        with self._hurry(), trio.move_on_after(1.0):
            await self._passed.wait()

    @contextlib.contextmanager
    def _hurry(self) -> Iterator[None]:
        self.hurried += 1
        try:
            yield
        finally:
            self.hurried -= 1

    def check_goes_on(self, why: str, began: float) -> None:
        """Raises OSError(ENOSPC) where it makes no sense to wait for room any longer, as somebody has since `began`."""
        if self.failure in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                errno.ENOSPC, f"{why}, and the storage of the image is full: {self.error}"
            )
        if trio.current_time() - max(began, self.moved) >= self._disk.settings.origin_timeout:
            raise OSError(errno.ENOSPC, f"{why}, and nothing could be written back")

    async def run(self) -> None:
        """Write back what is old enough, or too much, until cancelled. Failing passes are tried again."""
        pause = 1.0
        while True:
            await self._due()
            try:
                await self.checkpoint()
                pause = 1.0
            except OSError as error:
                await trio.sleep(pause)
                pause = min(2 * pause, RETRY_MOST)
                log.debug("%s: %s", self._disk.name, error)

    async def _due(self) -> None:
        """Wait until data is half as old as it may become, or so much that writes are about to be slowed down."""
        disk = self._disk
        idle_since = trio.current_time()
        while True:
            if self.error is not None or disk.marker_is_stale():
                return
            if disk.dirty_bytes and disk.block_cache.failed is not None:
                return
            if disk.dirty_bytes or not disk.marked:
                idle_since = trio.current_time()
            elif trio.current_time() - idle_since >= IDLE_SECONDS:
                return
            if disk.writes_back:
                if disk.dirty_bytes and disk.dirty_share() >= LOW:
                    return
                if disk.lag_seconds() * 2 >= disk.settings.max_lag and disk.dirty_bytes:
                    return
            with trio.move_on_after(min(1.0, disk.settings.max_lag / 8)):
                await self._wanted.wait()
            if self._wanted.is_set():
                self._wanted = trio.Event()
                if disk.dirty_bytes:
                    return

    async def checkpoint(self, progress: "Progress | None" = None) -> None:
        """One pass over everything that is dirty as it begins. Raises OSError; nothing is lost then.

        Cancelled, it leaves a frozen layer that the next pass finishes.
        """
        disk = self._disk
        async with self._lock:
            try:
                if not self.frozen and any(x.sectors for x in disk.view.private):
                    await self._freeze()
                with past_failure(disk.block_cache):
                    await disk.block_cache.sync()
                for layer in self.frozen:
                    await self._paced(layer, progress)
                await self._rest()
                self.error = self.failure = None
            except OSError as error:
                if self.error is None:
                    log.warning(
                        "%s: write-back failed, trying again: %s", disk.name, error.strerror
                    )
                self.error, self.failure = error.strerror or str(error), error.errno
                self._tried = trio.current_time()
                raise
            finally:
                event, self._passed = self._passed, trio.Event()
                event.set()

    async def leave_cache(self) -> None:
        """The cache device has failed: have in the image what only it has, as far as that can be read.

        Raises OSError; at once where that was tried just now.
        """
        if self._disk.dirty_bytes:
            if self.error is not None and trio.current_time() < self._tried + AGAIN_SECONDS:
                raise OSError(errno.EIO, self.error)
            await self.catch_up()

    async def _freeze(self) -> None:
        """The new layer is a record in the journal of the cache, which writes may have filled."""
        cache = self._disk.block_cache
        with past_failure(cache):
            while not cache.journal_room(FREEZE_ROOM):
                await cache.commit()
        self._disk.freeze()

    async def _paced(self, layer: Layer, progress: "Progress | None") -> None:
        """Write it out, and take the time."""
        pace = self._disk.pace
        pace.began(trio.current_time(), Amount(layer.sectors * SECTOR, layer.slots))
        whole = False
        try:
            await self._write_out(layer, progress)
            whole = True
        finally:
            pace.ended(trio.current_time(), whole=whole)

    async def _write_out(self, layer: Layer, progress: "Progress | None") -> None:
        disk = self._disk
        steps = _Steps(disk, layer, progress)
        # As long as there may be a committed journal, a start after a crash writes the image: its identity is not on
        # record in all that time, or those writes would be taken for somebody else's.
        async with disk.image.writing():
            journal = await self._journal(layer, steps)
            failures = disk.image.sync_failures
            async with disk.image.writing():
                await _Image(disk, layer, steps).all()
            await disk.image.flush()
            if disk.image.sync_failures != failures:
                raise OSError(
                    errno.EIO, "a flush of the image failed meanwhile: all is written again"
                )
            if journal is not None:
                await journal.end()
                disk.image.unfinished = False
        cache = disk.block_cache
        settled = False
        with past_failure(cache):
            await settle(cache, layer, disk.image.filler, steps.aside)
            # The clean layer has slots now that durable state gives to this one: nothing may be written there before.
            await cache.commit()
            settled = True
        if not settled:
            await uncover(cache, layer, disk.image.filler)
        disk.settled(layer)
        cache.drop_layer(layer)
        if not settled:
            await cache.commit_records()
        self.moved = trio.current_time()

    async def _journal(self, layer: Layer, steps: "_Steps") -> Journal | None:
        """A committed redo journal of the layer; None where the image is not a file."""
        disk = self._disk
        if disk.source.marker is None:
            return None
        journal = await disk.source.marker.begin_redo(disk.frozen_at(layer))
        try:
            await _Redo(disk, layer, steps, journal).all()
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(OSError):
                await journal.drop()
            raise
        disk.image.unfinished = True
        await journal.commit()
        return journal

    async def _rest(self) -> None:
        """Say beside the image that it has everything, if it has."""
        disk = self._disk
        if disk.dirty_bytes == 0 and (disk.marked or disk.marker_is_stale()):
            await disk.block_cache.commit_records()
            await disk.image.flush()  # what went past the cache
            await disk.unmark()

    async def drain(self, progress: "Progress") -> None:
        """Write back until nothing is dirty. Raises OSError.

        A VM that goes on writing is let go on for most of it, and waits for the last, short, pass.
        """
        disk = self._disk
        for _ in range(PASSES_BESIDE_WRITES):
            if not (disk.dirty_bytes or disk.marked):
                break
            await self._pass(progress)
        if disk.dirty_bytes or disk.marked:
            async with disk.gate.closed():
                await self.finish(progress)

    async def finish(self, progress: "Progress") -> None:
        """The same where no writes come any more."""
        while self._disk.dirty_bytes or self._disk.marked:
            await self._pass(progress)

    async def catch_up(self) -> None:
        """One pass that somebody waits for. Raises OSError."""
        with self._hurry():
            await self.checkpoint()

    async def _pass(self, progress: "Progress") -> None:
        total = self._disk.dirty_bytes
        done = 0

        def advance(part: int, _total: int) -> None:
            nonlocal done
            done += part
            progress(done, max(total, done))

        progress(0, total)
        with self._hurry():
            await self.checkpoint(advance)


class _Work:
    """Takes one frozen layer somewhere, several batches at a time."""

    def __init__(self, disk: "Disk", layer: Layer, steps: "_Steps") -> None:
        self._disk = disk
        self._layer = layer
        self._steps = steps
        self._view = View(disk.block_cache, [layer], None, _nothing)
        self._errors: list[OSError] = []
        self._slots = trio.Semaphore(WRITERS)

    async def all(self) -> None:
        """Raises OSError; then the origin has some of it."""
        async with trio.open_nursery() as nursery:
            try:
                await self._start_all(nursery)
            except OSError as error:  # of the index; out of a nursery it would come in a group
                self._errors.append(error)
        if self._errors:
            raise self._errors[0]

    async def _start_all(self, nursery: trio.Nursery) -> None:
        cache, layer = self._disk.block_cache, self._layer
        batch: list[Block] = []
        stored = 0
        for number in await pages_of(cache, layer):
            await cache.load(layer, [number])
            for block in blocks_of(layer.pages[number], number):
                batch.append(block)
                stored += block.stored
                if len(batch) == BATCH_BLOCKS or stored >= BATCH_MOST:
                    await self._begin(nursery, batch)
                    batch, stored = [], 0
        if batch:
            await self._begin(nursery, batch)

    async def _begin(self, nursery: trio.Nursery, batch: list[Block]) -> None:
        await self._steps.turn()
        await self._slots.acquire()
        if self._errors:
            self._slots.release()
        else:
            nursery.start_soon(self._one, batch)

    async def _one(self, batch: list[Block]) -> None:
        disk = self._disk
        try:
            for _ in range(YIELD_MOST):
                if not disk.image.filler.waiting:
                    break
                await trio.sleep(YIELD_SECONDS)
            ranges = await read_blocks(disk.block_cache, self._view, batch, disk.size)
            await self._put(ranges)
            self._steps.advance(sum(r.length for r in ranges))
        except OSError as error:
            self._errors.append(error)
        finally:
            self._slots.release()

    async def _put(self, ranges: list[Range]) -> None:
        """Write what one batch holds. Raises OSError."""
        raise NotImplementedError


class _Image(_Work):
    """Into the image."""

    _unsynced = 0

    async def _put(self, ranges: list[Range]) -> None:
        origin = self._disk.image.reached()
        for offset, length, data in ranges:
            if data is None:
                await origin.zero(offset, length, may_trim=True)
        writes = [(r.offset, r.data) for r in ranges if r.data is not None]
        if not writes:
            return
        await origin.write_ranges(writes, background=True)
        stored = sum(len(data) for _, data in writes)
        self._disk.origin_written_bytes += stored
        self._unsynced += stored
        if self._unsynced >= SYNC_EVERY:
            self._unsynced = 0
            await self._disk.image.flush()


class _Redo(_Work):
    """Into the redo journal beside it."""

    def __init__(self, disk: "Disk", layer: Layer, steps: "_Steps", journal: Journal) -> None:
        super().__init__(disk, layer, steps)
        self._journal = journal

    async def _put(self, ranges: list[Range]) -> None:
        await self._journal.add(ranges)
        self._disk.journal_written_bytes += sum(r.length for r in ranges if r.data is not None)


class _Steps:
    """How far a pass over one layer is, told to whoever wants to know."""

    def __init__(self, disk: "Disk", layer: Layer, progress: "Progress | None") -> None:
        self._disk = disk
        self._progress = progress
        self._weight = 1 if disk.source.marker is None else 2  # the journal is half of the work
        self._whole = max(1, layer.sectors * SECTOR)
        self._done = 0
        self._began = trio.current_time()
        self._served = 0

    async def turn(self) -> None:
        """Before the next batch: wait while guests are served, if there is time. A pass disturbs them at its best.

        Looks up often: from a moment on somebody may wait for the end of the pass.
        """
        share = self._done / self._weight / self._whole
        until = self._began + share * SPREAD * self._disk.settings.max_lag
        while (left := until - trio.current_time()) > 0 and self._may_wait():  # noqa: ASYNC110  (no one event)
            await trio.sleep(min(left, TURN_SECONDS))

    async def aside(self) -> None:
        """Between two pieces of work on the event loop itself."""
        if self._may_wait():
            await trio.sleep(ASIDE_SECONDS)
        else:
            await trio.lowlevel.checkpoint()

    def _may_wait(self) -> bool:
        disk = self._disk
        before, self._served = self._served, disk.block_cache.served()
        idle = before == self._served
        return not (idle or disk.writeback.hurried or disk.dirty_share() > LOW)

    def advance(self, length: int) -> None:
        """So many bytes are written, to the journal or to the image."""
        self._done += length
        if self._disk.writeback.error is None:  # a pass that fails time and again goes nowhere
            self._disk.writeback.moved = trio.current_time()
        self._disk.pace.advanced(min(1.0, self._done / self._weight / self._whole))
        if self._progress is not None:
            self._progress(length // self._weight, 0)


async def _nothing(offset: int, length: int) -> Buffer:
    raise OSError(errno.EIO, f"no private data in {length} bytes at {offset}")
