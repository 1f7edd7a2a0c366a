"""Writes into a private layer: dirty data, or an overlay's own.

Where a sector goes decides what a power cut can do to it, so the rule is in one place, :func:`_target`: a place that
durable state may name is never overwritten. Nothing here awaits; what would have to wait says so with False.
"""

from __future__ import annotations

import os
import zlib
from array import array
from typing import NamedTuple

from forebay_cache import ops
from forebay_cache.cache import Cache
from forebay_cache.geometry import (
    BLOCK,
    BLOCK_SHIFT,
    FULL,
    MASKS,
    PAGE_BLOCKS,
    PAGE_SHIFT,
    SECTOR,
    SECTOR_SHIFT,
    block_runs,
    sector_runs,
)
from forebay_cache.layer import ABSENT, SLOT_SHIFT, ZERO_SHIFT, Layer

_crc32 = zlib.crc32


def write(cache: Cache, layer: Layer, offset: int, data: memoryview) -> bool:
    """Store whole sectors; ``offset`` and ``len(data)`` are multiples of a sector.

    True: the data is in the kernel's hands, and so will the records be after ``cache.publish()``, which has to come
    before the reply. False: nothing (or only a prefix, harmlessly) was done; something has to be loaded or waited for
    first, see :func:`prepare`. Raises OSError when the device refuses.
    """
    length = len(data)
    if not cache.journal_room(length):
        return False
    if (offset & (BLOCK - 1)) + length <= BLOCK:
        try:
            done = _overwrite(cache, layer, offset, data)
        except OSError as error:
            cache.fail(error)
            raise
        if done is not None:
            return done
    at = 0
    for block, start, part in block_runs(offset, length):
        if not _write_block(cache, layer, block, start, data[at : at + part]):
            return False
        at += part
    return True


def _overwrite(cache: Cache, layer: Layer, offset: int, data: memoryview) -> bool | None:
    """The usual case of :func:`_write_block`, in one piece because it is most of what a write costs.

    One block, one side, a slot that is there, checksums that are in memory. None: it is not that simple.
    """
    page = layer.pages.get(offset >> PAGE_SHIFT)
    if page is None:
        return False
    i = (offset >> BLOCK_SHIFT) & (PAGE_BLOCKS - 1)
    start = offset & (BLOCK - 1)
    length = len(data)
    first = start >> SECTOR_SHIFT
    mask = MASKS[first][(start + length - 1) >> SECTOR_SHIFT]
    block = offset >> BLOCK_SHIFT
    key = layer.id << 40 | block
    if cache.syncing and cache.syncing.get(key, 0) & mask:
        return False
    word, second = page[i], page[PAGE_BLOCKS + i]
    opened = cache.open_sectors.get(key, 0)
    target = _target(word, second, mask, opened)
    if target and target != mask:
        return None
    slot = ((second if target else word) >> SLOT_SHIFT) - 1
    sums = cache.sums.get(slot)
    if slot < 0 or sums is None:
        return None
    if length == SECTOR:
        crcs = [_crc32(data)]
        cache.note(ops.write_one(target != 0, mask, layer.id, block, slot, crcs[0]))
    else:
        crcs = [_crc32(data[n : n + SECTOR]) for n in range(0, length, SECTOR)]
        cache.note(ops.write(target != 0, mask, layer.id, block, slot, crcs))
    if opened & mask:
        cache.publish()  # in place: see _put()
    device = cache.device
    if os.pwrite(device.fd, data, device.data_offset + (slot << BLOCK_SHIFT) + start) != length:
        return None
    sums[first : first + len(crcs)] = array("I", crcs)
    cache.ready[slot] |= mask
    if word & mask != mask:
        layer.sectors += (mask & ~word).bit_count()
    page[i] = word & ~(mask << ZERO_SHIFT) | mask
    page[PAGE_BLOCKS + i] = second & ~mask | target
    layer.dirty.add(offset >> PAGE_SHIFT)
    layer.changed = True
    cache.open_sectors[key] = opened | mask
    return True


