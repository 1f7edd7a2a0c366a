# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the cache has found of what was read in the last minutes, whoever came and went meanwhile."""

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

import trio

WINDOW_SECONDS = 300.0
"""What was read longer ago does not count."""
LOOK_SECONDS = 15.0
"""How often the counters are looked at. What a disk read after the last look before its detach is not counted."""

AT_ONCE = 256
"""Readers that are looked at in one go."""


class Reader(Protocol):
    """What counts what it has read: the views of the cache."""

    misses: int

    @property
    def hits(self) -> int:
        """Reads that needed nothing of the origin."""


class RecentHits:
    """Hits and misses of all readers, by the time at which they were seen."""

    def __init__(self, readers: Iterable[Reader]) -> None:
        """`readers` are those that there are at the time it is looked at."""
        self._readers = readers
        self._seen: weakref.WeakKeyDictionary[Reader, tuple[int, int]] = weakref.WeakKeyDictionary()
        """What each reader had counted at the last look."""
        self._looks: deque[tuple[float, int, int]] = deque()
        """Of the looks within the window: when, and how many hits and misses there were since the one before."""

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            await self.look(trio.current_time())
            await trio.sleep(LOOK_SECONDS)

    async def look(self, now: float) -> None:
        """Take in what was read since the last look, and forget what is too old; `now` in seconds.

        Others have their turn in between. Several looks at the same time count nothing twice.
        """
        hits = misses = 0
        for number, reader in enumerate(list(self._readers), 1):
            counted = reader.hits, reader.misses
            before = self._seen.get(reader, (0, 0))
            hits += max(0, counted[0] - before[0])
            misses += max(0, counted[1] - before[1])
            self._seen[reader] = counted
            if number % AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        if hits or misses:
            self._looks.append((now, hits, misses))
        while self._looks and now - self._looks[0][0] > WINDOW_SECONDS:
            self._looks.popleft()

    async def told(self, now: float) -> dict[str, Any]:
        """The keys of the summary; the percentage is None where nothing was read."""
        await self.look(now)
        hits = sum(look[1] for look in self._looks)
        misses = sum(look[2] for look in self._looks)
        percent = round(100 * hits / (hits + misses), 1) if hits + misses else None
        return {"hit_percent": percent, "recent_hits": hits, "recent_misses": misses}
