# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Writes into a private layer: dirty data, or an overlay's own.

Where a sector goes decides what a power cut can do to it, so the rule is in one place, ``entry.moved``: a place that
durable state may name is never overwritten. Nothing here awaits but :func:`prepare`: what would have to wait is not
done, and the caller is told so. This is for a device that is quick; see ``slow_writes`` for one that is not.
"""

from __future__ import annotations

import contextlib
from array import array
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from forebay_cache.cache import Cache
from forebay_cache.device import pace as timing
from forebay_cache.format import ops
from forebay_cache.format.checksum import SUM_BITS, checksums
from forebay_cache.format.entry import (
    NO_SLOT,
    ZEROS,
    Entry,
    block_key,
    block_of_key,
    entry_at,
    has_slot,
    moved,
    put_entry,
    runs_of,
    side_of,
    slot_of,
    with_slot,
    with_zero_places,
    with_zeros,
    written,
)
from forebay_cache.format.geometry import (
    BLOCK,
    BLOCK_SHIFT,
    FULL,
    IN_BLOCK,
    IN_PAGE,
    MASKS,
    PAGE_BLOCKS,
    PAGE_SHIFT,
    SECTOR,
    SECTOR_SHIFT,
    SECTORS,
    block_runs,
    sector_runs,
)
from forebay_cache.index.pages import EMPTY
from forebay_cache.index.sums import CHANGED
from forebay_cache.layers.layer import Layer

MANY_RUNS = 4
"""A whole block that would have to be written in so many pieces, or more, is written into a new slot instead."""

_target = moved
"""Which sectors of ``mask`` go to the second slot: ``_target(word, second, mask, opened)``."""


def write(cache: Cache, layer: Layer, offset: int, data: memoryview) -> bool:
    """Store whole sectors; ``offset`` and ``len(data)`` are multiples of a sector.

    Returns True if it was done: data and records are in the kernel's hands after ``cache.intent.publish()``, which has
    to come before the reply, before anything is read, and before ``data`` changes. False: nothing (or only a prefix,
    harmlessly) was done; something has to be loaded or waited for first, see :func:`prepare`. Raises OSError when the
    device refuses.
    """
    cache.failure.check()
    length = len(data)
    if not cache.intent.has_room(length):
        return False
    try:
        if (offset & IN_BLOCK) + length <= BLOCK:
            done = _write_simply(cache, layer, offset, data)
            if done is not None:
                return done
        at = 0
        for block, start, part in block_runs(offset, length):
            if not _write_block(cache, layer, block, start, data[at : at + part]):
                cache.intent.publish()  # `data` may change before the next try
                return False
            at += part
    except OSError as error:
        cache.failure.fail(error)
        with contextlib.suppress(OSError):
            cache.intent.publish()
        raise
    return True


def write_run(cache: Cache, layer: Layer, writes: list[tuple[int, memoryview]]) -> int:
    """Do as many of some writes, each (offset, data), as can be done at once, in order. Returns how many were done.

    None is while the device is slow, nor the next one after one that shows that it is: see ``device.pace``. Each is
    done as by :func:`write`. One that is not of whole sectors cannot be. Raises OSError if the first one fails;
    a later one that fails is left to be tried again.
    """
    cache.failure.check()
    pace, clock = cache.threads.pace, timing.clock
    if pace.is_slow and cache.publish.needs_thread:
        return 0
    if not cache.intent.has_room(sum([len(data) for _, data in writes])):
        return 0
    taken = 0
    began = clock()
    try:
        for offset, data in writes:
            length = len(data)
            if (offset | length) & (SECTOR - 1):
                break
            done = None
            if (offset & IN_BLOCK) + length <= BLOCK:
                done = _write_simply(cache, layer, offset, data)
            if done is None:
                done = write(cache, layer, offset, data)
            if not done:
                break
            taken += 1
            now = clock()
            if pace.took(now - began):
                break
            began = now
    except OSError as error:
        cache.failure.fail(error)
        if not taken:
            raise
    return taken


def _write_simply(  # noqa: C901  (calls cost more than what they would hide)
    cache: Cache, layer: Layer, offset: int, data: memoryview
) -> bool | None:
    """The usual case of :func:`_write_block`, sectors of one block that go to one slot: most of what a write costs.

    Returns None if it is not that simple, else what :func:`_write_block` does. Raises OSError; nothing was done then.
    """
    number = offset >> PAGE_SHIFT
    pages = layer.pages
    try:
        page = pages.by_number[number]
    except KeyError:
        return False
    block = offset >> BLOCK_SHIFT
    i = block & IN_PAGE
    start = offset & IN_BLOCK
    length = len(data)
    first = start >> SECTOR_SHIFT
    mask = MASKS[first][(start + length - 1) >> SECTOR_SHIFT]
    key = block_key(layer.id, block)
    intent = cache.intent
    if intent.syncing and intent.syncing.get(key, 0) & mask:
        return False
    word, second = page[i], page[PAGE_BLOCKS + i]
    opened = intent.open_sectors.get(key, 0)
    target = _target(word, second, mask, opened)
    if target and target != mask:
        return None
    slot = slot_of(second if target else word)
    fresh = slot < 0
    if fresh:
        if target and not has_slot(word):
            return None
        slot = cache.slots.take(key, held=layer.is_held)
        if slot < 0:
            return False
    sums = cache.sums
    if sums.state[slot] != CHANGED and not sums.change(slot):
        return False
    device = cache.device
    at = device.data_offset + (slot << BLOCK_SHIFT) + start
    if opened & mask:
        intent.write_later(slot, mask, at, data)
    else:
        try:
            device.write(at, data)
        except OSError:
            if fresh:
                cache.slots.abandon(slot)
            raise
    at = slot * SECTORS + first
    if length == SECTOR:
        sums.values[at] = value = xxh3_64_intdigest(data) & SUM_BITS
        intent.note(ops.write_one(target != 0, mask, layer.id, block, slot, value))
    else:
        values = checksums(data)
        sums.values[at : at + len(values)] = array("I", values)
        intent.note(ops.write(target != 0, mask, layer.id, block, slot, values))
    cache.ready.masks[slot] |= mask
    if page is EMPTY:
        page = pages.writable(number)
    if fresh:
        layer.slots += 1
        if target:
            second = with_slot(second, slot)
        else:
            word = with_slot(word, slot)
    layer.sectors += (mask & ~word).bit_count()
    page[i], page[PAGE_BLOCKS + i] = written(word, second, mask, target)
    pages.dirty.add(pages.first_key | number)
    intent.open_sectors[key] = opened | mask
    return True


def _write_block(cache: Cache, layer: Layer, block: int, start: int, data: memoryview) -> bool:
    """Write whole sectors of one block, from byte ``start`` of it on. Returns False if something has to be waited for.

    Raises OSError; slots that were taken for it are given back then.
    """
    number, i = divmod(block, PAGE_BLOCKS)
    page = layer.pages.look(number)
    if page is None:
        return False
    first = start >> SECTOR_SHIFT
    mask = MASKS[first][first + (len(data) >> SECTOR_SHIFT) - 1]
    key = block_key(layer.id, block)
    if cache.intent.syncing and cache.intent.syncing.get(key, 0) & mask:
        return False
    entry = word, second = entry_at(page, i)
    opened = cache.intent.open_sectors.get(key, 0)
    target = _target(word, second, mask, opened)
    had, slots = entry.slots, list(entry.slots)
    replaced = NO_SLOT
    if mask == FULL and runs_of(target) >= MANY_RUNS and cache.slots.has_plenty:
        # All of it goes to a new slot, in place of the first one. A start may find that not all of it has arrived.
        replaced, slots[0], target, opened = slots[0], NO_SLOT, 0, 0
    if not _slots_for(cache, layer, block, slots, mask & ~target, target):
        return False
    places = [
        _Place(layer.id, block, slots[side], side, part, in_place=bool(opened & part))
        for side, part in ((0, mask & ~target), (1, target))
        if part
    ]
    try:
        for place in places:
            _put(cache, place, first, data)
    except OSError:
        for slot in set(slots) - set(had):
            cache.slots.abandon(slot)
        raise
    for place in places:
        _note(cache, place, first, data)
    page = layer.pages.writable(number)
    layer.slots += (slots[0] != had[0]) + (slots[1] != had[1])
    layer.sectors += (mask & ~word).bit_count()
    word, second = written(word, second, mask, target)
    put_entry(page, i, Entry(with_slot(word, slots[0]), with_slot(second, slots[1])))
    cache.intent.open_sectors[key] = cache.intent.open_sectors.get(key, 0) | mask
    cache.removal.free(layer, replaced)
    return True


def _slots_for(
    cache: Cache, layer: Layer, block: int, slots: list[int], first: int, second: int
) -> bool:
    """Take the slots that are missing of the sides that get sectors (masks ``first``, ``second``), into ``slots``.

    Returns False, and has done nothing, if there are too few, or if checksums of those that are there are not loaded.
    """
    wanted = [side for side, part in ((0, first), (1, second)) if part]
    if sum(slots[side] < 0 for side in wanted) > cache.slots.placement.free:
        cache.slots.want_eviction()
        return False
    for side in wanted:
        if slots[side] >= 0 and not cache.sums.change(slots[side]):
            return False
    for side in wanted:
        if slots[side] < 0:
            slots[side] = cache.slots.take(block_key(layer.id, block), held=layer.is_held)
    return True


class _Place(NamedTuple):
    """Where the sectors ``mask`` of a block go. ``layer`` and ``block`` are numbers.

    ``in_place``: acknowledged data is overwritten, so it is written behind the record.
    """

    layer: int
    block: int
    slot: int
    side: int
    mask: int
    in_place: bool

    def pieces(self, first: int, data: memoryview) -> list[tuple[int, memoryview]]:
        """(sector, what goes there) of each run of its sectors; ``data`` begins at sector ``first``."""
        return [
            (start, data[(start - first) * SECTOR : (start + count - first) * SECTOR])
            for start, count in sector_runs(self.mask)
        ]


def _put(cache: Cache, place: _Place, first: int, data: memoryview) -> None:
    """Write the sectors of a place, unless that comes later. Raises OSError."""
    for start, piece in [] if place.in_place else place.pieces(first, data):
        cache.device.write(cache.device.at(place.slot, start * SECTOR), piece)


def _note(cache: Cache, place: _Place, first: int, data: memoryview) -> None:
    """Have sums, readiness and a record say what was written to a place, or is going to be behind the record."""
    _, block, slot, side, mask, in_place = place
    noted: list[int] = []
    for start, piece in place.pieces(first, data):
        if in_place:
            cache.intent.write_later(slot, mask, cache.device.at(slot, start * SECTOR), piece)
        values = checksums(piece)
        at = slot * SECTORS + start
        cache.sums.values[at : at + len(values)] = array("I", values)
        noted += values
    cache.intent.note(ops.write(side, mask, place.layer, block, slot, noted))
    cache.ready.masks[slot] |= mask


def zero(cache: Cache, layer: Layer, offset: int, length: int, provisioned: bool = False) -> bool:
    """Make whole sectors read as zeros without storing any. Returns and raises as :func:`write`.

    ``provisioned``: the image has to keep space for them, until something else is written there.
    """
    cache.failure.check()
    if not cache.intent.has_room(length // 16):
        return False
    for block, start, part in block_runs(offset, length):
        number, i = divmod(block, PAGE_BLOCKS)
        if layer.pages.look(number) is None:
            return False
        key = block_key(layer.id, block)
        mask = MASKS[start >> SECTOR_SHIFT][(start + part - 1) >> SECTOR_SHIFT]
        if cache.intent.syncing and cache.intent.syncing.get(key, 0) & mask:
            return False
        _zero_block(cache, layer, number, i, mask, key, provisioned=provisioned)
    return True


def _zero_block(
    cache: Cache, layer: Layer, number: int, i: int, mask: int, key: int, *, provisioned: bool
) -> None:
    """Make the sectors ``mask`` of one block zeros. Its slots come free if these are all of it."""
    page = layer.pages.writable(number)
    if mask == FULL:
        cache.removal.clear(layer, page, i)
        page[i] = ZEROS
        page[PAGE_BLOCKS + i] = with_zero_places(0, FULL, 0, provisioned=provisioned)
        layer.sectors += FULL.bit_count()
        cache.intent.open_sectors.pop(key, None)
        cache.intent.note(ops.zero(FULL, layer.id, block_of_key(key), 0, provisioned=provisioned))
        return
    word, second = page[i], page[PAGE_BLOCKS + i]
    opened = cache.intent.open_sectors.get(key, 0)
    target = _target(word, second, mask, opened)
    layer.sectors += (mask & ~word).bit_count()
    page[i] = with_zeros(word, mask)
    page[PAGE_BLOCKS + i] = with_zero_places(second, mask, target, provisioned=provisioned)
    cache.intent.open_sectors[key] = opened | mask
    sides = side_of(page[PAGE_BLOCKS + i])
    cache.intent.note(ops.zero(mask, layer.id, block_of_key(key), sides, provisioned=provisioned))


async def prepare(
    cache: Cache, layer: Layer, offset: int, length: int, *, zeros: bool = False
) -> None:
    """Wait for what kept :func:`write` (with ``zeros``: :func:`zero`) from being done; then it can be tried again.

    That is pages, checksums, slots, the end of a sync, or room in journal and commit. Raises CacheFull or OSError.
    """
    runs = block_runs(offset, length)
    await layer.pages.load({block // PAGE_BLOCKS for block, _, _ in runs})
    await cache.journal_room(length // 16 if zeros else length)
    if cache.intent.syncing:
        await cache.sync.ended()
    if zeros:
        return
    await cache.sums.load(_known_slots(layer, runs))
    missing = sum(_missing(cache, layer, *run) for run in runs)
    if missing > cache.slots.placement.free:
        await cache.evictor.room(min(missing, max(1, cache.device.slots // 4)))


def _missing(cache: Cache, layer: Layer, block: int, start: int, length: int) -> int:
    """How many new slots a write to one block takes."""
    number, i = divmod(block, PAGE_BLOCKS)
    word, second = entry_at(layer.pages.page(number), i)
    mask = MASKS[start >> SECTOR_SHIFT][(start + length - 1) >> SECTOR_SHIFT]
    opened = cache.intent.open_sectors.get(block_key(layer.id, block), 0)
    target = _target(word, second, mask, opened)
    return (bool(mask & ~target) and not has_slot(word)) + (bool(target) and not has_slot(second))


def _known_slots(layer: Layer, runs: list[tuple[int, int, int]]) -> list[int]:
    """The slots that blocks of the layer have already."""
    pages = [(layer.pages.look(block // PAGE_BLOCKS), block % PAGE_BLOCKS) for block, _, _ in runs]
    entries = [entry_at(page, i) for page, i in pages if page is not None]
    return [slot for entry in entries for slot in entry.slots if slot >= 0]
