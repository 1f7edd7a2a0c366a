# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""One disk as its VM sees it: an NBD export over the layers of the cache, with the policy that its mode asks for."""

import errno
import logging
from collections.abc import Callable
from typing import Any, Self

import trio

from forebay.checkpoint.counters import Counters
from forebay.checkpoint.dirty import Dirty
from forebay.checkpoint.schedule import WriteBack
from forebay.checkpoint.steps import Progress
from forebay.config.live import LiveSettings
from forebay.config.model import DiskSettings
from forebay.disk.block_status import CACHED_CONTEXT, OLD_CACHED_CONTEXT
from forebay.disk.copy import preload_range
from forebay.disk.detach import clear_mark, drop_private, in_any_case
from forebay.disk.modes import Modes, Policy
from forebay.disk.ranges import sectors_within
from forebay.disk.rates.rates import Rates, limits_of
from forebay.disk.reads import Reads, arrive, check_conflict
from forebay.disk.status import Status
from forebay.disk.watch import Watch
from forebay.errors import ForebayError
from forebay.image.image import Image
from forebay.image.registry import Images
from forebay.image.source import Source
from forebay.latency.requests import Requests
from forebay.origin.sharing.queue import payer
from forebay.units import Mode, format_size
from forebay_cache import View
from forebay_cache.durable.sync import Begun
from forebay_cache.format.entry import LARGEST_DISK
from forebay_cache.format.geometry import BLOCK, SECTOR, Buffer

log = logging.getLogger("forebay.disk")


class HotPath:
    """The calls of forebay_nbd.Export that come with each request: those of the parts of a disk themselves.

    `read_now` is the view's or the core's, `join_read` of the reads, `write_now` and `answered` the policy's, bound
    anew when the mode changes, the others are the cache's.
    """

    def __init__(self, image: Image, reads: Reads, modes: Modes, timing: Requests) -> None:
        self.timing = timing
        self.read_now = reads.read_now
        self.join_read = reads.join
        self.write_now = modes.policy.write_now
        self.answered = modes.policy.answered
        self.publish = image.cache.intent.publish
        self.pin = image.cache.quarantine.pin
        self.unpin = image.cache.quarantine.unpin
        self.unreadable = image.cache.ready.forget

    def bind(self, policy: Policy) -> None:
        """Have that policy take what is written from now on."""
        self.write_now, self.answered = policy.write_now, policy.answered


