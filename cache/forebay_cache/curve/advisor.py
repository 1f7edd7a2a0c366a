# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a cache of another size would find, from the samples that readers leave behind.

Once a second the samples are drained: :class:`Distances` makes a curve for LRU of them, and each :class:`Miniature` one
figure for the placement that is in use, at one size. What is counted fades with a half-life of a day.

What it costs is bounded by how it is made: at most ROOM samples a second, of which each takes some 10 us. Where there
were more for several seconds in a row, or the blocks of the sample have become too many, the share is halved.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import Any, Final

from forebay_cache.curve.distances import Distances
from forebay_cache.curve.kept import Kept
from forebay_cache.curve.miniature import Miniature
from forebay_cache.format.geometry import BLOCK
from forebay_cache.slots.pool import SlotPool
from forebay_cache.slots.samples import (
    LIMIT,
    MISS,
    MISSES,
    PUT,
    ROOM,
    USED,
    VISITS,
    WHOLE,
    hash_of,
)
from forebay_cache.turns import next_turn

MOST: Final = 8192
"""Blocks of the sample that are remembered."""
FACTORS: Final = (0.5, 1.0, 1.25, 1.5, 2.0, 4.0)
"""The sizes that are told of, as shares of the present one."""
ENOUGH: Final = 1000
"""With fewer reads of the sample than this a report means little."""
_FULL: Final = 5
"""So many drains in a row have lost samples: the share is halved."""
_AT_ONCE: Final = 32
"""Samples between two turns of others: half a millisecond."""
_FIT_EVERY: Final = 60
"""After so many drains it is looked whether the miniatures have the right size ..."""
_DRIFT: Final = 16
"""... which they get when the room for clean blocks has changed by one part of so many."""
_ORDER: Final = "order"
"""The name under which `Kept` has the blocks in the order of their last use."""


