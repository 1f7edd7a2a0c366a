# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Storing: what was read from the origin, or written to it, is kept in its clean layer.

The event loop says where the data goes, a thread writes it and takes checksums, and the event loop puts what is still
true by then into the pages.
"""

from __future__ import annotations

from typing import NamedTuple

import trio

from forebay_cache.cache import Cache
from forebay_cache.errors import CacheFull, IndexFault
from forebay_cache.format.checksum import checksums
from forebay_cache.format.entry import (
    NO_SLOT,
    block_key,
    pack,
    slot_of,
    slots_in,
    valid_of,
    with_zeros,
    zero_of,
)
from forebay_cache.format.geometry import (
    PAGE_BLOCKS,
    SECTOR,
    SECTORS,
    ZERO_BLOCK,
    Buffer,
    block_runs,
    covered,
    sector_runs,
)
from forebay_cache.layers.in_flight import Cells
from forebay_cache.layers.layer import Layer

Run = tuple[int, int, int]
"""Bytes of one block: (number of the block, first byte in it, length)."""

_GROUP = 16
"""Blocks that are written by one job of a thread."""
_PAGES_AT_ONCE = 128
"""Pages that are looked through for blocks to evict in one go: a millisecond."""
_ROOM_SECONDS = 5
"""How long a fill waits for slots; after that less is stored."""


class _Part(NamedTuple):
    """One block of a fill: its slot, and what is to be written where."""

    block: int
    slot: int  # NO_SLOT: nothing but zeros
    fresh: bool  # the slot was taken for it, and is in no page yet
    mask: int  # sectors that are stored
    zero: int  # those of them that are zeros
    data: memoryview  # of the whole block, from sector `first` on
    first: int


async def store(cache: Cache, layer: Layer, offset: int, data: Buffer, cells: Cells) -> None:
    """Keep ``data``, read from (or written to) the origin at ``offset``; both are whole sectors.

    Sectors that are valid already, or were overtaken (``cells`` is what ``InFlight.filling`` gave for all blocks of the
    range), are left alone. Never raises for want of room, or a failing device or index: then less is kept.
    """
    view = memoryview(data)
    runs = block_runs(offset, len(view))
    if cache.failure.error is not None:
        return
    try:
        await layer.pages.load({block // PAGE_BLOCKS for block, _, _ in runs})
    except IndexFault:
        return
    at = 0
    for group in _groups(runs):
        size = sum(part for _, _, part in group)
        await _store_group(cache, layer, group, view[at : at + size], cells)
        at += size


def _groups(runs: list[Run]) -> list[list[Run]]:
    return [runs[n : n + _GROUP] for n in range(0, len(runs), _GROUP)]


async def _store_group(
    cache: Cache,
    layer: Layer,
    runs: list[Run],
    data: memoryview,
    cells: Cells,
) -> None:
    if cache.slots.placement.free < len(runs):
        try:
            with trio.move_on_after(_ROOM_SECONDS):
                await cache.evictor.room(min(len(runs), max(1, cache.device.slots // 4)))
        except CacheFull:
            pass
    try:
        await cache.journal_room(0)  # for the sake of commits: nothing of this is in the journal
    except OSError:
        return
    if layer.cap and layer.slots + len(runs) > layer.cap:
        _make_room_in(cache, layer, layer.slots + len(runs) - layer.cap)
    # Nobody else gets the slots that are written to here, even if they are given up meanwhile.
    token = cache.quarantine.pin()
    parts = _prepare(cache, layer, runs, data, cells)
    storing = {part.slot for part in parts if part.slot >= 0}
    cache.in_flight.storing |= storing
    sums: list[dict[int, int]] = [{} for _ in parts]
    written, since = False, cache.ready.forgotten

    def let_go() -> None:
        cache.in_flight.storing -= storing
        cache.quarantine.unpin(token)

    try:
        await cache.threads.writes.run(_write, cache, parts, sums)
        written = True
    except OSError as error:
        cache.failure.fail(error)
    finally:  # also when cancelled
        for part, crcs in zip(parts, sums, strict=True):
            if written:
                _publish(cache, layer, part, crcs, cells, since)
            elif part.fresh:
                cache.slots.abandon(part.slot)
        cache.threads.writes.when_ended(let_go)


def _prepare(
    cache: Cache,
    layer: Layer,
    runs: list[Run],
    data: memoryview,
    cells: Cells,
) -> list[_Part]:
    """Say what is to be written where, and take the slots for it. A critical section: must not be split."""
    parts = []
    at = 0
    for block, start, length in runs:
        piece = data[at : at + length]
        at += length
        number, i = divmod(block, PAGE_BLOCKS)
        page = layer.pages.look(number)
        if page is None:
            continue
        word = page[i]
        mask = covered(start, length) & ~word & ~cells[block][0]
        if not mask:
            continue
        zero = _zeros(piece, mask)
        slot = slot_of(word)
        if slot in cache.in_flight.storing:
            continue
        fresh = False
        if mask & ~zero and slot < 0:
            if layer.cap and layer.slots >= layer.cap:
                continue
            slot = cache.slots.take(block_key(layer.id, block), held=layer.is_held)
            if slot < 0:
                continue
            fresh = True
        parts.append(_Part(block, slot, fresh, mask, zero, piece, start // SECTOR))
    return parts


def _zeros(piece: memoryview, mask: int) -> int:
    """``mask`` when the whole piece is zeros, else 0: blocks of nothing but zeros need no slot."""
    if piece[0] or piece[len(piece) // 2] or piece[-1]:
        return 0
    return mask if bytes(piece) == ZERO_BLOCK[: len(piece)] else 0


def _write(cache: Cache, parts: list[_Part], sums: list[dict[int, int]]) -> None:
    """In a thread: write the parts, and put the checksums of each, by sector, into its dict. Raises OSError."""
    for part, crcs in zip(parts, sums, strict=True):
        for start, count in sector_runs(part.mask & ~part.zero):
            piece = part.data[(start - part.first) * SECTOR : (start + count - part.first) * SECTOR]
            cache.device.write(cache.device.at(part.slot, start * SECTOR), piece)
            crcs.update(enumerate(checksums(piece), start))


def _publish(
    cache: Cache,
    layer: Layer,
    part: _Part,
    crcs: dict[int, int],
    cells: Cells,
    since: int,
) -> None:
    """Put what was written into the page, as far as nothing has overtaken it. A critical section: must not be split."""
    number, i = divmod(part.block, PAGE_BLOCKS)
    page = layer.pages.look(number)
    if page is None or not _is_wanted(layer, part, slot_of(page[i])):
        if part.fresh:
            cache.slots.abandon(part.slot)
        return
    word = page[i]
    mask = part.mask & ~word & ~cells[part.block][0]
    zero = part.zero & mask
    stored = mask & ~zero
    if part.slot != NO_SLOT and stored:
        if not _take_sums(cache, part.slot, stored, crcs):
            return
        cache.ready.note(part.slot, stored, since)
        layer.slots += part.fresh
        # The layer may have been pinned, or unpinned, since the slot was taken. Of what is chosen to be evicted,
        # the evictor itself keeps, and holds, what it must not take.
        if part.fresh and not cache.slots.is_evicting(part.slot):
            placement = cache.slots.placement
            (placement.hold if layer.is_held else placement.unhold)(part.slot)
    elif part.fresh:
        cache.slots.abandon(part.slot)
        if not zero:
            return
    layer.sectors += mask.bit_count()
    keep = part.slot if stored or not part.fresh else NO_SLOT
    zero |= zero_of(word) & ~stored
    layer.pages.writable(number)[i] = pack(keep, zero, valid_of(word) | mask)


def _is_wanted(layer: Layer, part: _Part, slot: int) -> bool:
    """False if what was written for a block, which has that slot now, must not get into the page any more."""
    if layer.is_dead:
        return False
    if (
        part.fresh
    ):  # another slot may have come meanwhile, or others may have taken what the layer may have
        return slot == NO_SLOT and not (layer.cap and layer.slots >= layer.cap)
    return part.slot == slot


def _take_sums(cache: Cache, slot: int, stored: int, crcs: dict[int, int]) -> bool:
    """Set the checksums of the sectors ``stored`` of a slot. False: the others of it cannot be had now."""
    try:
        cache.sums.load_now(slot)  # of a slot that is not fresh: those of a fresh one are in memory
    except IndexFault:
        return False
    cache.sums.change(slot)
    for sector, crc in crcs.items():
        if stored >> sector & 1:
            cache.sums.values[slot * SECTORS + sector] = crc
    return True


def _make_room_in(cache: Cache, layer: Layer, count: int) -> None:
    """Evict ``count`` blocks of a layer that is at its cap, those first that nobody asked for since the last search."""
    for slot, number, i in _candidates(cache, layer, count):
        cache.slots.placement.quarantine(slot)
        cache.removal.evict(layer, number, i, slot)


def _candidates(cache: Cache, layer: Layer, count: int) -> list[tuple[int, int, int]]:
    """Up to ``count`` blocks of a layer that may be evicted: (slot, number of the page, place in it).

    Fewer if there are fewer in the pages that are looked through; the next call goes on behind these.
    """
    untouched: list[tuple[int, int, int]] = []
    touched: list[tuple[int, int, int]] = []
    for number in layer.pages.from_hand(layer.hand, _PAGES_AT_ONCE):
        layer.hand += 1
        for i, slot in slots_in(layer.pages.page(number)):
            if not cache.slots.is_evicting(slot) and not layer.pinned:
                (touched if cache.slots.clear_touch(slot) else untouched).append((slot, number, i))
        if len(untouched) >= count:
            break
    return (untouched + touched)[:count]


def mark_zero(layer: Layer, offset: int, length: int, cells: Cells) -> None:
    """The origin has a hole here: remember whole sectors as zeros without storing any. The pages have to be loaded.

    ``cells`` as for :func:`store`. A plain function: nothing may be overtaken between the look at a cell and the page.
    """
    for block, start, part in block_runs(offset, length):
        number, i = divmod(block, PAGE_BLOCKS)
        page = layer.pages.look(number)
        if page is None or layer.is_dead:
            continue
        word = page[i]
        mask = covered(start, part) & ~word & ~cells[block][0]
        if mask:
            layer.pages.writable(number)[i] = with_zeros(word, mask)
            layer.sectors += mask.bit_count()
