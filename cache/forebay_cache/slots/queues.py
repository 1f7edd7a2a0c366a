# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the placement remembers besides the states of slots: where evictable ones lie, and which blocks have left."""

from array import array
from typing import Final

REGION_BITS: Final = 12
REGION: Final = 1 << REGION_BITS
"""Slots that one step of a hand looks at: 3 us of ``bytes.translate``."""
_MARK_BITS: Final = 16
"""Bits that are kept of a key in a generation of ghosts."""
_MARK: Final = (1 << _MARK_BITS) - 1


class Queue:
    """The evictable slots of one kind: how many lie in each region, and the hand that goes round them."""

    def __init__(self, slots: int, untouched: int) -> None:
        regions = (slots + REGION - 1) >> REGION_BITS
        self.untouched = untouched
        """The byte of a slot in it that was not asked for."""
        self.total = 0
        self.hand = 0
        self._slots = slots
        self._counts = [0] * regions
        self._present = bytearray(regions)

    def grow(self, slots: int) -> None:
        """The device has `slots` slots now."""
        more = ((slots + REGION - 1) >> REGION_BITS) - len(self._counts)
        self._slots = slots
        self._counts += [0] * more
        self._present += bytes(more)

    def add(self, slot: int, count: int = 1) -> None:
        """Count `count` slots of the region of `slot` in."""
        region = slot >> REGION_BITS
        self._counts[region] += count
        self._present[region] = 1
        self.total += count

    def drop(self, slot: int, count: int = 1) -> None:
        """Count `count` slots of the region of `slot` out."""
        region = slot >> REGION_BITS
        self._counts[region] -= count
        self.total -= count
        if not self._counts[region]:
            self._present[region] = 0

    def span(self) -> tuple[int, int]:
        """Move the hand on to a region with any slot of the queue. Returns the hand and the region's end."""
        if self.hand >= self._slots:
            self.hand = 0
        region = self.hand >> REGION_BITS
        if not self._counts[region]:
            region = self._present.find(1, region)
            if region < 0:
                region = self._present.find(1)
            self.hand = region << REGION_BITS
        return self.hand, min((region + 1) << REGION_BITS, self._slots)


class Ghosts:
    """Keys of blocks evicted from probation, remembered as 16-bit fingerprints in two generations.

    A full generation is forgotten at once, so a key is remembered for at least one and at most two generations of
    evictions, unless another key falls on its entry. A key never seen is taken for a ghost once in 2 ** 15.
    """

    def __init__(self, entries: int) -> None:
        self._bits = max(4, (entries - 1).bit_length())
        self._limit = max(1, entries)
        self._young = self._blank()
        self._old = self._blank()
        self._added = 0

    def _blank(self) -> "array[int]":
        return array("H", (0,)) * (1 << self._bits)

    def _place(self, key: int) -> tuple[int, int]:
        mixed = hash((key, key >> 61))  # mixes all bits, which an integer's own hash does not
        return (mixed >> _MARK_BITS) & ((1 << self._bits) - 1), (mixed & _MARK) or 1

    def add(self, key: int) -> None:
        """Remember `key`."""
        if self._added >= self._limit:
            self._old, self._young = self._young, self._blank()
            self._added = 0
        entry, mark = self._place(key)
        self._young[entry] = mark
        self._added += 1

    def take(self, key: int) -> bool:
        """True if `key` was remembered; it is no longer."""
        entry, mark = self._place(key)
        for generation in (self._young, self._old):
            if generation[entry] == mark:
                generation[entry] = 0
                return True
        return False
