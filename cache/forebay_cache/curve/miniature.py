# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A cache in small, without data: the real placement, given only a sample of the blocks.

What it finds of the sample is what a cache as many times larger would find of all (Waldspurger and others, Cache
Modeling and Optimization using Miniature Simulations, ATC 2017). Unlike a curve of LRU it is right for the policy that
is in use. With a share of 1 it is a simulation of the policy, which bench and tests use as that.
"""

from collections.abc import Sequence
from typing import Final

from forebay_cache.slots.placement import MAIN, TOUCHED, Placement, fresh_of
from forebay_cache.turns import next_turn

_AT_ONCE: Final = 64
"""Blocks that leave at once, at most; one in so many slots in a smaller one."""
_TURN: Final = 1024
"""Blocks that are put into place between two turns of others: a millisecond."""


class Miniature:
    """A cache of ``blocks`` blocks, in front of a share of all blocks.

    ``misses`` is weighted, and the caller's to change.
    """

    def __init__(self, blocks: float, share: float = 1.0) -> None:
        self.misses = 0.0
        self._slots: dict[int, int] = {}
        self._start(blocks, share)

    def _start(self, blocks: float, share: float) -> None:
        slots = max(1, round(blocks * share))
        self.placement = Placement(slots, fresh=round(fresh_of(round(blocks)) * share))
        self._keys = [0] * slots

    def __len__(self) -> int:
        return len(self._slots)

    def read(self, key: int, times: int = 1) -> bool:
        """Ask for a block so many times in a row; whether it was there at the first."""
        slot = self._slots.get(key)
        if slot is not None:
            self.placement.state[slot] |= TOUCHED
            return True
        slot = self._put(key)
        if times > 1:
            self.placement.state[slot] |= TOUCHED
        return False

    def put(self, key: int) -> None:
        """A block comes in that nobody asked for, unless it is there."""
        if key not in self._slots:
            self._put(key)

    def _put(self, key: int) -> int:
        slot = self.placement.take()
        if slot is None:
            self._evict()
            slot = self.placement.take()
            assert slot is not None, "nothing is held here, so something can leave"
        self.placement.insert(slot, key, held=False)
        self._slots[key], self._keys[slot] = slot, key
        return slot

    def _evict(self) -> None:
        placement = self.placement
        for slot in placement.victims(max(1, min(_AT_ONCE, placement.slots // _AT_ONCE))):
            key = self._keys[slot]
            del self._slots[key]
            placement.evicted(slot, key)
            placement.release(slot)

    async def become(self, blocks: float, share: float, keys: Sequence[int]) -> None:
        """Be another cache from now on, with these blocks as far as they fit."""
        self._slots.clear()
        self._start(blocks, share)
        for slot, key in enumerate(keys[: self.placement.slots]):
            if slot % _TURN == 0:
                await next_turn()
            self.placement.adopt(slot, held=False)
            self._slots[key], self._keys[slot] = slot, key

    def blocks(self) -> list[int]:
        """The keys of the blocks that are there, those first that have proved themselves."""
        state = self.placement.state
        main = [key for key, slot in self._slots.items() if state[slot] & MAIN]
        return main + [key for key, slot in self._slots.items() if not state[slot] & MAIN]
