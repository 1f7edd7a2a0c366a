# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Whether the files of the cache are where they were: one that is removed or replaced works on until the next start.

What only the cache has would be lost then. So it is noticed while there is time: the device counts as failed, which
has everything that can be saved written back at once, and writes go past it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat

import trio

from forebay_cache.cache import Cache
from forebay_cache.device.device import Device
from forebay_cache.device.files import size_of

LOOK_SECONDS = 2.0
"""How often it is looked."""


class Look:
    """Looks at one device, again and again."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._allocated = 0

    def why_lost(self) -> str | None:
        """Why the device is not what it was, or the next start would not find it so; None if it is. In a thread.

        Also asks the device for something past the kernel's cache: one that hangs shows, though nobody else may ask.
        """
        device = self._device
        _ask(device)
        try:
            ours = os.fstat(device.fd)
            named = os.stat(device.path)
            size = size_of(device.fd)
        except FileNotFoundError:
            return "it was removed"
        except OSError:
            return None  # who reads and writes it notices
        if stat.S_ISREG(ours.st_mode) and not ours.st_nlink:
            return "its file was removed"
        if (ours.st_dev, ours.st_ino, ours.st_rdev) != (named.st_dev, named.st_ino, named.st_rdev):
            return "there is another one under its name"
        if size < device.layout.size:
            return f"it has {size} bytes, and had {device.layout.size}: it was cut"
        return self._why_emptied(ours.st_blocks)

    def _why_emptied(self, allocated: int) -> str | None:
        """Why much of the file is a hole now, which reads as zeros: nothing of it is ever given back by us."""
        before, self._allocated = self._allocated, allocated
        if allocated * 2 >= before:
            return None
        return f"it has {allocated * 512} bytes of space, and had {before * 512}: it was cut, or emptied"


def _ask(device: Device) -> None:
    """Read the superblock from the device itself, if its file system can do that. Who needs it notices if it fails."""
    with contextlib.suppress(OSError), mmap.mmap(-1, mmap.PAGESIZE) as aligned:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT
        fd = os.open(f"/proc/self/fd/{device.fd}", flags)
        try:
            os.preadv(fd, [aligned], 0)
        finally:
            os.close(fd)


async def watch_files(cache: Cache) -> None:
    """Have the device fail when it, or the index, is not where it was. Runs until cancelled."""
    look = Look(cache.device)
    while True:
        await trio.sleep(LOOK_SECONDS)
        if cache.failure.error is not None:
            continue
        try:
            lost = await cache.threads.reads.run(look.why_lost)
        except OSError:
            continue  # it has failed by that
        if lost is None and not await trio.to_thread.run_sync(cache.index.place.is_kept):
            lost = f"its index at {cache.index.path} was removed, replaced or cut"
        if lost is not None:
            cache.failure.fail(
                OSError(
                    errno.EIO,
                    f"{lost}; what only the cache has is written back now, where that can be: "
                    "bring the file back, or make a new cache when nothing is dirty",
                ),
                taken=True,
            )
