# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The header of a qcow2 image, with a bound on every number of it.

Whoever made the file chose each byte. So nothing is believed that does not fit the file, and what names other files is
told, and followed by nobody here. Source: docs/interop/qcow2.txt of QEMU, and the bounds of its block/qcow2.h.
"""

import struct
from dataclasses import dataclass

MAGIC = b"QFI\xfb"

HEAD = 64 << 10
"""Bytes from the start of the file that `parse` wants. Header, extensions and the backing file's name lie in them."""

_FIRST = struct.Struct(">4sIQIIQIIQQIIQ")
_MORE = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")

_LEAST_BITS, _MOST_BITS = 9, 21
_LEAST_EXTENDED_BITS = 14
_MOST_L1 = 32 << 20
"""Bytes of the table of tables."""
_LONGEST_NAME = 1023
_MOST_EXTENSIONS = 64

_CORRUPT, _EXTERNAL_DATA, _COMPRESSION, _EXTENDED_L2 = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_KNOWN = 1 << 0 | _CORRUPT | _EXTERNAL_DATA | _COMPRESSION | _EXTENDED_L2
"""Incompatible features. The lowest, "dirty", speaks of reference counts, which nobody needs who only reads."""

_COMPRESSIONS = ("zlib", "zstd")
_ENCRYPTIONS = {1: "AES", 2: "LUKS"}


@dataclass(frozen=True)
class Header:
    """What a header says, and is possible."""

    version: int
    size: int
    """Bytes that a guest sees."""
    cluster_bits: int
    l1_offset: int
    l1_entries: int
    """Entries of the table of tables that the size takes; the file has as many."""
    compression: str
    """Of compressed clusters: zlib or zstd."""
    extended: bool
    """True if entries of second tables have 16 bytes, and tell 32 parts of a cluster apart."""
    encryption: str
    """AES or LUKS; empty where the data is plain."""
    backing: bytes
    """The name of the backing file, as it stands there; empty where there is none."""
    backing_format: bytes
    external_data: bool
    """True if the data lies in another file."""
    data_file: bytes
    """The name of that, if the header has it."""
    corrupt: bool
    """True if QEMU noted that the tables are damaged."""
    bitmaps: bool = False
    """True if it has bitmaps of a backup program, of which blocks have changed."""

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Entries of a second table, which has one cluster."""
        return self.cluster // (16 if self.extended else 8)


def parse(head: bytes, file_size: int) -> Header:
    """The header at the start of a file of so many bytes; `head` is the file's first HEAD bytes, or all of it.

    Raises ValueError, whose text says what is wrong as the rest of a sentence that begins with the file's name.
    """
    if len(head) < _FIRST.size or not head.startswith(MAGIC):
        raise ValueError("is not a qcow2 image")
    first = _FIRST.unpack_from(head)
    _, version, backing_at, backing_length, bits, size, crypt, l1_entries, l1_offset, *_ = first
    if version not in (2, 3):
        raise ValueError(f"is qcow2 of version {version}: versions 2 and 3 are known")
    if not _LEAST_BITS <= bits <= _MOST_BITS:
        raise ValueError(f"is a damaged qcow2 image: clusters of 2^{bits} bytes")
    features, length, compression = _version_3(head) if version == 3 else (0, _FIRST.size, 0)
    if features & _EXTENDED_L2 and bits < _LEAST_EXTENDED_BITS:
        raise ValueError(f"is a damaged qcow2 image: parts of clusters of 2^{bits} bytes")
    if features & ~_KNOWN:
        raise ValueError(f"is a qcow2 image with features that are not known ({features:#x})")
    if length < _FIRST.size or length > min(len(head), 1 << bits) or length % 8:
        raise ValueError(f"is a damaged qcow2 image: a header of {length} bytes")
    if compression >= len(_COMPRESSIONS) or bool(compression) != bool(features & _COMPRESSION):
        raise ValueError(f"is a qcow2 image with compression {compression}, which is not known")
    if crypt and crypt not in _ENCRYPTIONS:
        raise ValueError(f"is a qcow2 image with encryption {crypt}, which is not known")
    extensions = _extensions(head[: 1 << bits], length)
    header = Header(
        version=version,
        size=size,
        cluster_bits=bits,
        l1_offset=l1_offset,
        l1_entries=0,
        compression=_COMPRESSIONS[compression],
        extended=bool(features & _EXTENDED_L2),
        encryption=_ENCRYPTIONS.get(crypt, ""),
        backing=_backing(head[: 1 << bits], backing_at, backing_length),
        backing_format=extensions.get(_BACKING_FORMAT, b""),
        external_data=bool(features & _EXTERNAL_DATA),
        data_file=extensions.get(_DATA_FILE, b""),
        corrupt=bool(features & _CORRUPT),
        bitmaps=_BITMAPS in extensions,
    )
    return _with_table(header, l1_entries, file_size)


def _version_3(head: bytes) -> tuple[int, int, int]:
    """Incompatible features, length of the header, compression. Raises ValueError."""
    if len(head) < _FIRST.size + _MORE.size:
        raise ValueError("is cut off within its qcow2 header")
    features, _, _, _, length = _MORE.unpack_from(head, _FIRST.size)
    at = _FIRST.size + _MORE.size
    return features, length, head[at] if length > at and len(head) > at else 0


def _with_table(header: Header, l1_entries: int, file_size: int) -> Header:
    """The header with the number of entries that its size takes. Raises ValueError where the file cannot have them."""
    each = header.l2_entries << header.cluster_bits
    needed = -(-header.size // each)
    if header.size >= 1 << 63 or needed * 8 > _MOST_L1:
        raise ValueError(f"is a qcow2 image of an impossible size ({header.size} bytes)")
    if l1_entries < needed or l1_entries * 8 > _MOST_L1:
        raise ValueError(f"is a damaged qcow2 image: {l1_entries} tables for {header.size} bytes")
    at = header.l1_offset
    if needed and (at % header.cluster or at == 0 or at + needed * 8 > file_size):
        raise ValueError("is a damaged qcow2 image, or cut off: its table of tables is not in it")
    return Header(**{**vars(header), "l1_entries": needed})


def _backing(head: bytes, at: int, length: int) -> bytes:
    """The name of the backing file. Raises ValueError."""
    if at == 0:
        return b""
    if not 0 < length <= _LONGEST_NAME or at + length > len(head):
        raise ValueError("is a damaged qcow2 image: its backing file's name is not in its header")
    return head[at : at + length]


_END, _BACKING_FORMAT, _DATA_FILE, _BITMAPS = 0, 0xE2792ACA, 0x44415441, 0x23852875


def _extensions(head: bytes, at: int) -> dict[int, bytes]:
    """The extensions of the header, by their numbers. Raises ValueError."""
    found: dict[int, bytes] = {}
    for _ in range(_MOST_EXTENSIONS):
        if at + _EXTENSION.size > len(head):
            return found
        kind, length = _EXTENSION.unpack_from(head, at)
        if kind == _END:
            return found
        at += _EXTENSION.size
        if at + length > len(head):
            raise ValueError("is a damaged qcow2 image: an extension of its header is cut off")
        found[kind] = head[at : at + length]
        at += -(-length // 8) * 8
    raise ValueError("is a damaged qcow2 image: extensions of its header without end")
