# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Who asks for which block: seen for a share of all blocks that is chosen by a hash, and kept for who looks soon.

The hit path does one multiplication and one comparison for it; the compiled core does the same on the same arrays.
Where a block is in the share, everything that is asked of it is seen, so what is seen is the load of the whole cache in
small (spatial sampling: Waldspurger and others, SHARDS, FAST 2015).
"""

from array import array
from typing import Final

LIMIT: Final = 0
"""Of `head`: a block belongs to the share if the hash of its key is below this."""
USED: Final = 1
"""Of `head`: entries since the last `drain`; those beyond ROOM were lost."""
VISITS: Final = 2
"""Of `head`: how many blocks readers came to, of all blocks; a block is counted once for each request."""
MISSES: Final = 3
"""Of `head`: those of them that were read from the origin."""

HIT, MISS, PUT = 0, 1, 2
"""What an entry is about: the block was read, and was there, or was not; it came in for another reason."""

ROOM: Final = 512
"""Entries between two drains."""
MIX: Final = 0x9E3779B97F4A7C15
"""A key times this, modulo 2 ** 64, is its hash: 2 ** 64 over the golden ratio, so neighbours are far apart."""
WHOLE: Final = (1 << 64) - 1

Entry = tuple[int, int, int]
"""The key of a block, what happened, and how many times in a row."""


def hash_of(key: int) -> int:
    """The hash of a block's key, of 64 bits."""
    return key * MIX & WHOLE


class Samples:
    """The entries since the last drain. The arrays stay the same objects: the compiled core keeps their addresses."""

    def __init__(self) -> None:
        self.head = array("Q", (WHOLE, 0, 0, 0))
        self.keys = array("Q", bytes(8 * ROOM))
        self.counts = array("Q", bytes(8 * ROOM))
        self.kinds = bytearray(ROOM)

    def note(self, key: int, kind: int) -> None:
        """Something happened to the block with that key."""
        if key * MIX & WHOLE >= self.head[LIMIT]:
            return
        n = self.head[USED]
        if kind == HIT and 0 < n <= ROOM and self.keys[n - 1] == key and self.kinds[n - 1] != PUT:
            self.counts[n - 1] += 1
            return
        if n < ROOM:
            self.keys[n], self.kinds[n], self.counts[n] = key, kind, 1
        self.head[USED] = n + 1

    def take_from(self, place: int) -> int:
        """One of the numbers in `head`, which is 0 from now on."""
        value = self.head[place]
        self.head[place] = 0
        return value

    def forget(self) -> None:
        """Drop all that was seen since the last drain."""
        self.head[USED:] = array("Q", (0, 0, 0))

    def drain(self) -> list[Entry]:
        """The entries since the last call, in order, without those that were lost."""
        count = min(ROOM, self.take_from(USED))
        return list(zip(self.keys[:count], self.kinds[:count], self.counts[:count], strict=True))
