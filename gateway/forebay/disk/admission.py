# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a private write has to wait for: the gate, the mark beside the image, the pace of write-back, and room."""

import contextlib
import errno
import math
from collections.abc import Iterator

import trio

from forebay.checkpoint.dirty import Dirty
from forebay.checkpoint.pace import LOW, SLACK, Amount
from forebay.checkpoint.schedule import WriteBack
from forebay.config.live import LiveSettings
from forebay.disk.ranges import Gate
from forebay.image.image import Image
from forebay_cache import Layer, View
from forebay_cache.format.geometry import BLOCK, SECTOR, SECTOR_SHIFT

TURN_SECONDS = 0.05
"""A write that is slowed down looks again this often: a pass that ended may have made room."""


class NoRoom(OSError):
    """The cache is full, and nothing of it is this disk's to write back."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "the cache is full of what other disks hold in it")


class Admission:
    """Lets the private writes of one disk in. For an overlay there is nothing to wait for but the gate, and no room is
    ever made.

    :meth:`must_wait` is on the path of each batch of writes, so it decides the usual case by two comparisons: so little
    is dirty that nobody has to look at the pace. :meth:`set_limits` says what little is; the mode decides that.
    """

    def __init__(
        self,
        view: View,
        image: Image,
        dirty: Dirty,
        writeback: WriteBack,
        gate: Gate,
        settings: LiveSettings,
    ) -> None:
        self._view = view
        self._reach = image.reach
        self._size = image.size
        self._device = image.cache.failure
        self._placement = image.cache.slots.placement
        self._dirty = dirty
        self._mark = dirty.mark
        self._since = dirty.ages.since
        self._writeback = writeback
        self._pace = writeback.pace
        self._gate = gate
        self._settings = settings
        self._overlay = dirty.overlay
        self._turn = trio.Lock()
        self._little_sectors = 0
        """As long as no more sectors are dirty, nothing is slowed down because of bytes."""
        self._pressed = False
        """True while so much is dirty that what is added is charged for."""

    def set_limits(self) -> None:
        """Called when the mode was chosen, before anything is written in it, and when `max_dirty` is another."""
        most = (
            self._settings.now.max_dirty * LOW
            if self._writeback.automatic
            else 2 * self._size + BLOCK
        )
        self._little_sectors = int(most) // SECTOR

    # -- before a write ---------------------------------------------------------------------------------------

    def must_wait(self, length: int) -> bool:
        """True if a write of that many bytes has to go the long way, by :meth:`admit`."""
        if self._gate.shut or self._reach.conflict is not None or self._device.error is not None:
            return True
        if self._overlay:
            return False
        if not self._mark.is_set:
            return True
        top, dirty, placement = self._view.private[0], self._dirty, self._placement
        if (
            top.sectors + dirty.frozen_sectors + (length >> SECTOR_SHIFT) <= self._little_sectors
            and 3 * (top.slots + dirty.frozen_slots) <= placement.free + placement.evictable()
        ):
            self._pressed = False
            return False
        return self._must_slow_down(length)

    def _must_slow_down(self, length: int) -> bool:
        if not self._writeback.automatic:
            return False
        dirty, most = self._dirty.amounts()
        return self._wait_seconds() > SLACK or dirty.bytes + length > most.bytes

    async def admit(self, length: int) -> None:
        """Return when that many bytes may become dirty, and it is on record beside the image that it lacks data.

        Raises OSError: ENOSPC where `max_dirty` is reached and write-back goes nowhere.
        """
        if self._overlay:
            return
        await self._mark.set()
        if self._writeback.automatic:
            await self._slow_down()
            await self._stay_below_limit(length)

    async def _slow_down(self) -> None:
        """Let writes in one after the other, as fast as write-back is, or faster while little is dirty."""
        if self._wait_seconds() <= SLACK:
            return
        async with self._turn:
            while (wait := self._wait_seconds()) > SLACK:  # noqa: ASYNC110  (it is time that is waited for)
                await trio.sleep(min(wait, TURN_SECONDS))

    def _wait_seconds(self) -> float:
        """How long the next write has to wait."""
        return self._pace.seconds_to_wait(trio.current_time()) if self._press() else 0.0

    def _press(self) -> bool:
        """Decide whether so much is dirty that what is added has to be charged for, and have it written back then."""
        self._pressed = (
            self._writeback.automatic
            and self._writeback.error is None  # else nothing is gained by it
            and self._dirty.share() > LOW
        )
        if self._pressed and not self._pace.is_passing:
            self._writeback.want()
        if not self._pressed:
            self._pace.relieve()
        return self._pressed

    async def _stay_below_limit(self, length: int) -> None:
        began = trio.current_time()
        while self._is_too_much(length):
            await self._writeback.wait_for_pass()
            if self._is_too_much(length):
                self._writeback.check_goes_on("max_dirty is reached", began)

    def _is_too_much(self, length: int) -> bool:
        """True if so many bytes more are beyond `max_dirty` as it is now; what is more than that is let in alone."""
        return self._dirty.bytes + length > max(self._settings.now.max_dirty, length)

    # -- after a write ----------------------------------------------------------------------------------------

    def note_written(self, layer: Layer, sectors: int, slots: int) -> None:
        """Called after each write to the open layer, without an await in between: it has grown by that much."""
        if layer.id not in self._since:
            self._dirty.ages.note_first_write(layer)
        if self._pressed and (sectors > 0 or slots > 0):
            now, added = trio.current_time(), Amount(max(0, sectors) * SECTOR, max(0, slots))
            self._pace.charge(now, self._pace.seconds_to_add(now, added, *self._dirty.amounts()))

    # -- a full cache -----------------------------------------------------------------------------------------

    async def make_room(self, began: float) -> None:
        """Have something written back, or wait a second for that: the cache has been full since `began` (trio time).

        Raises OSError(ENOSPC) where write-back goes nowhere, NoRoom where there is nothing to write back.
        """
        if self._overlay:
            raise OSError(errno.ENOSPC, "the cache is full")
        if not self._dirty.bytes:
            raise NoRoom
        await self._writeback.wait_for_pass()
        self._writeback.check_goes_on("the cache is full", began)

    def patience(self) -> trio.CancelScope:
        """A scope that ends `origin_timeout` seconds from now; :meth:`extend` it as long as write-back goes on."""
        return trio.move_on_after(self._settings.now.origin_timeout)

    @staticmethod
    @contextlib.contextmanager
    def paused(patience: trio.CancelScope) -> Iterator[None]:
        """Within it that scope does not end: a slow device is waited for, which has a limit of its own."""
        left = patience.deadline - trio.current_time()
        patience.deadline = math.inf
        try:
            yield
        finally:
            patience.deadline = trio.current_time() + left

    def extend(self, patience: trio.CancelScope) -> None:
        """Have it end no sooner than `origin_timeout` seconds after write-back was last seen to go on."""
        until = self._writeback.moved_at + self._settings.now.origin_timeout
        patience.deadline = max(patience.deadline, until)
