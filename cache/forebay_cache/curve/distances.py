# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The miss-ratio curve of LRU from a sample of blocks: SHARDS with a fixed number of blocks at most.

A read of a block finds it in an LRU cache that is larger than the number of other blocks that were asked for since: its
reuse distance (Mattson and others, 1970). Among a share R of all blocks distances are R times as long (Waldspurger and
others, FAST 2015). When there are too many blocks the caller halves the share. What is counted weighs 1 / R, which is
what the paper's rescaling of all earlier counts comes to.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final

_STEPS: Final = 16
"""Counters for each doubling of the distance: 4.4 % apart."""
_LARGEST: Final = 48
"""Longer distances than 2 ** this are counted as the first read of a block."""


class Distances:
    """The blocks of the sample in the order of their last use, and how long the distances were."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}  # when each block was last used, oldest first
        self._times: list[int] = []  # the same times, in order
        self._clock = 0
        self.counts = [0.0] * (_LARGEST * _STEPS + 1)
        """Weighted reads, by distance; the last number is of first reads, and of all that are longer."""

    def __len__(self) -> int:
        return len(self._last)

    def __iter__(self) -> Iterator[int]:
        """The blocks, that first which was not used for longest."""
        return iter(self._last)

    def __contains__(self, key: int) -> bool:
        return key in self._last

    def use(self, key: int) -> int | None:
        """A block is used: how many others were since it was last; None if it never was."""
        self._clock += 1
        last = self._last.pop(key, None)
        self._last[key] = self._clock
        self._times.append(self._clock)
        if last is None:
            return None
        place = bisect_left(self._times, last)
        del self._times[place]
        return len(self._times) - 1 - place

    def count(self, distance: int | None, weight: float) -> None:
        """Count a read for as many reads as ``weight``, the distance among the sample for as many blocks."""
        last = len(self.counts) - 1
        place = last
        if distance is not None:  # so many blocks have it, on average
            place = min(last, math.ceil(_place((distance + 0.5) * weight + 0.5)))
        self.counts[place] += weight

    def forget_oldest(self) -> None:
        """Forget the block that was not used for longest."""
        del self._last[next(iter(self._last))]
        del self._times[0]

    def keep(self, is_kept: Callable[[int], bool]) -> None:
        """Forget the blocks that are not in the sample any more."""
        self._last = {key: when for key, when in self._last.items() if is_kept(key)}
        self._times = list(self._last.values())

    def fade(self, factor: float) -> None:
        """Have what was counted so far count for less."""
        self.counts = [count * factor for count in self.counts]

    def misses(self, blocks: float) -> float:
        """How many of the reads that were counted an LRU cache of that many blocks would not have had."""
        at = min(_place(max(1.0, blocks)), len(self.counts) - 2.0)
        place = math.ceil(at)
        return self.counts[place] * (place - at) + sum(self.counts[place + 1 :])


def _place(blocks: float) -> float:
    """Among the counters: each counts up to its place the distances that are found by that many blocks."""
    return math.log2(blocks) * _STEPS
