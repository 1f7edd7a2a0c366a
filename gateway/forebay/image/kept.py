# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What was written to an image and is not known to be durable there: kept, so that it can be written again.

A kernel reports a write-out that failed once, to one flush, and forgets the data. So a write of the modes that write to
the image is kept in memory until a flush that began after its end went well. After one that failed, all of it is
written again before the next one counts: of each byte only what was written last, so that a kill in the middle of it
leaves what was there, and older data never takes the place of newer. There is a bound for each image and one for all
together: what would go beyond is preceded by a flush, and fails where that fails.
"""

import contextlib
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import trio

from forebay.origin.protocol import Origin

MOST = 32 << 20
"""Bytes that are kept of one image: what a store of 1 Gbit/s takes in a third of a second."""

MOST_IN_ALL = 256 << 20
"""Bytes that are kept of all images together; beyond that each keeps what it needs for one write."""

MOST_CHANGES = 8192
"""Changes that are kept of one image: as many writes of a sector as make 32 MiB."""

OVERHEAD = 256
"""Bytes that a change counts for beside its data."""

TOGETHER = 1 << 20
"""Bytes of changes that are written again in one call."""

SLICE = 512
"""Changes that are looked at between two turns of others: 2 ms."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something that was written to an image: data, or zeros where that is None."""

    offset: int
    length: int
    data: bytes | None
    may_trim: bool = False

    @property
    def cost(self) -> int:
        """The bytes that it takes in memory."""
        return OVERHEAD + (len(self.data) if self.data is not None else 0)

    def without(self, start: int, end: int) -> Iterator["Change"]:
        """What is left of it without the bytes from `start` to `end` (exclusive)."""
        last = self.offset + self.length
        for first, behind in ((self.offset, min(last, start)), (max(self.offset, end), last)):
            if first < behind:
                data = self.data
                if data is not None and behind - first < self.length:
                    data = data[first - self.offset : behind - self.offset]
                yield Change(first, behind - first, data, self.may_trim)


@dataclass(slots=True)
class KeptInAll:
    """How much is kept of all images of a gateway together."""

    used: int = 0
    """Bytes."""


class KeptWrites:
    """The changes of one image, in the order of their ends. Writers pass a gate, which `alone` closes."""

    def __init__(self, in_all: KeptInAll) -> None:
        self._in_all = in_all
        self._changes: deque[tuple[int, Change]] = deque()
        """Each with how many had ended before it."""
        self.position = 0
        """How many changes have ended so far: `forget` takes it."""
        self.bytes = 0
        """What they take in memory."""
        self._passing = 0
        self._closed = False
        self._moved = trio.Event()
        """Set, and replaced, when the gate opens or the last writer has passed."""
        self._one = trio.Lock()

    @property
    def is_empty(self) -> bool:
        """True if everything that was written is durable, and nothing is being written."""
        return not self._changes and not self._passing

    @property
    def is_full(self) -> bool:
        """True if a flush has to come before the next write."""
        if len(self._changes) >= MOST_CHANGES or self.bytes >= MOST:
            return True
        return bool(self._changes) and self._in_all.used >= MOST_IN_ALL

    def add(self, change: Change) -> None:
        """Keep a change that has ended well."""
        self._changes.append((self.position, change))
        self.position += 1
        self._count(change.cost)

    def forget(self, position: int) -> None:
        """Let go the changes that had ended by then: they are durable."""
        while self._changes and self._changes[0][0] < position:
            self._count(-self._changes.popleft()[1].cost)

    def leave_out(self, offset: int, length: int) -> None:
        """Never write that range again: a write of it has failed, and what it holds now is not to change by itself."""
        before, self._changes = self._changes, deque()
        for number, change in before:
            parts = list(change.without(offset, offset + length))
            self._count(sum(part.cost for part in parts) - change.cost)
            self._changes.extend((number, part) for part in parts)

    def _count(self, cost: int) -> None:
        self.bytes += cost
        self._in_all.used += cost

    # ------------------------------------------------------------------------------------------------------- the gate

    @contextlib.asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Around each write, from before it begins until it is kept."""
        while self._closed:
            await self._moved.wait()
        self._passing += 1
        try:
            yield
        finally:
            self._passing -= 1
            if not self._passing:
                self._move()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Keep writers away, once those under way have ended. One at a time."""
        async with self._one:
            self._closed = True
            try:
                while self._passing:
                    await self._moved.wait()
                yield
            finally:
                self._closed = False
                self._move()

    def _move(self) -> None:
        moved, self._moved = self._moved, trio.Event()
        moved.set()

    # -------------------------------------------------------------------------------------------------- writing again

    def ranges(self) -> list[tuple[int, int]]:
        """(offset, length) of all changes."""
        return [(change.offset, change.length) for _, change in self._changes]

    async def write_again(self, origin: Origin) -> None:
        """Write again what all changes together have made. For whoever is alone. Raises OSError."""
        batch: list[tuple[int, bytes]] = []
        size = 0
        for change in await newest_only([change for _, change in self._changes]):
            if change.data is not None and size + change.length <= TOGETHER:
                batch.append((change.offset, change.data))
                size += change.length
                continue
            await _write(origin, batch)
            batch, size = [], 0
            if change.data is None:
                await origin.zero(change.offset, change.length, change.may_trim)
            else:
                batch, size = [(change.offset, change.data)], change.length
        await _write(origin, batch)


async def newest_only(changes: Sequence[Change]) -> list[Change]:
    """What is left of the changes, given in their order, without what later ones have written over; none overlap."""
    left: list[Change] = []
    starts: list[int] = []
    ends: list[int] = []  # of the ranges that later changes cover, in order, none of which touch
    for number, change in enumerate(reversed(changes)):
        if number % SLICE == 0:
            await trio.lowlevel.checkpoint()
        start, end = change.offset, change.offset + change.length
        first = bisect_left(ends, start)
        behind = bisect_right(starts, end)
        parts = [change]
        for low, high in zip(starts[first:behind], ends[first:behind], strict=True):
            parts = [piece for part in parts for piece in part.without(low, high)]
        left += parts
        if first < behind:
            start, end = min(start, starts[first]), max(end, ends[behind - 1])
        starts[first:behind], ends[first:behind] = [start], [end]
    return left


async def _write(origin: Origin, batch: list[tuple[int, bytes]]) -> None:
    if batch:
        await origin.write_ranges(batch, background=True)
