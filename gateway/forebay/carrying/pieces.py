# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an overlay has, as a file that only grows: pieces one behind the other, of which a later one counts.

A piece is a header and, where it is no zeros, as many bytes. Each header has the move that it belongs to, its number,
and checksums: what is damaged, of another move, or not there is found, and never taken for data. Pure functions.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"FBY1"

HEADER = struct.Struct("<4s8sQQQIII")
"""Magic, move, number, offset, length, kind, checksum of the data, checksum of all before."""

MOST_DATA = 1 << 20
"""Bytes of data in one piece, at most."""


class Kind(IntEnum):
    """What a piece says of its range."""

    DATA = 1
    ZEROS = 2


class BadPieceError(ValueError):
    """Something that is no piece of this move. The text says what is wrong, as the end of a sentence."""


@dataclass(frozen=True)
class Piece:
    """A range of the disk, and what it has there; without data: zeros."""

    offset: int
    length: int
    data: memoryview | None = None


def encoded(move: str, number: int, piece: Piece) -> list[bytes | memoryview]:
    """The piece as it stands in the file: its header, and its data. `move`: 16 hexadecimal digits."""
    data = piece.data
    kind = Kind.ZEROS if data is None else Kind.DATA
    checksum = 0 if data is None else zlib.crc32(data)
    fields = (MAGIC, bytes.fromhex(move), number, piece.offset, piece.length, kind, checksum)
    start = HEADER.pack(*fields, 0)[:-4]
    header = start + zlib.crc32(start).to_bytes(4, "little")
    return [header] if data is None else [header, data]


class Parser:
    """Makes pieces of the file's bytes, however they are cut."""

    def __init__(self, move: str, size: int) -> None:
        """`size` in bytes, of the disk: nothing is taken that lies beyond it."""
        self._move = bytes.fromhex(move)
        self._size = size
        self._number = 0
        self._rest = b""

    def feed(self, data: bytes) -> list[Piece]:
        """The pieces that are whole by now. Raises BadPieceError."""
        self._rest += data
        return list(self._whole())

    def is_between_pieces(self) -> bool:
        """True if no part of a piece waits for the rest of it."""
        return not self._rest

    def _whole(self) -> Iterator[Piece]:
        whole, at = memoryview(self._rest), 0
        while len(whole) - at >= HEADER.size:
            piece, kind, checksum = self._header(whole[at : at + HEADER.size])
            end = at + HEADER.size
            if kind is Kind.DATA:
                if len(whole) - end < piece.length:
                    break
                data = whole[end : end + piece.length]
                if zlib.crc32(data) != checksum:
                    raise BadPieceError(f"piece {self._number} is damaged")
                piece = Piece(piece.offset, piece.length, data)
                end += piece.length
            yield piece
            self._number += 1
            at = end
        self._rest = bytes(whole[at:])

    def _header(self, found: memoryview) -> tuple[Piece, Kind, int]:
        magic, move, number, offset, length, kind, checksum, own = HEADER.unpack(found)
        if magic != MAGIC or zlib.crc32(found[:-4]) != own:
            raise BadPieceError(f"the header of piece {self._number} is damaged")
        if move != self._move or number != self._number:
            raise BadPieceError(f"piece {self._number} is of another move, or missing")
        if kind not in list(Kind) or not 0 < length <= self._size - offset:
            raise BadPieceError(f"piece {self._number} is of no range of the disk")
        if kind == Kind.DATA and length > MOST_DATA:
            raise BadPieceError(f"piece {self._number} is too long")
        return Piece(offset, length), Kind(kind), checksum
