# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A device that becomes larger, while it is used or while it is not.

Steps, each safe to be killed in or after: the device is made larger (a file here, anything else by whoever can), its
new length is durable; the copy of the superblock, then the superblock itself say so, durably; from then on the new
slots are used. Until the superblock says so nothing in the index can name them.
"""

from __future__ import annotations

import os
from pathlib import Path

import trio

from forebay_cache.cache import Cache
from forebay_cache.device.extend import Progress, grow
from forebay_cache.device.files import open_device, size_of
from forebay_cache.device.superblock import read_superblock
from forebay_cache.errors import CacheError
from forebay_cache.format.superblock import Superblock
from forebay_cache.index.index import Index


async def extend(cache: Cache, size: int | None, progress: Progress) -> None:
    """Have a cache that is in use take all of its device; a file is made ``size`` bytes long first.

    One call at a time. Not cancellable. Raises CacheError, and nothing has changed then; OSError fails the device.
    """
    cache.failure.check()
    device = cache.device
    layout = device.layout.grown(size or size_of(device.fd))
    if not cache.index.fits(layout.slots):
        raise CacheError(
            f"{device.path}: {layout.size} bytes are too many to take at once while the cache is used: "
            "extend it in two steps, or while the daemon is stopped"
        )

    def work() -> Superblock:
        return grow(
            device.fd,
            device.path,
            device.layout,
            size,
            lambda done, total: trio.from_thread.run_sync(progress, done, total),
        )

    try:
        layout = await trio.to_thread.run_sync(work)
    except OSError as error:
        cache.failure.fail(
            error, taken=True
        )  # it may have been told to us instead of a guest's flush
        raise
    cache.grow(layout)


def extend_device(path: Path, index: Path, size: int | None, progress: Progress) -> Superblock:
    """The same for a cache that nobody has open. Returns the new layout. Raises CacheError and OSError."""
    fd = open_device(path)
    try:
        layout = read_superblock(fd, path)
        if layout is None:
            raise CacheError(f"{path}: holds no Forebay cache: 'forebay cache create' makes one")
        if not index.exists():
            raise CacheError(f"{path}: its index is not at {index}: correct 'state' or the device")
        opened = Index(index, layout.slots)
        opened.close()
        if opened.meta.uuid != str(layout.uuid):
            raise CacheError(
                f"{path}: is cache {layout.uuid}, but the index at {index} belongs to "
                f"{opened.meta.uuid}: correct 'device' or 'state'"
            )
        return grow(fd, path, layout, size, progress)
    finally:
        os.close(fd)
