# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A trace as bytes of a file: a line of JSON, ten bytes for each block, and a checksum of all of that.

Whoever may write beside an image may write a trace there. So nothing of one is believed that was not checked: a file
that is too long, or is not what it says, is refused as a whole, and so is a block that the image does not have.
"""

import json
import struct
import zlib
from typing import Any

from forebay.boot.trace import MOST_BLOCKS, MOST_COUNTED, MOST_MS, Read, Trace
from forebay_cache.format.geometry import BLOCK

MAGIC, VERSION = "boot trace", 1
LONGEST_HEADER = 4096
"""Bytes."""
_BLOCK = struct.Struct("<IIBB")
"""Number of the block, milliseconds, how many boots have read it, of how many."""
_SUM = struct.Struct("<I")
LONGEST = LONGEST_HEADER + MOST_BLOCKS * _BLOCK.size + _SUM.size
"""Bytes of the longest file."""
_LARGEST = 1 << 63
"""No number in the header is as large."""


class BadTraceError(ValueError):
    """Not a trace. The text says why, as the end of a sentence."""


def encoded(trace: Trace, image: str) -> bytes:
    """The bytes of a file. `image` is the key of the image, for people, and for traces that do not lie beside it."""
    header = {
        "forebay": MAGIC,
        "version": VERSION,
        "image": image,
        "size": trace.size,
        "mtime_ns": trace.mtime_ns,
        "inode": trace.inode,
        "boots": trace.boots,
        "recorded": trace.recorded,
        "blocks": len(trace.blocks),
    }
    text = json.dumps(header).encode() + b"\n"
    body = b"".join(_BLOCK.pack(n, *read) for n, read in trace.blocks.items())
    return text + body + _SUM.pack(zlib.crc32(text + body))


def decoded(data: bytes, image: str | None = None) -> Trace:
    """The trace in the bytes of a file. With `image`, it has to be of the image with that key. Raises BadTraceError."""
    if len(data) > LONGEST:
        raise BadTraceError(f"longer than {LONGEST} bytes")
    end = data.find(b"\n", 0, LONGEST_HEADER) + 1
    if not end or len(data) < end + _SUM.size:
        raise BadTraceError("cut off")
    if _SUM.unpack(data[-_SUM.size :])[0] != zlib.crc32(data[: -_SUM.size]):
        raise BadTraceError("damaged: its checksum is wrong")
    header = _header(data[:end])
    if image is not None and header.get("image") != image:
        raise BadTraceError("of another image")
    numbers = {
        name: _number(header, name) for name in ("size", "mtime_ns", "inode", "boots", "recorded")
    }
    body = data[end : -_SUM.size]
    if len(body) != _number(header, "blocks") * _BLOCK.size:
        raise BadTraceError("cut off")
    return Trace(**numbers, blocks=_blocks(body, numbers["size"]))


def _header(line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("forebay") != MAGIC:
        raise BadTraceError("no trace")
    if header.get("version") != VERSION:
        raise BadTraceError(
            f"of a version that is not known here, {str(header.get('version'))[:20]}"
        )
    return header


def _number(header: dict[str, Any], name: str) -> int:
    value = header.get(name)
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise BadTraceError(f"no trace: its {name} is no number that can be")
    return value


def _blocks(body: bytes, size: int) -> dict[int, Read]:
    """The blocks of an image of `size` bytes, in the order in which they stand there. Raises BadTraceError."""
    blocks: dict[int, Read] = {}
    for number, ms, seen, told in _BLOCK.iter_unpack(body):
        if number * BLOCK >= size or number in blocks:
            raise BadTraceError(
                f"no trace of that image: block {number} cannot be in it, or is twice"
            )
        if ms > MOST_MS or not 0 < told <= MOST_COUNTED or seen > told:
            raise BadTraceError(f"no trace: what it says of block {number} cannot be")
        blocks[number] = Read(ms, seen, told)
    return blocks
