# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Checksums of sectors in memory: those of slots that are being changed, and of slots that were not long ago.

The index has the rest. A slot's sums are *unknown* here, *known* (as the index has them) or *changed* since the last
commit took what was changed.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Collection, Iterable

import trio

from forebay_cache.format.checksum import GROUP, SIZE
from forebay_cache.format.geometry import SECTORS, Buffer
from forebay_cache.format.records import ALL_OF_GROUP
from forebay_cache.index.changes import Changes, Share, Taken

UNKNOWN, KNOWN, CHANGED = 0, 1, 2
"""The states of a slot's checksums; see the head of the module."""

_AREA = GROUP * SIZE
_PAGE = mmap.PAGESIZE // SIZE
"""Memory is given back in pages of the machine, of so many slots each ..."""
_PAGES_KEPT = 8192
"""... of which so many are kept: 32 MiB, the sums of 32 GiB at best ..."""
_SHED = 512
"""... and so many are given back at a time."""
_GROUPS_AT_ONCE = 512
"""Groups that are looked through between two turns of others."""
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


Read = Callable[[Collection[int]], dict[int, bytes]]
"""Gives the checksums (u32[16]) of some slots as the index has them, if it has some. Raises IndexFault."""


class Sums:
    """Checksums of all slots, as far as they are in memory.

    ``values[16 * slot + sector]`` means something where ``state[slot]`` is not UNKNOWN. Both are other objects after
    :meth:`grow`. A participant of each commit.
    """

    def __init__(self, slots: int, read: Read) -> None:
        self._read = read
        # Anonymous maps: memory is taken only for what is used.
        self._values = mmap.mmap(-1, -(-slots // _PAGE) * mmap.PAGESIZE, flags=_FLAGS)
        self.values = memoryview(self._values).cast("I")
        self._state = mmap.mmap(-1, max(slots, 1), flags=_FLAGS)
        self.state = memoryview(self._state)
        self.unstored: dict[int, int] = {}
        """By group of 16 slots: which of them were changed since the last commit took what was, as a mask."""
        self._pages: dict[int, None] = {}
        self.pending = 0
        """How many slots were changed since the last commit took what was, about."""

    def grow(self, slots: int) -> None:
        """The device has ``slots`` slots now. Raises OSError when there is no memory; what is there stays valid."""
        self.state.release()
        self.values.release()
        try:
            self._values.resize(-(-slots // _PAGE) * mmap.PAGESIZE)
            self._state.resize(max(slots, 1))
        finally:
            self.values = memoryview(self._values).cast("I")
            self.state = memoryview(self._state)

    # -- reading ----------------------------------------------------------------------------------------------

    async def load(self, slots: Iterable[int]) -> None:
        """Bring the sums of slots into memory, for somebody who is about to change some of them. Raises IndexFault.

        They may have been shed again when this returns, if others had a turn: see :meth:`load_now`.
        """
        missing = [s for s in set(slots) if self.state[s] == UNKNOWN]
        if missing:
            found = await trio.to_thread.run_sync(self._read, missing)
            for slot in missing:
                self._adopt(slot, found.get(slot))

    def load_now(self, slot: int) -> None:
        """The same for one slot, at once: what the index has is a page fault away at most. Raises IndexFault."""
        if self.state[slot] == UNKNOWN:
            self._adopt(slot, self._read([slot]).get(slot))

    def _adopt(self, slot: int, raw: Buffer | None) -> None:
        """Take what the index has of the slot (None: nothing), unless something newer is known by now."""
        if self.state[slot] == UNKNOWN:
            self._values[slot * SIZE : (slot + 1) * SIZE] = raw or bytes(SIZE)
            self.state[slot] = KNOWN
            self._pages[slot // _PAGE] = None

    def get(self, slot: int) -> bytes | None:
        """The sums of a slot as they are now, u32[16]; None where they are not in memory."""
        if self.state[slot] == UNKNOWN:
            return None
        return self._values[slot * SIZE : (slot + 1) * SIZE]

    # -- changing ---------------------------------------------------------------------------------------------

    def renew(self, slot: int) -> None:
        """The slot is given to another block: whatever is known of it is void."""
        self.values[slot * SECTORS : (slot + 1) * SECTORS] = _NONE
        self._mark(slot)

    def change(self, slot: int) -> bool:
        """Allow the caller to change ``values`` of the slot; the next commit stores them.

        Returns False if its sums are not in memory, and have to be loaded first.
        """
        state = self.state[slot]
        if state == UNKNOWN:
            return False
        if state == KNOWN:
            self._mark(slot)
        return True

    def _mark(self, slot: int) -> None:
        self.state[slot] = CHANGED
        group = slot // GROUP
        self.unstored[group] = self.unstored.get(group, 0) | 1 << slot % GROUP
        self._pages[slot // _PAGE] = None
        self.pending += 1

    def forget(self, slot: int) -> None:
        """No block has the slot any more: its sums mean nothing, and are not stored."""
        if self.state[slot] == CHANGED:
            group = slot // GROUP
            left = self.unstored.get(group, 0) & ~(1 << slot % GROUP)
            if left:
                self.unstored[group] = left
            else:
                self.unstored.pop(group, None)
        self.state[slot] = UNKNOWN

    # -- commits ----------------------------------------------------------------------------------------------

    async def changed(self) -> list[int]:
        """The slots whose sums no commit has stored yet, in order. For while none is made."""
        found: list[int] = []
        for n, (group, slots) in enumerate(sorted(self.unstored.items())):
            found += slots_of_group(group, slots)
            if n % _GROUPS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return found

    def has_changes(self) -> bool:
        """True if sums were changed since the last commit."""
        return bool(self.pending)

    def contribute(self, changes: Changes) -> Share:
        """Have a commit store the sums that were changed. When it has succeeded, memory is given back."""
        taken = changes.sums = self._take()
        return Share(self._shed, lambda: self._put_back(taken))

    def _take(self) -> list[Taken]:
        """What a commit has to store, in order. It counts as known from now on."""
        taken = []
        for group in sorted(self.unstored):
            slots = self.unstored[group]
            first = group * GROUP
            taken.append(Taken(group, slots, self._values[first * SIZE : first * SIZE + _AREA]))
            states = self._state[first : first + GROUP]
            self._state[first : first + len(states)] = states.replace(b"\2", b"\1")
        self.unstored = {}
        self.pending = 0
        return taken

    def _put_back(self, taken: list[Taken]) -> None:
        """A commit did not store these."""
        for group, slots, _ in taken:
            first = group * GROUP
            if slots == ALL_OF_GROUP and self._state[first : first + GROUP] == _ALL_KNOWN:
                self._state[first : first + GROUP] = _ALL_CHANGED
                self.unstored[group] = slots
                self._pages[first // _PAGE] = None
                self.pending += GROUP
                continue
            for slot in slots_of_group(group, slots):
                if self.state[slot] == KNOWN:
                    self._mark(slot)

    def _shed(self) -> None:
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


def slots_of_group(group: int, mask: int) -> list[int]:
    """The slots of a group that a mask names, in order."""
    return [group * GROUP + n for n in range(GROUP) if mask >> n & 1]


_ALL_KNOWN, _ALL_CHANGED = (bytes([state] * GROUP) for state in (KNOWN, CHANGED))
_NONE = memoryview(bytes(SIZE)).cast("I")
