"""One disk as its VM sees it: an NBD export over the layers of the cache, with the policy that its mode asks for."""

import errno
import logging
from typing import Any, Self

import trio

from forebay.checkpoint.counters import Counters
from forebay.checkpoint.dirty import Dirty
from forebay.checkpoint.pace import LOW, SLACK, Amount
from forebay.checkpoint.schedule import WriteBack
from forebay.checkpoint.steps import Progress
from forebay.config.model import DiskSettings
from forebay.disk.block_status import CACHED_CONTEXT, allocation, cached
from forebay.disk.copy import hydrate, preload_range
from forebay.disk.policies import NoRoom, OriginWrites, Policy, PrivateOrOrigin, PrivateWrites
from forebay.disk.ranges import Gate, Ranges
from forebay.errors import ForebayError
from forebay.image.image import WATCH_SECONDS, Image, Images
from forebay.image.source import Source
from forebay.units import Mode
from forebay_cache import Layer, ReadAhead, View, pin_layer
from forebay_cache.device.device import Buffer
from forebay_cache.format.geometry import BLOCK, SECTOR

log = logging.getLogger("forebay.disk")

TURN_SECONDS = 0.05
"""A write that is slowed down looks again this often: a pass that ended may have made room."""

PRIVATE_MODES = (Mode.WRITE_BACK, Mode.FULL_COPY)


