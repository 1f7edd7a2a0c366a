# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The torrent of an image (BEP 52, version 2, one file): a hash for each piece, and of which state of the image.

A piece is a whole number of the cache's blocks, and its hash the root of a Merkle tree over the SHA-256 of each 16 KiB,
so that whoever has the torrent can check a piece by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from forebay.origin.protocol import Identity
from forebay.staging import bencode
from forebay_cache.format.geometry import BLOCK

LEAF = 16 << 10
"""Bytes under one leaf of a tree, and of what one host asks another for."""

HASH = 32
"""Bytes of a hash."""

LEAST_PIECES = 1 << 10
"""With fewer, a host has too little to give away while it gets the rest: pieces are smaller then."""

LARGE_PIECE = 1 << 20
"""Bytes. Each piece has a cost of its own, in three processes of each host: small ones cost twice as much as this."""

MOST_PIECES = 1 << 16
"""Above that, pieces become larger still: hosts tell each other of each piece that they have."""

LARGEST_PIECE = 4 << 20
"""Bytes. A piece is in memory until all of it is there and checked."""

PIECES = frozenset(1 << n for n in range(BLOCK.bit_length() - 1, LARGEST_PIECE.bit_length()))
"""The lengths that a piece may have; which of them one has that is made here, `piece_length_of` says."""

LARGEST = MOST_PIECES * LARGEST_PIECE
"""Bytes of an image that can be staged: 256 GiB."""

LONGEST = MOST_PIECES * HASH + (64 << 10)
"""Bytes of the longest torrent."""

NAME = b"image"
"""What each torrent calls its file: no text of a store gets into it."""

_OURS = b"forebay"
"""The key of what only Forebay reads."""

_NUMBER = 1 << 63
"""No number in a torrent is as large."""

_NO_HASH = bytes(HASH)
"""Stands for a leaf behind the end."""


class BadTorrentError(ValueError):
    """Not a torrent of an image. The text says why, as the end of a sentence."""


@dataclass(frozen=True)
class Torrent:
    """The pieces of an image of `size` bytes, each `piece_length` bytes long but for the last one."""

    size: int
    piece_length: int
    hashes: bytes
    """Of all pieces, HASH bytes each."""
    mtime_ns: int
    """When the image was changed last, before the hashes were taken, as its store has it."""
    inode: int

    @property
    def pieces(self) -> int:
        """How many there are."""
        return len(self.hashes) // HASH

    @property
    def identity(self) -> Identity:
        """What the image looked like whose pieces these are."""
        return Identity(self.size, self.mtime_ns, 0, self.inode)

    def span(self, piece: int) -> tuple[int, int]:
        """Offset and length of a piece, bytes."""
        offset = piece * self.piece_length
        return offset, min(self.piece_length, self.size - offset)

    def is_right(self, piece: int, data: memoryview) -> bool:
        """True if these are the bytes of that piece."""
        if len(data) != self.span(piece)[1]:
            return False
        return piece_hash(data, self._width()) == self._hash(piece)

    def zeros(self, first: int, end: int) -> Iterator[int]:
        """Those of some pieces that hold nothing but zeros."""
        width = self._width()
        whole, last = zero_hash(self.piece_length, width), self.pieces - 1
        for piece in range(first, end):
            wanted = whole if piece != last else zero_hash(self.span(last)[1], width)
            if self._hash(piece) == wanted:
                yield piece

    def _hash(self, piece: int) -> bytes:
        return self.hashes[piece * HASH : (piece + 1) * HASH]

    def _width(self) -> int:
        """How many leaves the tree of a piece has, those behind the end of the image counted."""
        return width_of(self.size, self.piece_length)


def piece_length_of(size: int) -> int:
    """Bytes of a piece of an image of that size. Raises ValueError where it cannot be staged."""
    if not 0 < size <= LARGEST:
        raise ValueError(f"an image of 1 byte to {LARGEST >> 30} GiB can be staged")
    length = BLOCK
    while size > length * MOST_PIECES or (
        length < LARGE_PIECE and size >= 2 * length * LEAST_PIECES
    ):
        length *= 2
    return length


