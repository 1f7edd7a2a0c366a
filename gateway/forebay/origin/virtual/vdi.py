# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The header of a VDI image, VirtualBox's format. Source: the comment at the head of QEMU's block/vdi.c."""

import struct

from forebay.origin.virtual.header import CONVERT, SECTOR, File, Header

NAME = "vdi"
SIGNATURE = struct.pack("<I", 0xBEDA107F)
AT = 64
"""The byte at which the signature stands."""

_NUMBERS = struct.Struct("<IIIIIIIQIIII")
_NUMBERS_AT = 340
_VERSION = 0x00010001
_BLOCK = 1 << 20
_MOST_BLOCKS = 0x1FFFFFFF
_LINKS_AT, _UUID = 424, 16
_DYNAMIC, _STATIC = 1, 2


def read(file: File) -> Header:
    """What the header says. Raises ForebayError for one that is refused, and OSError."""
    raw = file.read(0, SECTOR, "its header")
    version, _length, kind = struct.unpack_from("<III", raw, AT + 4)
    if version != _VERSION:
        raise file.bad(f"it is VDI of version {version >> 16}.{version & 0xFFFF}")
    if kind not in (_DYNAMIC, _STATIC) or any(raw[_LINKS_AT : _LINKS_AT + 2 * _UUID]):
        raise file.refused("holds only what differs from another image", CONVERT)
    table, data, *geometry, sector, _unused, size, block, extra, blocks, allocated = (
        _NUMBERS.unpack_from(raw, _NUMBERS_AT)
    )
    del geometry
    if sector != SECTOR or block != _BLOCK or extra:
        raise file.bad(f"its blocks have {block} bytes, and {extra} more")
    if not -(-size // _BLOCK) <= blocks <= _MOST_BLOCKS or allocated > blocks:
        raise file.bad(f"it has {blocks} blocks for {size} bytes")
    if table % SECTOR or data % SECTOR or not SECTOR <= table < data:
        raise file.bad(f"its block map lies at byte {table}")
    file.check_inside(table, 4 * blocks, "its block map")
    return Header(NAME, file.check_size(size))
