# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Records of the intent journal: what each says, and how it is packed.

Head of every record, 16 bytes little endian: ``kind u8 | side u8 | mask u16 | layer u32 | a u32 | b u32``.

=========  ===============================================  =================  ============================
kind       what it says                                     a, b               what follows the head
=========  ===============================================  =================  ============================
WRITE      private sectors have data in a slot, which is    block, slot        checksum u32 of each sector
           the block's first (side 0) or second (side 1)
ZERO       private sectors are all zeros; side: 1 if the    block, side bits   nothing
           image has to keep space for them
DROP       clean sectors are not valid any more             block, 0           nothing
HOT        the origin of a region may be written            region, 0          nothing
LAYER      a layer was made; side: 1 if it is private;      0, 0               its name, JSON
           mask: how many bytes follow
=========  ===============================================  =================  ============================

Frames of these records are what ``durable.journal`` writes; what they mean after a crash is in ``offline.claims``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from forebay_cache.format.records import LayerName

WRITE, ZERO, DROP, HOT, LAYER = 1, 2, 3, 4, 5
"""The kinds of records."""
HEAD = struct.Struct("<BBHIII")
LONGEST_NAME = 0xFFFF
"""Bytes that the name of a layer may have: their number takes the place of the mask."""
_SUMS = [struct.Struct(f"<{n}I") for n in range(17)]


class Op(NamedTuple):
    """One record, as :func:`unpack` gives it. The fields are those of the head, and what follows it."""

    kind: int
    side: int
    mask: int
    layer: int
    a: int
    b: int
    sums: tuple[int, ...] = ()
    """Of a WRITE: the checksums of the sectors of ``mask``, in their order."""
    name: LayerName | None = None
    """Of a LAYER."""


def write(side: int, mask: int, layer: int, block: int, slot: int, sums: list[int]) -> bytes:
    """Sectors of a private block have data in a slot; ``sums`` has a checksum for each bit of ``mask``."""
    return HEAD.pack(WRITE, side, mask, layer, block, slot) + _SUMS[len(sums)].pack(*sums)


_WRITE_ONE = struct.Struct("<BBHIIII")


def write_one(side: int, mask: int, layer: int, block: int, slot: int, value: int) -> bytes:
    """:func:`write` of one sector."""
    return _WRITE_ONE.pack(WRITE, side, mask, layer, block, slot, value)


def zero(mask: int, layer: int, block: int, sides: int, *, provisioned: bool = False) -> bytes:
    """Sectors of a private block are all zeros. With all bits in ``mask`` the block has no slots any more.

    ``provisioned``: the image has to keep space for them.
    """
    return HEAD.pack(ZERO, provisioned, mask, layer, block, sides)


def drop(mask: int, layer: int, block: int) -> bytes:
    """Sectors of a clean block are not valid any more."""
    return HEAD.pack(DROP, 0, mask, layer, block, 0)


def hot(layer: int, region: int) -> bytes:
    """The origin of a clean layer may be written in this region of 4 MiB."""
    return HEAD.pack(HOT, 0, 0, layer, region, 0)


def layer_made(layer: int, name: LayerName) -> bytes:
    """A layer was made, and has that number. Raises ValueError for a name that is too long for a record."""
    raw = name.pack()
    if len(raw) > LONGEST_NAME:
        raise ValueError(f"the name of a layer has {len(raw)} bytes, of {LONGEST_NAME} at most")
    return HEAD.pack(LAYER, name.is_private, len(raw), layer, 0, 0) + raw


def unpack(payload: bytes) -> Iterator[Op]:
    """The records of one frame, in order. Raises ValueError at one that makes no sense, after those before it."""
    at = 0
    while at < len(payload):
        try:
            op, at = _unpack_one(payload, at)
        except struct.error:
            raise ValueError(f"a record at byte {at} of {len(payload)} that is cut off") from None
        yield op


def _unpack_one(payload: bytes, at: int) -> tuple[Op, int]:
    """The record at that byte, and where the next one begins. Raises ValueError, and struct.error if it is cut off."""
    kind, side, mask, layer, a, b = HEAD.unpack_from(payload, at)
    at += HEAD.size
    if kind == WRITE and side < 2:
        packer = _SUMS[mask.bit_count()]
        return Op(kind, side, mask, layer, a, b, packer.unpack_from(payload, at)), at + packer.size
    if kind == LAYER and at + mask <= len(payload):
        name = LayerName.unpack(payload[at : at + mask], private=bool(side))
        return Op(kind, side, mask, layer, a, b, (), name), at + mask
    if kind in (ZERO, DROP, HOT):
        return Op(kind, side, mask, layer, a, b), at
    raise ValueError(f"a record of kind {kind}")
