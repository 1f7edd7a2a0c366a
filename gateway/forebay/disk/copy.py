# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Bringing an image in ahead of its readers: preload of a part, and the full copy. Guests' misses come first.

A place that cannot be read is skipped: what is left of its surroundings is fetched in smaller parts, and the work goes
on behind it. A full copy goes over the image again and again until the cache has all of it: what could not be read, and
what the cache had no room for, is tried again, ever more seldom if it stays so.
"""

import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from forebay.checkpoint.counters import Counters
from forebay.checkpoint.steps import Progress
from forebay.image.image import Image
from forebay_cache import Layer, pin_layer, salvage
from forebay_cache.blocks.store import mark_zero
from forebay_cache.errors import IndexFault
from forebay_cache.format.geometry import BLOCK, PAGE_BLOCKS, SECTOR
from forebay_cache.read.salvage import OF_THE_STORE

log = logging.getLogger("forebay.hydrate")

STEP = 8 << 20
"""Bytes looked at in one go; between two of them guests are let past."""

STREAMS = 2
"""Fetches at the same time."""

HOLE = 2
"""NBD's flag for a range that reads as zeros."""

YIELD_SECONDS = 0.005
"""How long a fetch waits before it looks again whether guests wait for the image ..."""

PATIENCE_SECONDS = 1.0
"""... and how long at most: a guest that always waits for something does not keep a copy from its end."""

LONG = 16 << 20
"""So many bytes in a row of which nothing can be read: as many behind them are skipped without being tried."""

RETRY_SECONDS = 5.0
"""How soon a full copy that the image or the cache stopped goes on."""

RETRY_MOST = 600.0
"""How soon what could not be read is tried again, at most: from RETRY_SECONDS on twice as long each time in vain."""

NEARLY = 0.999
"""The most that a full copy says of itself before the cache has all of the image."""


@dataclass
class Unread:
    """What could not be read."""

    bytes: int = 0
    first: int | None = None
    """The offset of the first of them, in bytes."""
    why: str = ""
    """What the image answered there."""
    _run: int = field(default=0, repr=False)
    """How many bytes in a row were tried in vain, or skipped, until now."""
    _skip: int = field(default=0, repr=False)
    """How many of the next bytes are skipped."""

    def note(self, offset: int, length: int, why: str) -> None:
        """Count some bytes more."""
        self.bytes += length
        if self.first is None or offset < self.first:
            self.first, self.why = offset, why

    @property
    def is_long(self) -> bool:
        """True if nothing of what was tried last could be read."""
        return self._run > 0

    def note_step(self, length: int, *, is_read: bool) -> None:
        """Say whether anything could be read of a step of so many bytes."""
        self._run = 0 if is_read else self._run + length
        if self._run >= LONG:
            self._skip = self._run

    def skips(self, length: int) -> bool:
        """True if the next step, of so many bytes, is not to be tried."""
        if self._skip <= 0:
            return False
        self._skip -= length
        self._run += length
        return True

    def text(self, key: str) -> str:
        """One line: how much of the image of that key could not be read, and where."""
        return (
            f"{self.bytes} bytes of {key} could not be read, the first at {self.first}: {self.why}"
        )


Spend = Callable[[int], Awaitable[None]]
"""Waits until so many bytes may be read from the image."""


async def at_once(_length: int) -> None:
    """No limit of its own."""


async def preload_range(
    image: Image, counters: Counters, length: int, progress: Progress, spend: Spend = at_once
) -> None:
    """Have the first `length` bytes in the cache; what is there already costs nothing.

    Raises OSError; also, at the end, where some of them could not be read.
    """
    unread = Unread()
    progress(0, length)
    for start in range(0, length, STEP):
        await bring_in(image, counters, start, min(STEP, length - start), unread, spend)
        progress(min(start + STEP, length), length)
    if unread.bytes:
        raise OSError(errno.EIO, f"{unread.text(image.key)}; all else was")


