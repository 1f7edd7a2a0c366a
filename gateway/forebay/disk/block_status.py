"""What NBD's block status says of a disk: what is allocated (base:allocation), and what is cached (forebay:cached)."""

from typing import TYPE_CHECKING

from forebay_cache.format.geometry import PAGE_SHIFT
from forebay_cache.read.view import ORIGIN, ZEROS, Piece

if TYPE_CHECKING:
    from forebay.disk.disk import Disk

CACHED_CONTEXT = "forebay:cached"
"""Flags: 0 not cached, 1 clean (the image has it too), 2 private (dirty, or an overlay's own)."""

NOT_CACHED, CLEAN, PRIVATE = 0, 1, 2
HOLE_AND_ZERO = 3

PAGES_MOST = 64
"""Pages of the index that one reply looks at: 256 MiB of the disk. The client asks on from there."""

Extents = list[tuple[int, int]]


async def _pieces(disk: "Disk", offset: int, length: int) -> list[Piece]:
    end = min(offset + length, ((offset >> PAGE_SHIFT) + PAGES_MOST) << PAGE_SHIFT)
    await disk.view.load(offset, end - offset)
    return disk.view.plan(offset, end - offset)


async def cached(disk: "Disk", offset: int, length: int) -> Extents:
    """Where the cache answers, from `offset` on."""
    found: Extents = []
    for piece in await _pieces(disk, offset, length):
        if piece.slot == ORIGIN:
            _add(found, piece.length, NOT_CACHED)
        else:
            _add(found, piece.length, PRIVATE if piece.private else CLEAN)
    return found


async def allocation(disk: "Disk", offset: int, length: int) -> Extents:
    """Holes and data as a reader finds them: the cache's word where it has one, the origin's elsewhere."""
    found: Extents = []
    for piece in await _pieces(disk, offset, length):
        if piece.slot == ZEROS:
            _add(found, piece.length, HOLE_AND_ZERO)
        elif piece.slot != ORIGIN:
            _add(found, piece.length, 0)
        elif disk.image.origin is None:
            _add(found, piece.length, 0)  # data, for all anybody knows
        else:
            for part, flags in await disk.image.origin.extents(piece.offset, piece.length):
                _add(found, part, flags)
    return found


def _add(found: Extents, length: int, flags: int) -> None:
    if found and found[-1][1] == flags:
        found[-1] = (found[-1][0] + length, flags)
    else:
        found.append((length, flags))
