# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Records: the tables of the index, their keys, and what is stored there as JSON.

Tables (keys big endian so that they sort, values little endian)::

    meta     b"state"          Meta, as JSON
    pages    layer u32, page u32 -> words u64[] (see entry.py)
    sums     group u32         -> checksum u32[16][16]: of each sector of slots 16 * group to 16 * group + 15
    layers   layer u32         -> LayerRecord, as JSON
    hot      layer u32, region u32 -> b""      regions that an origin write may have touched
    records  kind NUL name     -> JSON          what the layers above keep here (disks, images)
             kind NUL 0xFF sha256 -> JSON {"name", "value"}   the same where the name is too long for a key

In format 2 a layer had one text for a name, which was taken apart by whoever had to know whose it is. In format 3 the
pages did not tell zeros for which the image has to keep space from others. An index of these formats is read as it is;
the first commit makes one of today's format of it, all at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Self

from forebay_cache.format.checksum import GROUP

FORMAT: Final = 4
"""The format of an index that is written."""
NAMES_ARE_TEXT: Final = 2
"""The oldest format that is read."""
FORMATS: Final = range(NAMES_ARE_TEXT, FORMAT + 1)
"""Those that are read."""

TABLES: Final = ("meta", "pages", "sums", "layers", "hot", "records")

PAGE_KEY = struct.Struct(">II")
"""(number of a layer, number of a page in it), or of a region in the table ``hot``."""
LAYER_KEY = struct.Struct(">I")
GROUP_KEY = struct.Struct(">I")
ALL_OF_GROUP: Final = (1 << GROUP) - 1
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


class Kind(Enum):
    """What a layer holds. The values are part of the format."""

    CLEAN = "clean"
    """What the origin has too."""
    PRIVATE = "private"
    """What only the cache has."""


@dataclass(frozen=True)
class LayerName:
    """Whose a layer is. No two layers that are in use have the same name. Stored as JSON: the fields are the format."""

    kind: Kind
    image: str
    """The key of the image that the layer lies on; empty in a private layer of a version that did not write it down."""
    disk: str = ""
    """The name of the disk that a private layer belongs to; empty in a clean one."""
    generation: int = 0
    """Of a disk's private layers, which one it is: a newer layer has a higher number. 0 in a clean one."""
    parent: int | None = field(default=None, compare=False)
    """Reserved, for private layers that are kept: the number of the layer under this one."""

    @classmethod
    def of_image(cls, image: str) -> Self:
        """The clean layer of an image, by its key."""
        return cls(Kind.CLEAN, image)

    @classmethod
    def of_disk(cls, disk: str, generation: int, image: str) -> Self:
        """A private layer of a disk on the image with that key."""
        return cls(Kind.PRIVATE, image, disk, generation)

    @property
    def is_private(self) -> bool:
        """True if only the cache has what is in the layer."""
        return self.kind is Kind.PRIVATE

    def __str__(self) -> str:
        """For messages; also the text that was its name in format 2."""
        if not self.is_private:
            return f"image:{self.image}"
        return f"disk:{self.disk}:{self.generation}" + (f":{self.image}" if self.image else "")

    @classmethod
    def parse(cls, text: str, *, private: bool) -> Self:
        """The name that had this text in format 2. Raises ValueError."""
        kind, _, rest = text.partition(":")
        if kind == "image" and not private:
            return cls.of_image(rest)
        disk, _, rest = rest.partition(":")
        generation, _, image = rest.partition(":")
        if kind == "disk" and private and generation.isdecimal():
            return cls.of_disk(disk, int(generation), image)
        raise ValueError(f"'{text}' is no name of a {'private' if private else 'clean'} layer")

    def json(self) -> dict[str, Any]:
        """As it is stored."""
        return {
            "kind": self.kind.value,
            "image": self.image,
            "disk": self.disk,
            "generation": self.generation,
            "parent": self.parent,
        }

    @classmethod
    def from_json(cls, found: object) -> Self:
        """The name that is stored so. Raises ValueError."""
        match found:
            case {
                "kind": str(kind),
                "image": str(image),
                "disk": str(disk),
                "generation": int(generation),
                "parent": None | int() as parent,
                **others,
            } if not others:
                return cls(Kind(kind), image, disk, generation, parent)
        raise ValueError(f"no name of a layer: {found!r}")

    def pack(self) -> bytes:
        """As the journal has it."""
        return json.dumps(self.json(), ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )

    @classmethod
    def unpack(cls, raw: bytes, *, private: bool) -> Self:
        """The name that a journal has, of today or of a version that wrote format 2. Raises ValueError."""
        if not raw.startswith(b"{"):
            return cls.parse(raw.decode(), private=private)
        found = cls.from_json(_loads(raw))
        if found.is_private != private:
            raise ValueError(f"'{found}' is a layer of both kinds")
        return found


