# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""How much may come out of what is imported, and how much of the store it may take.

A few kilobytes can say that they are petabytes. Zeros take no space in the image, only time, so the size of the image
is bounded; and data, which does take space, is bounded by the bytes that it was made of.
"""

from dataclasses import dataclass

from forebay.errors import ForebayError
from forebay.units import GIB, MIB, TIB, format_size

MOST = TIB
"""Bytes of an image, where the operator names no number."""

RATIO = 100
"""Bytes of data that may come of one byte of the source. Disks pack to a half or a tenth; what is made to be a bomb, to
a thousandth (gzip) or less."""

FREELY = GIB
"""Bytes of data that may come of any source: a small image of one pattern is no bomb."""


@dataclass
class Limits:
    """What bounds one import."""

    most: int = MOST
    """Bytes of the image."""
    asked: bool = False
    """True if the operator named that: then no ratio is asked for."""

    def check_size(self, size: int) -> None:
        """Raises ForebayError for an image that would be too large."""
        if size > self.most:
            raise ForebayError(
                f"the image would have more than {format_size(self.most)}: say --max-size if that is meant"
            )

    def check_data(self, written: int, source: int) -> None:
        """Raises ForebayError where so many bytes of data came of so few bytes of the source."""
        if not self.asked and written > FREELY + RATIO * source:
            raise ForebayError(
                f"{format_size(source)} of the source became {format_size(written)} of data, as of what is made "
                "to fill a store: say --max-size if that is meant"
            )


def check_room(room: tuple[int, int], need: int, where: str) -> None:
    """Raises ForebayError where a file system with so much room (free bytes, bytes in all) would be full.

    A hundredth stays free, at most a GiB: running VMs write there, too.
    """
    free, size = room
    spare = min(GIB, size // 100)
    if need + spare > free:
        wants = f"{format_size(need)} more are needed and " if need else ""
        raise ForebayError(
            f"{where} has {format_size(free)} free; {wants}{format_size(max(spare, MIB))} stay free for disks that are "
            "in use: make room there"
        )