class Disk:
    """Implements forebay_nbd.Export. Made by :meth:`open`; :meth:`run` has to be running."""

    rotational = False
    preferred_block = SECTOR
    contexts: tuple[str, ...] = (CACHED_CONTEXT,)

    def __init__(
        self, image: Image, name: str, source: Source, settings: DiskSettings, *, read_only: bool
    ) -> None:
        self.image = image
        self.block_cache = image.cache
        self.name = name
        self.source = source
        self.settings = settings
        self.mode = Mode(settings.mode)
        self.size = source.size
        self.read_only = read_only
        self.overlay = source.use.overlay
        self.ranges = Ranges()
        self.gate = Gate()
        self.view = View(self.block_cache, [], None, self._fetch)
        self.counters = Counters()
        self.dirty = Dirty(self.view, source, image, settings.max_dirty)
        self.writeback = WriteBack(source, image, settings, self.dirty, self.counters)
        self._mode_to_be: Mode | None = None  # as soon as what is dirty has been written back
        self.copied: float | None = None  # how much of a full copy is there, 0..1
        self._ahead = ReadAhead(image.filler, self.counters)
        self._pressed = False  # what is added is charged for
        self._turn = trio.Lock()
        self._hydration: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._policy: Policy = OriginWrites(self, keep=False)
        self.read_now = self.view.read_now
        self.write_now = self._policy.write_now
        self.publish = self.block_cache.publish
        self.pin = self.block_cache.pin
        self.unpin = self.block_cache.unpin

    @classmethod
    async def open(
        cls,
        images: Images,
        name: str,
        source: Source,
        settings: DiskSettings,
        *,
        read_only: bool,
        overlay: bool,
    ) -> Self:
        """A disk on an image, with what the cache holds of it. Raises ForebayError."""
        assert overlay == source.use.overlay
        image = await images.acquire(source)
        disk = cls(image, name, source, settings, read_only=read_only)
        try:
            disk._check_fits(disk.mode)
            disk.dirty.adopt()
            if disk.dirty.mark.is_set and not disk.writes_private and not read_only:
                # The mode was changed, or the configuration, and we ended before the data had gone to the image.
                disk._mode_to_be, disk.mode = disk.mode, Mode.WRITE_BACK
            disk._avoid_unsafe()
            disk._choose()
            image.watch(disk.view)
            image.caps[name] = settings.cache_size // BLOCK
            image.share_cap()
        except BaseException:
            await image.leave(source, disk.view)
            raise
        return disk

    def _avoid_unsafe(self) -> None:
        """The store was mounted otherwise since the attach: nothing more is acknowledged before it has it."""
        if self._is_unsafe():
            if self.dirty.mark.is_set:
                self._mode_to_be, self.mode = Mode.WRITE_THROUGH, Mode.WRITE_BACK
            else:
                self.mode = Mode.WRITE_THROUGH

    def _is_unsafe(self) -> bool:
        """Known once the image was opened; said in the log."""
        try:
            self.source.check_safe(self.mode)
        except ForebayError as fault:
            log.warning("%s: in write-through until the next restart: %s", self.name, fault)
            return True
        return False

    def _check_fits(self, mode: Mode) -> None:
        if mode is not Mode.FULL_COPY:
            return
        if 0 < self.settings.cache_size < self.size:
            raise ForebayError(
                f"a full copy of {self.image.key} takes {self.size} bytes, and cache_size lets the disk have "
                f"{self.settings.cache_size}: leave cache_size out, or use write-back"
            )
        room = self.block_cache.device.slots * BLOCK
        if self.size > room * 9 // 10:
            raise ForebayError(
                f"a full copy of {self.image.key} takes {self.size} bytes, and the cache has {room}: "
                "use write-back, or a larger cache device"
            )

    # -- modes ------------------------------------------------------------------------------------------------

    @property
    def writes_private(self) -> bool:
        """Whether writes go to a private layer."""
        return not self.read_only and (self.overlay or self.mode in PRIVATE_MODES)

    @property
    def writes_back(self) -> bool:
        """Whether private data is written to the image by itself."""
        return self.mode is Mode.WRITE_BACK and not self.overlay and not self.read_only

    def _choose(self) -> None:
        """Set up the layers and the policy of the mode."""
        if self.writes_private:
            self.dirty.begin()
            self._policy = PrivateWrites(self) if self.overlay else PrivateOrOrigin(self)
        else:
            self._policy = OriginWrites(self, keep=self.mode is Mode.WRITE_THROUGH)
        self.write_now = self._policy.write_now
        self.writeback.automatic = self.writes_back
        most = self.settings.max_dirty * LOW if self.writes_back else 2 * self.size + BLOCK
        self._most_sectors = int(most) // SECTOR
        self.view.clean = None if self.mode is Mode.NONE else self.image.layer

    async def set_mode(self, mode: Mode, progress: Progress) -> None:
        """Change over while clients are connected. Raises ForebayError or OSError; the mode is the old one then."""
        if mode is self.mode:
            return
        self._check_fits(mode)
        self.source.check_safe(mode)
        leaves_private = self.writes_private and not self.overlay and mode not in PRIVATE_MODES
        if leaves_private and self.dirty.bytes:
            await self.writeback.catch_up()  # most of it, while the VM goes on writing
        async with self.gate.closed():
            if leaves_private:
                await self.writeback.finish(progress)
                self.dirty.drop()
            else:
                await self._policy.flush()
                self.source.check_safe(mode)  # the image may have come meanwhile
            was, self.mode = self.mode, mode
            self._choose()
        self._stop_hydration()
        if was is Mode.FULL_COPY:
            self.copied = None
            await self._unpin()
        self._start_hydration()

    # -- state ------------------------------------------------------------------------------------------------

    @property
    def dirty_bytes(self) -> int:
        """What the image lacks; an overlay's own data is not meant for it."""
        return self.dirty.bytes

    def note_dirty(self, layer: Layer, sectors: int, slots: int) -> None:
        """Something was written to the open layer, which has grown by so much."""
        if layer.id not in self.dirty.ages.since:
            self.dirty.ages.note_first_write(layer)
        if self._pressed and (sectors > 0 or slots > 0):
            now, added = trio.current_time(), Amount(max(0, sectors) * SECTOR, max(0, slots))
            pace = self.writeback.pace
            pace.charge(now, pace.takes(now, added, *self.dirty.amounts()))

    def state(self) -> str:
        """One word for the STATE column; `reason` in the status says more."""
        if self.image.conflict is not None:
            return "conflict"
        if self.block_cache.failed is not None:
            return "broken" if self.dirty.private_bytes else "pass-through"
        if self.image.origin is None:
            return "degraded"
        if self.writeback.error is not None:
            return "lagging"
        if self.copied is not None and self.copied < 1:
            return "copying"
        return "ready"

    def reason(self) -> str | None:
        """Why the state is not what it should be, and what to do."""
        failed, only = self.block_cache.failed, self.dirty.private_bytes
        if self.image.conflict is not None or failed is None:
            return self.image.conflict or self._trouble() or self.block_cache.index_error
        where = f"cache device {self.block_cache.device.path}: {failed.strerror or failed}"
        if not only:
            return f"{where}: the image is used without it, until it works again"
        return (
            f"{where}: {only} bytes are nowhere else: writes fail until it works again; "
            "detach with --discard to give them up"
        )

    def _trouble(self) -> str | None:
        """What ends by itself."""
        if self.image.unreachable is not None:
            return f"{self.image.key} cannot be reached: {self.image.unreachable}; tried again by itself"
        if self.writeback.error is not None:
            return f"write-back failed: {self.writeback.error}; tried again by itself"
        return None

    def status(self) -> dict[str, Any]:
        """The keys of the contract, but for clients and socket."""
        clean = 0 if self.mode is Mode.NONE else self.image.layer.sectors * SECTOR
        own = self.dirty.private_bytes
        return {
            "name": self.name,
            "image": self.image.key,
            "mode": self.mode.value,
            "state": self.state(),
            "reason": self.reason(),
            "read_only": self.read_only,
            "overlay": self.overlay,
            "size": self.size,
            "cached_bytes": min(clean + own, self.size),
            "dirty_bytes": self.dirty.bytes,
            "private_bytes": own,
            "copied": self.copied,
            "lag_seconds": round(self.dirty.lag_seconds(), 3),
            "lag_bytes": self.dirty.bytes,
            "reads": self.view.hits + self.view.misses,
            "writes": self.counters.write_hits + self.counters.write_misses,
            "read_bytes": self.view.read_bytes,
            "written_bytes": self.counters.written_bytes,
            "read_hits": self.view.hits,
            "read_misses": self.view.misses,
            "write_hits": self.counters.write_hits,
            "write_misses": self.counters.write_misses,
            "origin_read_bytes": self.counters.origin_read_bytes,
            "origin_written_bytes": self.counters.origin_written_bytes,
            "journal_written_bytes": self.counters.journal_written_bytes,
        }

    # -- reading ----------------------------------------------------------------------------------------------

    async def _fetch(self, offset: int, length: int) -> Buffer:
        await self._arrive()
        if self.view.clean is None:
            self.counters.origin_read_bytes += length
            return await self.image.read(offset, length)
        return await self.image.filler.fetch(offset, length, self.counters)

    async def read(self, offset: int, length: int) -> list[Buffer]:
        """Implements Export."""
        if not length:
            return []
        self._check_conflict()
        misses = self.view.misses
        beyond = offset >= self.view.lookahead
        buffers = await self.view.read(offset, length, slices=True)
        if beyond or self.view.misses != misses:
            self.view.lookahead = self._look_ahead(offset, length)
        return buffers

    def _look_ahead(self, offset: int, length: int) -> int:
        if self.image.conflict is not None:
            return 0  # nothing is read any more, not even from the cache
        return self._ahead.note(offset, length) if self.view.clean is not None else 1 << 63

    async def cache(self, offset: int, length: int) -> None:
        """Bring a range in."""
        if self.view.clean is not None:
            if self.image.origin is None and await self.image.filler.missing(offset, length):
                await self._arrive()
            await self.image.filler.prefetch(offset, length, self.counters)

    async def extents(
        self, context: str, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        """Implements Export. Never more work for several extents than for one, so ``one`` changes nothing."""
        del one
        find = cached if context == CACHED_CONTEXT else allocation
        return await find(self, offset, length)

    # -- writing ----------------------------------------------------------------------------------------------

    async def _arrive(self) -> None:
        """Wait for an image that cannot be reached, as for one that hangs, before anybody else has to wait for us."""
        if self.image.origin is None:
            await self.image.arrive(self.settings.origin_timeout)

    async def _arrive_to_write(self) -> None:
        """The same, unless the cache takes writes: it does where the marker says already that the image lacks some."""
        if not (self.writes_private and (self.dirty.mark.is_set or self.overlay)):
            await self._arrive()

    def _check_conflict(self) -> None:
        if self.image.conflict is not None:
            raise OSError(errno.EIO, self.image.conflict)

    def must_wait(self, length: int) -> bool:
        """Whether a write of that many bytes has to go the long way."""
        if self.gate.shut or self.image.conflict is not None or self.block_cache.failed is not None:
            return True
        if self.overlay:
            return False
        if not self.dirty.mark.is_set:
            return True
        top, placement = self.view.private[0], self.block_cache.placement
        if (
            top.sectors + self.dirty.frozen_sectors + (length >> 12) <= self._most_sectors
            and 3 * (top.slots + self.dirty.frozen_slots) <= placement.free + placement.evictable()
        ):
            self._pressed = False
            return False
        return self._must_slow_down(length)

    def _must_slow_down(self, length: int) -> bool:
        if not self.writes_back:
            return False
        dirty, most = self.dirty.amounts()
        return self._wait() > SLACK or dirty.bytes + length > most.bytes

    def _press(self) -> bool:
        """Whether so much is dirty that what is added has to be charged for."""
        self._pressed = (
            self.writes_back
            and self.writeback.error is None  # else nothing is gained by it
            and self.dirty.share() > LOW
        )
        if self._pressed and not self.writeback.pace.passing:
            self.writeback.want()
        if not self._pressed:
            self.writeback.pace.relieve()
        return self._pressed

    async def admit(self, length: int) -> None:
        """Wait until that much may become dirty. Raises OSError."""
        if self.overlay:
            return
        await self.dirty.mark.set()
        if self.writes_back:
            await self._slow_down()
            await self._below_limit(length)

    async def _slow_down(self) -> None:
        """One after the other, as fast as write-back is, or faster while little is dirty."""
        if self._wait() <= SLACK:
            return
        async with self._turn:
            while (wait := self._wait()) > SLACK:  # noqa: ASYNC110  (it is time that is waited for)
                await trio.sleep(min(wait, TURN_SECONDS))

    def _wait(self) -> float:
        return self.writeback.pace.wait(trio.current_time()) if self._press() else 0.0

    async def _below_limit(self, length: int) -> None:
        most = max(self.settings.max_dirty, length)
        began = trio.current_time()
        while self.dirty.bytes + length > most:
            await self.writeback.passed()
            if self.dirty.bytes + length > most:
                self.writeback.check_goes_on("max_dirty is reached", began)

    async def write_back_some(self, began: float) -> None:
        """The cache has been full since then: have something written back.

        Raises OSError(ENOSPC) where it goes nowhere, NoRoom where there is nothing to write back.
        """
        if self.overlay:
            raise OSError(errno.ENOSPC, "the cache is full")
        if not self.dirty.bytes:
            raise NoRoom
        await self.writeback.passed()
        self.writeback.check_goes_on("the cache is full", began)

    async def write(self, offset: int, data: memoryview, fua: bool) -> None:
        """Implements Export."""
        self._check_conflict()
        if not len(data):
            return
        self.counters.written_bytes += len(data)
        await self._arrive_to_write()
        async with self.gate.passing():
            await self._policy.write(offset, data)
        if fua:
            await self._policy.flush()

    def flush_now(self) -> bool:
        """Implements Export."""
        if self.image.conflict is not None or self.read_only:
            return False
        return self._policy.flush_now()

    async def flush(self) -> None:
        """Implements Export."""
        self._check_conflict()
        if not self.read_only:
            if not self.writes_private and not self.image.all_durable():
                await self._arrive()
            await self._policy.flush()

    async def zero(self, offset: int, length: int, fua: bool, no_hole: bool, fast: bool) -> None:
        """Implements Export."""
        self._check_conflict()
        if fast and not self.writes_private:
            raise OSError(errno.ENOTSUP, "zeroing may be as slow as writing here")
        if not length:
            return
        await self._arrive_to_write()
        async with self.gate.passing():
            await self._policy.zero(offset, length, may_trim=not no_hole)
        if fua:
            await self._policy.flush()

    async def trim(self, offset: int, length: int, fua: bool) -> None:
        """Implements Export: whole sectors become zeros, so that they never change by themselves."""
        start = -(-offset // SECTOR) * SECTOR
        end = (offset + length) // SECTOR * SECTOR
        if start < end:
            await self.zero(start, end - start, fua, no_hole=False, fast=False)

    async def drain(self, progress: Progress) -> None:
        """Write back everything that is dirty, in whatever mode. Raises OSError."""
        if self.writes_private and not self.overlay:
            await self.writeback.nearly_finish(progress)
            if not self.writeback.is_done:
                async with self.gate.closed():
                    await self.writeback.finish(progress)
            await self.image.flush()  # what went past the cache
        elif not self.read_only and not self.overlay:
            await self.image.flush()
        else:
            progress(0, 0)

    def unreadable(self) -> None:
        """Implements Export: everything is read, and checked, before it is handed out again."""
        self.block_cache.forget_ready()

    # -- clients ----------------------------------------------------------------------------------------------

    def opened(self) -> None:
        """Implements Export."""

    def closed(self) -> None:
        """Implements Export."""

    # -- background -------------------------------------------------------------------------------------------

    async def preload(self, amount: int | str, progress: Progress) -> None:
        """Bring in the first `amount` bytes, or `all`. Raises ForebayError or OSError."""
        if amount == "trace":
            raise ForebayError("preload of a boot trace is not there yet: give a size, or 'all'")
        length = self.size if amount == "all" else min(int(amount), self.size)
        if self.view.clean is None:
            raise ForebayError(
                f"'{self.name}' is in mode none, which caches nothing: change its mode"
            )
        await preload_range(self, length, progress)

    def _start_hydration(self) -> None:
        if self.mode is Mode.FULL_COPY and self._nursery is not None:
            self.copied = 0.0
            self.image.copied_by.add(self.name)
            self._hydration = trio.CancelScope()
            self._nursery.start_soon(hydrate, self, self._hydration)

    def _stop_hydration(self) -> None:
        if self._hydration is not None:
            self._hydration.cancel()
            self._hydration = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write back, copy, preload and watch the image until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if not self.read_only and not self.overlay:
                nursery.start_soon(self.writeback.run)
            nursery.start_soon(self._watch)
            if self._mode_to_be is not None:
                nursery.start_soon(self._change_over, self._mode_to_be)
            self._start_hydration()
            if self.settings.preload and self.mode is not Mode.NONE:
                nursery.start_soon(self._preload_at_attach)
            task_status.started()

    async def _change_over(self, mode: Mode) -> None:
        """Leave write-back for that mode, however long it takes."""
        log.info("%s: dirty data is written back before the mode becomes %s", self.name, mode.value)
        while self.mode in PRIVATE_MODES:
            try:
                await self.set_mode(mode, _silent)
            except OSError as error:
                log.info("%s: still in write-back: %s", self.name, error.strerror)
                await trio.sleep(WATCH_SECONDS)

    async def _watch(self) -> None:
        while True:
            away = self.image.origin is None
            await trio.sleep(self.image.look_in())
            await self.image.try_reach()
            came = away and self.image.origin is not None
            if came and self._mode_to_be is None and self._is_unsafe():
                assert self._nursery is not None, "run() is running"
                self._nursery.start_soon(self._change_over, Mode.WRITE_THROUGH)
            await self.image.look()

    async def _preload_at_attach(self) -> None:
        try:
            await self.preload(self.settings.preload, _silent)
        except (OSError, ForebayError) as error:
            log.warning("%s: preload ended: %s", self.name, error)

    async def close(self, *, discard: bool) -> None:
        """At detach: drop what is private. `discard` says that it is meant to be lost where it is dirty."""
        assert discard or not self.dirty.bytes, "drain first"
        if self.dirty.bytes:
            log.warning("%s: %d dirty bytes are dropped as asked", self.name, self.dirty.bytes)
        # A pass that was not finished wrote to the image under clean blocks that its frozen layer hides.
        begun = bool(self.dirty.bytes) and len(self.dirty.frozen) > 0
        self.dirty.drop()
        if discard and self.image.conflict is not None:
            self.image.give_up()
        elif begun:
            self.image.refresh()
        self.dirty.ages.forget()
        await self._unpin()
        del self.image.caps[self.name]
        self.image.share_cap()
        if discard and self.dirty.mark.is_set:
            await self._unmark_discarded()
        await self.image.leave(self.source, self.view)

    async def _unpin(self) -> None:
        """What was kept for this disk may be evicted, unless it is kept for another one too."""
        self.image.copied_by.discard(self.name)
        if self.image.layer.pinned and not self.image.copied_by:
            await pin_layer(self.block_cache, self.image.layer, pinned=False)

    async def _unmark_discarded(self) -> None:
        """What the image lacked is gone for good, so it lacks nothing any more."""
        try:
            await self.block_cache.commit_records()  # else a kill now would bring it back, unmarked
            await self.image.flush()  # of a pass that was not finished
            await self.dirty.mark.clear()
        except OSError as error:
            log.warning("%s: its marker could not be cleared: %s", self.name, error.strerror)


def _silent(done: int, total: int) -> None:
    pass