@dataclass
class LayerRecord:
    """A layer as the index has it."""

    name: LayerName
    slots: int = 0
    """How many slots its pages name."""
    sectors: int = 0
    """How many sectors it answers for."""
    dead: bool = False
    """True if it is not used any more, and what it holds is to be freed."""
    pinned: bool = False
    """True if it is clean, and nothing of it may be evicted: the whole image is to stay."""

    @property
    def private(self) -> bool:
        """True if only the cache has what is in the layer."""
        return self.name.is_private

    def pack(self) -> bytes:
        """As it is stored: the fields of the name beside the others, which are part of the format."""
        state = {name: getattr(self, name) for name in _NEW_LAYER}
        return json.dumps(self.name.json() | state).encode()

    @classmethod
    def unpack(cls, raw: bytes, index_format: int = FORMAT) -> Self:
        """The record that is stored so in an index of that format. Raises ValueError."""
        found = _loads(raw)
        if index_format == NAMES_ARE_TEXT and isinstance(found, dict):
            found = _NEW_LAYER | found  # older versions of it had less to say
        match found:
            case {
                "slots": int(slots),
                "sectors": int(sectors),
                "dead": bool(dead),
                "pinned": bool(pinned),
                **name,
            }:
                return cls(_name_in_index(name, index_format), slots, sectors, dead, pinned)
        raise ValueError("no record of a layer")


_NEW_LAYER: Final = {"slots": 0, "sectors": 0, "dead": False, "pinned": False}
"""What a LayerRecord says besides the name, and of a layer that was just made."""


def _name_in_index(found: dict[Any, Any], index_format: int) -> LayerName:
    """Raises ValueError."""
    if index_format != NAMES_ARE_TEXT:
        return LayerName.from_json(found)
    match found:
        case {"name": str(text), "private": bool(private), **others} if not others:
            return LayerName.parse(text, private=private)
    raise ValueError(f"no name of a layer: {found!r}")


def _loads(raw: bytes) -> object:
    """The JSON. Raises ValueError."""
    try:
        found: object = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return found


# -- names ------------------------------------------------------------------------------------------------------------

LONGEST_NAME = 8192
"""Bytes of the name of a layer or of a record, at most: more than any path or URI that is taken makes of it."""

_LONGEST_KEY = 511
"""Bytes of a key in LMDB, at most."""
_DIGEST = b"\xff"
"""Begins the name's part of a key that has a digest: no text encoded as UTF-8 has this byte."""
_LARGEST_VALUE = 1 << 20
"""Bytes of a record's JSON, at most."""


def encode_name(name: str) -> bytes:
    """A name as it is stored. It may be any text, with NUL and with the surrogates of bytes that are not UTF-8.

    Raises OSError(ENAMETOOLONG).
    """
    raw = name.encode("utf-8", "surrogatepass")
    if len(raw) > LONGEST_NAME:
        raise OSError(
            errno.ENAMETOOLONG,
            f"a name of {len(raw)} bytes is too long for the index, which takes {LONGEST_NAME}: "
            f"'{name[:60]}...'",
        )
    return raw


def decode_name(raw: bytes) -> str:
    """The name that :func:`encode_name` made this of. Raises ValueError."""
    return raw.decode("utf-8", "surrogatepass")


def record_key(kind: str, name: str) -> bytes:
    """The key of a record, of bounded size however long the name is. Raises OSError(ENAMETOOLONG)."""
    raw = encode_name(name)
    head = kind.encode() + b"\0"
    if len(head) + len(raw) <= _LONGEST_KEY:
        return head + raw
    return head + _DIGEST + hashlib.sha256(raw).digest()


def pack_record(kind: str, name: str, value: dict[str, Any]) -> tuple[bytes, bytes]:
    """(key, value) of a record as the table ``records`` has it. Raises OSError for what cannot be stored."""
    key = record_key(kind, name)
    is_long = key.partition(b"\0")[2].startswith(_DIGEST)
    try:
        raw = json.dumps({"name": name, "value": value} if is_long else value).encode()
    except (TypeError, ValueError) as fault:
        raise OSError(errno.EINVAL, f"a record that is no JSON: {fault}") from None
    if len(raw) > _LARGEST_VALUE:
        raise OSError(errno.EFBIG, f"a record of {len(raw)} bytes is too large for the index")
    return key, raw


def unpack_record(key: bytes, raw: bytes) -> tuple[str, str, dict[str, Any]]:
    """(kind, name, value) of what the table has. Raises ValueError for what :func:`pack_record` does not make."""
    kind, nul, rest = key.partition(b"\0")
    value = json.loads(raw)
    if rest.startswith(_DIGEST):
        found = value if isinstance(value, dict) else {}
        name, value = found.get("name"), found.get("value")
        if not isinstance(name, str) or record_key(kind.decode(), name) != key:
            raise ValueError("its name is not the one that its key was made of")
    else:
        name = decode_name(rest)
    if not (kind and nul and isinstance(value, dict)):
        raise ValueError("not an object with a kind and a name")
    return kind.decode(), name, value
