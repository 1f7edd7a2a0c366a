# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""What the cache has of a large range: as fast as there is something to tell, in slices that hold nobody up.

Pages that do not exist are passed over in one step, however many they are, and a page that says the same of all its
blocks is one extent at once.
"""

from __future__ import annotations

import functools
from enum import IntEnum
from time import perf_counter
from typing import Final

from forebay_cache.format.entry import masks_in, valid_of, zero_of
from forebay_cache.format.geometry import FULL, PAGE_BLOCKS, PAGE_SHIFT, SECTOR, sector_runs
from forebay_cache.index.pages import EMPTY, Page
from forebay_cache.layers.layer import Layer
from forebay_cache.read.view import View
from forebay_cache.turns import next_turn

SLICE_SECONDS: Final = 0.001
"""How long one piece of work goes on before other tasks of the loop have a turn."""

WINDOW_PAGES: Final = 4096
"""Pages, of 4 MiB each, among which those that exist are looked for in one step."""

LOADED_AT_ONCE: Final = 64
"""Pages that are brought into memory in one step; one after the other they would cost a thread each."""

PAGES_MOST: Final = 2048
"""Pages with something in them that one call looks at: it rather tells less than was asked for than to take much longer
than a tenth of a second."""

WINDOWS_MOST: Final = 256
"""Steps of one call, for the same reason."""


class Holding(IntEnum):
    """What the cache has of a sector."""

    NOTHING = 0  # the image has it
    CLEAN = 1  # data that the image has too
    CLEAN_ZEROS = 2
    PRIVATE = 3  # data of one disk, of which there is no other copy
    PRIVATE_ZEROS = 4


Extent = tuple[int, Holding]
"""(length in bytes, what is there)."""


class _Extents:
    """Extents one after the other, neighbours of one kind joined, of which the first `skip` bytes are left out."""

    def __init__(self, skip: int, length: int) -> None:
        self.found: list[Extent] = []
        self._skip = skip
        self._left = length

    def add(self, length: int, kind: Holding) -> None:
        cut = min(self._skip, length)
        self._skip -= cut
        length = min(length - cut, self._left)
        self._left -= length
        if not length:
            return
        if self.found and self.found[-1][1] == kind:
            self.found[-1] = (self.found[-1][0] + length, kind)
        else:
            self.found.append((length, kind))


async def survey(view: View, offset: int, length: int, most: int) -> list[Extent]:
    """What the cache has of a range, in order, from its beginning on: at least one extent, and about `most` of them.

    It may end before the range does. Each place is told of as it was at one instant during the call, and what it says
    of a place is older than what anybody learns of the image afterwards. Raises IndexFault.
    """
    first, end = offset >> PAGE_SHIFT, (offset + length - 1 >> PAGE_SHIFT) + 1
    extents = _Extents(offset - (first << PAGE_SHIFT), length)
    await next_turn()
    slice_ends = perf_counter() + SLICE_SECONDS
    at, looked, windows = first, 0, 0
    batch = 1 if most < LOADED_AT_ONCE else LOADED_AT_ONCE
    while at < end and looked < PAGES_MOST and windows < WINDOWS_MOST:
        numbers, stop = await _existing(view, at, min(end, at + WINDOW_PAGES), batch)
        windows += 1
        for number in numbers:
            _add_nothing(extents, number - at)
            _add_page(extents, view, number)
            at = number + 1
            if len(extents.found) > most:
                return extents.found[:-1]
            if perf_counter() > slice_ends:
                await next_turn()
                slice_ends = perf_counter() + SLICE_SECONDS
        looked += len(numbers)
        _add_nothing(extents, stop - at)
        at = stop
        if len(extents.found) > most:
            return extents.found[:-1]
        batch = min(2 * batch, LOADED_AT_ONCE)
    return extents.found


def _layers(view: View) -> list[Layer]:
    """The layers of the view in which there is something, in the order in which a reader asks them."""
    return [
        layer for layer in (*view.private, *([view.clean] if view.clean else [])) if layer.sectors
    ]


async def _existing(view: View, first: int, end: int, most: int) -> tuple[list[int], int]:
    """The numbers of pages that hold something, from `first` on and before `end`, and up to where these are all.

    They are at most `most`, and loaded in each layer. Raises IndexFault.
    """
    layers = _layers(view)
    numbers: set[int] = set()
    for layer in layers:
        found, end = await layer.pages.numbers_in(first, end, most)
        numbers.update(found)
    chosen = sorted(n for n in numbers if n < end)
    if len(chosen) > most:
        chosen, end = chosen[:most], chosen[most]
    for layer in layers:
        await layer.pages.load_all(chosen)
    return chosen, end


def _add_nothing(extents: _Extents, pages: int) -> None:
    extents.add(pages << PAGE_SHIFT, Holding.NOTHING)


def _add_page(extents: _Extents, view: View, number: int) -> None:
    """Add what the layers have of one page now. It has been loaded in each of them, not long ago. Raises IndexFault."""
    pages: list[tuple[Page, bool]] = []
    for layer in _layers(view):
        page = layer.pages.page(number)
        if page is not EMPTY:
            pages.append((page, layer.private))
    if len(pages) == 1:
        page, private = pages[0]
        masks = masks_in(page)
        if len(masks) == 1:
            _add_blocks(extents, _runs(*_split(masks.pop(), private)), PAGE_BLOCKS)
            return
    for i in range(PAGE_BLOCKS):
        _add_blocks(extents, _runs(*_block(pages, i)), 1)


def _add_blocks(extents: _Extents, runs: tuple[Extent, ...], count: int) -> None:
    """Add the same runs for `count` blocks, one after the other."""
    if len(runs) == 1:
        length, kind = runs[0]
        extents.add(length * count, kind)
        return
    for _ in range(count):
        for length, kind in runs:
            extents.add(length, kind)


def _split(word: int, private: bool) -> tuple[int, int, int, int]:
    """The masks of a block that one layer has: private zeros and data, clean zeros and data."""
    zeros = zero_of(word) & valid_of(word)
    data = valid_of(word) & ~zeros
    return (zeros, data, 0, 0) if private else (0, 0, zeros, data)


def _block(pages: list[tuple[Page, bool]], i: int) -> tuple[int, int, int, int]:
    """The masks of block `i` of a page: private zeros and data, clean zeros and data. None of them overlap."""
    private_zeros = private_data = clean_zeros = clean_data = 0
    need = FULL
    for page, private in pages:
        word = page[i]
        valid = word & need
        if not valid:
            continue
        zeros = zero_of(word) & valid
        need &= ~valid
        if private:
            private_zeros |= zeros
            private_data |= valid & ~zeros
        else:
            clean_zeros |= zeros
            clean_data |= valid & ~zeros
    return private_zeros, private_data, clean_zeros, clean_data


@functools.lru_cache(maxsize=8192)
def _runs(
    private_zeros: int, private_data: int, clean_zeros: int, clean_data: int
) -> tuple[Extent, ...]:
    """What these masks say of a block, as extents in order."""
    masks = (
        (private_zeros, Holding.PRIVATE_ZEROS),
        (private_data, Holding.PRIVATE),
        (clean_zeros, Holding.CLEAN_ZEROS),
        (clean_data, Holding.CLEAN),
        (FULL & ~(private_zeros | private_data | clean_zeros | clean_data), Holding.NOTHING),
    )
    found = [(first, count, kind) for mask, kind in masks for first, count in sector_runs(mask)]
    return tuple((count * SECTOR, kind) for _, count, kind in sorted(found))
