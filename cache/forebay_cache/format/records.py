"""Records: the tables of the index, their keys, and what is stored there as JSON.

Tables (keys big endian so that they sort, values little endian)::

    meta     b"state"          Meta, as JSON
    pages    layer u32, page u32 -> words u64[] (see entry.py)
    sums     group u32         -> checksum u32[16][16]: of each sector of slots 16 * group to 16 * group + 15
    layers   layer u32         -> LayerRecord, as JSON
    hot      layer u32, region u32 -> b""      regions that an origin write may have touched
    records  kind NUL name     -> JSON          what the layers above keep here (disks, images)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from forebay_cache.format.checksum import GROUP

FORMAT = 2
"""The format of the index, of which there is one that this code reads and writes."""

TABLES = ("meta", "pages", "sums", "layers", "hot", "records")

PAGE_KEY = struct.Struct(">II")
"""(number of a layer, number of a page in it), or of a region in the table ``hot``."""
LAYER_KEY = struct.Struct(">I")
GROUP_KEY = struct.Struct(">I")
ALL_OF_GROUP = (1 << GROUP) - 1
"""Mask of the slots of a group."""


@dataclass
class Meta:
    """What the index says of itself and of the whole cache. Stored as JSON: the names are part of the format."""

    uuid: str
    """That of the device: both or none are opened."""
    fresh: bool = True
    """True while nothing was ever stored: a blank device may be formatted for this index."""
    boot_id: str = ""
    """The boot id of the kernel under which the index was opened last."""
    clean: bool = True
    """True if the cache was closed. Nothing but `forebay cache check` reads it."""
    journal_offset: int = 0
    """Where replay of the journal begins: bytes from its start ..."""
    journal_sequence: int = 1
    """... and the sequence number of the frame there."""
    frontier: int = 0
    """No slot with this number or a higher one was ever used."""
    next_layer: int = 1
    """The number of the next layer that is made; numbers are not used again."""
    format: int = FORMAT


@dataclass
class LayerRecord:
    """A layer as the index has it. Stored as JSON: the names are part of the format."""

    name: str
    private: bool
    slots: int = 0
    """How many slots its pages name."""
    sectors: int = 0
    """How many sectors it answers for."""
    dead: bool = False
    """True if it is not used any more, and what it holds is to be freed."""
    pinned: bool = False
    """True if it is clean, and nothing of it may be evicted: the whole image is to stay."""
