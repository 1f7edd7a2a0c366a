# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Many frozen private layers, read as if they were few: what a disk with many snapshots reads through.

A reader that looked through a hundred layers one after the other would take a hundred lookups for what lies in the
lowest. So the pages of frozen layers, in which nothing changes, are merged when they are first read: for each sector
the newest layer that has it counts. A block may have its sectors in more than two slots then, and an entry names two;
so a block goes on in a second table, a third, at most LEVELS, of which most blocks need one.

Nothing here owns a slot, and nothing of it is stored: it can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Final, NamedTuple

import trio

from forebay_cache.format.entry import (
    NO_SLOT,
    Entry,
    entry_at,
    pack,
    pack_second,
    put_entry,
)
from forebay_cache.format.geometry import FULL, PAGE_BLOCKS, SECTORS
from forebay_cache.format.records import LayerName, LayerRecord
from forebay_cache.index.index import Index
from forebay_cache.index.pages import EMPTY, Page, PageTable
from forebay_cache.layers.layer import Layer

LEVELS: Final = SECTORS // 2
"""Tables at most: a block has so many sectors, and an entry two slots."""

FEW: Final = 2
"""So many layers are not merged: a lookup in each is as quick."""

_PAGES_KEPT: Final = 256
"""Where a newer layer has more pages than this, what was merged so far is made anew, and not looked through."""

_STRETCH: Final = 8
"""Blocks that are merged in one go, while others wait: a millisecond at most, however many layers there are."""


class _Part(NamedTuple):
    """Sectors of one block that lie in one slot."""

    slot: int = NO_SLOT
    mask: int = 0


class Merged:
    """The frozen layers of one disk, newest first, merged page by page."""

    def __init__(self, index: Index, layers: Iterable[Layer]) -> None:
        self.layers = list(layers)
        self._making: dict[int, object] = {}
        """By number of a page that is being merged: another object once it has to be merged anew."""
        self.tables = [_Table(self, index, level) for level in range(LEVELS)]
        self.levels = [
            Layer(0, LayerRecord(LayerName.of_disk("", table.level, "")), table)
            for table in self.tables
        ]
        """What stands for the layers in a view, in this order."""
        self._count()

    def _count(self) -> None:
        self.levels[0].sectors = sum(layer.sectors for layer in self.layers)

    def replace(self, layers: Iterable[Layer]) -> None:
        """Have these layers, which together hold the same as those before, or that and what a newer layer has.

        Of that one all pages have to be in memory: see :meth:`may_add`.
        """
        before = set(self.layers)
        self.layers = list(layers)
        self._making.clear()
        for layer in self.layers:
            if layer not in before:
                for number, _ in layer.pages.held():
                    self.forget(number)
        self._count()

    @staticmethod
    def may_add(layer: Layer) -> bool:
        """True if it is known, and soon said, which pages change with that layer on top."""
        return layer.pages.by_number.complete and len(layer.pages) <= _PAGES_KEPT

    def forget(self, number: int) -> None:
        """The layers hold something else in that page: merge it again when it is read."""
        self._making.pop(number, None)
        for table, level in zip(self.tables, self.levels, strict=True):
            if level.sectors:
                table.drop(number)

    async def load(self, numbers: list[int]) -> None:
        """Have pages loaded, in all layers by one thread. Raises IndexFault."""
        missing = [
            (layer.pages, number)
            for number in numbers
            for layer in self.layers
            if layer.sectors and layer.pages.look(number) is None
        ]
        if missing:
            found = await trio.to_thread.run_sync(_read, missing)
            for (pages, number), raw in zip(missing, found, strict=True):
                pages.adopt(number, raw)

    async def make(self, number: int) -> None:
        """Have the page of that number merged, unless it is. Raises IndexFault."""
        while self.tables[0].look(number) is None:
            await self.load([number])
            mark = self._making.setdefault(number, object())
            pages, made = self._pages(number), list[Page]()
            for start in range(0, PAGE_BLOCKS if len(pages) >= FEW else 0, _STRETCH):
                _merge(made, pages, range(start, start + _STRETCH))
                await trio.lowlevel.checkpoint()
            if self._making.get(number) is mark:
                self._place(number, pages, made)

    def merge(self, number: int) -> Page:
        """The same at once, of a page that was merged not long ago; the first one of those that it became."""
        pages, made = self._pages(number), list[Page]()
        _merge(made, pages, range(PAGE_BLOCKS if len(pages) >= FEW else 0))
        return self._place(number, pages, made)

    def _pages(self, number: int) -> list[Page]:
        """Those of that number that hold anything, newest first. Raises IndexFault."""
        found = [layer.pages.page(number) for layer in self.layers if layer.sectors]
        return [page for page in found if page is not EMPTY]

    def _place(self, number: int, pages: list[Page], made: list[Page]) -> Page:
        """Have what these pages became in the tables; one that is the only one is taken as it is."""
        self._making.pop(number, None)
        if len(pages) < FEW:
            made = pages
        made = made or [EMPTY]
        for table, page in zip_longest(self.tables, made):
            level = self.levels[table.level]
            if page is not None:
                table.place(number, page)
                level.sectors = max(1, level.sectors)
            elif level.sectors:
                table.drop(number)
        return made[0]