async def bring_in(
    image: Image,
    counters: Counters,
    offset: int,
    length: int,
    unread: Unread,
    spend: Spend = at_once,
) -> bool:
    """Have one range in the cache, by STREAMS fetches at the same time; `unread` gets what cannot be read.

    Returns True if the cache has all of it then. Raises OSError where the image or the cache cannot be used at all.
    """
    image.cache.failure.check()
    gaps = await image.filler.missing(offset, length)
    if not gaps:
        return True
    if unread.skips(length):
        unread.note(offset, sum(part for _, part in gaps), unread.why)
        return False
    await _note_holes(image, offset, length)
    gaps = await image.filler.missing(offset, length)
    failed = await _fetch_all(image, counters, gaps, spend)
    left = sum(part for _, part in gaps)
    is_hopeless = unread.is_long and sum(part for _, part, _ in failed) == left
    for start, part, why in failed:
        lost = [(start, part)]
        if not is_hopeless:
            lost = await salvage(image.filler, start, part, counters)
        for place in lost:
            unread.note(*place, why)
            left -= place[1]
    unread.note_step(length, is_read=left > 0 or not gaps)
    return not await image.filler.missing(offset, length)


async def _fetch_all(
    image: Image, counters: Counters, gaps: list[tuple[int, int]], spend: Spend
) -> list[tuple[int, int, str]]:
    """Fetch parts of the image; (offset, length, why) of those that could not be read as a whole.

    Raises OSError where the image or the cache cannot be used at all, the first one.
    """
    left = iter(gaps)
    failed: list[tuple[int, int, str]] = []
    errors: list[OSError] = []

    async def stream() -> None:
        for start, part in left:
            await spend(part)
            await _let_misses_go_first(image)
            try:
                await image.filler.prefetch(start, part, counters, background=True)
            except OSError as error:
                if not _is_of_a_place(image, error):
                    errors.append(error)
                    return
                failed.append((start, part, error.strerror or str(error)))

    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS):
            nursery.start_soon(stream)
    if errors:
        raise errors[0]
    return failed


def _is_of_a_place(image: Image, error: OSError) -> bool:
    """True if the error is of a part of the image, which can be used otherwise."""
    if isinstance(error, IndexFault) or error.errno in OF_THE_STORE:
        return False
    return image.origin is not None and image.conflict is None


async def _let_misses_go_first(image: Image) -> None:
    with trio.move_on_after(PATIENCE_SECONDS):
        while image.filler.waiting:  # noqa: ASYNC110  (guests' misses come and go all the time)
            await trio.sleep(YIELD_SECONDS)


