"""Records of the intent journal: what each says, and how it is packed.

Head of every record, 16 bytes little endian: ``kind u8 | side u8 | mask u16 | layer u32 | a u32 | b u32``.

=========  ======================================  ==============================  ==========================
kind       meaning                                 a, b                            followed by
=========  ======================================  ==============================  ==========================
WRITE      private sectors got data                block, slot; side: 0 or 1       crc32 u32 of each sector
ZERO       private sectors became zeros            block, new side bits            nothing
DROP       clean sectors are no longer valid       block, 0                        nothing
HOT        the origin is written in this region    region, 0                       nothing
LAYER      a layer was made; mask: bytes behind    0, 0; side: 1 when private      its name, JSON
=========  ======================================  ==============================  ==========================
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from forebay_cache.format.records import LayerName

WRITE, ZERO, DROP, HOT, LAYER = 1, 2, 3, 4, 5
HEAD = struct.Struct("<BBHIII")
LONGEST_NAME = 0xFFFF
"""Bytes that the name of a layer may have: their number takes the place of the mask."""
_CRCS = [struct.Struct(f"<{n}I") for n in range(17)]


class Op(NamedTuple):
    """One record, as :func:`unpack` gives it."""

    kind: int
    side: int
    mask: int
    layer: int
    a: int
    b: int
    crcs: tuple[int, ...] = ()
    name: LayerName | None = None


def write(side: int, mask: int, layer: int, block: int, slot: int, crcs: list[int]) -> bytes:
    """Private sectors got data; ``crcs``: one for each bit of ``mask``."""
    return HEAD.pack(WRITE, side, mask, layer, block, slot) + _CRCS[len(crcs)].pack(*crcs)


_WRITE_ONE = struct.Struct("<BBHIIII")


def write_one(side: int, mask: int, layer: int, block: int, slot: int, crc: int) -> bytes:
    """:func:`write` of one sector."""
    return _WRITE_ONE.pack(WRITE, side, mask, layer, block, slot, crc)


def zero(mask: int, layer: int, block: int, sides: int) -> bytes:
    """Private sectors became zeros."""
    return HEAD.pack(ZERO, 0, mask, layer, block, sides)


def drop(mask: int, layer: int, block: int) -> bytes:
    """Clean sectors are no longer valid."""
    return HEAD.pack(DROP, 0, mask, layer, block, 0)


def hot(layer: int, region: int) -> bytes:
    """The origin is about to be written in this region."""
    return HEAD.pack(HOT, 0, 0, layer, region, 0)


def layer_made(layer: int, name: LayerName) -> bytes:
    """A layer was made. Raises ValueError for a name that is too long for a record."""
    raw = name.pack()
    if len(raw) > LONGEST_NAME:
        raise ValueError(f"the name of a layer has {len(raw)} bytes, of {LONGEST_NAME} at most")
    return HEAD.pack(LAYER, name.is_private, len(raw), layer, 0, 0) + raw


def unpack(payload: bytes) -> Iterator[Op]:
    """The records of one frame, in order. Raises ValueError at one that makes no sense."""
    at = 0
    while at < len(payload):
        try:
            op, at = _unpack_one(payload, at)
        except struct.error:
            raise ValueError(f"a record at byte {at} of {len(payload)} that is cut off") from None
        yield op


def _unpack_one(payload: bytes, at: int) -> tuple[Op, int]:
    """One record, and where the next one begins. Raises ValueError and struct.error."""
    kind, side, mask, layer, a, b = HEAD.unpack_from(payload, at)
    at += HEAD.size
    if kind == WRITE and side < 2:
        packer = _CRCS[mask.bit_count()]
        return Op(kind, side, mask, layer, a, b, packer.unpack_from(payload, at)), at + packer.size
    if kind == LAYER and at + mask <= len(payload):
        name = LayerName.unpack(payload[at : at + mask], private=bool(side))
        return Op(kind, side, mask, layer, a, b, (), name), at + mask
    if kind in (ZERO, DROP, HOT):
        return Op(kind, side, mask, layer, a, b), at
    raise ValueError(f"a record of kind {kind}")
