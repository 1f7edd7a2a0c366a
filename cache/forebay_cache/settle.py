"""After write-back: what a frozen private layer held is in the origin now, so it becomes clean.

A block that the clean layer has no slot for is handed over as it is. Otherwise its sectors are copied into the clean
slot first; they are shadowed by the private layer until the entry changes hands, which happens between two awaits, so
that one commit stores both sides of it.
"""

from __future__ import annotations

from array import array

import trio

from forebay_cache.cache import Cache
from forebay_cache.fill import Filler
from forebay_cache.geometry import (
    BLOCK,
    FULL,
    PAGE_BLOCKS,
    PAGE_SHIFT,
    SECTOR,
    SECTORS,
    sector_runs,
)
from forebay_cache.layer import ABSENT, SLOT_SHIFT, ZERO_SHIFT, Layer, pack
from forebay_cache.private import changing_sums


async def pages_of(cache: Cache, layer: Layer) -> list[int]:
    """Numbers of all pages of a layer that hold anything, in order, whether in memory or not."""
    numbers = {n for n, page in layer.pages.items() if page is not ABSENT}
    after = 0
    while True:
        found = await trio.to_thread.run_sync(cache.index.pages, layer.id, after, 1024)
        numbers.update(n for n, _ in found if n not in layer.pages)
        if len(found) < 1024:
            return sorted(numbers)
        after = found[-1][0] + 1


async def pin_layer(cache: Cache, layer: Layer, pinned: bool) -> None:
    """Keep all of a clean layer from being evicted, or no longer."""
    layer.pinned = pinned
    layer.changed = True
    change = cache.placement.hold if pinned else cache.placement.unhold
    for number in await pages_of(cache, layer):
        await cache.load(layer, [number])
        for i in range(PAGE_BLOCKS):
            slot = (layer.pages[number][i] >> SLOT_SHIFT) - 1
            if slot >= 0 and not cache.evicting(slot):
                change(slot)
        if layer.pinned != pinned:  # somebody changed their mind meanwhile
            return


async def settle(cache: Cache, frozen: Layer, filler: Filler) -> None:
    """Move everything from a frozen private layer to the clean one of ``filler``. The origin has it, durably.

    Interrupted, it can be called again; what was moved already is clean. Raises OSError.
    """
    clean = filler.layer
    for number in await pages_of(cache, frozen):
        await cache.load(frozen, [number])
        await cache.load(clean, [number])
        filler.overtaken(number << PAGE_SHIFT, PAGE_BLOCKS * BLOCK)
        copied = await _copy(cache, frozen, clean, number)
        for i in range(PAGE_BLOCKS):
            _hand_over(cache, frozen, clean, number, i, copied.get(i, (-1, 0)))


async def _copy(
    cache: Cache, frozen: Layer, clean: Layer, number: int
) -> dict[int, tuple[int, int]]:
    """Copy the sectors of blocks that have a clean slot too; the clean copies are not looked at meanwhile.

    Returns which sectors were copied where, by block of the page: ``{i: (slot, mask)}``.
    """
    jobs: list[tuple[int, int, int, int]] = []  # (from slot, to slot, mask, i)
    page, target = frozen.pages[number], clean.pages[number]
    for i in range(PAGE_BLOCKS):
        word, second = page[i], page[PAGE_BLOCKS + i]
        slot = (target[i] >> SLOT_SHIFT) - 1
        if slot < 0 or cache.evicting(slot):
            continue
        data = word & ~(word >> ZERO_SHIFT) & FULL
        side = second & data
        for source, mask in ((word, data & ~side), (second, side)):
            if mask:
                jobs.append(((source >> SLOT_SHIFT) - 1, slot, mask, i))
    copied: dict[int, tuple[int, int]] = {}
    if not jobs:
        return copied
    await cache.load_sums([s for job in jobs for s in job[:2]])
    token = cache.pin()
    try:
        for _, to, mask, _ in jobs:
            cache.ready[to] &= ~mask
        await trio.to_thread.run_sync(_copy_sectors, cache, jobs)
        await cache.load_sums([s for job in jobs for s in job[:2]])
        for source, to, mask, i in jobs:
            if (clean.pages[number][i] >> SLOT_SHIFT) - 1 == to:
                _copied(cache, clean, number, i, source, to, mask)
                copied[i] = (to, copied.get(i, (to, 0))[1] | mask)
    finally:
        cache.unpin(token)
    return copied


