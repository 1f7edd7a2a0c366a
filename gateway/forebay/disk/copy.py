# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Bringing an image in ahead of its readers: preload of a part, and the full copy. Guests' misses come first."""

import logging

import trio

from forebay.checkpoint.counters import Counters
from forebay.checkpoint.steps import Progress
from forebay.image.image import Image
from forebay_cache import pin_layer
from forebay_cache.blocks.store import mark_zero
from forebay_cache.format.geometry import BLOCK, PAGE_BLOCKS, SECTOR

log = logging.getLogger("forebay.hydrate")

STEP = 8 << 20
"""Bytes looked at in one go; between two of them guests are let past."""

STREAMS = 2
"""Fetches at the same time."""

HOLE = 2
"""NBD's flag for a range that reads as zeros."""

YIELD_SECONDS = 0.005
"""How long a fetch waits before it looks again whether guests wait for the image."""

RETRY_SECONDS = 5.0
"""How soon a full copy that the image or the cache stopped goes on."""

NEARLY = 0.999
"""The most that a full copy says of itself before it has looked whether anything is missing."""


async def preload_range(image: Image, counters: Counters, length: int, progress: Progress) -> None:
    """Have the first `length` bytes in the cache; what is there already costs nothing. Raises OSError."""
    progress(0, length)
    for start in range(0, length, STEP):
        image.cache.failure.check()
        await _bring_in(image, counters, start, min(STEP, length - start))
        progress(min(start + STEP, length), length)


async def _bring_in(image: Image, counters: Counters, offset: int, length: int) -> None:
    """Have one range in the cache, by STREAMS fetches at the same time. Raises OSError, the first one."""
    await _note_holes(image, offset, length)
    gaps = iter(await image.filler.missing(offset, length))
    errors: list[OSError] = []

    async def stream() -> None:
        for start, part in gaps:
            await _let_misses_go_first(image)
            try:
                await image.filler.prefetch(start, part, counters, background=True)
            except OSError as error:
                errors.append(error)
                return

    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS):
            nursery.start_soon(stream)
    if errors:
        raise errors[0]


async def _let_misses_go_first(image: Image) -> None:
    while image.filler.waiting:  # noqa: ASYNC110  (guests' misses come and go all the time)
        await trio.sleep(YIELD_SECONDS)


async def _note_holes(image: Image, offset: int, length: int) -> None:
    """Remember the holes of a sparse image without reading them. Raises OSError."""
    cache, layer = image.cache, image.layer
    blocks = range(offset // BLOCK, -(-(offset + length) // BLOCK))
    with cache.in_flight.filling(layer, blocks) as cells:
        extents = await image.require_origin().extents(offset, length)
        await layer.pages.load({b // PAGE_BLOCKS for b in blocks})
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
        self._told = ""
        """Why copying pauses, as it was said in the log last."""
        self.share: float | None = None
        """How much of the image is there, 0 to 1; None: no copy is wanted."""

    def start(self, nursery: trio.Nursery) -> None:
        """Begin, or begin anew, to copy the image in. It goes on, however often the image fails, until :meth:`stop`."""
        self.share = 0.0
        self._image.clean.copied_by.add(self._disk)
        self._scope = trio.CancelScope()
        nursery.start_soon(self._copy, self._scope)

    def stop(self) -> None:
        """Copy no more. What is there stays, and is kept until :meth:`release`."""
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None

    async def release(self) -> None:
        """Let the image's blocks be evicted again, unless they are kept for another disk, too. Raises OSError."""
        self.share = None
        image = self._image
        image.clean.copied_by.discard(self._disk)
        if image.layer.pinned and not image.clean.copied_by:
            await pin_layer(image.cache, image.layer, pinned=False)

    async def _copy(self, scope: trio.CancelScope) -> None:
        self._told = ""
        with scope:
            while True:
                try:
                    if await self._is_complete():
                        self.share = 1.0
                        return
                    self._tell("the cache has no room for the rest")
                except OSError as error:
                    self._tell(error.strerror or str(error))
                await trio.sleep(RETRY_SECONDS)

    async def _is_complete(self) -> bool:
        """Copy what can be copied now. Returns whether all of the image is there then. Raises OSError."""
        image = self._image
        layer = image.layer  # a new one, if the image has changed meanwhile
        if not layer.pinned:
            await pin_layer(image.cache, layer, pinned=True)
        await preload_range(image, self._counters, image.size, self._progress)
        return not await image.filler.missing(0, image.size)

    def _progress(self, done: int, total: int) -> None:
        share = NEARLY * done / total if total else NEARLY
        self.share = max(min(self.share or 0.0, NEARLY), share)

    def _tell(self, why: str) -> None:
        """Say in the log, once, why copying pauses."""
        if why != self._told:
            log.warning("%s: copying paused: %s", self._disk, why)
        self._told = why
