"""Bringing an image in ahead of its readers: preload of a part, and the full copy. Guests' misses come first."""

import logging
from typing import TYPE_CHECKING

import trio

from forebay_cache import pin_layer
from forebay_cache.blocks import clean
from forebay_cache.format.geometry import BLOCK, PAGE_BLOCKS, SECTOR

if TYPE_CHECKING:
    from forebay.checkpoint.steps import Progress
    from forebay.disk.disk import Disk

log = logging.getLogger("forebay.hydrate")

STEP = 8 << 20
"""Bytes looked at in one go; between two of them guests are let past."""

STREAMS = 2
"""Fetches at the same time."""

HOLE = 2
"""NBD's flag for a range that reads as zeros."""

YIELD_SECONDS = 0.005
RETRY_SECONDS = 5.0


async def preload_range(disk: "Disk", length: int, progress: "Progress") -> None:
    """Have the first `length` bytes in the cache. Raises OSError. What is there already costs nothing."""
    progress(0, length)
    for start in range(0, length, STEP):
        disk.block_cache.check()
        await _step(disk, start, min(STEP, length - start))
        progress(min(start + STEP, length), length)


async def _step(disk: "Disk", offset: int, length: int) -> None:
    filler = disk.image.filler
    await _note_holes(disk, offset, length)
    gaps = iter(await filler.missing(offset, length))
    errors: list[OSError] = []

    async def stream() -> None:
        for start, part in gaps:
            while filler.waiting:  # noqa: ASYNC110  (guests' misses come and go all the time)
                await trio.sleep(YIELD_SECONDS)
            try:
                await filler.prefetch(start, part, disk.counters, background=True)
            except OSError as error:
                errors.append(error)
                return

    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS):
            nursery.start_soon(stream)
    if errors:
        raise errors[0]


async def _note_holes(disk: "Disk", offset: int, length: int) -> None:
    """Remember the holes of a sparse image without reading them."""
    layer = disk.image.layer
    blocks = range(offset // BLOCK, -(-(offset + length) // BLOCK))
    with clean.filling(disk.block_cache, layer, blocks) as cells:
        extents = await disk.image.reached().extents(offset, length)
        await disk.block_cache.load(layer, {b // PAGE_BLOCKS for b in blocks})
        at = offset
        for part, flags in extents:
            first, last = -(-at // SECTOR) * SECTOR, (at + part) // SECTOR * SECTOR
            if flags & HOLE and first < last:
                clean.mark_zero(layer, first, last - first, cells)
            at += part


async def hydrate(disk: "Disk", scope: trio.CancelScope) -> None:
    """Copy the whole image in and keep it, however often the origin fails meanwhile."""

    def progress(done: int, total: int) -> None:
        disk.copied = min(disk.copied or 0.0, 0.999) if done < total else 0.999
        disk.copied = max(disk.copied, 0.999 * done / total if total else 0.999)

    told = ""
    with scope:
        while True:
            layer = disk.image.layer  # a new one, if the image has changed meanwhile
            try:
                if not layer.pinned:
                    await pin_layer(disk.block_cache, layer, pinned=True)
                await preload_range(disk, disk.size, progress)
                if not await disk.image.filler.missing(0, disk.size):
                    disk.copied = 1.0
                    return
                full = "the cache has no room for the rest"
                if told != full:
                    log.warning("%s: copying paused: %s", disk.name, full)
                told = full
            except OSError as error:
                text = error.strerror or str(error)
                if text != told:
                    log.warning("%s: copying paused: %s", disk.name, text)
                told = text
            await trio.sleep(RETRY_SECONDS)
