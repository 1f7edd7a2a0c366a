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
from functools import partial
from typing import TYPE_CHECKING

import trio

from forebay.origin_source import Journal
from forebay_cache import Layer, View, pages_of, past_failure, settle, uncover
from forebay_cache.device import Buffer
from forebay_cache.geometry import BLOCK, FULL, PAGE_BLOCKS, PAGE_SHIFT, SECTOR, sector_runs
from forebay_cache.layer import ZERO_SHIFT

if TYPE_CHECKING:
    from forebay.disk import Disk, Progress

log = logging.getLogger("forebay.writeback")

RUN_MOST = 1 << 20
"""Bytes of one write to the origin."""

SYNC_EVERY = 64 << 20
"""Bytes after which the image is flushed already, so that the last flush is not so long that it is given up."""

WRITERS = 4
"""Writes to the origin at the same time: enough to hide its latency, few enough to leave it to the guests' misses."""

YIELD_SECONDS = 0.002
YIELD_MOST = 25
"""How long, and how often at most, a write-back write stands aside for misses that guests wait for."""

PASSES_BESIDE_WRITES = 2
"""How often a drain tries to catch up with a VM that writes, before it has it wait."""

AGAIN_SECONDS = 1.0
"""How soon a guest's write tries a pass again that failed, while the cache device does not work."""

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

    @property
    def frozen(self) -> list[Layer]:
        """Oldest first."""
        return self._disk.view.private[:0:-1]

    def want(self) -> None:
        """Begin a pass as soon as possible."""
        self._wanted.set()

    async def passed(self, seconds: float) -> bool:
        """Wait for the end of a pass; False when none ended in that time."""
        self.want()
        event = self._passed
        with trio.move_on_after(seconds):
            await event.wait()
            return True
        return False

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
        """Wait until data is half as old, or half as much, as it may become: the pass itself takes time too."""
        disk = self._disk
        while True:
            if disk.block_cache.failed is not None and disk.dirty_bytes:
                return
            if disk.writes_back:
                if disk.dirty_bytes * 2 >= disk.settings.max_dirty and disk.dirty_bytes:
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
                    disk.freeze()
                with past_failure(disk.block_cache):
                    await disk.block_cache.sync()
                for layer in self.frozen:
                    await self._write_out(layer, progress)
                await self._rest()
                self.error = None
            except OSError as error:
                if self.error is None:
                    log.warning(
                        "%s: write-back failed, trying again: %s", disk.name, error.strerror
                    )
                self.error = error.strerror or str(error)
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
            await self.checkpoint()

    async def _write_out(self, layer: Layer, progress: "Progress | None") -> None:
        disk = self._disk
        # As long as there may be a committed journal, a start after a crash writes the image: its identity is not on
        # record in all that time, or those writes would be taken for somebody else's.
        async with disk.image.writing():
            journal = await self._journal(layer, progress)
            failures = disk.image.sync_failures
            async with disk.image.writing():
                await _Image(disk, layer, progress).all()
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
            await settle(cache, layer, disk.image.filler)
            # The clean layer has slots now that durable state gives to this one: nothing may be written there before.
            await cache.commit()
            settled = True
        if not settled:
            await uncover(cache, layer, disk.image.filler)
        disk.settled(layer)
        cache.drop_layer(layer)
        if not settled:
            await cache.commit_records()

    async def _journal(self, layer: Layer, progress: "Progress | None") -> Journal | None:
        """A committed redo journal of the layer; None where the image is not a file."""
        disk = self._disk
        if disk.source.marker is None:
            return None
        journal = await disk.source.marker.begin_redo(disk.frozen_at(layer))
        try:
            await _Redo(disk, layer, progress, journal).all()
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
        if disk.dirty_bytes == 0 and disk.marked:
            await disk.block_cache.commit_records()
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

    async def _pass(self, progress: "Progress") -> None:
        total = self._disk.dirty_bytes
        done = 0

        def advance(part: int, _total: int) -> None:
            nonlocal done
            done += part
            progress(done, max(total, done))

        progress(0, total)
        await self.checkpoint(advance)


class _Work:
    """Takes one frozen layer somewhere, several runs at a time."""

    def __init__(self, disk: "Disk", layer: Layer, progress: "Progress | None") -> None:
        self._disk = disk
        self._layer = layer
        self._progress = progress
        self._weight = 1 if disk.source.marker is None else 2  # the journal is half of the work
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
        for number in await pages_of(cache, layer):
            await cache.load(layer, [number])
            for offset, length, zero in self._runs(number):
                await self._slots.acquire()
                if self._errors:
                    self._slots.release()
                    return
                nursery.start_soon(partial(self._one, offset, length, zero=zero))

    def _runs(self, number: int) -> list[tuple[int, int, bool]]:
        """(offset, length, zeros) in bytes of what the layer holds in one page, neighbours joined."""
        page = self._layer.pages[number]
        runs: list[tuple[int, int, bool]] = []
        for i in range(PAGE_BLOCKS):
            word = page[i]
            zeros = word >> ZERO_SHIFT & FULL
            found = [(*run, False) for run in sector_runs(word & FULL & ~zeros)]
            found += [(*run, True) for run in sector_runs(zeros)]
            for first, count, zero in sorted(found):
                offset = (number << PAGE_SHIFT) + i * BLOCK + first * SECTOR
                length = min(count * SECTOR, self._disk.size - offset)
                last = runs[-1] if runs else None
                joined = last and last[2] == zero and last[0] + last[1] == offset
                if last and joined and (zero or last[1] + length <= RUN_MOST):
                    runs[-1] = (last[0], last[1] + length, zero)
                else:
                    runs.append((offset, length, zero))
        return runs

    async def _one(self, offset: int, length: int, *, zero: bool) -> None:
        disk = self._disk
        try:
            for _ in range(YIELD_MOST):
                if not disk.image.filler.waiting:
                    break
                await trio.sleep(YIELD_SECONDS)
            await self._put(offset, length, None if zero else await self._view.read(offset, length))
            if self._progress is not None:
                self._progress(length // self._weight, 0)
        except OSError as error:
            self._errors.append(error)
        finally:
            self._slots.release()

    async def _put(self, offset: int, length: int, data: list[Buffer] | None) -> None:
        """Write one run; `data` None: zeros. Raises OSError."""
        raise NotImplementedError


class _Image(_Work):
    """Into the image."""

    _unsynced = 0

    async def _put(self, offset: int, length: int, data: list[Buffer] | None) -> None:
        origin = self._disk.image.reached()
        if data is None:
            await origin.zero(offset, length, may_trim=True)
        else:
            await origin.write(offset, data, background=True)
            self._disk.origin_written_bytes += length
            self._unsynced += length
            if self._unsynced >= SYNC_EVERY:
                self._unsynced = 0
                await self._disk.image.flush()


class _Redo(_Work):
    """Into the redo journal beside it."""

    def __init__(
        self, disk: "Disk", layer: Layer, progress: "Progress | None", journal: Journal
    ) -> None:
        super().__init__(disk, layer, progress)
        self._journal = journal

    async def _put(self, offset: int, length: int, data: list[Buffer] | None) -> None:
        await self._journal.add(offset, length, data)
        if data is not None:
            self._disk.journal_written_bytes += length


async def _nothing(offset: int, length: int) -> Buffer:
    raise OSError(errno.EIO, f"no private data in {length} bytes at {offset}")
