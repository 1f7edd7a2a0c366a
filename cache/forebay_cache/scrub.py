"""Scrub: read every slot that holds something and compare it with its checksums."""

from __future__ import annotations

from collections.abc import Callable

import trio

from forebay_cache.cache import Cache
from forebay_cache.geometry import BLOCK, FULL, PAGE_BLOCKS
from forebay_cache.layer import ABSENT, SLOT_SHIFT, ZERO_SHIFT, Layer
from forebay_cache.settle import pages_of
from forebay_cache.view import matching, read_slots


async def scrub(cache: Cache, progress: Callable[[int, int], None]) -> dict[str, int]:
    """Check all slots; damaged clean blocks are given up (the origin has them), damaged private data is counted.

    Returns ``checked_bytes``, ``damaged_clean`` and ``damaged_private`` (blocks). ``progress`` gets bytes. Yields to
    guests between two blocks; cancelled, it has checked what it has checked.
    """
    found = {"checked_bytes": 0, "damaged_clean": 0, "damaged_private": 0}
    layers = [x for x in cache.layers.values() if not x.dead]
    total = sum(x.slots for x in layers) * BLOCK
    progress(0, total)
    for layer in layers:
        for number in await pages_of(cache, layer):
            await cache.load(layer, [number])
            for i in range(PAGE_BLOCKS):
                await _check(cache, layer, number, i, found)
            progress(min(found["checked_bytes"], total), total)
    progress(total, total)
    return found


async def _check(cache: Cache, layer: Layer, number: int, i: int, found: dict[str, int]) -> None:
    for slot, mask in _held(layer, number, i):
        found["checked_bytes"] += BLOCK
        before = cache.sums.get(slot)
        token = cache.pin()
        try:
            data = await trio.to_thread.run_sync(read_slots, cache, {slot})
        finally:
            cache.unpin(token)
        if (slot, mask) not in _held(layer, number, i):
            continue  # changed meanwhile: what was read says nothing
        _, sums, stored = data[slot]
        now = cache.sums.get(slot) or stored
        if now != (before or stored):
            continue  # overwritten in place meanwhile
        if mask & ~matching(sums, now):
            cache.damaged_slots += 1
            if layer.private:
                found["damaged_private"] += 1
            else:
                found["damaged_clean"] += 1
                cache.retire(layer, number * PAGE_BLOCKS + i, slot)


def _held(layer: Layer, number: int, i: int) -> list[tuple[int, int]]:
    """Slots of one block, each with the mask of sectors that lie there."""
    page = layer.pages.get(number, ABSENT)
    word = page[i]
    data = word & ~(word >> ZERO_SHIFT) & FULL
    side = page[PAGE_BLOCKS + i] & data if layer.private else 0
    slots = [((word >> SLOT_SHIFT) - 1, data & ~side)]
    if layer.private:
        slots.append(((page[PAGE_BLOCKS + i] >> SLOT_SHIFT) - 1, side))
    return [(slot, mask) for slot, mask in slots if slot >= 0 and mask]
