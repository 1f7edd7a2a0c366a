# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Read-ahead: what a guest that reads on and on will want next is fetched before it asks."""

from __future__ import annotations

from forebay_cache.format.geometry import BLOCK
from forebay_cache.read.fill import CHUNK, Filler, Tally
from forebay_cache.read.view import NEVER

WINDOW = 8 << 20
"""How many bytes a sequential reader is kept ahead of."""
STREAK = 2 * BLOCK
"""Reading counts as sequential after so many bytes on end."""
SLACK = 2 << 20
"""Requests of a sequential reader may arrive so many bytes out of order: deep queues do that."""


class ReadAhead:
    """Watches the slow reads of one disk, and keeps a window fetched ahead of a sequential reader."""

    def __init__(self, filler: Filler, tally: Tally) -> None:
        self._filler = filler
        self._tally = tally
        self._end = -1
        self._streak = 0
        self._fetched = 0

    def note(self, offset: int, length: int) -> int:
        """Tell of a read that took the slow path: it missed, or came to the offset that the last call returned.

        Returns the offset from which on reads should take the slow path again, for the view's ``lookahead``.
        """
        if not self._end - SLACK <= offset <= self._end + SLACK or self._end < 0:
            self._end, self._streak, self._fetched = offset + length, 0, offset + length
            return NEVER
        if offset + length > self._end:
            self._streak += offset + length - self._end
            self._end = offset + length
        if self._streak < STREAK:
            return NEVER
        window = min(WINDOW, 2 * self._streak)
        start = max(self._fetched, self._end)
        stop = min(self._end + window, self._filler.reader.size)
        if stop - start >= min(window // 2, CHUNK) or (
            stop == self._filler.reader.size and stop > start
        ):
            self._filler.ahead(start, stop - start, self._tally)
            self._fetched = stop
        if self._fetched >= self._filler.reader.size:
            return NEVER
        return max(self._end, self._fetched - window // 2)