def _copy_sectors(cache: Cache, jobs: list[tuple[int, int, int, int]]) -> None:
    for source, to, mask, _ in jobs:
        for first, count in sector_runs(mask):
            data = bytearray(count * SECTOR)
            cache.device.read_into(cache.device.at(source, first * SECTOR), [data])
            cache.device.write(cache.device.at(to, first * SECTOR), data)


def _copied(
    cache: Cache, clean: Layer, number: int, i: int, source: int, to: int, mask: int
) -> None:
    """The clean slot has the sectors now. Its checksums are the private ones: a bad copy shows when it is read."""
    sums, known = _sums(cache, to), _sums(cache, source)
    for sector in range(SECTORS):
        if mask >> sector & 1:
            sums[sector] = known[sector]
    page = clean.writable(number)
    word = page[i]
    clean.sectors += (mask & ~word).bit_count()
    page[i] = pack(to, word >> ZERO_SHIFT & FULL & ~mask, word & FULL | mask)


def _sums(cache: Cache, slot: int) -> array[int]:
    sums = changing_sums(cache, slot)
    assert sums is not None, "loaded just now"
    return sums


def _hand_over(
    cache: Cache, frozen: Layer, clean: Layer, number: int, i: int, copied: tuple[int, int]
) -> None:
    page = frozen.pages[number]
    word = page[i]
    if not word & FULL:
        return
    second = page[PAGE_BLOCKS + i]
    page, target = frozen.writable(number), clean.writable(number)
    old = target[i]
    valid, zero = word & FULL, word >> ZERO_SHIFT & FULL
    if old >> SLOT_SHIFT:
        done = copied[1] if copied[0] == (old >> SLOT_SHIFT) - 1 else 0
        _merge(clean, target, i, zero=zero, stale=valid & ~zero & ~done)
        cache.clear_entry(frozen, page, i)
        return
    clean.sectors -= (old & FULL).bit_count()
    data = valid & ~zero
    side = second & data
    slots = [(word >> SLOT_SHIFT) - 1, (second >> SLOT_SHIFT) - 1]
    keep = 1 if side.bit_count() > (data & ~side).bit_count() else 0
    kept = side if keep else data & ~side
    slot = slots[keep] if kept else -1
    zeros = (old >> ZERO_SHIFT & FULL & ~valid) | zero
    if slot >= 0:
        # The frozen entry must not free the slot that it gives away.
        if keep:
            page[PAGE_BLOCKS + i] = second & FULL
        else:
            page[i] = word & 0xFFFFFFFF
        frozen.slots -= 1
        clean.slots += 1
        cache.owner[slot] = clean.id << 40 | number * PAGE_BLOCKS + i
        if not clean.pinned:
            cache.placement.unhold(slot)
    cache.clear_entry(frozen, page, i)
    target[i] = pack(slot, zeros, kept | zeros)
    clean.sectors += (kept | zeros).bit_count()


def _merge(clean: Layer, target: array[int], i: int, *, zero: int, stale: int) -> None:
    """What became zero is zero in the clean block too; what could not be copied is not valid there any more."""
    word = target[i]
    valid = word & FULL & ~stale | zero
    clean.sectors += valid.bit_count() - (word & FULL).bit_count()
    target[i] = pack((word >> SLOT_SHIFT) - 1, word >> ZERO_SHIFT & FULL & ~stale | zero, valid)