class Advisor:
    """The curve of one cache. ``is_held`` tells of a block's key whether the block may never be evicted."""

    def __init__(self, slots: SlotPool, is_held: Callable[[int], bool]) -> None:
        self._slots = slots
        self._samples = slots.samples
        self._samples.head[LIMIT] = WHOLE // max(1, slots.placement.slots // MOST)
        self._is_held = is_held
        self._since = time.time()
        self._distances = Distances()
        self._miniatures = {factor: Miniature(1) for factor in FACTORS}
        self._clean = 0  # slots for clean blocks when the miniatures were made
        self._reads = 0.0  # that were counted, of all blocks
        self._found = 0.0  # those of them that were there in fact
        self._entries = 0.0  # of the sample that were counted
        self._full = 0
        self._drains = 0

    @property
    def share(self) -> float:
        """The share of all blocks that is in the sample."""
        return (self._samples.head[LIMIT] + 1) / (WHOLE + 1)

    def fade(self, factor: float) -> None:
        """Have what was counted so far count for less."""
        self._reads *= factor
        self._found *= factor
        self._entries *= factor
        self._distances.fade(factor)
        for miniature in self._miniatures.values():
            miniature.misses *= factor

    async def drain(self) -> None:
        """Take in what was seen since the last call. One call at a time."""
        samples = self._samples
        reads, misses = samples.take_from(VISITS), samples.take_from(MISSES)
        seen = samples.head[USED]
        entries = samples.drain()
        if not entries and not reads:
            return
        await self._fit()
        # Where samples were lost only as many reads are counted as were seen.
        kept = min(1.0, ROOM / seen) if seen else 1.0
        self._reads += reads * kept
        self._found += (reads - misses) * kept
        for start in range(0, len(entries), _AT_ONCE):
            for entry in entries[start : start + _AT_ONCE]:
                self._take(*entry)
            await next_turn()
        while len(self._distances) > self._room(FACTORS[-1]) * self.share:
            self._distances.forget_oldest()  # even the largest cache that is told of has it no more
        self._full = self._full + 1 if seen > ROOM else 0
        if self._full >= _FULL or len(self._distances) > MOST:
            await self._halve()

    def _take(self, key: int, kind: int, times: int) -> None:
        if self._is_held(key):
            return
        weight = 1 / self.share
        if kind == MISS or (kind != PUT and key in self._distances):
            self._entries += 1
            self._distances.count(self._distances.use(key), weight)
            for miniature in self._miniatures.values():
                miniature.misses += 0 if miniature.read(key, times) else weight
            return
        if kind != PUT:  # it came in before anybody looked: who else had it is not known
            self._reads -= weight
            self._found -= weight
        if key not in self._distances:
            self._distances.use(key)
        for miniature in self._miniatures.values():
            miniature.put(key)

    async def _halve(self) -> None:
        """Have half as many blocks in the sample."""
        self._full = 0
        self._samples.head[LIMIT] >>= 1
        self._samples.forget()  # they were chosen by the share before
        self._distances.keep(self._is_sampled)
        self._clean = 0
        await self._fit()

    def _is_sampled(self, key: int) -> bool:
        return hash_of(key) < self._samples.head[LIMIT]

    async def _fit(self) -> None:
        """Have the miniatures stand for the cache as it is now: what is held leaves less room for the others."""
        self._drains += 1
        if self._clean and self._drains % _FIT_EVERY:
            return
        placement = self._slots.placement
        clean = max(1, placement.free + placement.evictable())
        if abs(clean - self._clean) * _DRIFT < self._clean:
            return
        self._clean = clean
        for factor, miniature in self._miniatures.items():
            keys = [key for key in miniature.blocks() if self._is_sampled(key)]
            await miniature.become(self._room(factor), self.share, keys)

    def _room(self, factor: float) -> int:
        """Blocks that a cache so many times as large has for clean blocks: what is held stays, some are kept free."""
        more = round((factor - 1) * self._slots.placement.slots)
        return max(1, self._clean - self._slots.low + more)

    # -- telling

    def report(self) -> dict[str, Any]:
        """What was seen, and for each size the share of reads that would find their block: see curve/README.md."""
        total = self._slots.placement.slots
        return {
            "since": self._since,
            "reads": round(self._reads),
            "hit_ratio": _ratio(self._found, self._reads),
            "sampled_reads": round(self._entries),
            "sampled_share": self.share,
            "needed_reads": ENOUGH,
            "enough": self._entries >= ENOUGH and self._reads >= 1,
            "size": total * BLOCK,
            "free_bytes": max(0, self._slots.placement.free - self._slots.low) * BLOCK,
            "sizes": [self._size(factor, round(total * factor)) for factor in FACTORS],
        }

    def _size(self, factor: float, blocks: int) -> dict[str, Any]:
        missed = self._miniatures[factor].misses
        lru = self._distances.misses(self._room(factor))
        return {
            "size": blocks * BLOCK,
            "hit_ratio": _ratio(self._reads - missed, self._reads),
            "lru_hit_ratio": _ratio(self._reads - lru, self._reads),
        }

    # -- over a restart

    async def kept(self, uuid: str) -> Kept:
        """What :meth:`restore` takes."""
        numbers = {"reads": self._reads, "found": self._found, "entries": self._entries}
        numbers = {name: max(0.0, value) for name, value in numbers.items()}
        keys = {_ORDER: array("Q", self._distances)}
        for factor, miniature in self._miniatures.items():
            await next_turn()
            numbers[str(factor)] = miniature.misses
            keys[str(factor)] = array("Q", miniature.blocks())
        counts = array("d", self._distances.counts)
        return Kept(uuid, self._since, self._samples.head[LIMIT], numbers, counts, keys)

    async def restore(self, kept: Kept) -> None:
        """Go on from there. Raises ValueError for what cannot be, and has changed nothing then."""
        order = kept.keys.get(_ORDER, array("Q"))
        if not 0 < kept.limit <= WHOLE or len(kept.counts) != len(self._distances.counts):
            raise ValueError("it has other counters")
        if len(order) > MOST:
            raise ValueError("it knows too many blocks")
        self._samples.head[LIMIT] = min(kept.limit, self._samples.head[LIMIT])
        self._since = min(kept.since, self._since)
        self._reads, self._found = kept.numbers.get("reads", 0.0), kept.numbers.get("found", 0.0)
        self._entries = kept.numbers.get("entries", 0.0)
        for key in filter(self._is_sampled, order):
            self._distances.use(key)
        self._distances.counts = kept.counts.tolist()
        await self._fit()
        for factor, miniature in self._miniatures.items():
            keys = [key for key in kept.keys.get(str(factor), ()) if self._is_sampled(key)]
            await miniature.become(self._room(factor), self.share, keys)
            miniature.misses = kept.numbers.get(str(factor), 0.0)


def _ratio(part: float, of: float) -> float | None:
    return round(min(1.0, max(0.0, part / of)), 4) if of >= 1 else None