def _write_block(cache: Cache, layer: Layer, block: int, start: int, data: memoryview) -> bool:
    number, i = divmod(block, PAGE_BLOCKS)
    page = layer.pages.get(number)
    if page is None:
        return False
    first = start >> SECTOR_SHIFT
    mask = MASKS[first][first + (len(data) >> SECTOR_SHIFT) - 1]
    key = layer.id << 40 | block
    if cache.syncing and cache.syncing.get(key, 0) & mask:
        return False
    word, second = page[i], page[PAGE_BLOCKS + i]
    opened = cache.open_sectors.get(key, 0)
    target = _target(word, second, mask, opened)
    slots = [(word >> SLOT_SHIFT) - 1, (second >> SLOT_SHIFT) - 1]
    had = tuple(slots)
    sums = _slots_for(cache, layer, block, slots, mask & ~target, target)
    if sums is None:
        return False
    try:
        for side, part in ((0, mask & ~target), (1, target)):
            if part:
                place = _Place(layer.id, block, slots[side], side)
                _put(cache, place, first, data, sums[side], part, in_place=bool(opened & part))
    except OSError as error:
        for slot in set(slots) - set(had):
            cache.abandon(slot)
        cache.fail(error)
        raise
    page = layer.writable(number)
    layer.slots += (slots[0] != had[0]) + (slots[1] != had[1])
    layer.sectors += (mask & ~word).bit_count()
    page[i] = (slots[0] + 1) << SLOT_SHIFT | word & ~(mask << ZERO_SHIFT) & 0xFFFFFFFF | mask
    page[PAGE_BLOCKS + i] = (slots[1] + 1) << SLOT_SHIFT | second & 0xFFFF & ~mask | target
    cache.open_sectors[key] = cache.open_sectors.get(key, 0) | mask
    return True


def _target(word: int, second: int, mask: int, opened: int) -> int:
    """Which sectors of ``mask`` go to the second slot.

    A sector written since the last sync began stays where it is: nothing durable names that place. Any other that the
    layer answers for moves to the other side. A sector new to the layer goes to the first slot.
    """
    if not word >> SLOT_SHIFT and not second >> SLOT_SHIFT:
        return 0
    side = second & 0xFFFF
    moving = word & mask & ~opened & FULL
    return (side ^ moving) & mask & word


def _slots_for(
    cache: Cache, layer: Layer, block: int, slots: list[int], first: int, second: int
) -> list[array[int] | None] | None:
    """Make sure of slots and their checksums for the sides that are written; None: cannot be had now."""
    wanted = [bool(first), bool(second)]
    missing = sum(wanted[side] and slots[side] < 0 for side in (0, 1))
    if missing > cache.placement.free:
        cache.take_slot_soon()
        return None
    sums: list[array[int] | None] = [None, None]
    for side in (0, 1):
        if wanted[side] and slots[side] >= 0:
            sums[side] = changing_sums(cache, slots[side])
            if sums[side] is None:
                return None
    for side in (0, 1):
        if wanted[side] and slots[side] < 0:
            slots[side] = cache.take_slot(layer, block)
            sums[side] = cache.sums[slots[side]]
    return sums


def changing_sums(cache: Cache, slot: int) -> array[int] | None:
    """The checksums of a slot, to be changed in place and stored by the next commit; None: load them first."""
    sums = cache.sums.get(slot)
    if sums is None:
        known = cache.sums_committing.get(slot) or cache.sums_kept.get(slot)
        if known is None:
            return None
        sums = cache.sums[slot] = known[:]
    return sums


class _Place(NamedTuple):
    """Where sectors of a block go."""

    layer: int
    block: int
    slot: int
    side: int


