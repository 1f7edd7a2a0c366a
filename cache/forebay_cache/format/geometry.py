# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Units of the cache.

A *block* is 64 KiB, the unit of placement; a *sector* is 4 KiB, the unit of what is valid. A *page* of the index
describes 64 blocks, 4 MiB of an image. A mask is 16 bits, bit n for sector n of a block.
"""

from __future__ import annotations

import functools

BLOCK = 65536
BLOCK_SHIFT = 16
SECTOR = 4096
SECTOR_SHIFT = 12
SECTORS = BLOCK // SECTOR
FULL = (1 << SECTORS) - 1

PAGE_SHIFT = 22
PAGE_BLOCKS = 1 << (PAGE_SHIFT - BLOCK_SHIFT)

IN_BLOCK = BLOCK - 1
"""``offset & IN_BLOCK``: where in its block a byte lies."""

IN_PAGE = PAGE_BLOCKS - 1
"""``block & IN_PAGE``: which of its page's blocks a block is."""

MASKS: tuple[tuple[int, ...], ...] = tuple(
    tuple((2 << last) - (1 << first) if last >= first else 0 for last in range(SECTORS))
    for first in range(SECTORS)
)
"""``MASKS[first][last]``: the mask of the sectors ``first`` to ``last`` of a block, both included."""

ZERO_BLOCK = bytes(BLOCK)

Buffer = bytes | bytearray | memoryview
"""What holds data of blocks; a memoryview of bytes, one after the other."""


def block_runs(offset: int, length: int) -> list[tuple[int, int, int]]:
    """Cut a byte range at block borders: ``[(block, start in block, length)]``."""
    runs = []
    while length > 0:
        start = offset & (BLOCK - 1)
        part = min(length, BLOCK - start)
        runs.append((offset >> BLOCK_SHIFT, start, part))
        offset += part
        length -= part
    return runs


@functools.lru_cache(maxsize=8192)
def sector_runs(mask: int) -> tuple[tuple[int, int], ...]:
    """Runs of set bits of a mask: ``((first sector, count), ...)``."""
    runs = []
    while mask:
        low = mask & -mask
        carried = mask + low  # the run is gone, and the bit behind it set
        end = carried & ~mask
        runs.append((low.bit_length() - 1, end.bit_length() - low.bit_length()))
        mask &= carried
    return tuple(runs)


def covered(start: int, length: int) -> int:
    """Mask of the sectors that a byte range inside one block touches."""
    return MASKS[start >> SECTOR_SHIFT][(start + length - 1) >> SECTOR_SHIFT]


def covered_in(block: int, offset: int, length: int) -> int:
    """Mask of the sectors of the block with that number that a byte range touches; 0 for none of it."""
    start = max(offset - (block << BLOCK_SHIFT), 0)
    end = min(offset + length - (block << BLOCK_SHIFT), BLOCK)
    return covered(start, end - start) if start < end else 0
