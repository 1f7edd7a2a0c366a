# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Clean sectors when the origin is written: what the cache holds there is dropped, and that is on record before.

The modes that write to the origin call :func:`mark_hot`, then :func:`invalidate`, and only then write. What they write
may be stored again afterwards, see ``store``.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import trio

from forebay_cache.cache import Cache
from forebay_cache.format import ops
from forebay_cache.format.entry import NO_SLOT, pack, slot_of, valid_of, zero_of
from forebay_cache.format.geometry import (
    BLOCK,
    PAGE_BLOCKS,
    PAGE_SHIFT,
    SECTOR,
    block_runs,
    covered,
)
from forebay_cache.layers.layer import Layer
from forebay_cache.turns import next_turn

REGION_SHIFT = 22
"""Origin writes are announced by regions of 2 ** 22 bytes: one sync for a region, not one for each write."""
_AT_ONCE = 64 * BLOCK
"""So many bytes are invalidated between two looks at the room in the journal, and between two turns of others."""
_REGIONS_AT_ONCE = 256
"""So many regions are made hot between two looks at the room in the journal, and between two turns of others."""


class Filler(Protocol):
    """What fetches for one image: see read.fill.Filler."""

    layer: Layer

    def overtaken(self, offset: int, length: int) -> None:
        """Bytes of the origin are being written: nobody stores, or is given, what was read there meanwhile."""


async def invalidate(cache: Cache, layer: Layer, offset: int, length: int) -> None:
    """Forget what a clean layer has of these bytes, because their origin is about to be written.

    When this returns, a daemon that is killed has forgotten them too. Raises OSError when that cannot be recorded; the
    origin must not be written then.
    """
    cache.in_flight.overtake(layer, offset, length)
    await cache.failure.in_one_state(partial(_invalidate, cache, layer, offset, length))


async def _invalidate(cache: Cache, layer: Layer, offset: int, length: int) -> None:
    for at in range(offset, offset + length, _AT_ONCE):
        if length > _AT_ONCE:
            await next_turn()
        await cache.invalidations.make_room(layer)
        runs = block_runs(at, min(_AT_ONCE, offset + length - at))
        await layer.pages.load({block // PAGE_BLOCKS for block, _, _ in runs})
        with cache.failure.passed_over():
            await cache.journal_room(SECTOR * len(runs))
        for block, start, part in runs:
            drop(cache, layer, block, covered(start, part))
        with cache.failure.passed_over():
            await cache.publish()
    await cache.invalidations.invalidate(layer)


async def uncover(cache: Cache, frozen: Layer, filler: Filler) -> None:
    """Forget the clean sectors under a frozen private layer of which the origin has all, because the device has failed.

    When this returns, the private layer can be dropped without anything stale coming to light. Raises OSError.
    """
    await cache.failure.in_one_state(partial(_uncover, cache, frozen, filler))


async def _uncover(cache: Cache, frozen: Layer, filler: Filler) -> None:
    layer = filler.layer
    for number in await frozen.pages.numbers():
        await trio.lowlevel.checkpoint()
        await cache.invalidations.make_room(layer)
        await frozen.pages.load([number])
        page = frozen.pages.page(number)
        await layer.pages.load([number])
        with cache.failure.passed_over():
            await cache.journal_room(PAGE_BLOCKS * SECTOR)
        filler.overtaken(number << PAGE_SHIFT, PAGE_BLOCKS * BLOCK)
        for i in range(PAGE_BLOCKS):
            drop(cache, layer, number * PAGE_BLOCKS + i, valid_of(page[i]))
        with cache.failure.passed_over():
            await cache.publish()
    await cache.invalidations.invalidate(layer)


def drop(cache: Cache, layer: Layer, block: int, mask: int) -> None:
    """Take the sectors ``mask`` out of a clean block; the record that is noted here still has to be published.

    It is noted where memory has nothing valid, too: a crash undoes an eviction that was not committed. The page has to
    be loaded, or to have been not long ago. Raises IndexFault.
    """
    number, i = divmod(block, PAGE_BLOCKS)
    word = layer.pages.page(number)[i]
    cache.intent.note(ops.drop(mask, layer.id, block))
    if not word & mask:
        return
    layer.sectors -= (word & mask).bit_count()
    slot, valid, zero = slot_of(word), valid_of(word) & ~mask, zero_of(word) & ~mask
    page = layer.pages.writable(number)
    if slot != NO_SLOT and not valid & ~zero:
        cache.removal.free(layer, slot)
        slot = NO_SLOT
    elif slot != NO_SLOT:
        cache.ready.masks[slot] &= ~mask
    page[i] = pack(slot, zero, valid)


async def mark_hot(cache: Cache, layer: Layer, offset: int, length: int) -> None:
    """Have it on record, durably, that the origin of these bytes may change: a power cut drops their clean blocks then.

    Raises OSError when that cannot be made durable; the origin must not be written then.
    """
    first, end = offset >> REGION_SHIFT, (offset + length - 1 >> REGION_SHIFT) + 1
    for start in range(first, end, _REGIONS_AT_ONCE):
        if end - first > _REGIONS_AT_ONCE:
            await next_turn()  # a sync that is quick awaits nothing
        await _mark_hot(cache, layer, range(start, min(start + _REGIONS_AT_ONCE, end)))


async def _mark_hot(cache: Cache, layer: Layer, regions: range) -> None:
    """The same for some regions, given by their numbers."""
    hot = cache.hot
    known = hot.of(layer.id)
    if all(r in known for r in regions):
        return
    with cache.failure.passed_over():
        await cache.journal_room(SECTOR * len(regions))
        if cache.failure.error is None and hot.is_crowded():
            await cache.commit()
    known = hot.of(layer.id)
    new = [r for r in regions if r not in known]
    hot.heat(layer.id, new)
    told = False
    with cache.failure.passed_over():
        cache.failure.check()
        await cache.make_durable()
        told = True
        if not layer.is_dead:
            hot.of(layer.id).update(new)
    if not told:
        await cache.invalidations.invalidate(layer)
    if not told and cache.failure.error is None:  # it works again, and knows nothing of this
        await _mark_hot(cache, layer, regions)
