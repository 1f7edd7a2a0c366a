# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The slots of the device: whose each of them is, and how it is taken and given back.

The life of a slot: :meth:`SlotPool.take` gives it to a block, from which moment on it may be evicted unless it is
held, although no page names it yet. Then a page of the block's layer names it. When no page names it any more, or
when it was taken in vain, :meth:`SlotPool.abandon` gives it back: it goes into quarantine, and from there it becomes
free. What may be evicted, and which of it is, is the business of ``placement``.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from forebay_cache.format.records import Meta
from forebay_cache.index.sums import Sums
from forebay_cache.slots.numbers import SlotNumbers
from forebay_cache.slots.placement import Placement
from forebay_cache.slots.quarantine import Quarantine
from forebay_cache.slots.ready import ReadyMap
from forebay_cache.slots.samples import PUT, Samples

log = logging.getLogger(__name__)

COMMIT_SLOTS = 65536
"""A commit is asked for when so many slots have new checksums: that bounds memory, and the length of a commit."""
SCAN_RETRY_SECONDS = 1.0
"""How long to wait when the index could not be read to find out which slots are free."""


def _low_water(slots: int) -> int:
    """With fewer free slots than this, of ``slots``, something is evicted."""
    return min(max(16, slots // 64), 2048, max(1, slots // 4))


class SlotPool:
    """All slots of one device. ``want_commit`` and ``want_eviction`` are called to have somebody do these soon."""

    def __init__(
        self,
        placement: Placement,
        meta: Meta,
        sums: Sums,
        ready: ReadyMap,
        quarantine: Quarantine,
        *,
        want_commit: Callable[[], None],
        want_eviction: Callable[[], None],
    ) -> None:
        self.placement = placement
        self.samples = Samples()
        """Who asks for which block of a clean layer."""
        self.evicting: set[int] = set()
        """Slots that were chosen to be evicted and are still named by a page; quarantined in the placement."""
        self.low = _low_water(placement.slots)
        """With fewer free slots than this, something is evicted."""
        self.scan: Callable[[], Awaitable[None]] | None = None
        """Finds out which slots are free, where that was not done at the start; None when it is known."""
        self.evicted_blocks = 0
        self.damaged_slots = 0
        self.want_eviction = want_eviction
        self._meta = meta
        self._sums = sums
        self._ready = ready
        self._quarantine = quarantine
        self._want_commit = want_commit
        self._owner = SlotNumbers(placement.slots, "Q")
        self.owner = self._owner.values
        """By slot: the key of the block that it was given to last. Another object after :meth:`grow`."""

    def grow(self, slots: int) -> None:
        """Make room for what is known of ``slots`` slots. Raises OSError when there is no memory.

        The new ones are not used before :meth:`use`.
        """
        try:
            self._owner.grow(slots)
        finally:
            self.owner = self._owner.values

    def use(self, slots: int) -> None:
        """The device has ``slots`` slots now: the new ones are free."""
        self.placement.grow(slots)
        self.low = _low_water(slots)
        self._quarantine.release()

    # -- taking and giving back -------------------------------------------------------------------------------

    def take(self, key: int, *, held: bool) -> int:
        """A free slot for the block with that key, or -1 if there is none: then ask the evictor for room.

        ``held``: it must not be evicted. Whoever puts the slot into a page counts it in the layer's ``slots``; a slot
        that does not get into a page has to be abandoned.
        """
        placement = self.placement
        slot = placement.take()
        if placement.free < self.low:
            self.want_eviction()
        if slot is None:
            return -1
        self.own(slot, key, held=held)
        self._ready.masks[slot] = 0
        placement.insert(slot, key, held=held)
        if slot >= self._meta.frontier:
            self._meta.frontier = slot + 1
        self._sums.renew(slot)
        self._ask_for_commit()
        return slot

    def own(self, slot: int, key: int, *, held: bool) -> None:
        """From now on the slot is that block's."""
        self.owner[slot] = key
        if not held:
            self.samples.note(key, PUT)

    def abandon(self, slot: int) -> None:
        """Give back a slot that no page in memory names: any more, or at all.

        It is given out again when that is durable, and nobody reads it any more.
        """
        if slot in self.evicting:
            self.evicting.discard(slot)
        else:
            self.placement.quarantine(slot)
        self._forget(slot)

    def evicted(self, slot: int) -> None:
        """A slot that was chosen to be evicted is named by no page any more."""
        self.placement.evicted(slot, self.owner[slot])
        self._forget(slot)
        self.evicted_blocks += 1

    def retire(self, slot: int) -> None:
        """Take a damaged slot, which no page names any more, out of use for as long as the daemon runs."""
        self._ready.masks[slot] = 0
        if slot in self.evicting:
            self.evicting.discard(
                slot
            )  # the evictor passes it over, and the placement has it in quarantine
        else:
            self.placement.quarantine(slot)

    def _forget(self, slot: int) -> None:
        self._ready.masks[slot] = 0
        self._sums.forget(slot)
        self._quarantine.add(slot)
        self._ask_for_commit()

    def _ask_for_commit(self) -> None:
        if self._sums.pending >= COMMIT_SLOTS:
            self._want_commit()

    # -- questions --------------------------------------------------------------------------------------------

    def is_evicting(self, slot: int) -> bool:
        """True if the slot was chosen to be evicted, and its block is still there."""
        return slot in self.evicting

    def clear_touch(self, slot: int) -> bool:
        """Forget that the block in a slot was asked for. True if it was, since the last time or a hand passed."""
        return self.placement.forget_touch(slot)

    @property
    def has_plenty(self) -> bool:
        """True if a slot may be taken by who can do without: nobody has to wait, and nothing is evicted, for that."""
        return self.placement.free > self.low

    def missing(self) -> int:
        """How many slots have to be evicted so that enough are free, or about to be. Negative where there are more."""
        return self.low - self.placement.free - self._quarantine.leaving

    def may_come(self) -> bool:
        """True if slots that are taken may become free: they are about to, or can be evicted."""
        return bool(self._quarantine.leaving or self.evicting or self.placement.evictable())

    def spare(self) -> int:
        """How many slots are free, or will be when everything that may be evicted is."""
        return self.placement.free + self.placement.evictable() + self._quarantine.leaving

    # -- after a start ----------------------------------------------------------------------------------------

    async def find_free(self) -> None:
        """Find out which slots are free, unless that is known. Until then nothing is evicted."""
        while self.scan is not None:
            try:
                await self.scan()
            except OSError as error:
                log.error("looking for free slots failed, trying again: %s", error)
                await trio.sleep(SCAN_RETRY_SECONDS)
                continue
            self.scan = None
            self.want_eviction()