class _Table(PageTable):
    """The merged pages of one level. A page that the first one has not, has to be merged; then all of them have it."""

    __slots__ = ("_merged", "level")

    def __init__(self, merged: Merged, index: Index, level: int) -> None:
        super().__init__(index, 0, set(), private=True, complete=level > 0)
        self._merged = merged
        self.level = level

    def place(self, number: int, page: Page) -> None:
        """Have that page, in the place of another one."""
        self._put(number, page)
        self._has_changed([number])

    def drop(self, number: int) -> None:
        """Have no page of that number."""
        self.by_number.drop(number)
        self._has_changed([number])

    async def load(self, numbers: Iterable[int]) -> None:
        """See PageTable. Raises IndexFault."""
        if self.level:
            return  # the first one has them made
        wanted = [number for number in numbers if self.look(number) is None]
        await self._merged.load(wanted)
        for number in wanted:
            await self._merged.make(number)

    async def load_all(self, numbers: Iterable[int]) -> None:
        """See PageTable. Raises IndexFault."""
        await self.load(numbers)

    async def numbers_in(self, first: int, end: int, most: int) -> tuple[list[int], int]:
        """See PageTable. Raises IndexFault."""
        if self.level:
            return [], end  # the first one has them
        found: set[int] = set()
        for layer in self._merged.layers:
            if layer.sectors:
                numbers, end = await layer.pages.numbers_in(first, end, most)
                found.update(numbers)
        return sorted(n for n in found if n < end), end

    def page(self, number: int) -> Page:
        """See PageTable. Raises IndexFault."""
        page = self.look(number)
        return self._merged.merge(number) if page is None else page


def _read(pages: list[tuple[PageTable, int]]) -> list[bytes | None]:
    """In a thread: what the index has of these pages."""
    return [table.ask(number) for table, number in pages]


def _merge(made: list[Page], pages: list[Page], blocks: range) -> None:
    """Put these blocks of the pages, newest first, into one page for each level."""
    for i in blocks:
        need, entries = FULL, list[tuple[int, Entry]]()
        for page in pages:
            mask = page[i] & need
            if mask:
                entries.append((mask, entry_at(page, i)))
                need &= ~mask
                if not need:
                    break
        if len(entries) == 1 and entries[0][0] == entries[0][1].valid:
            _put(made, 0, i, entries[0][1])
        elif entries:
            _put_all(made, i, entries)


def _put_all(made: list[Page], i: int, entries: list[tuple[int, Entry]]) -> None:
    """Put a block that has its sectors in several entries."""
    zero = provisioned = 0
    parts: list[_Part] = []
    for mask, entry in entries:
        zero |= entry.zero & mask
        provisioned |= entry.provisioned & mask
        parts += [_Part(slot, held & mask) for slot, held in entry.places() if held & mask]
    for level in range(max(1, (len(parts) + 1) // 2)):
        first, second = (*parts[2 * level : 2 * level + 2], _Part(), _Part())[:2]
        word = pack(first.slot, zero, first.mask | second.mask | zero)
        _put(made, level, i, Entry(word, pack_second(second.slot, second.mask, provisioned)))
        zero = provisioned = 0


def _put(made: list[Page], level: int, i: int, entry: Entry) -> None:
    while len(made) <= level:
        made.append(EMPTY[:])
    put_entry(made[level], i, entry)


def seen_through(index: Index, layers: list[Layer], before: Merged | None) -> Merged | None:
    """What a view has in the place of these frozen layers, newest first; None: the layers themselves.

    ``before`` is what it was for these, or for all but the newest.
    """
    if len(layers) <= FEW:
        return None
    if before is not None and _holds_the_same(before, layers):
        before.replace(layers)
        return before
    return Merged(index, layers)


def _holds_the_same(before: Merged, layers: list[Layer]) -> bool:
    """True if what was merged can be gone on with: at most the newest of the layers is new."""
    were = [layer for layer in before.layers if layer.sectors]
    are = [layer for layer in layers if layer.sectors]
    return are == were or (are[1:] == were and Merged.may_add(are[0]))
