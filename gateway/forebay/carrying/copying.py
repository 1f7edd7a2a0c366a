# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What an overlay has goes into the file of its move, and from there into the cache of another host.

It goes in rounds. Each freezes what the overlay has, and writes what is frozen since the round before; the VM goes on
writing above that. So the last round, for which it waits, has only what was written since the one before.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from forebay.carrying.beside import Beside
from forebay.carrying.notes import Offer
from forebay.carrying.pieces import HEADER, MOST_DATA, BadPieceError, Parser, Piece, encoded
from forebay.checkpoint.counters import Counters
from forebay.checkpoint.schedule import FREEZE_ROOM
from forebay.disk.disk import Disk
from forebay.errors import ForebayError
from forebay_cache import View
from forebay_cache.format.geometry import SECTOR, Buffer
from forebay_cache.read.survey import Holding, survey
from forebay_cache.turns import next_turn

T = TypeVar("T")

Progress = Callable[[int, int], None]
Run = Callable[[Callable[[], T]], Awaitable[T]]
"""Makes a blocking call in a thread of the store, with a time limit. Raises OSError."""

AT_ONCE = 4 << 20
"""Bytes that are written or read in one call."""

EXTENTS_AT_ONCE = 4096


class Rounds:
    """Writes what one overlay has, into the file of one move. After a failure it is good for nothing any more: what was
    given up may still be written.
    """

    def __init__(self, disk: Disk, beside: Beside, move: str, run: "Run[None]") -> None:
        self.length = 0
        """Bytes of the file that count."""
        self._disk = disk
        self._beside = beside
        self._move = move
        self._run = run
        self._number = 0
        self._upto = 0
        """The newest generation of layers that is written."""
        self._parts: list[bytes | memoryview] = []
        self._collected = 0

    @property
    def waiting_bytes(self) -> int:
        """Bytes that were written since the last round, about."""
        layers = self._disk.dirty.layers
        return sum(x.sectors for x in layers if x.name.generation > self._upto) * SECTOR

    async def write(self, progress: Progress, *, durably: bool = False) -> None:
        """One round. Raises OSError."""
        dirty, cache = self._disk.dirty, self._disk.image.cache
        await cache.journal_room(FREEZE_ROOM)
        generation = dirty.freeze_changes()
        layers = [x for x in dirty.layers if self._upto < x.name.generation <= generation]
        if layers:
            await self._write_all(View(cache, layers, None, _refuse), progress)
        await self._put(durably=durably)
        self._upto = max(self._upto, generation)

    async def _write_all(self, view: View, progress: Progress) -> None:
        total, done, at = sum(x.sectors for x in view.private) * SECTOR, 0, 0
        size = self._disk.size
        progress(0, total)
        while at < size:
            for found, holding in await survey(view, at, size - at, EXTENTS_AT_ONCE):
                length = min(found, size - at)
                if holding is Holding.PRIVATE_ZEROS:
                    await self._add(Piece(at, length))
                elif holding is Holding.PRIVATE:
                    for start in range(at, at + length, MOST_DATA):
                        part = min(MOST_DATA, at + length - start)
                        data = b"".join(bytes(x) for x in await view.read(start, part))
                        await self._add(Piece(start, part, memoryview(data)))
                        done += part
                        progress(min(done, total), total)
                at += length

    async def _add(self, piece: Piece) -> None:
        self._parts += encoded(self._move, self._number, piece)
        self._number += 1
        self._collected += HEADER.size + (0 if piece.data is None else piece.length)
        if self._collected >= AT_ONCE:
            await self._put(durably=False)

    async def _put(self, *, durably: bool) -> None:
        parts, at = self._parts, self.length
        if parts or durably:
            await self._run(lambda: self._beside.put(self._move, at, parts, durably=durably))
        self.length += self._collected
        self._parts, self._collected = [], 0


class TakingIn:
    """Brings what the file of a move has into the layers of an overlay that its clients do not see yet."""

    def __init__(self, disk: Disk, view: View, beside: Beside, run: "Run[list[Piece]]") -> None:
        """`view` reads through the disk's layers."""
        self._disk = disk
        self._writes = disk.modes.private_writes(view, Counters())
        self._beside = beside
        self._run = run
        self._move = ""
        self._length = 0
        self._parser = Parser("", 0)

    def has_all(self, offer: Offer) -> bool:
        """True if all that counts of that is here."""
        return (
            offer.move == self._move
            and offer.length == self._length
            and self._parser.is_between_pieces()
        )

    async def bring_in(self, offer: Offer) -> None:
        """Have all that counts by now. Raises OSError, and ForebayError for what is not what it should be."""
        if offer.move != self._move:
            self._begin(offer)
        if offer.length < self._length:
            raise ForebayError(
                f"what '{self._disk.name}' had on its host has become less meanwhile"
            )
        try:
            while self._length < offer.length:
                await self._bring_in_part(min(AT_ONCE, offer.length - self._length))
        except BaseException:
            self._move = ""  # it begins anew: nobody knows how far it came
            raise

    async def _bring_in_part(self, length: int) -> None:
        beside, parser, move, at = self._beside, self._parser, self._move, self._length
        try:
            pieces = await self._run(lambda: parser.feed(beside.get(move, at, length)))
        except BadPieceError as why:
            raise ForebayError(
                f"what '{self._disk.name}' had on its host cannot be read: {why}: it stays there"
            ) from None
        for piece in pieces:
            await self._take(piece)
        self._length += length

    def _begin(self, offer: Offer) -> None:
        """What is here of an earlier move does not count."""
        self._disk.dirty.drop()
        self._disk.dirty.open_layer()
        self._move, self._length = offer.move, 0
        self._parser = Parser(offer.move, self._disk.size)

    async def _take(self, piece: Piece) -> None:
        await next_turn()
        if piece.data is None:
            await self._writes.zero(piece.offset, piece.length, may_trim=True)
        else:
            await self._writes.write(piece.offset, piece.data)


async def _refuse(offset: int, length: int) -> Buffer:
    raise AssertionError(f"{length} bytes at {offset} are in no layer")
