"""Checksums of sectors in memory: those of slots that are being changed, and of slots that were not long ago.

The index has the rest. A slot's sums are *unknown* here, *known* (as the index has them) or *changed* since the last
commit took what was changed.
"""

from __future__ import annotations

import itertools
import mmap
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from forebay_cache.device.device import Buffer
from forebay_cache.format.geometry import SECTOR, SECTORS

UNKNOWN, KNOWN, CHANGED = 0, 1, 2
#: Slots whose sums are stored together, as one value of the index.
GROUP = 16
#: Bytes of the sums of one slot.
SIZE = 4 * SECTORS
_AREA = GROUP * SIZE
#: Memory is given back in pages of the machine, of this many slots each.
_PAGE = mmap.PAGESIZE // SIZE
#: Such pages kept: 32 MiB, the sums of 32 GiB at best.
_PAGES_KEPT = 8192
#: ... and how many are given back at a time.
_SHED = 512

_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

SUM_BITS = 0xFFFFFFFF
"""A checksum is these bits of XXH3."""

ZERO_SECTOR_SUM = 0x48C689BA  # checksum(bytes(4096))


def checksum(sector: Buffer) -> int:
    """Of one sector, 32 bits: the low half of XXH3 (64 bits), eight times as fast as CRC-32 here."""
    return xxh3_64_intdigest(sector) & SUM_BITS


def checksums(data: Buffer) -> list[int]:
    """Of each of several sectors."""
    view = memoryview(data)
    return [xxh3_64_intdigest(view[n : n + SECTOR]) & SUM_BITS for n in range(0, len(view), SECTOR)]


class Taken(NamedTuple):
    """The sums of some slots of one group: bit n of ``slots`` for the n-th of them, ``raw`` for all 16."""

    group: int
    slots: int
    raw: bytes


class Sums:
    """``values[16 * slot + sector]`` means something where ``state[slot]`` is not UNKNOWN."""

    def __init__(self, slots: int) -> None:
        # Anonymous maps: memory is taken only for what is used.
        self._values = mmap.mmap(-1, -(-slots // _PAGE) * mmap.PAGESIZE, flags=_FLAGS)
        self.values = memoryview(self._values).cast("I")
        self._state = mmap.mmap(-1, max(slots, 1), flags=_FLAGS)
        self.state = memoryview(self._state)
        self._changed: dict[int, int] = {}
        self._pages: dict[int, None] = {}
        self.pending = 0  # slots changed since the last take(), about

    def grow(self, slots: int) -> None:
        """There are so many slots now. Raises OSError when there is no memory; what is there stays valid."""
        self.state.release()
        self.values.release()
        try:
            self._values.resize(-(-slots // _PAGE) * mmap.PAGESIZE)
            self._state.resize(max(slots, 1))
        finally:
            self.values = memoryview(self._values).cast("I")
            self.state = memoryview(self._state)

    def fresh(self, slot: int) -> None:
        """The slot is given to somebody new: whatever is known of it is void."""
        self.values[slot * SECTORS : (slot + 1) * SECTORS] = _NONE
        self._mark(slot)

    def change(self, slot: int) -> bool:
        """Make ready to change sums of the slot. False: they are not known, see :meth:`adopt`."""
        state = self.state[slot]
        if state == UNKNOWN:
            return False
        if state == KNOWN:
            self._mark(slot)
        return True

    def _mark(self, slot: int) -> None:
        self.state[slot] = CHANGED
        group = slot // GROUP
        self._changed[group] = self._changed.get(group, 0) | 1 << slot % GROUP
        self._pages[slot // _PAGE] = None
        self.pending += 1

    def adopt(self, slot: int, raw: Buffer | None) -> None:
        """What the index has of the slot, None: nothing. Newer knowledge stays."""
        if self.state[slot] == UNKNOWN:
            self._values[slot * SIZE : (slot + 1) * SIZE] = raw or bytes(SIZE)
            self.state[slot] = KNOWN
            self._pages[slot // _PAGE] = None

    def get(self, slot: int) -> bytes | None:
        """The sums of a slot as u32[16], as they are now."""
        if self.state[slot] == UNKNOWN:
            return None
        return self._values[slot * SIZE : (slot + 1) * SIZE]

    def forget(self, slot: int) -> None:
        """The slot is nobody's any more."""
        if self.state[slot] == CHANGED:
            group = slot // GROUP
            left = self._changed.get(group, 0) & ~(1 << slot % GROUP)
            if left:
                self._changed[group] = left
            else:
                self._changed.pop(group, None)
        self.state[slot] = UNKNOWN

    def take(self) -> list[Taken]:
        """What a commit has to store. In order; it counts as known from now on."""
        taken = []
        for group, slots in sorted(self._changed.items()):
            first = group * GROUP
            taken.append(Taken(group, slots, self._values[first * SIZE : first * SIZE + _AREA]))
            states = self._state[first : first + GROUP]
            self._state[first : first + len(states)] = states.replace(b"\2", b"\1")
        self._changed = {}
        self.pending = 0
        return taken

    def changed(self) -> list[int]:
        """Slots whose sums no commit has stored yet, in order."""
        found = sorted(self._changed.items())
        return [group * GROUP + n for group, slots in found for n in range(GROUP) if slots >> n & 1]

    def put_back(self, taken: list[Taken]) -> None:
        """The commit failed."""
        for group, slots, _ in taken:
            for n in range(GROUP):
                if slots >> n & 1 and self.state[group * GROUP + n] == KNOWN:
                    self._mark(group * GROUP + n)

    def shed(self) -> None:
        """Forget some of what the index has too, if there is much of it. Not while a commit is under way."""
        if len(self._pages) <= _PAGES_KEPT:
            return
        for page in list(itertools.islice(self._pages, _SHED)):
            del self._pages[page]
            first = page * _PAGE
            states = self._state[first : first + _PAGE]
            if b"\2" in states:
                self._pages[page] = None  # again the newest
                continue
            self._state[first : first + len(states)] = bytes(len(states))
            self._values.madvise(mmap.MADV_DONTNEED, page * mmap.PAGESIZE, mmap.PAGESIZE)


_NONE = memoryview(bytes(SIZE)).cast("I")
