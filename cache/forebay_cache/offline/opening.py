# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Opening a cache: device and index have to be there, belong together, and make sense; then ``recovery`` starts it."""

from __future__ import annotations

import fcntl
import os
import struct
import uuid
from contextlib import ExitStack
from pathlib import Path

from forebay_cache.cache import Cache, boot_id
from forebay_cache.device.device import Device
from forebay_cache.device.files import open_device, size_of
from forebay_cache.device.superblock import format_was_cut, is_blank, read_superblock, write_format
from forebay_cache.device.worker import TIMEOUT
from forebay_cache.errors import CacheError
from forebay_cache.format.geometry import BLOCK
from forebay_cache.format.superblock import Superblock
from forebay_cache.index.index import Index
from forebay_cache.offline.formatting import DEFAULT_SIZE
from forebay_cache.offline.recovery import recover
from forebay_cache.offline.replay import Telling, nobody_is_told


def open_cache(
    device: Path,
    index: Path,
    *,
    size: int | None = None,
    block_size: int = BLOCK,
    boot: str | None = None,
    timeout: float = TIMEOUT,
    telling: Telling = nobody_is_told,
) -> Cache:
    """Open, create or recover a cache.

    ``size`` (bytes) is for a device that is a file and does not exist yet. ``boot`` stands for the kernel's boot id.
    ``timeout`` (seconds): when a call to the device, or to the index, that has not ended counts as failed.
    ``telling`` is told how far a recovery is: it is as long as the journal has records, and the device is slow.
    Raises :class:`CacheError` when that is not possible without losing something: the text says what to do.
    """
    if block_size != BLOCK:
        raise CacheError(f"block_size {block_size} is not supported: 64 KiB is the only one yet")
    index.parent.mkdir(parents=True, exist_ok=True)
    _check_not_lost(device, index)
    with ExitStack() as undo:
        fd = open_device(device, create_size=size or DEFAULT_SIZE)
        undo.callback(os.close, fd)
        undo.callback(fcntl.flock, fd, fcntl.LOCK_UN)  # a map has a duplicate of the descriptor
        layout = _layout(fd, device, index)
        try:
            opened = Index(index, layout.slots if layout else size_of(fd) // BLOCK)
            undo.callback(opened.close)
            found = Device(fd, device, _match(fd, device, layout, opened))
            opened.timeout = timeout
            cache = recover(found, opened, boot or boot_id(), timeout, telling)
        except (ValueError, TypeError, LookupError, struct.error) as fault:
            raise CacheError(
                f"{device}: what it or its index says makes no sense ({fault}): see 'forebay cache check'"
            ) from fault
        undo.pop_all()
        return cache


def _check_not_lost(device: Path, index: Path) -> None:
    """Raise CacheError where the device is gone that an index describes: no blank one may come into its place."""
    if device.exists() or not index.exists():
        return
    opened = Index(index, 0)
    opened.close()
    if not opened.meta.fresh:
        raise CacheError(
            f"{device}: is gone, but the index at {index} describes the cache on it; bring back the device "
            f"{opened.meta.uuid}, or start over with 'forebay cache format --force'"
        )


def _layout(fd: int, device: Path, index: Path) -> Superblock | None:
    """What the superblock says, if there is one. Raises CacheError where that cannot be gone on with."""
    try:
        layout = read_superblock(fd, device)
    except CacheError:
        if not index.exists():
            raise
        return None  # the index knows whether the format was cut short
    if layout is not None and size_of(fd) < layout.size:
        raise CacheError(
            f"{device}: {size_of(fd)} bytes, but the cache on it has {layout.size}: it was made smaller; "
            f"give it its size back, or drop the cache with 'forebay cache format --force'"
        )
    if layout is not None and not index.exists():
        raise CacheError(
            f"{device}: holds a cache whose index is not at {index}; point 'state' to it, or drop what the "
            "cache holds with 'forebay cache format --force'"
        )
    return layout


def _match(fd: int, path: Path, layout: Superblock | None, index: Index) -> Superblock:
    """Device and index belong together, or the device is blank and the index has never been used.

    As good as blank is one whose format a power cut interrupted.
    """
    ident = uuid.UUID(index.meta.uuid)
    if layout is None:
        cut_short = index.meta.fresh and format_was_cut(fd, ident)
        if not cut_short and not is_blank(fd):
            read_superblock(fd, path)  # it has its own words for one that is damaged
            raise CacheError(
                f"{path}: holds something that is not a Forebay cache; choose another device, or overwrite it "
                "with 'forebay cache format --force'"
            )
        if not index.meta.fresh:
            raise CacheError(
                f"{path}: is blank, but the index at {index.path} describes a cache; bring back the device "
                f"{index.meta.uuid}, or start over with 'forebay cache format --force'"
            )
        return write_format(fd, path, ident)
    if layout.uuid != ident:
        raise CacheError(
            f"{path}: is cache {layout.uuid}, but the index at {index.path} belongs to {ident}; correct "
            "'device' or 'state', or drop what it holds with 'forebay cache format --force'"
        )
    return layout
