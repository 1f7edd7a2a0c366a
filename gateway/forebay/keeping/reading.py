# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What a disk shows, read for a new image: without what is known to be zeros, and with what is missing told."""

import errno
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from forebay.units import format_size
from forebay_cache import View
from forebay_cache.format.geometry import SECTOR, Buffer
from forebay_cache.read.survey import Holding, survey

Holes = Callable[[int, int], Awaitable[list[tuple[int, int]]]]
"""See `Reader`."""

RANGES_TOLD = 64
"""Ranges that neither has which are told one by one; their sum covers all."""


@dataclass
class Missing:
    """What neither the cache nor the image has."""

    bytes: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """(offset, length) of the first RANGES_TOLD."""

    def add(self, offset: int, length: int) -> None:
        """Count a range that comes after all those before."""
        self.bytes += length
        last = self.ranges[-1] if self.ranges else None
        if last is not None and last[0] + last[1] == offset:
            self.ranges[-1] = (last[0], last[1] + length)
        elif len(self.ranges) < RANGES_TOLD:
            self.ranges.append((offset, length))

    def __str__(self) -> str:
        places = ", ".join(f"{length} bytes at {offset}" for offset, length in self.ranges[:3])
        return f"{format_size(self.bytes)} are neither in the cache nor in the image any more ({places}, ...)"


class Reader:
    """Reads what a disk shows: `view` are its layers, and with `has_image` what these lack is in the image.

    `holes`, where there is an image, returns what of a range (offset, length) is known to be zeros: extents of (length,
    0 for data), one behind the other, from its beginning on, maybe not to its end. Raises OSError.
    """

    def __init__(
        self, view: View, size: int, *, has_image: bool, holes: Holes | None = None
    ) -> None:
        self._view = view
        self._size = size
        self._has_image = has_image
        self._holes = holes
        self._known: deque[tuple[int, int]] = deque()
        """(end, 0 for data) of extents that follow each other."""
        self.missing = Missing()

    async def data_from(self, offset: int) -> int:
        """The first place from `offset` on that is not known to be zeros; the size of the disk where there is none.

        Asked for places in ascending order. A disk of terabytes with little in it is looked through in no time.
        """
        while self._holes is not None and offset < self._size:
            if not self._known and not await self._ask(self._holes, offset):
                break
            end, flags = self._known[0]
            if offset < end and not flags:
                break
            offset = max(offset, end)
            self._known.popleft()
        return min(offset, self._size)

    async def _ask(self, holes: Holes, offset: int) -> bool:
        """Learn of what follows. False where nobody says anything: then all of it is read."""
        try:
            found = await holes(offset, self._size - offset)
        except OSError:
            found = []
        for length, flags in found:
            offset += length
            self._known.append((offset, flags))
        if not self._known:
            self._holes = None
        return bool(self._known)

    async def read(self, offset: int, length: int) -> list[tuple[int, bytes]]:
        """(offset, data) of what is there of the range, without zeros. What is missing is noted."""
        found: list[tuple[int, bytes]] = []
        end = offset + length
        while offset < end:
            extents = await survey(self._view, offset, end - offset, 4096)
            for part, holding in extents:
                if holding is not Holding.NOTHING:
                    found += await self._cached(offset, part, zeros=holding in _ZEROS)
                elif self._has_image:
                    found += await self._tried(offset, part)
                else:
                    self._miss(offset, part)
                offset += part
        return found

    async def _cached(self, offset: int, length: int, *, zeros: bool) -> list[tuple[int, bytes]]:
        return [] if zeros else await self._tried(offset, length)

    async def _tried(self, offset: int, length: int) -> list[tuple[int, bytes]]:
        """The range, or those sectors of it that can be read."""
        length = min(length, self._size - offset)
        if length <= 0:
            return []
        try:
            return [(offset, b"".join(bytes(x) for x in await self._view.read(offset, length)))]
        except OSError as error:
            if length <= SECTOR:
                self._miss(offset, length)
                return []
            if error.errno == errno.ETIMEDOUT:
                self._has_image = False  # each further try would take as long
        found = []
        half = max(SECTOR, length // 2 // SECTOR * SECTOR)
        for start in range(offset, offset + length, half):
            part = min(half, offset + length - start)
            if self._has_image:
                found += await self._tried(start, part)
            else:
                found += await self.read(start, part)
        return found

    def _miss(self, offset: int, length: int) -> None:
        length = min(length, self._size - offset)
        if length > 0:
            self.missing.add(offset, length)


_ZEROS = (Holding.CLEAN_ZEROS, Holding.PRIVATE_ZEROS)


async def refuse(offset: int, length: int) -> Buffer:
    """The fetch of a view that has no image below it."""
    raise OSError(errno.EIO, f"{length} bytes at {offset} are in no layer")