async def _note_holes(image: Image, offset: int, length: int) -> None:
    """Remember the holes of a sparse image without reading them. Raises OSError."""
    cache, layer = image.cache, image.layer
    blocks = range(offset // BLOCK, -(-(offset + length) // BLOCK))
    with cache.in_flight.filling(layer, blocks) as cells:
        try:
            extents = await image.require_origin().extents(offset, length, background=True)
        except OSError as error:
            if _is_of_a_place(image, error):
                return  # whoever reads it finds out what is there
            raise
        await layer.pages.load({b // PAGE_BLOCKS for b in blocks})
        await cache.journal_room(0)
        at = offset
        for part, flags in extents:
            first, last = -(-at // SECTOR) * SECTOR, (at + part) // SECTOR * SECTOR
            if flags & HOLE and first < last:
                mark_zero(layer, first, last - first, cells)
            at += part


class FullCopy:
    """The copy of a whole image that one disk in mode full-copy keeps in the cache.

    The clean blocks are shared by all disks on the image, so they are kept (pinned) as long as one disk wants that.
    """

    def __init__(self, image: Image, counters: Counters, disk: str) -> None:
        """`disk`: the name of the disk."""
        self._image = image
        self._counters = counters
        self._disk = disk
        self._scope: trio.CancelScope | None = None
        self._unread = Unread()
        """What the last round could not read."""
        self._left: Sequence[int] = ()
        """Offsets of the steps that the next round looks at."""
        self.paused = ""
        """Why copying pauses, as it was said in the log last."""
        self.share: float | None = None
        """How much of the image is there, 0 to 1; None: no copy is wanted."""
        self.is_incomplete = False
        """True if the cache has all but what cannot be read."""

    @property
    def unreadable_bytes(self) -> int:
        """How many bytes could not be read when they were tried last."""
        return self._unread.bytes

    def start(self, nursery: trio.Nursery) -> None:
        """Begin, or begin anew, to copy the image in. It goes on, however often the image fails, until :meth:`stop`."""
        self.share, self.is_incomplete, self._unread = 0.0, False, Unread()
        self._image.clean.pinned_by.add(self._disk)
        self._scope = trio.CancelScope()
        nursery.start_soon(self._copy, self._scope)

    def stop(self) -> None:
        """Copy no more. What is there stays, and is kept until :meth:`release`."""
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None

    async def release(self) -> None:
        """Let the image's blocks be evicted again, unless they are kept for another disk, too. Raises OSError."""
        self.share, self.is_incomplete, self._unread, self.paused = None, False, Unread(), ""
        image = self._image
        image.clean.pinned_by.discard(self._disk)
        if image.layer.pinned and not image.clean.pinned_by:
            await pin_layer(image.cache, image.layer, pinned=False)

    async def _copy(self, scope: trio.CancelScope) -> None:
        self.paused = ""
        pause = RETRY_SECONDS
        self._left = self._all_steps()
        with scope:
            while True:
                before = self._unread.bytes
                try:
                    if await self._is_complete():
                        self.share, self.is_incomplete, self.paused = 1.0, False, ""
                        return
                except OSError as error:
                    self._pause(error.strerror or str(error))
                is_stuck = self.is_incomplete and 0 < before <= self._unread.bytes
                pause = min(2 * pause, RETRY_MOST) if is_stuck else RETRY_SECONDS
                await trio.sleep(pause)

    async def _is_complete(self) -> bool:
        """Copy what can be copied now. Returns whether all of the image is there then. Raises OSError."""
        layer = self._image.layer  # a new one, if the image has changed meanwhile
        if not layer.pinned:
            await pin_layer(self._image.cache, layer, pinned=True)
        unread = Unread()
        left: Sequence[int] = await self._copy_steps(layer, unread)
        lacking = self._lacking(layer)
        if layer is not self._image.layer or not left:
            left = self._all_steps()
        # Backwards the next time: what lies behind a long part that cannot be read comes first then.
        self._left = left[::-1]
        self._unread = unread
        if lacking > 0:
            self._note_lacking(lacking)
        return lacking <= 0

    async def _copy_steps(self, layer: Layer, unread: Unread) -> list[int]:
        """Copy what can be copied of `_left`; which steps have to be looked at again. Raises OSError."""
        image, left = self._image, []
        for start in self._left:
            length = min(STEP, image.size - start)
            if not await bring_in(image, self._counters, start, length, unread):
                left.append(start)
            if layer is not image.layer:
                break
            self._unread.bytes = max(self._unread.bytes, unread.bytes)
            self.share = min(NEARLY, 1 - self._lacking(layer) / -(-image.size // SECTOR))
            await trio.lowlevel.checkpoint()
        return left

    def _all_steps(self) -> range:
        return range(0, self._image.size, STEP)

    def _lacking(self, layer: Layer) -> int:
        """How many sectors of the image its clean layer lacks."""
        return -(-self._image.size // SECTOR) - layer.sectors

    def _note_lacking(self, sectors: int) -> None:
        """Take down, after a round without an error, why so many sectors are not there."""
        unread = self._unread
        self.is_incomplete = unread.bytes > 0 and sectors <= -(-unread.bytes // SECTOR)
        if self.is_incomplete:
            self._pause(unread.text(self._image.key))
        elif unread.bytes:
            self._pause(f"the cache has no room for the rest, and {unread.text(self._image.key)}")
        else:
            self._pause("the cache has no room for the rest")

    def _pause(self, why: str) -> None:
        """Say in the log, once, why copying pauses."""
        if why != self.paused:
            log.warning("%s: copying paused: %s", self._disk, why)
        self.paused = why
