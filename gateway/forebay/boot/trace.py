# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""A boot trace: which blocks of an image boots read, in which order, and how many of them did.

It holds numbers of blocks, times and counts, and nothing of what is in the blocks. Nothing here does I/O.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from forebay.origin.protocol import Identity
from forebay_cache.format.geometry import BLOCK

MOST_BLOCKS = 1 << 16
"""Blocks of one trace: 4 GiB of an image. Who reads more in his first minutes copies the image."""

LEAST_BLOCKS = 16
"""Who reads fewer has not booted: a megabyte."""

RUN_BLOCKS = 16
"""Blocks that are fetched with one request at most: the cache fetches a megabyte at a time."""

WINDOW_MS = 2000
"""Blocks that were read within so many milliseconds are fetched in the order of the requests' sizes."""

MOST_COUNTED = 200
"""Boots that are counted of a block; then both counts are halved, so that what was long ago counts less."""

MOST_MS = 1 << 30
"""The latest time in a trace."""


class Read(NamedTuple):
    """What is known of one block: when the boot came to it, in milliseconds from its start, and who read it."""

    ms: int
    seen: int
    """How many boots have read it ..."""
    told: int
    """... of those of which it is known whether they have."""

    @property
    def is_usual(self) -> bool:
        """True if most boots read the block."""
        return 2 * self.seen > self.told

    @property
    def is_forgotten(self) -> bool:
        """True if so few boots read the block that it is not kept."""
        return 4 * self.seen < self.told

    def counted(self, *, seen: bool) -> "Read":
        """The same after one boot more, which has read the block or not."""
        half = self.told >= MOST_COUNTED
        had = (self.seen // 2, self.told // 2) if half else (self.seen, self.told)
        return Read(self.ms, had[0] + seen, had[1] + 1)


class Run(NamedTuple):
    """Neighbouring blocks, as bytes of the image."""

    offset: int
    length: int


@dataclass(frozen=True)
class Boot:
    """What one boot has read: the numbers of the blocks, each with its time in milliseconds."""

    read: Mapping[int, int]
    unread: frozenset[int] = frozenset()
    """Blocks of which it is known that it has not read them."""


@dataclass(frozen=True)
class Trace:
    """What boots from one image read, as that was at one time."""

    size: int
    """Bytes of the image."""
    mtime_ns: int = 0
    inode: int = 0
    """With the size, what the image looked like: see `Identity.content`."""
    boots: int = 0
    """How many boots were recorded."""
    recorded: int = 0
    """When the last one was, seconds since the epoch."""
    blocks: Mapping[int, Read] = field(default_factory=dict)
    """By number of the block."""

    @classmethod
    def of_image(cls, identity: Identity) -> Self:
        """An empty one, of an image that looks like that."""
        return cls(*identity.content)

    @property
    def content(self) -> tuple[int, int, int]:
        """As `Identity.content`."""
        return self.size, self.mtime_ns, self.inode

    def usual(self) -> list[int]:
        """The blocks that most boots read, sorted: those that are fetched ahead."""
        return sorted(n for n, read in self.blocks.items() if read.is_usual)

    def bytes(self) -> int:
        """How many bytes of the image are fetched ahead."""
        return sum(run.length for run in self.runs())

    def runs(self) -> list[Run]:
        """What is fetched ahead, in this order: by time, and of what is read at about that time the largest first."""
        found = sorted(
            self._joined(), key=lambda run: (run[0] // WINDOW_MS, run[1] - run[2], run[0])
        )
        return [
            Run(first * BLOCK, min(end * BLOCK, self.size) - first * BLOCK)
            for _, first, end in found
        ]

    def _joined(self) -> Iterable[tuple[int, int, int]]:
        """(earliest time, first block, block behind the last) of neighbours, at most RUN_BLOCKS together."""
        first, end, earliest = 0, 0, 0
        for block in self.usual():
            ms = self.blocks[block].ms
            if first < end == block < first + RUN_BLOCKS:
                end, earliest = end + 1, min(earliest, ms)
                continue
            if first < end:
                yield earliest, first, end
            first, end, earliest = block, block + 1, ms
        if first < end:
            yield earliest, first, end

    def with_boot(self, boot: Boot, now: float) -> Self:
        """The same after one boot more, which ended at `now`, in seconds since the epoch."""
        blocks = dict(self.blocks)
        for block, ms in sorted(boot.read.items(), key=lambda item: item[1]):
            was = blocks.get(block)
            blocks[block] = (was or Read(min(ms, MOST_MS), 0, 0)).counted(seen=True)
        for block in boot.unread & blocks.keys():
            blocks[block] = blocks[block].counted(seen=False)
        kept = {n: read for n, read in blocks.items() if not read.is_forgotten}
        if len(kept) > MOST_BLOCKS:
            by_use = sorted(kept, key=lambda n: (-kept[n].seen / kept[n].told, kept[n].ms))
            kept = {n: kept[n] for n in by_use[:MOST_BLOCKS]}
        return replace(self, boots=self.boots + 1, recorded=int(now), blocks=kept)

    def is_hardly(self, boot: Boot) -> bool:
        """True if the boot has read less than a quarter of what is usual: it was something else, or was cut off."""
        usual = [n for n, read in self.blocks.items() if read.is_usual]
        return 4 * len(boot.read.keys() & set(usual)) < len(usual)
