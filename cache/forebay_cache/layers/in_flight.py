# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What is on its way between an origin and the cache, so that what a write has overtaken is not stored.

A *fill* stores what was read from the origin. While the origin is written in the same place, nobody knows whether the
fill has read the old data or the new. So each fill has a *cell* for each of its blocks, a mask in which origin writes
mark the sectors that they overtake; marked sectors are neither stored nor counted as valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import trio

from forebay_cache.device.failure import Failure
from forebay_cache.format.entry import block_key, block_of_key
from forebay_cache.format.geometry import BLOCK_SHIFT, covered_in
from forebay_cache.layers.layer import Layer

Cells = dict[int, list[int]]
"""By number of the block: a list of one mask, that of the sectors which were overtaken."""


UNSTORED = 64 << 20
"""Bytes that were fetched and wait to be stored, at most, of all images together; beyond this data is served and not
kept."""


class InFlight:
    """The fills, origin writes and writes of clean slots of one cache that are under way."""

    def __init__(self, failure: Failure) -> None:
        self._failure = failure
        failure.listen(self._look_again)
        self.storing: set[int] = set()
        """Slots of clean blocks that a thread is writing to. Nobody else does: the later write could come first."""
        self.unstored = 0
        """Bytes that were fetched and wait to be stored."""
        self.taking: dict[int, trio.Event] = {}
        """By key of the block: a thread writes to slots that were taken for it, of which its page knows nothing yet."""
        self._writes: dict[int, int] = {}  # number of a private layer -> writes of threads
        self._no_writes = trio.Event()  # set when one has ended; another one each time
        self._fills: dict[int, list[list[int]]] = {}  # key of the block -> masks
        self._overwriting: list[
            tuple[int, int, int]
        ] = []  # (layer, start, end) of origin writes, bytes

    def begin_write(self, layer: Layer) -> None:
        """A thread is going to write to slots that are, or become, those of a private layer."""
        self._writes[layer.id] = self._writes.get(layer.id, 0) + 1

    def end_write(self, layer: Layer) -> None:
        """It has ended."""
        self._writes[layer.id] -= 1
        if not self._writes[layer.id]:
            del self._writes[layer.id]
        self._look_again()

    def _look_again(self) -> None:
        event, self._no_writes = self._no_writes, trio.Event()
        event.set()

    async def no_writes(self, layer: Layer) -> None:
        """Return when no thread writes to slots of a private layer. None begins to, once it is frozen.

        Raises OSError if the device fails: then one may go on for as long as it likes.
        """
        while layer.id in self._writes:
            self._failure.check()
            await self._no_writes.wait()

    @property
    def is_filling(self) -> bool:
        """True if any fill is under way."""
        return bool(self._fills)

    @contextmanager
    def filling(self, layer: Layer, blocks: Sequence[int]) -> Iterator[Cells]:
        """Around a fill of these blocks: gives their cells. What is being overwritten already is marked in them."""
        cells: Cells = {block: [0] for block in blocks}
        for ident, first, last in self._overwriting:
            if ident == layer.id:
                for block, cell in cells.items():
                    cell[0] |= covered_in(block, first, last - first)
        for block, cell in cells.items():
            self._fills.setdefault(block_key(layer.id, block), []).append(cell)
        try:
            yield cells
        finally:
            for block, cell in cells.items():
                key = block_key(layer.id, block)
                self._fills[key] = [c for c in self._fills[key] if c is not cell]
                if not self._fills[key]:
                    del self._fills[key]

    @contextmanager
    def overwriting(self, layer: Layer, offset: int, length: int) -> Iterator[None]:
        """Around a write of bytes of the origin: fills that begin meanwhile do not store what they read there."""
        mine = (layer.id, offset, offset + length)
        self._overwriting.append(mine)
        try:
            yield
        finally:
            self._overwriting.remove(mine)

    def overtake(self, layer: Layer, offset: int, length: int) -> None:
        """Bytes of the origin are going to be written, or just were: fills under way must not store them.

        Takes as long as there are fills, however long the range is.
        """
        if not self._fills:
            return
        first, last = offset >> BLOCK_SHIFT, offset + length - 1 >> BLOCK_SHIFT
        keys: Iterable[int] = range(block_key(layer.id, first), block_key(layer.id, last) + 1)
        if last - first >= len(self._fills):
            keys = [key for key in self._fills if key in keys]
        for key in keys:
            for cell in self._fills.get(key, ()):
                cell[0] |= covered_in(block_of_key(key), offset, length)
