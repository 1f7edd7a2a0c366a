# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Which images are raw disks: looked at once, when an image is first attached, and remembered from then on.

What lies at the start of a raw disk is its guest's to choose, the first bytes of a qcow2 image included. So an image
that was attached once is raw for good, as long as it keeps its size. The index remembers that of the last MOST images,
beyond detach; and an image that a disk writes bears it as an extended attribute, where its file system has these, for
other hosts and for a cache that is formatted. Whoever may set that attribute may write the image, too.
"""

import contextlib
import time

from forebay.origin.worker import syscalls
from forebay_cache import Cache

KIND = "raw"
"""Kind of the record: by the image's key, its size in bytes, and when it was attached last, seconds since the epoch."""

MOST = 16384
"""Images that the index remembers; of more, those that were attached longest ago are forgotten."""

NOTED_AGAIN = 24 * 3600
"""Seconds after which the record of an image that is attached again says so."""

ATTRIBUTE = "user.forebay.raw"
"""Of an image: its size in bytes, as decimal digits."""


class Formats:
    """What the index remembers of images, in memory at once and durably with the next commit."""

    def __init__(self, cache: Cache) -> None:
        self._records = cache.records

    def is_raw(self, key: str, size: int) -> bool:
        """True if the image of that key was a raw disk of so many bytes."""
        known = self._records.get(KIND, key)
        return known is not None and known.get("size") == size

    def remember(self, key: str, size: int) -> None:
        """Note that the image of that key is a raw disk of so many bytes."""
        now = int(time.time())
        known = self._records.get(KIND, key)
        if known is not None and known.get("size") == size and now - known["at"] < NOTED_AGAIN:
            return
        self._records.put(KIND, key, {"size": size, "at": now})
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        known = self._records.all(KIND)
        if len(known) > MOST:
            oldest = min(known, key=lambda key: (known[key]["at"], key))
            self._records.put(KIND, oldest, None)


def is_marked(fd: int, size: int) -> bool:
    """True if the open image bears the attribute of a raw disk of so many bytes. Blocks, raises nothing."""
    with contextlib.suppress(OSError):
        return syscalls.getxattr(fd, ATTRIBUTE) == b"%d" % size
    return False


def mark(fd: int, size: int) -> None:
    """Have the open image bear it, where its file system and its mode let us. Blocks, raises nothing."""
    if not is_marked(fd, size):
        with contextlib.suppress(OSError):
            syscalls.setxattr(fd, ATTRIBUTE, b"%d" % size)
