# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Checksums of sectors, and how the index keeps those of a slot."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from typing import Final

from xxhash import xxh3_64_intdigest

from forebay_cache.format.geometry import SECTOR, SECTORS, Buffer

SUM_BITS: Final = 0xFFFFFFFF
"""A checksum is these bits of XXH3."""
ZERO_SECTOR_SUM: Final = 0x48C689BA
"""The checksum of a sector of zeros."""
UNREADABLE: Final = -1
"""No checksum is this: it stands for that of a sector that could not be read."""

GROUP: Final = 16
"""Slots whose sums are stored together, as one value of the index."""
SIZE: Final = 4 * SECTORS
"""Bytes of the sums of one slot: u32[16], in the order of its sectors."""


def checksum(sector: Buffer) -> int:
    """The checksum of one sector, 32 bits: the low half of XXH3 (64 bits), eight times as fast as CRC-32 here."""
    return xxh3_64_intdigest(sector) & SUM_BITS


def checksums(data: Buffer) -> list[int]:
    """The checksums of several sectors that lie one after the other in ``data``."""
    view = memoryview(data)
    return [xxh3_64_intdigest(view[n : n + SECTOR]) & SUM_BITS for n in range(0, len(view), SECTOR)]


def matching(sums: Collection[int], stored: bytes) -> int:
    """The mask of the sectors of a slot whose checksum is the one that is ``stored`` (u32[16])."""
    return sum(
        1 << s for s, (a, b) in enumerate(zip(sums, array("I", stored), strict=True)) if a == b
    )


def sums_in_group(value: bytes, slot: int) -> bytes:
    """The sums of a slot (u32[16]) in the ``value`` that the index has of its group; empty if they are not there."""
    n = slot % GROUP
    return value[n * SIZE : (n + 1) * SIZE]
