# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What lies on a device: reading and writing its superblock, and looking whether there is anything at all.

The superblock is written by :func:`write_format`, and again when the device has grown: the copy first, so that a power
cut in the middle of one leaves the other.
"""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from forebay_cache.device.device import read_all
from forebay_cache.device.files import size_of
from forebay_cache.errors import CacheError
from forebay_cache.format.superblock import (
    COPY_OFFSET,
    JOURNAL_OFFSET,
    MAGIC,
    SUPERBLOCK,
    Superblock,
    is_whole,
    plan,
)

_PROBE = 1 << 20
"""Bytes at both ends of a device that are looked at before formatting.

Partition tables, LVM labels and every file system's superblock lie there."""


def is_blank(fd: int, start: int = 0) -> bool:
    """True if a file holds only zeros from byte ``start`` on, or if both ends of a block device do."""
    size = size_of(fd)
    ends = ((0, min(size, _PROBE)), (max(0, size - _PROBE), min(size, _PROBE)))
    ranges = _written(fd, size) if stat.S_ISREG(os.fstat(fd).st_mode) else ends
    return all(_is_zero(read_all(fd, at + n - max(at, start), max(at, start))) for at, n in ranges)


def format_was_cut(fd: int, ident: uuid.UUID) -> bool:
    """True if nothing is on the device but a part of what :func:`write_format` writes for that uuid.

    That is what a power cut leaves of it: a medium writes 512 bytes whole.
    """
    both = read_all(fd, COPY_OFFSET + SUPERBLOCK, 0)
    expected = plan(size_of(fd), ident).pack() * 2
    pieces = [(both[at : at + 512], expected[at : at + 512]) for at in range(0, len(both), 512)]
    return all(found in (bytes(512), ours) for found, ours in pieces) and is_blank(fd, len(both))


def _is_zero(data: bytes) -> bool:
    return data == bytes(len(data))


def _written(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what a sparse file holds, in pieces."""
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: holes from here to the end
            return
        end = os.lseek(fd, at, os.SEEK_HOLE)
        for start in range(at, end, _PROBE):
            yield start, min(_PROBE, end - start)
        at = end


def read_superblock(fd: int, path: Path) -> Superblock | None:
    """The superblock, or its copy where a power cut has torn it; None if the device does not begin with our magic.

    Raises CacheError when both are damaged or the format is unknown, and OSError.
    """
    raw = read_all(fd, SUPERBLOCK, 0)
    if len(raw) < SUPERBLOCK or not raw.startswith(MAGIC):
        return None
    if not is_whole(raw):
        copy = read_all(fd, SUPERBLOCK, COPY_OFFSET)
        if copy.startswith(MAGIC) and is_whole(copy):
            raw = copy
    return Superblock.unpack(raw, path)


def write_superblock(fd: int, layout: Superblock) -> None:
    """Replace the superblock. At any instant one of the two copies on the device is whole. Raises OSError."""
    write_copy(fd, layout)
    os.pwrite(fd, layout.pack(), 0)
    os.fdatasync(fd)


def write_copy(fd: int, layout: Superblock) -> None:
    """Replace the copy alone, durably; also to see whether the device takes writes. Raises OSError."""
    os.pwrite(fd, layout.pack(), COPY_OFFSET)
    os.fdatasync(fd)


def erase(fd: int) -> None:
    """Overwrite both superblocks, durably, so that nobody takes the device for a cache any more. Raises OSError."""
    os.pwrite(fd, bytes(COPY_OFFSET + SUPERBLOCK), 0)
    os.fdatasync(fd)


def write_format(fd: int, path: Path, ident: uuid.UUID) -> Superblock:
    """Make an empty cache of the device: write a journal of zeros, then the superblock. Returns the layout.

    The caller has made sure that nothing is lost by it. Raises CacheError.
    """
    layout = plan(size_of(fd), ident)
    try:
        zeros = bytes(1 << 20)
        for start in range(0, layout.journal_size, len(zeros)):
            part = min(len(zeros), layout.journal_size - start)
            os.pwrite(fd, zeros[:part], JOURNAL_OFFSET + start)
        os.fsync(fd)
        os.pwrite(fd, layout.pack(), 0)
        os.fsync(fd)
        os.pwrite(fd, layout.pack(), COPY_OFFSET)
        os.fsync(fd)
    except OSError as error:
        raise CacheError(
            f"{path}: cannot format: {error.strerror}; free space there or choose another device"
        ) from None
    return layout
