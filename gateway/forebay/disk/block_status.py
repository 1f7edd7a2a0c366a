# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What NBD's block status says of a disk: what is allocated (base:allocation), what is cached (x-forebay:cached).

The work is proportional to what there is to tell, not to the size of the disk, and done in slices: other disks do not
wait for it.
"""

from collections.abc import Iterator
from time import perf_counter
from typing import Final

from forebay.image.image import Image
from forebay.origin.protocol import MOST_EXTENTS, Origin
from forebay_cache import Holding, View, survey
from forebay_cache.read.survey import SLICE_SECONDS
from forebay_cache.turns import next_turn

CACHED_CONTEXT = "x-forebay:cached"
"""Flags: 0 not cached, 1 clean (the image has it too), 2 private (dirty, or an overlay's own)."""

OLD_CACHED_CONTEXT = "forebay:cached"
"""The same, by the name that it had before: the protocol keeps names without x- for itself."""

NOT_CACHED, CLEAN, PRIVATE = 0, 1, 2

DATA = 0
HOLE_AND_ZERO = 3
"""Flags of base:allocation, as the NBD protocol has them."""

EXTENTS_MOST: Final = 4096
"""Extents of one reply, about. The client asks on from where they end."""

FIRST_ASKED: Final = 4 << 20
"""Bytes of an image that are asked for first where one extent is wanted; if they are all alike, 16 times as many."""

Extents = list[tuple[int, int]]
"""(length in bytes, flags), one behind the other from the offset on that was asked for."""

_CACHED = {
    Holding.NOTHING: NOT_CACHED,
    Holding.CLEAN: CLEAN,
    Holding.CLEAN_ZEROS: CLEAN,
    Holding.PRIVATE: PRIVATE,
    Holding.PRIVATE_ZEROS: PRIVATE,
}
_ZEROS = (Holding.CLEAN_ZEROS, Holding.PRIVATE_ZEROS)


async def cached(view: View, offset: int, length: int, one: bool) -> Extents:
    """Which parts of a range the cache has, and whether the image has them too. With `one`, one or two extents.

    Raises OSError.
    """
    kinds = await survey(view, offset, length, 2 if one else EXTENTS_MOST)
    await next_turn()
    found: Extents = []
    for part, kind in kinds:
        _add(found, part, _CACHED[kind])
    return found


async def allocation(view: View, image: Image, offset: int, length: int, one: bool) -> Extents:
    """Holes and data as a reader finds them: what the cache says where it has something, elsewhere what the image says.

    Where the image cannot be reached it counts as data. With `one`, one or a few extents. Raises OSError.

    The cache is asked before the image: what goes from the one to the other meanwhile is found at least once.
    """
    kinds = await survey(view, offset, length, 2 if one else EXTENTS_MOST)
    if one:
        del kinds[1:]
    origin = image.origin
    asked = _without_cache(kinds, offset)
    if origin is None or not asked[1]:
        return _of_kinds(kinds)
    if one:
        return await _first_of_image(origin, *asked)
    parts = await origin.extents(*asked)
    await next_turn()
    if len(parts) >= MOST_EXTENTS:
        parts.pop()  # what the image did not look at counts as data in it
    return await _merged(kinds, parts, asked[0] - offset)


def _of_kinds(kinds: list[tuple[int, Holding]]) -> Extents:
    """base:allocation of what is in the cache; all else is data."""
    found: Extents = []
    for part, kind in kinds:
        _add(found, part, HOLE_AND_ZERO if kind in _ZEROS else DATA)
    return found


def _without_cache(kinds: list[tuple[int, Holding]], offset: int) -> tuple[int, int]:
    """(offset, length) of the shortest range that has all that the cache has not; `kinds` begin at `offset`."""
    first = last = offset
    at = offset
    for part, kind in kinds:
        if kind is Holding.NOTHING:
            if first == last:
                first = at
            last = at + part
        at += part
    return first, last - first


async def _first_of_image(origin: Origin, offset: int, length: int) -> Extents:
    """The first extents of a range of the image: at least one. Raises OSError.

    A fragmented image is not looked through again and again for a client that asks for one extent after the other.
    """
    asked = FIRST_ASKED
    while True:
        count = min(asked, length)
        parts = await origin.extents(offset, count)
        if len(parts) > 1 or count == length:
            return parts[:1]
        asked *= 16


async def _merged(kinds: list[tuple[int, Holding]], parts: Extents, skip: int) -> Extents:
    """base:allocation, where `parts` of the image begin `skip` bytes behind the beginning. Ends where they end."""
    found: Extents = []
    image = _Parts(parts, skip)
    at = 0
    slice_ends = perf_counter() + SLICE_SECONDS
    for length, kind in kinds:
        if kind is not Holding.NOTHING:
            _add(found, length, HOLE_AND_ZERO if kind in _ZEROS else DATA)
        else:
            for part, flags in image.cut(at, at + length):
                _add(found, part, flags)
            if image.end < at + length:
                break
        at += length
        if perf_counter() > slice_ends:
            await next_turn()
            slice_ends = perf_counter() + SLICE_SECONDS
    return found


class _Parts:
    """Extents of an image, of which ranges are asked for in order."""

    def __init__(self, parts: Extents, start: int) -> None:
        self._parts = parts
        self._start = start
        """Where the extent begins that is next."""
        self._next = 0
        self.end = start + sum(part for part, _ in parts)

    def cut(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """What there is of a range; the next one must not begin before its end."""
        while self._next < len(self._parts):
            length, flags = self._parts[self._next]
            part = min(end, self._start + length) - max(first, self._start)
            if part > 0:
                yield part, flags
            if self._start + length > end:
                return
            self._start += length
            self._next += 1


def _add(found: Extents, length: int, flags: int) -> None:
    """Append an extent, joined with the last one if that has the same flags."""
    if found and found[-1][1] == flags:
        found[-1] = (found[-1][0] + length, flags)
    else:
        found.append((length, flags))
