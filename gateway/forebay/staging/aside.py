# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Pieces of which not all has come, or which are not right: in memory, for whoever writes them, and for nobody else."""

import weakref
from bisect import bisect_left, bisect_right
from collections import OrderedDict

from forebay_cache.format.geometry import Buffer

MOST_ASIDE = 64 << 20
"""Bytes, for all images together. Of more, the oldest piece is dropped of the image that has most."""

MOST_PARTS = 1024
"""Of a piece. Of one that comes in more, nothing is kept."""


class Piece:
    """A piece that is not known to be right."""

    def __init__(self, length: int) -> None:
        self.data = bytearray(length)
        self._there: list[tuple[int, int]] = []
        """The ranges that have come, (start, end), in order and apart. A write that is large comes in parts, which end
        anywhere."""
        self._was_wrong = False
        """All of it came, and was not right: it can be read, and is looked at again when all of it has come again."""

    def refused(self) -> None:
        """It is whole, and wrong."""
        self._there, self._was_wrong = [], True

    def put(self, start: int, data: Buffer) -> None:
        """Take in bytes from `start` on."""
        end = start + len(data)
        self.data[start:end] = data
        there = self._there
        first = bisect_left(there, start, key=lambda one: one[1])
        last = bisect_right(there, end, lo=first, key=lambda one: one[0])
        if first < last:
            start, end = min(start, there[first][0]), max(end, there[last - 1][1])
        there[first:last] = [(start, end)]

    @property
    def is_whole(self) -> bool:
        """True if all of it is there."""
        return self._there == [(0, len(self.data))]

    @property
    def is_in_tatters(self) -> bool:
        """True for one of which more parts lie apart than any writer of pieces leaves behind."""
        return len(self._there) > MOST_PARTS

    def has(self, start: int, length: int) -> bool:
        """True if these bytes are there."""
        if self._was_wrong:
            return True
        at = bisect_right(self._there, start, key=lambda one: one[0]) - 1
        return at >= 0 and start + length <= self._there[at][1]


class Room:
    """What all images together keep aside."""

    def __init__(self, most: int = MOST_ASIDE) -> None:
        """`most` bytes."""
        self._most = most
        self.images: weakref.WeakSet[Aside] = weakref.WeakSet()

    def bound(self) -> None:
        """Drop what is too much: who wrote it reads what the image has instead."""
        images = list(self.images)
        while sum(one.bytes for one in images) > self._most:
            max(images, key=lambda one: one.bytes).drop_oldest()


class Aside:
    """The pieces of one image, each `piece_length` bytes long at most."""

    def __init__(self, piece_length: int, room: Room) -> None:
        """`room` is shared by all images."""
        self._piece_length = piece_length
        self._pieces: OrderedDict[int, Piece] = OrderedDict()
        self._room = room
        room.images.add(self)

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def bytes(self) -> int:
        """How much is kept."""
        return len(self._pieces) * self._piece_length

    def get(self, number: int) -> Piece | None:
        """A piece, if something of it is kept."""
        return self._pieces.get(number)

    def put(self, number: int, length: int, start: int, data: Buffer) -> Piece:
        """Keep bytes from `start` on of a piece that is so long; what there is of it then."""
        piece = self._pieces.get(number)
        if piece is None:
            piece = self._pieces[number] = Piece(length)
        piece.put(start, data)
        if piece.is_in_tatters:
            del self._pieces[number]
        self._room.bound()
        return piece

    def drop(self, number: int) -> None:
        """Keep nothing of a piece any more."""
        self._pieces.pop(number, None)

    def drop_oldest(self) -> None:
        """Keep one piece less, the one that began first."""
        self._pieces.popitem(last=False)

    def clear(self) -> None:
        """Keep nothing."""
        self._pieces.clear()
