"""What a mode does with a disk's writes: the calls that every policy takes.

Offsets and lengths are bytes, any; what is not whole sectors is completed from what the disk reads there, under a lock
on the sectors concerned (:mod:`forebay.disk.ranges`).
"""

from typing import Protocol

from forebay_cache.format.geometry import SECTOR


class Policy(Protocol):
    """Where a disk's writes go. All calls raise OSError; ENOSPC when there is no room and none is coming."""

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """See :meth:`forebay_nbd.Export.write_now`."""

    async def write(self, offset: int, data: memoryview) -> None:
        """Store the data. The write may be acknowledged when this returns."""

    async def zero(self, offset: int, length: int, may_trim: bool) -> None:
        """Make the range read as zeros; `may_trim`: also by giving its storage back. May be acknowledged then."""

    def flush_now(self) -> bool:
        """Do what :meth:`flush` does and return True if that takes but a moment; else False, and nothing is done."""

    async def flush(self) -> None:
        """Make all that was acknowledged durable."""


def sectors_touched(offset: int, length: int) -> tuple[int, int]:
    """The whole sectors that a range touches: (start, end) in bytes."""
    return offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR


def sectors_within(offset: int, length: int) -> tuple[int, int]:
    """The whole sectors that lie in a range: (start, end) in bytes; start >= end where there is none."""
    return -(-offset // SECTOR) * SECTOR, (offset + length) // SECTOR * SECTOR
