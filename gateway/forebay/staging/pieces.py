# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""The pieces of an image as another host's data comes in: an NBD export that takes writes, and believes none of them.

What is written is no more than an offer. A piece of which all is there is compared with its hash in the torrent; what
is right is stored as clean data of the image, as if it had been read from the store. All else is kept aside, for those
only who write here, until it is right or there is too much of it: whoever wrote it reads it back, finds it wrong too,
and knows whom not to ask any more. Nobody else ever sees it.

What is read here and not aside comes from the cache, or the store, as it does for every reader of the image.
"""

import errno
import logging
from collections.abc import Callable

import trio

from forebay.disk.copy import STEP
from forebay.disk.disk import Disk
from forebay.staging.aside import Aside, Room
from forebay.staging.torrent import LEAF, Torrent
from forebay_cache.blocks.store import mark_zero
from forebay_cache.format.geometry import BLOCK, PAGE_BLOCKS, SECTOR, Buffer
from forebay_nbd import Timing

log = logging.getLogger("forebay.staging")

LOOKED_AT = 64 << 20
"""Bytes of an image that are looked through for gaps in one go: there is one for each 64 KiB at most."""

INLINE = 128 << 10
"""Bytes that are hashed at once: 0.1 ms. More is for a thread."""


class Pieces:
    """Implements forebay_nbd.Export, on a read-only disk of the image."""

    read_only = False
    rotational = False
    preferred_block = LEAF
    contexts: tuple[str, ...] = ()
    throttle = None

    def __init__(self, disk: Disk, torrent: Torrent, room: Room) -> None:
        """`room` is shared by all images."""
        self.name = disk.name
        self.size = disk.size
        self.torrent = torrent
        self.taken_bytes = 0
        """Bytes that were offered, were right, and are clean data now, as far as the cache had room."""
        self.refused_pieces = 0
        """How many pieces were whole and wrong."""
        self._disk = disk
        self._image = disk.image
        self._layer = disk.image.layer
        self.timing = Timing()
        self.aside = Aside(torrent.piece_length, room)
        self.unreadable = disk.unreadable
        self.pin = disk.pin
        self.unpin = disk.unpin

    # -- what is true of the image

    def fits(self) -> bool:
        """True if the torrent is of the image as the cache knows it. It stays so, or `why_stale` tells."""
        known = self._image.identity
        return known.is_on_record() and not known.differs_from(self.torrent.identity)

    def why_stale(self) -> str | None:
        """Why nothing of it is taken or served any more; None if the image is still as it was."""
        image = self._image
        if image.conflict is None and image.layer is self._layer:
            return None
        return image.conflict or f"{image.key} was changed while it was staged: stage it again"

    def _check(self) -> None:
        if (why := self.why_stale()) is not None:
            self.aside.clear()
            raise OSError(errno.EIO, why)

    async def note_zeros(self) -> None:
        """Have the cache know what the torrent says to be zeros: that takes no room. Raises OSError."""
        cache, layer = self._image.cache, self._layer
        per_step = max(1, STEP // self.torrent.piece_length)
        for first in range(0, self.torrent.pieces, per_step):
            end = min(first + per_step, self.torrent.pieces)
            zeros = [self.torrent.span(piece) for piece in self.torrent.zeros(first, end)]
            await trio.lowlevel.checkpoint()
            if not zeros:
                continue
            start, stop = zeros[0][0], sum(zeros[-1])
            blocks = range(start // BLOCK, -(-stop // BLOCK))
            with cache.in_flight.filling(layer, blocks) as cells:
                await layer.pages.load({block // PAGE_BLOCKS for block in blocks})
                await cache.journal_room(0)
                self._check()
                for offset, length in zeros:
                    mark_zero(layer, offset, -(-length // SECTOR) * SECTOR, cells)

    async def lacking(self) -> list[tuple[int, int]]:
        """The runs (first piece, how many) of which the cache lacks something. Raises OSError."""
        runs: list[tuple[int, int]] = []
        for start in range(0, self.size, LOOKED_AT):
            self._check()
            for offset, length in await self._image.filler.missing(start, LOOKED_AT):
                first = offset // self.torrent.piece_length
                end = -(-(offset + length) // self.torrent.piece_length)
                if runs and first <= sum(runs[-1]):
                    first = runs.pop()[0]
                runs.append((first, end - first))
            await trio.lowlevel.checkpoint()
        return runs

    @property
    def stored_bytes(self) -> int:
        """Bytes of the device that the cache has given to the image."""
        return self._layer.slots * BLOCK

    # -- reading

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """Implements Export."""
        if self.aside or self.why_stale() is not None:
            return None
        return self._disk.read_now(offset, length)

    def join_read(self, offset: int, length: int, wake: Callable[[], None]) -> bool:
        """Implements Export: each read waits for itself."""
        return False

    async def read(self, offset: int, length: int) -> list[Buffer]:
        """Implements Export. Raises OSError."""
        self._check()
        if not self.aside:
            return await self._disk.read(offset, length)
        found: list[Buffer] = []
        for at, part in _parts(offset, length, LEAF):
            piece, start = divmod(at, self.torrent.piece_length)
            aside = self.aside.get(piece)
            if aside is not None and aside.has(start, part):
                found.append(bytes(aside.data[start : start + part]))
            else:
                found += map(bytes, await self._disk.read(at, part))
        return found

    async def extents(
        self, context: str, offset: int, length: int, one: bool
    ) -> list[tuple[int, int]]:
        """Implements Export: all of it is data."""
        return [(self.size - offset, 0)]

    async def cache(self, offset: int, length: int) -> None:
        """Implements Export: nothing is brought in unasked."""

    # -- offers

    def write_now(self, writes: list[tuple[int, memoryview]]) -> int:
        """Implements Export: each has to wait."""
        return 0

    async def write(self, offset: int, data: memoryview, fua: bool) -> None:
        """Implements Export: take an offer. Raises OSError only where nothing is taken any more."""
        self._check()
        for at, part in _parts(offset, len(data), self.torrent.piece_length):
            await self._offered(at, data[at - offset : at - offset + part])

    async def zero(self, offset: int, length: int, fua: bool, no_hole: bool, fast: bool) -> None:
        """Implements Export: zeros are an offer, too."""
        self._check()
        for at, part in _parts(offset, length, self.torrent.piece_length):
            await self._offered(at, memoryview(bytes(part)))

    async def trim(self, offset: int, length: int, fua: bool) -> None:
        """Implements Export: nothing happens."""

    async def _offered(self, offset: int, data: memoryview) -> None:
        """Take in bytes of one piece."""
        piece, start = divmod(offset, self.torrent.piece_length)
        begin, length = self.torrent.span(piece)
        if len(data) != length:
            aside = self.aside.put(piece, length, start, data)
            if not aside.is_whole:
                return
            data = memoryview(bytes(aside.data))
        if await self._is_right(piece, data):
            self._check()
            await self._image.filler.take(self._layer, begin, data)
            self.aside.drop(piece)
            self.taken_bytes += length
            return
        self.refused_pieces += 1
        self.aside.put(piece, length, 0, data).refused()

    async def _is_right(self, piece: int, data: memoryview) -> bool:
        if len(data) <= INLINE:
            return self.torrent.is_right(piece, data)
        return await trio.to_thread.run_sync(self.torrent.is_right, piece, data)

    # -- the rest of an export

    def publish(self) -> None:
        """Implements Export: write_now() does nothing."""

    def answered(self) -> None:
        """Implements Export: nothing to do."""

    def flush_now(self) -> bool:
        """Implements Export: what is lost in a crash is fetched again, as all clean data is."""
        return True

    def begin_flush(self) -> None:
        """Implements Export: see `flush_now`."""

    async def flush(self) -> None:
        """Implements Export: see `flush_now`."""

    def opened(self) -> None:
        """Implements Export: nothing to do."""

    def closed(self) -> None:
        """Implements Export: nothing to do."""


def _parts(offset: int, length: int, unit: int) -> list[tuple[int, int]]:
    """A range, (offset, length), cut where multiples of `unit` are."""
    parts = []
    end = offset + length
    while offset < end:
        part = min(end, (offset // unit + 1) * unit) - offset
        parts.append((offset, part))
        offset += part
    return parts
