# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The header of a VHDX image, Hyper-V's format. Source: Microsoft's MS-VHDX."""

import struct
import uuid

from forebay.origin.virtual.header import CONVERT, SECTOR, File, Header

MAGIC = b"vhdxfile"
NAME = "vhdx"

_REGIONS_AT = 192 << 10
_TABLE = 64 << 10
_ENTRY = 32
_MOST_REGIONS, _MOST_ITEMS = 2047, 2047
_LOWEST = 1 << 20
"""The first byte that a region may have."""
_LARGEST_REGION = 1 << 30


def _guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


_BLOCKS = _guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
_METADATA = _guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
_PARAMETERS = _guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
_SIZE = _guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
_SECTOR = _guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
_PARENT = _guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
_HAS_PARENT = 2


def read(file: File) -> Header:
    """What the header says. Raises ForebayError for one that is refused, and OSError."""
    regions = _regions(file)
    if _BLOCKS not in regions or _METADATA not in regions:
        raise file.bad("a region of it is missing")
    items = _items(file, *regions[_METADATA])
    for guid, length in ((_PARAMETERS, 8), (_SIZE, 8), (_SECTOR, 4)):
        if len(items.get(guid, b"")) != length:
            raise file.bad("its metadata is not whole")
    block, flags = struct.unpack("<II", items[_PARAMETERS])
    if flags & _HAS_PARENT or _PARENT in items:
        raise file.refused("holds only what differs from another image", CONVERT)
    if not 1 << 20 <= block <= 256 << 20 or block & (block - 1):
        raise file.bad(f"its blocks have {block} bytes")
    (sector,) = struct.unpack("<I", items[_SECTOR])
    if sector != SECTOR:
        raise file.refused(
            f"has sectors of {sector} bytes", "convert it with qemu-img convert, on a host that can"
        )
    return Header(NAME, file.check_size(struct.unpack("<Q", items[_SIZE])[0]))


def _regions(file: File) -> dict[bytes, tuple[int, int]]:
    """Offset and length of each region, by what it is for."""
    raw = file.read(_REGIONS_AT, _TABLE, "its region table")
    magic, _sum, count = struct.unpack_from("<4sII", raw)
    if magic != b"regi" or count > _MOST_REGIONS:
        raise file.bad("its region table is none")
    found = {}
    for n in range(count):
        guid, at, length, required = struct.unpack_from("<16sQII", raw, 16 + _ENTRY * n)
        if guid not in (_BLOCKS, _METADATA):
            if required & 1:
                raise file.bad("it needs a region that nobody knows")
            continue
        if guid in found or at < _LOWEST or length > _LARGEST_REGION:
            raise file.bad("its region table is damaged")
        file.check_inside(at, length, "a region of it")
        found[guid] = (at, length)
    return found


def _items(file: File, at: int, length: int) -> dict[bytes, bytes]:
    """The content of each item of the metadata that counts, by what it is for."""
    raw = file.read(at, min(length, _TABLE), "its metadata")
    if len(raw) < _TABLE or raw[:8] != b"metadata":
        raise file.bad("its metadata is none")
    (count,) = struct.unpack_from("<H", raw, 10)
    if count > _MOST_ITEMS:
        raise file.bad(f"its metadata has {count} items")
    found = {}
    for n in range(count):
        guid, offset, size = struct.unpack_from("<16sII", raw, 32 + _ENTRY * n)
        if guid == _PARENT:
            found[guid] = b""
        elif guid in (_PARAMETERS, _SIZE, _SECTOR):
            if guid in found or size > 8 or not _TABLE <= offset <= length - size:
                raise file.bad("its metadata is damaged")
            found[guid] = file.read(at + offset, size, "its metadata")
    return found
