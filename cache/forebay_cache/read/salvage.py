# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A part of an origin that cannot be read as a whole: as much of it as can be had is fetched, by halves.

That is for work that nobody waits for. Each step reads what the clean layer lacks, and nothing twice, so that whoever
tries again later goes on where this one ended.
"""

from __future__ import annotations

import errno

from forebay_cache.format.entry import valid_of
from forebay_cache.format.geometry import (
    BLOCK,
    BLOCK_SHIFT,
    PAGE_BLOCKS,
    SECTOR,
    sector_runs,
)
from forebay_cache.read.fill import Filler, Tally, needed_of

MOST_READS = 128
"""Reads that one call makes at most: enough to find several bad sectors in a megabyte. What is left then counts as if
it could not be read."""
OF_THE_STORE = (
    errno.ETIMEDOUT,
    errno.ESHUTDOWN,
    errno.ESTALE,
    errno.EBADF,
    errno.ENOTCONN,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EPIPE,
)
"""Errors that say nothing of the place that was to be read: a store that cannot be reached has no bad sectors."""

Part = tuple[int, int]
"""(offset, length) in bytes."""


async def salvage(filler: Filler, offset: int, length: int, tally: Tally) -> list[Part]:
    """Fetch what can be had of a range in which something cannot be read; what cannot, in no order.

    Raises IndexFault, and OSError where the store itself fails.
    """
    todo = await lacking(filler, offset, length)
    if todo == [(offset, length)]:  # which has just been tried
        todo = _halves(todo[0])
    lost: list[Part] = []
    for _ in range(MOST_READS):
        if not todo:
            break
        part = todo.pop()
        try:
            flight = await filler.read_exactly(*part, tally, background=True)
        except OSError as error:
            if error.errno in OF_THE_STORE:
                raise
            (todo.extend if part[1] > SECTOR else lost.extend)(_halves(part))
        else:
            await flight.stored.wait()
    return lost + todo


def _halves(part: Part) -> list[Part]:
    """A range of more than a sector in two parts, the border between them at a sector."""
    offset, length = part
    if length <= SECTOR:
        return [part]
    first = -(-length // SECTOR) // 2 * SECTOR
    return [(offset + first, length - first), (offset, first)]


async def lacking(filler: Filler, offset: int, length: int) -> list[Part]:
    """The runs of sectors of a range of whole blocks that the clean layer lacks. Raises IndexFault."""
    parts: list[Part] = []
    pages = filler.layer.pages
    for block in range(offset >> BLOCK_SHIFT, (offset + length - 1 >> BLOCK_SHIFT) + 1):
        await pages.load([block // PAGE_BLOCKS])
        left = filler.reader.size - (block << BLOCK_SHIFT)
        word = pages.page(block // PAGE_BLOCKS)[block % PAGE_BLOCKS]
        for first, count in sector_runs(needed_of(left) & ~valid_of(word)):
            start = (block << BLOCK_SHIFT) + first * SECTOR
            size = min(count * SECTOR, filler.reader.size - start)
            if parts and sum(parts[-1]) == start and start % BLOCK == 0:
                parts[-1] = (parts[-1][0], parts[-1][1] + size)
            else:
                parts.append((start, size))
    return parts