def _put(
    cache: Cache,
    place: _Place,
    first: int,
    data: memoryview,
    sums: array[int] | None,
    part: int,
    *,
    in_place: bool,
) -> None:
    """Write the sectors ``part`` of ``data``, which begins at sector ``first``, and note it.

    Data that was acknowledged, though not flushed, may lie in the same place. Then the record goes to the kernel first:
    killed between the two, replay finds both checksums, and one of them fits. Where nothing was, the data goes
    first: replay then either knows of it or does not.
    """
    assert sums is not None
    runs = [
        (start, data[(start - first) * SECTOR : (start + count - first) * SECTOR])
        for start, count in sector_runs(part)
    ]
    crcs = [
        _crc32(piece[n : n + SECTOR]) for _, piece in runs for n in range(0, len(piece), SECTOR)
    ]
    cache.note(ops.write(place.side, part, place.layer, place.block, place.slot, crcs))
    if in_place:
        cache.publish()
    for start, piece in runs:
        cache.device.write(cache.device.at(place.slot, start * SECTOR), piece)
        for n in range(len(piece) // SECTOR):
            sums[start + n] = crcs.pop(0)
    cache.ready[place.slot] |= part


def zero(cache: Cache, layer: Layer, offset: int, length: int) -> bool:
    """Make whole sectors read as zeros without storing any; the terms of :func:`write`."""
    if not cache.journal_room(length // 16):
        return False
    for block, start, part in block_runs(offset, length):
        number, i = divmod(block, PAGE_BLOCKS)
        if layer.pages.get(number) is None:
            return False
        key = layer.id << 40 | block
        mask = MASKS[start >> SECTOR_SHIFT][(start + part - 1) >> SECTOR_SHIFT]
        if cache.syncing and cache.syncing.get(key, 0) & mask:
            return False
        _zero_block(cache, layer, number, i, mask, key)
    return True


def _zero_block(cache: Cache, layer: Layer, number: int, i: int, mask: int, key: int) -> None:
    page = layer.writable(number)
    if mask == FULL:
        cache.clear_entry(layer, page, i)
        page[i] = FULL << ZERO_SHIFT | FULL
        layer.sectors += FULL.bit_count()
        cache.open_sectors.pop(key, None)
        cache.note(ops.zero(FULL, layer.id, key & 0xFFFFFFFFFF, 0))
        return
    word, second = page[i], page[PAGE_BLOCKS + i]
    opened = cache.open_sectors.get(key, 0)
    target = _target(word, second, mask, opened)
    layer.sectors += (mask & ~word).bit_count()
    page[i] = word | mask << ZERO_SHIFT | mask
    page[PAGE_BLOCKS + i] = second & ~mask | target
    cache.open_sectors[key] = opened | mask
    cache.note(ops.zero(mask, layer.id, key & 0xFFFFFFFFFF, (second & ~mask | target) & FULL))


async def prepare(
    cache: Cache, layer: Layer, offset: int, length: int, *, zeros: bool = False
) -> None:
    """Wait for what :func:`write` (or :func:`zero`) said False to: pages, checksums, slots, a sync, the journal.

    Raises :class:`forebay_cache.errors.CacheFull`, OSError or lmdb.Error.
    """
    runs = block_runs(offset, length)
    await cache.load(layer, {block // PAGE_BLOCKS for block, _, _ in runs})
    if not cache.journal_room(length):
        await cache.commit()
    if cache.syncing:
        await cache.sync.idle()
    if zeros:
        return
    await cache.load_sums(_known_slots(layer, runs))
    missing = sum(_missing(cache, layer, *run) for run in runs)
    if missing > cache.placement.free:
        await cache.room(min(missing, max(1, cache.device.slots // 4)))


def _missing(cache: Cache, layer: Layer, block: int, start: int, length: int) -> int:
    """How many new slots a write to one block takes."""
    number, i = divmod(block, PAGE_BLOCKS)
    page = layer.pages.get(number, ABSENT)
    word, second = page[i], page[PAGE_BLOCKS + i]
    mask = MASKS[start >> SECTOR_SHIFT][(start + length - 1) >> SECTOR_SHIFT]
    target = _target(word, second, mask, cache.open_sectors.get(layer.id << 40 | block, 0))
    return (bool(mask & ~target) and not word >> SLOT_SHIFT) + (
        bool(target) and not second >> SLOT_SHIFT
    )


def _known_slots(layer: Layer, runs: list[tuple[int, int, int]]) -> list[int]:
    slots = []
    for block, _, _ in runs:
        number, i = divmod(block, PAGE_BLOCKS)
        page = layer.pages.get(number)
        if page is not None:
            slots += [(page[j] >> SLOT_SHIFT) - 1 for j in (i, PAGE_BLOCKS + i)]
    return [slot for slot in slots if slot >= 0]
