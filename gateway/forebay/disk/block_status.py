"""What NBD's block status says of a disk: what is allocated (base:allocation), and what is cached (forebay:cached)."""

from forebay.image.image import Image
from forebay_cache import View
from forebay_cache.format.geometry import PAGE_SHIFT
from forebay_cache.read.plan import ORIGIN, ZEROS, Piece

CACHED_CONTEXT = "forebay:cached"
"""Flags: 0 not cached, 1 clean (the image has it too), 2 private (dirty, or an overlay's own)."""

NOT_CACHED, CLEAN, PRIVATE = 0, 1, 2

DATA = 0
HOLE_AND_ZERO = 3
"""Flags of base:allocation, as the NBD protocol has them."""

PAGES_MOST = 64
"""Pages of the index that one reply looks at: 256 MiB of the disk. The client asks on from there."""

Extents = list[tuple[int, int]]
"""(length in bytes, flags), one behind the other from the offset on that was asked for."""


async def _pieces(view: View, offset: int, length: int) -> list[Piece]:
    end = min(offset + length, ((offset >> PAGE_SHIFT) + PAGES_MOST) << PAGE_SHIFT)
    await view.load(offset, end - offset)
    return view.plan(offset, end - offset)


async def cached(view: View, offset: int, length: int) -> Extents:
    """Which parts of a range the cache has, and whether the image has them too. Raises OSError."""
    found: Extents = []
    for piece in await _pieces(view, offset, length):
        if piece.slot == ORIGIN:
            _add(found, piece.length, NOT_CACHED)
        else:
            _add(found, piece.length, PRIVATE if piece.private else CLEAN)
    return found


async def allocation(view: View, image: Image, offset: int, length: int) -> Extents:
    """Holes and data as a reader finds them: what the cache says where it has something, elsewhere what the image says.

    Where the image cannot be reached it counts as data. Raises OSError.
    """
    found: Extents = []
    for piece in await _pieces(view, offset, length):
        if piece.slot == ZEROS:
            _add(found, piece.length, HOLE_AND_ZERO)
        elif piece.slot != ORIGIN or image.origin is None:
            _add(found, piece.length, DATA)
        else:
            for part, flags in await image.origin.extents(piece.offset, piece.length):
                _add(found, part, flags)
    return found


def _add(found: Extents, length: int, flags: int) -> None:
    """Append an extent, joined with the last one if that has the same flags."""
    if found and found[-1][1] == flags:
        found[-1] = (found[-1][0] + length, flags)
    else:
        found.append((length, flags))
