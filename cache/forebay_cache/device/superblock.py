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
    """True when a file holds only zeros from ``start`` on, or when neither end of a device holds anything else."""
    size = size_of(fd)
    ends = ((0, min(size, _PROBE)), (max(0, size - _PROBE), min(size, _PROBE)))
    ranges = _written(fd, size) if stat.S_ISREG(os.fstat(fd).st_mode) else ends
    return all(_is_zero(read_all(fd, at + n - max(at, start), max(at, start))) for at, n in ranges)


def format_was_cut(fd: int, ident: uuid.UUID) -> bool:
    """Whether there is nothing on the device but a part of what :func:`write_format` would write for that uuid.

    A power cut came in between: what a medium writes whole is 512 bytes.
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
    """The superblock, or None when the device does not begin with our magic.

    Where a power cut tore it, its copy. Raises :class:`CacheError` when both are damaged, or the format is unknown.
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
    """The copy alone; also to see whether the device takes writes. Raises OSError."""
    os.pwrite(fd, layout.pack(), COPY_OFFSET)
    os.fdatasync(fd)


def erase(fd: int) -> None:
    """Nobody takes this device for a cache any more. Raises OSError."""
    os.pwrite(fd, bytes(COPY_OFFSET + SUPERBLOCK), 0)
    os.fdatasync(fd)


def write_format(fd: int, path: Path, ident: uuid.UUID) -> Superblock:
    """Write an empty journal, then the superblock; the caller has made sure that nothing is lost by it."""
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