def width_of(size: int, piece_length: int) -> int:
    """How many leaves the tree of a piece has. That of an only piece is no larger than it has to be."""
    leaves = -(-size // LEAF)
    return min(piece_length // LEAF, 1 << (leaves - 1).bit_length())


def piece_hash(data: memoryview, width: int) -> bytes:
    """The root of the tree over the bytes of a piece, which has `width` leaves: a power of two."""
    level = [sha256(data[at : at + LEAF]).digest() for at in range(0, len(data), LEAF)]
    return root(level, width, _NO_HASH)


def zero_hash(length: int, width: int) -> bytes:
    """The same of so many zeros."""
    whole, rest = divmod(length, LEAF)
    level = [sha256(bytes(LEAF)).digest()] * whole
    level += [sha256(bytes(rest)).digest()] if rest else []
    return root(level, width, _NO_HASH)


def root(level: list[bytes], width: int, padding: bytes) -> bytes:
    """The root over some hashes of one level, followed by `padding` until there are `width`: a power of two."""
    while width > 1:
        if len(level) % 2:
            level = [*level, padding]
        level = [sha256(a + b).digest() for a, b in zip(level[::2], level[1::2], strict=True)]
        padding = sha256(padding + padding).digest()
        width //= 2
    return level[0]


# ------------------------------------------------------------------------------------------------------------- its file


def encoded(torrent: Torrent) -> bytes:
    """The bytes of its file. Takes a tenth of a second for many pieces: for a thread."""
    leaves = torrent.piece_length // LEAF
    hashes = [torrent.hashes[at : at + HASH] for at in range(0, len(torrent.hashes), HASH)]
    padding = root([_NO_HASH], leaves, _NO_HASH)
    top = root(hashes, 1 << (len(hashes) - 1).bit_length(), padding)
    content = {
        b"created by": b"Forebay",
        _OURS: {b"inode": torrent.inode, b"mtime_ns": torrent.mtime_ns, b"version": 1},
        b"info": {
            b"file tree": {NAME: {b"": {b"length": torrent.size, b"pieces root": top}}},
            b"meta version": 2,
            b"name": NAME,
            b"piece length": torrent.piece_length,
        },
        b"piece layers": {top: torrent.hashes} if torrent.pieces > 1 else {},
    }
    return bencode.encoded(content)


def decoded(data: bytes) -> Torrent:
    """The torrent in the bytes of a file, which is foreign. Raises BadTorrentError.

    That the hashes of the pieces belong to the root of all is for those to check who go by the root.
    """
    if len(data) > LONGEST:
        raise BadTorrentError(f"longer than {LONGEST} bytes")
    try:
        content = bencode.decoded(data)
        ours, info = content[_OURS], content[b"info"]
        file = info[b"file tree"][NAME][b""]
        size, top = _number(file[b"length"]), file[b"pieces root"]
        if ours[b"version"] != 1 or info[b"meta version"] != 2:
            raise BadTorrentError("of a version that is not known here")
        layer = content[b"piece layers"].get(top, top)
        torrent = Torrent(
            size,
            _number(info[b"piece length"]),
            layer,
            _number(ours[b"mtime_ns"]),
            _number(ours[b"inode"]),
        )
        if not 0 < size <= LARGEST or torrent.piece_length not in PIECES:
            raise BadTorrentError("its pieces have another length than those of Forebay")
        pieces = -(-size // torrent.piece_length)
    except BadTorrentError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise BadTorrentError(f"no torrent of Forebay ({type(fault).__name__}: {fault})") from None
    if type(layer) is not bytes or type(top) is not bytes or len(layer) != pieces * HASH:
        raise BadTorrentError("it has not one hash for each piece")
    return torrent


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _NUMBER:
        raise BadTorrentError("a number in it cannot be")
    return value
