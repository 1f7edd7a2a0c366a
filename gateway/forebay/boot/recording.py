# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What guests read of one image in the minutes after a disk's first client came.

Hits cost nothing more than before: nobody counts them. A read that misses is a task anyway, and says which blocks it
was. What was fetched ahead of guests (by a replay, by read-ahead, by a preload) is looked at later: the placement's
byte of a slot tells whether anybody has asked for it, and the placement says so where it forgets that. Of what was in
the cache before nothing is known, and it counts for nothing.
"""

from collections.abc import Iterable

import trio

from forebay.boot.trace import LEAST_BLOCKS, MOST_BLOCKS, Boot, Trace
from forebay.image.image import Image
from forebay_cache import Use, uses_of
from forebay_cache.format.geometry import BLOCK_SHIFT

MOST_SECONDS = 300.0
"""How long a recording takes at most ..."""

QUIET_SECONDS = 60.0
"""... and how long it goes on when nobody reads anything new."""


class Recording:
    """Of one image; all disks on it that boot meanwhile say to it what they miss."""

    def __init__(self, image: Image, brought: Iterable[int]) -> None:
        """`brought`: blocks that came in ahead until now, and count if they are asked for from now on."""
        self.image = image
        self._layer = image.layer
        self._began = self._news = trio.current_time()
        self._read: dict[int, int] = {}
        self._ahead = dict.fromkeys(brought, 0)
        """Blocks that came in ahead, and of which nobody has asked for until they were looked at last."""
        self.is_given_up = False
        """True if it is not worth keeping: somebody reads more than a boot does."""

    def __len__(self) -> int:
        """How many blocks it has in memory."""
        return len(self._read) + len(self._ahead)

    @property
    def is_of_now(self) -> bool:
        """True if the image's clean blocks are those that were there at the beginning."""
        return self.image.layer is self._layer and not self._layer.is_dead

    @property
    def is_over(self) -> bool:
        """True if it has been long enough, or quiet for long enough, or is of no use any more."""
        now = trio.current_time()
        is_quiet = len(self._read) >= LEAST_BLOCKS and now >= self._news + QUIET_SECONDS
        is_long = now >= self._began + MOST_SECONDS
        return is_quiet or is_long or self.is_given_up or not self.is_of_now

    def _ms(self) -> int:
        return int(1000 * (trio.current_time() - self._began))

    def note_miss(self, offset: int, length: int) -> None:
        """A guest has to wait for these bytes."""
        for block in range(offset >> BLOCK_SHIFT, (offset + length - 1 >> BLOCK_SHIFT) + 1):
            self._note_read(block, self._ahead.pop(block, None))

    def _note_read(self, block: int, ms: int | None) -> None:
        if block in self._read:
            return
        self._read[block] = self._ms() if ms is None else ms
        self._news = trio.current_time()
        if len(self._read) > MOST_BLOCKS:
            self.give_up()

    def note_ahead(self, blocks: range) -> None:
        """These blocks are being fetched before anybody has asked for them."""
        for block in blocks:
            if block not in self._read and len(self._ahead) < MOST_BLOCKS:
                self._ahead.setdefault(block, self._ms())

    def note_asked(self, layer: int, block: int) -> None:
        """A block of the layer with that number was asked for, which the placement has just forgotten."""
        if layer == self._layer.id and block in self._ahead:
            self._note_read(block, self._ahead.pop(block))

    def give_up(self) -> None:
        """Let go of what was recorded, and record nothing more."""
        self.is_given_up = True
        self._read, self._ahead = {}, {}

    async def look(self) -> None:
        """Take down what of that which came ahead was asked for. Raises OSError."""
        async for block, use in uses_of(self.image.cache, self._layer, list(self._ahead)):
            if use is Use.ASKED and block in self._ahead:
                self._note_read(block, self._ahead.pop(block))

    async def boot(self, before: Trace) -> Boot | None:
        """What was recorded; None if that is no boot. `before` is the trace of the image as it is now.

        Raises OSError.
        """
        await self.look()
        others = [n for n in before.blocks if n not in self._read and n not in self._ahead]
        unread: set[int] = set()
        async for block, use in uses_of(self.image.cache, self._layer, [*self._ahead, *others]):
            if use is (Use.UNASKED if block in self._ahead else Use.ABSENT):
                unread.add(block)
        if len(self._read) < LEAST_BLOCKS or self.is_given_up or not self.is_of_now:
            return None
        return Boot(self._read, frozenset(unread))