class Adjustable(HotPath):
    """The settings of a disk, which change while it is used."""

    def __init__(
        self,
        image: Image,
        source: Source,
        live: LiveSettings,
        reads: Reads,
        modes: Modes,
        timing: Requests,
    ) -> None:
        super().__init__(image, reads, modes, timing)
        self.name = source.use.disk
        self.image = image
        self.source = source
        self.modes = modes
        self._live = live
        self.throttle = Rates(source.size, lambda: not modes.writes_private)
        self.throttle.set(limits_of(live.now))
        self.throttle.weight.value = live.now.weight

    @property
    def settings(self) -> DiskSettings:
        """What holds for it now."""
        return self._live.now

    def adopt(self, settings: DiskSettings) -> None:
        """Have other settings from now on, but for the mode, which `set_mode` changes. What waits already for an image
        that does not answer goes on waiting as it began to.

        A critical section: all of them at once.
        """
        self._live.now = settings
        self.set_cap()
        self.throttle.set(limits_of(settings))
        self.throttle.weight.value = settings.weight
        self.modes.adopt_limits()
        self.source.timeout = settings.origin_timeout
        self.timing.follow(settings.slow)
        self.image.follow_timeouts()

    def set_cap(self) -> None:
        """Have as much of the cache as its settings say."""
        self.image.clean.set_cap(self.name, -(-self.settings.cache_size // BLOCK))


class Disk(Adjustable):
    """Implements forebay_nbd.Export. Made by :meth:`open`; :meth:`run` has to be running while clients use it.

    The parts: `reads` serves reads; `modes` has the policy that takes writes; `dirty` are the private layers, which
    `writeback` takes to the image.
    """

    rotational = False
    preferred_block = SECTOR
    contexts: tuple[str, ...] = (CACHED_CONTEXT, OLD_CACHED_CONTEXT)

    def __init__(self, image: Image, source: Source, settings: DiskSettings) -> None:
        self.name = source.use.disk
        self.size = source.size
        self.read_only = source.use.read_only
        self.image = image
        self.source = source
        live = LiveSettings(settings)
        self.counters = Counters()
        self.reads = Reads(image, self.counters, live)
        self.dirty = Dirty(self.view, source, image, live)
        self.writeback = WriteBack(source, image, live, self.dirty, self.counters)
        self.modes = Modes(
            source, image, live, self.view, self.dirty, self.writeback, self.counters
        )
        self.modes.on_choice = self.bind
        timing = Requests(self.name, self.counters.latency, settings.slow)
        super().__init__(image, source, live, self.reads, self.modes, timing)
        self._watch = Watch(source, image, self.dirty, self.modes)
        self.on_opened: Callable[[], None] = _nothing
        """Told of each client that comes."""
        self.report = Status(
            source, image, self.view, self.dirty, self.writeback, self.modes, self.counters
        )

    @classmethod
    async def open(cls, images: Images, source: Source, settings: DiskSettings) -> Self:
        """A disk on an image, with what the cache holds of it. Raises ForebayError.

        `source.use` says what disk it is, and what it does with the image.
        """
        if source.size > LARGEST_DISK:
            raise ForebayError(
                f"{source.key} has {format_size(source.size)}, and the cache takes images of at most "
                f"{format_size(LARGEST_DISK)}: make it smaller"
            )
        image = await images.acquire(source)
        disk = cls(image, source, settings)
        try:
            disk._bring_up()
        except BaseException:
            await image.leave(source, disk.view)
            raise
        return disk

    def _bring_up(self) -> None:
        """Make what the cache holds of the disk its own, and be in the mode that follows. Raises ForebayError."""
        if not self.source.resumed:  # a cache that has shrunk since has the copy pause
            self.modes.check_fits(self.mode)
        self.dirty.recall()
        self._watch.choose_mode()
        self.modes.choose()
        self.image.watch(self.view)
        self.set_cap()

    @property
    def view(self) -> View:
        """The layers that the disk reads from."""
        return self.reads.view

    @property
    def mode(self) -> Mode:
        """The mode it is in at this instant."""
        return self.modes.mode

    @property
    def overlay(self) -> bool:
        """True if what is written to the disk is never written to its image."""
        return self.source.use.overlay

    async def set_mode(self, mode: Mode, progress: Progress) -> None:
        """See :meth:`Modes.change_if_free`. Raises ForebayError or OSError; the mode is the old one then."""
        await self.modes.change_if_free(mode, progress)
        self._watch.target = None

    # -- what the daemon asks ---------------------------------------------------------------------------------

    @property
    def dirty_bytes(self) -> int:
        """Bytes that the image lacks and is meant to get; 0 of an overlay."""
        return self.dirty.bytes

    def status(self) -> dict[str, Any]:
        """The keys of `forebay status --json`, but for `clients` and `socket`."""
        return {
            **self.report.keys(),
            "max_lag_seconds": self.settings.max_lag,
            **self.throttle.status(),
            **self.timing.status(),
        }

    # -- reading ----------------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> list[Buffer]:
        """Implements Export."""
        with self.timing.one("read", offset, length):
            return await self.reads.read(offset, length)

    async def cache(self, offset: int, length: int) -> None:
        """Implements Export: bring a range in. Raises OSError."""
        with self.timing.one("prefetch", offset, length):
            await self.reads.prefetch(offset, length)

    async def extents(
        self, context: str, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        """Implements Export."""
        with self.timing.one("block status", offset, length):
            return await self.reads.extents(context, offset, length, one)

    # -- writing ----------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview, fua: bool) -> None:
        """Implements Export."""
        check_conflict(self.image)
        if not len(data):
            return
        self.counters.written_bytes += len(data)
        with self.timing.one("write", offset, len(data)):
            async with self.modes.writing():
                await self.modes.policy.write(offset, data)
            if fua:
                await self.modes.policy.flush()

    def flush_now(self) -> bool:
        """Implements Export."""
        if self.image.conflict is not None or self.read_only:
            return False
        return self.modes.policy.flush_now()

    def begin_flush(self) -> Begun | None:
        """Implements Export."""
        if self.image.conflict is not None or self.read_only:
            return None
        return self.modes.policy.begin_flush()

    async def flush(self) -> None:
        """Implements Export."""
        check_conflict(self.image)
        if self.read_only or self.source.withheld:  # what was answered before is durable
            return
        with self.timing.one("flush"):
            if not self.modes.writes_private and not self.image.is_all_durable():
                await arrive(self.image, self.settings.origin_timeout)
            await self.modes.policy.flush()

    async def zero(self, offset: int, length: int, fua: bool, no_hole: bool, fast: bool) -> None:
        """Implements Export."""
        check_conflict(self.image)
        if fast and not self.modes.writes_private:
            raise OSError(errno.ENOTSUP, "zeroing may be as slow as writing here")
        if not length:
            return
        with self.timing.one("zero", offset, length):
            async with self.modes.writing():
                await self.modes.policy.zero(offset, length, may_trim=not no_hole)
            if fua:
                await self.modes.policy.flush()

    async def trim(self, offset: int, length: int, fua: bool) -> None:
        """Implements Export: whole sectors become zeros, so that they never change by themselves.

        Nothing happens where the image is to have them as zeros, and cannot give space back: see `OwnWrites.may_trim`.
        """
        check_conflict(self.image)
        start, end = sectors_within(offset, length)
        if start >= end:
            return
        with self.timing.one("trim", offset, length):
            if self.overlay or await self.image.writes.may_trim():
                await self.zero(start, end - start, fua, no_hole=False, fast=False)
            else:
                self.counters.trims_ignored += 1

    async def drain(self, progress: Progress) -> None:
        """Write back everything that is dirty, in whatever mode. Raises OSError.

        A VM that goes on writing is let go on for most of it, and waits for the last, short, pass.
        """
        if self.overlay or self.read_only or self.source.withheld:
            progress(0, 0)
            return
        if self.modes.writes_private:
            await self.writeback.nearly_finish(progress)
            if not self.writeback.is_done:
                async with self.modes.gate.closed():
                    await self.writeback.finish(progress)
        await self.image.flush()  # in private modes: what went past the cache

    # -- clients ----------------------------------------------------------------------------------------------

    def opened(self) -> None:
        """Implements Export. What the connection's tasks ask of the store is on this disk's account from now on."""
        payer.set(self.throttle.weight)
        self.on_opened()

    def closed(self) -> None:
        """Implements Export: nothing to do."""

    # -- background -------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write back, copy, preload and watch the image until cancelled."""
        async with trio.open_nursery() as nursery:
            if not self.read_only and not self.overlay:
                nursery.start_soon(self.writeback.run)
            self._watch.start(nursery)
            self.modes.start(nursery)
            may_preload = self.mode is not Mode.NONE and not self.source.withheld
            if self.settings.preload not in (0, "trace") and may_preload:
                nursery.start_soon(self._preload_at_attach)
            task_status.started()

    async def _preload_at_attach(self) -> None:
        try:
            await self.preload(self.settings.preload, _silent)
        except (OSError, ForebayError) as error:
            log.warning("%s: preload ended: %s", self.name, error)

    async def preload(self, amount: int | str, progress: Progress) -> None:
        """Bring in the first `amount` bytes, or `all`. Raises ForebayError or OSError."""
        length = self.size if amount == "all" else min(int(amount), self.size)
        if self.view.clean is None:
            raise ForebayError(
                f"'{self.name}' is in mode none, which caches nothing: change its mode"
            )
        await preload_range(self.image, self.counters, length, progress)

    # -- the end ----------------------------------------------------------------------------------------------

    async def close(self, *, discard: bool, keep: bool = False) -> None:
        """At detach, when nobody uses the disk any more: drop what is private, and leave the image.

        `discard` says that what is dirty is meant to be lost; without it nothing may be dirty. `keep`: what is private
        stays in the cache. What fails is said in the log: it goes in any case.
        """
        dirty = self.dirty.bytes
        assert discard or not dirty, "drain first"
        if dirty:
            log.warning("%s: %d dirty bytes are dropped as asked", self.name, dirty)
        if not keep:
            drop_private(self.image, self.dirty, discard=discard)
        with in_any_case(self.name):
            await self.modes.copy.release()
        self.image.clean.set_cap(self.name, None)
        if discard and self.dirty.mark.is_set:
            await clear_mark(self.image, self.dirty, self.name)
        with in_any_case(self.name):
            await self.image.leave(self.source, self.view)


def _silent(done: int, total: int) -> None:
    pass


def _nothing() -> None:
    pass
