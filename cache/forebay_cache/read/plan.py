# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Where the bytes of a range come from: which slots, zeros, or the origin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from forebay_cache.format.entry import ALL_ZERO, MIXED, Entry, entry_at, whole_slot
from forebay_cache.format.geometry import (
    BLOCK_SHIFT,
    PAGE_BLOCKS,
    SECTOR_SHIFT,
    block_runs,
    covered,
)
from forebay_cache.layers.layer import Layer

ZEROS: Final = -1
"""In place of a slot: the bytes are zeros, and nothing is stored for them."""
ORIGIN: Final = -2
"""In place of a slot: the cache does not have the bytes."""


class Piece(NamedTuple):
    """Bytes of a disk that come from one place: a slot, ZEROS or ORIGIN. A piece in a slot lies in one block."""

    offset: int
    length: int
    slot: int
    private: bool  # of a private layer: then there is no other copy of it


_Source = tuple[int, int, bool]
"""Of one block: (mask of the sectors, slot or ZEROS or ORIGIN, whether it is private)."""


def plan(private: Sequence[Layer], clean: Layer | None, offset: int, length: int) -> list[Piece]:
    """Cut a range by where its bytes come from, in order, neighbours from one place joined.

    ``private`` are the private layers, newest first, and ``clean`` the layer under them. The pages of the range have
    to be loaded, or to have been not long ago. Raises IndexFault.
    """
    pieces: list[Piece] = []
    for block, start, part in block_runs(offset, length):
        for found in _plan_block(private, clean, block, start, part):
            last = pieces[-1] if pieces else None
            if last and last.slot == found.slot and (found.slot < 0 or _same_block(last, found)):
                pieces[-1] = last._replace(length=last.length + found.length)
            else:
                pieces.append(found)
    return pieces


def _plan_block(
    private: Sequence[Layer], clean: Layer | None, block: int, start: int, length: int
) -> list[Piece]:
    need = covered(start, length)
    sources: list[_Source] = []
    number, i = divmod(block, PAGE_BLOCKS)
    for layer in private:
        if not layer.sectors:
            continue
        entry = entry_at(layer.pages.page(number), i)
        if entry.valid & need:
            sources += _sources(entry, need, private=True)
            need &= ~entry.valid
    if clean is not None and need:
        page = clean.pages.page(number)
        if not sources:  # the usual case: all of it in one slot of the clean layer
            slot = whole_slot(page[i], need)
            if slot != MIXED:
                place = ZEROS if slot == ALL_ZERO else slot
                return [Piece((block << BLOCK_SHIFT) + start, length, place, False)]
        entry = entry_at(page, i)
        sources += _sources(entry, need, private=False)
        need &= ~entry.valid
    sources.append((need, ORIGIN, False))
    return _cut(block, start, length, [s for s in sources if s[0]])


def _sources(entry: Entry, need: int, *, private: bool) -> list[_Source]:
    """Which of the sectors ``need`` an entry has: (mask, slot or ZEROS, private)."""
    (first, second), (data, side) = entry.slots, entry.sides
    return [
        (entry.zero & entry.valid & need, ZEROS, private),
        (side & need, second, private),
        (data & need, first, private),
    ]


def _same_block(a: Piece, b: Piece) -> bool:
    return a.offset >> BLOCK_SHIFT == b.offset >> BLOCK_SHIFT


def _cut(block: int, start: int, length: int, sources: list[_Source]) -> list[Piece]:
    """Pieces of one block, in order, from disjoint masks that together cover the range."""
    if len(sources) == 1:
        _, slot, private = sources[0]
        return [Piece((block << BLOCK_SHIFT) + start, length, slot, private)]
    pieces: list[Piece] = []
    at, end = start, start + length
    while at < end:
        sector = at >> SECTOR_SHIFT
        slot, private = next((s, p) for mask, s, p in sources if mask >> sector & 1)
        stop = min(end, (sector + 1) << SECTOR_SHIFT)
        last = pieces[-1] if pieces else None
        if last and last.slot == slot:
            pieces[-1] = last._replace(length=last.length + stop - at)
        else:
            pieces.append(Piece((block << BLOCK_SHIFT) + at, stop - at, slot, private))
        at = stop
    return pieces
