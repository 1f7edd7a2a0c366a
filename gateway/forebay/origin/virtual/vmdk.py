# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The header of a VMDK image that is one file: monolithicSparse, or streamOptimized.

A VMDK may be a text that names other files or devices, in a file of its own or inside an image: those are refused.
Source: VMware's Virtual Disk Format 5.0.
"""

import re
import struct

from forebay.origin.virtual.header import CONVERT, SECTOR, File, Header

MAGIC = b"KDMV"
TEXTS = (b"# Disk DescriptorFile", b"# Disk Descriptor File")
"""The first bytes of a text that names other files."""
NAME = "vmdk"

_HEADER = struct.Struct("<4sIIQQQQIQQQ")
_COMPRESSED = 1 << 16
_AT_END = (1 << 64) - 1
_FOOTER = 3 * SECTOR
_LONGEST_DESCRIPTOR = 20 * SECTOR
_LARGEST_GRAIN = 0x200000
"""Sectors."""
_MOST_TABLES = 32 << 20
_EXTENT = re.compile(r"^\s*(RW|RDONLY|NOACCESS)\s", re.MULTILINE)
_KINDS = ("monolithicsparse", "streamoptimized")


def read(file: File) -> Header:
    """What the header says. Raises ForebayError for one that is refused, and OSError."""
    raw = file.read(0, SECTOR, "its header")
    if raw.startswith(TEXTS):
        raise file.refused("is only a text that names other files", CONVERT)
    capacity = _check(file, raw)
    is_streamed = _HEADER.unpack_from(raw)[9] == _AT_END
    if is_streamed:
        if file.length < _FOOTER:
            raise file.bad("its footer is missing")
        footer = file.read(file.length - 2 * SECTOR, SECTOR, "its footer")
        if _check(file, footer) != capacity or _HEADER.unpack_from(footer)[9] == _AT_END:
            raise file.bad("its footer says other things than its header")
    _check_descriptor(file, raw)
    flags = _HEADER.unpack_from(raw)[2]
    return Header(
        NAME,
        file.check_size(capacity * SECTOR),
        not_writable=f"is compressed, as a stream: {CONVERT}"
        if is_streamed or flags & _COMPRESSED
        else None,
    )


def _check(file: File, raw: bytes) -> int:
    """The capacity that a header has, in sectors. Raises ForebayError."""
    magic, version, _flags, capacity, grain, _at, _length, entries, _spare, tables, _data = (
        _HEADER.unpack_from(raw)
    )
    if magic != MAGIC or not 1 <= version <= 3:
        raise file.bad(f"it is VMDK of version {version}")
    if capacity == 0:
        raise file.refused("is only a text that names other files", CONVERT)
    if not 0 < grain <= _LARGEST_GRAIN or grain & (grain - 1):
        raise file.bad(f"its grains have {grain} sectors")
    if not 0 < entries <= SECTOR:
        raise file.bad(f"its grain tables have {entries} entries")
    file.check_size(capacity * SECTOR)
    if -(-capacity // (grain * entries)) > _MOST_TABLES:
        raise file.bad("it has too many grain tables")
    if tables != _AT_END:
        file.check_inside(tables * SECTOR, SECTOR, "its grain directory")
    return int(capacity)


def _check_descriptor(file: File, raw: bytes) -> None:
    """Raise ForebayError where the text in the image names a parent, or more than itself."""
    at, length = (x * SECTOR for x in _HEADER.unpack_from(raw)[5:7])
    if not at:
        return
    if not 0 < length <= _LONGEST_DESCRIPTOR:
        raise file.bad(f"its descriptor has {length} bytes")
    text = file.read(at, length, "its descriptor").partition(b"\0")[0].decode("latin-1")
    told = {
        name.strip().lower(): value.strip().strip('"').lower()
        for name, equals, value in (line.partition("=") for line in text.splitlines())
        if equals
    }
    if told.get("parentcid", "ffffffff") != "ffffffff" or "parentfilenamehint" in text.lower():
        raise file.refused("holds only what differs from another image", CONVERT)
    if told.get("createtype") not in _KINDS:
        kind = told.get("createtype", "")
        shown = kind[:40] if kind.isprintable() and kind else "unknown"
        raise file.refused(f"is a VMDK of type {shown}, and may name other files", CONVERT)
    if len(_EXTENT.findall(text)) > 1:
        raise file.refused("has several extents, in other files", CONVERT)
