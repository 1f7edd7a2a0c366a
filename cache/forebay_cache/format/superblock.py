# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The superblock: what a formatted device says of itself, in its first 4096 bytes and once more behind them.

Layout of a device, in bytes (see ``cache/README.md``)::

    0            superblock, 4096
    4096         its copy, 4096
    1 MiB        intent journal (``journal_size``)
    data_offset  slots of one block each
"""

from __future__ import annotations

import struct
import uuid
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from forebay_cache.errors import CacheError
from forebay_cache.format.entry import LAST_SLOT
from forebay_cache.format.geometry import BLOCK

MAGIC = b"FOREBAY\0"
FORMAT = 1
"""The format of the device, of which there is one that this code reads and writes."""
SUPERBLOCK = 4096
"""Bytes of a superblock."""
COPY_OFFSET = SUPERBLOCK
"""Where its copy lies."""
JOURNAL_OFFSET = 1 << 20
"""Where the journal begins."""
SMALLEST = 4 << 20
"""Below so many bytes there is no room for a journal and a few slots."""

_FIELDS = struct.Struct("<8sII16sQQQQ")


@dataclass(frozen=True)
class Superblock:
    """What a formatted device says of itself; sizes in bytes."""

    uuid: uuid.UUID
    block_size: int
    size: int
    journal_size: int
    data_offset: int
    slots: int

    def grown(self, size: int) -> Superblock:
        """The layout with ``size`` bytes: more slots, everything else where it was. Raises CacheError for too many."""
        _check_not_too_large(size)
        return replace(self, size=size, slots=(size - self.data_offset) // BLOCK)

    def pack(self) -> bytes:
        """The 4096 bytes that lie on the device; the last four are a CRC32 of the others."""
        body = _FIELDS.pack(
            MAGIC,
            FORMAT,
            self.block_size,
            self.uuid.bytes,
            self.size,
            self.journal_size,
            self.data_offset,
            self.slots,
        )
        body = body.ljust(SUPERBLOCK - 4, b"\0")
        return body + zlib.crc32(body).to_bytes(4, "little")

    @classmethod
    def unpack(cls, raw: bytes, path: Path) -> Superblock:
        """What the 4096 bytes say. Raises CacheError if they are damaged or of a format this version does not know."""
        if not is_whole(raw):
            raise CacheError(
                f"{path}: the superblock is damaged; if nothing dirty can be on it, run "
                "'forebay cache format --force'"
            )
        _, version, block_size, ident, size, journal, data, slots = _FIELDS.unpack_from(raw)
        if version != FORMAT:
            raise CacheError(
                f"{path}: cache format {version}, this version knows only {FORMAT}; "
                "drain it with the version that wrote it"
            )
        found = cls(uuid.UUID(bytes=ident), block_size, size, journal, data, slots)
        ends = (JOURNAL_OFFSET + journal, data + slots * BLOCK)
        if block_size != BLOCK or not journal or not slots or ends[0] > data or ends[1] > size:
            raise CacheError(
                f"{path}: the superblock makes no sense, whole as it is; if nothing dirty can be on it, run "
                "'forebay cache format --force'"
            )
        return found


def is_whole(raw: bytes) -> bool:
    """True if the checksum at the end of a superblock is that of what it holds."""
    return zlib.crc32(raw[:-4]) == int.from_bytes(raw[-4:], "little")


def _check_not_too_large(size: int) -> None:
    if size > LAST_SLOT * BLOCK:
        raise CacheError(f"a cache of {size} bytes is too large: at most {LAST_SLOT * BLOCK} bytes")


def plan(size: int, ident: uuid.UUID) -> Superblock:
    """The layout of an empty cache on a device of ``size`` bytes. Raises CacheError for a size that cannot be."""
    if size < SMALLEST:
        raise CacheError(f"a cache of {size} bytes is too small: at least {SMALLEST >> 20} MiB")
    _check_not_too_large(size)
    journal = min(max(size // 64, 256 << 10), 32 << 20) // BLOCK * BLOCK
    data = JOURNAL_OFFSET + journal
    return Superblock(ident, BLOCK, size, journal, data, (size - data) // BLOCK)
