# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Making a cache larger on its device, so that a kill at any moment leaves a whole one."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from forebay_cache.device.files import size_of
from forebay_cache.device.superblock import write_superblock
from forebay_cache.errors import CacheError
from forebay_cache.format.superblock import Superblock

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from whatever thread the work is in."""

_RESERVE = 1 << 30
"""Space for a file is reserved in pieces of so many bytes, so that progress can be told."""


def reserve(fd: int, path: Path, size: int, progress: Progress) -> None:
    """Make a regular file ``size`` bytes long, durably, and reserve space for its new part.

    Raises CacheError when there is no room; the file has the length it had then. Raises OSError from fsync.
    """
    old = os.fstat(fd).st_size
    room = os.fstatvfs(fd)
    # asked first: others are not to run out of space
    if size - old > room.f_bavail * room.f_frsize:
        raise CacheError(
            f"{path}: cannot be made {size} bytes: no space left: make room there, or say less"
        )
    try:
        for start in range(old, size, _RESERVE):
            progress(start - old, size - old)
            os.posix_fallocate(fd, start, min(_RESERVE, size - start))
    except OSError as error:
        os.ftruncate(fd, old)
        raise CacheError(
            f"{path}: cannot be made {size} bytes: {error.strerror}; make room there, or say less"
        ) from None
    os.fsync(fd)
    progress(size - old, size - old)


def grow(
    fd: int, path: Path, layout: Superblock, size: int | None, progress: Progress
) -> Superblock:
    """Let the cache on the device take all of it; a file is made ``size`` bytes long first. Returns the new layout.

    After a kill at any moment the device holds the old layout or the new one, and enough bytes for it. Raises
    CacheError when it would not become larger, and OSError.
    """
    now = size_of(fd)
    if size is not None and size < max(now, layout.size):
        raise CacheError(
            f"{path}: is {max(now, layout.size)} bytes already, more than {size}: a cache only grows; "
            "for a smaller one remove it and create another"
        )
    larger = layout.grown(size or now)
    if larger.slots <= layout.slots:
        raise CacheError(
            f"{path}: the cache takes all of its {now} bytes already: say a larger size, or make the "
            "device larger first"
        )
    if stat.S_ISREG(os.fstat(fd).st_mode):
        reserve(fd, path, larger.size, progress)
    elif larger.size > now:
        raise CacheError(
            f"{path}: a device of {now} bytes cannot be made {size}: make the device larger first, "
            "then extend the cache without a size"
        )
    write_superblock(fd, larger)
    return larger
