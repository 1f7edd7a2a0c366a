# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""After write-back: what a frozen private layer held is in the origin now, so it becomes clean.

A block of which the clean layer has nothing more is handed over, slot and all. Otherwise its sectors are copied into
the clean slot first; they are shadowed by the private layer until the entry changes hands, which happens between two
awaits, so that one commit stores both sides of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from forebay_cache.blocks.clean import Filler, drop
from forebay_cache.cache import Cache
from forebay_cache.format.checksum import checksums
from forebay_cache.format.entry import (
    NO_SLOT,
    Entry,
    block_key,
    data_of,
    entry_at,
    has_slot,
    pack,
    put_entry,
    slot_of,
    valid_of,
    without_slot,
    zero_of,
)
from forebay_cache.format.geometry import (
    BLOCK,
    FULL,
    MASKS,
    PAGE_BLOCKS,
    PAGE_SHIFT,
    SECTOR,
    SECTORS,
    sector_runs,
)
from forebay_cache.index.pages import Page
from forebay_cache.layers.layer import Layer

_DROPS = 2 * PAGE_BLOCKS * SECTOR
"""Bytes of a write whose records take the journal as much room as the drops of a whole page."""
_STRETCH = 32
"""Blocks that change layers in one go."""


async def settle(
    cache: Cache, frozen: Layer, filler: Filler, turn: Callable[[], Awaitable[None]]
) -> None:
    """Move everything from a frozen private layer to the clean one of ``filler``. The origin has to have it, durably.

    ``turn`` lets others go on; it is called between two stretches, each of which keeps the event loop for a fraction
    of a millisecond. Interrupted, it can be called again; what was moved already is clean. Raises OSError.
    """
    clean = filler.layer
    await cache.in_flight.no_writes(frozen)
    for number in await frozen.pages.numbers():
        for start in range(0, PAGE_BLOCKS, _STRETCH):
            await frozen.pages.load([number])
            await clean.pages.load([number])
            blocks = range(start, start + _STRETCH)
            if any(frozen.pages.page(number)[i] & FULL for i in blocks):
                await _settle(cache, frozen, filler, clean, number, blocks)
                await turn()


async def _settle(
    cache: Cache, frozen: Layer, filler: Filler, clean: Layer, number: int, blocks: range
) -> None:
    """The same for some blocks of one page."""
    await cache.journal_room(_DROPS)
    cache.failure.check()  # no commit bounds any more what changes
    offset = (number << PAGE_SHIFT) + blocks.start * BLOCK
    filler.overtaken(offset, len(blocks) * BLOCK)
    copied = await _copy(cache, clean, number, _jobs(cache, frozen, clean, number, blocks))
    for i in blocks:
        _hand_over(cache, frozen, clean, number, i, copied.get(i, (NO_SLOT, 0)))


class Job(NamedTuple):
    """Sectors of one block of the page to be copied from one slot to another."""

    i: int
    source: int
    to: int
    mask: int


Copied = dict[int, tuple[int, int]]
"""What was copied, by block of the page: (slot, sectors)."""


def _jobs(cache: Cache, frozen: Layer, clean: Layer, number: int, blocks: range) -> list[Job]:
    """What has to be copied so that each block ends in one slot.

    Where the clean block has data that the private one lacks, its slot stays and gets the private sectors. Elsewhere
    the private slot with more of the data takes its place, and gets the sectors that lie in the other one.
    """
    jobs: list[Job] = []
    page, target = frozen.pages.page(number), clean.pages.page(number)
    for i in blocks:
        entry = entry_at(page, i)
        slots, data = entry.slots, entry.sides
        old = slot_of(target[i])
        if old >= 0 and data_of(target[i]) & ~entry.valid:
            if not cache.slots.is_evicting(old) and old not in cache.in_flight.storing:
                jobs += [Job(i, slots[side], old, data[side]) for side in (0, 1) if data[side]]
        elif data[0] and data[1]:
            major = _major(data)
            jobs.append(Job(i, slots[1 - major], slots[major], data[1 - major]))
    return jobs


def _drop_shadowed(cache: Cache, clean: Layer, number: int, jobs: list[Job]) -> None:
    """Forget clean sectors before others are copied over them: a copy that is not finished damages nothing then.

    The records that are noted here still have to be published.
    """
    page = clean.pages.page(number)
    for job in jobs:
        if slot_of(page[job.i]) == job.to:
            drop(cache, clean, number * PAGE_BLOCKS + job.i, job.mask)


def _major(data: tuple[int, int]) -> int:
    return 1 if data[1].bit_count() > data[0].bit_count() else 0


async def _copy(cache: Cache, clean: Layer, number: int, jobs: list[Job]) -> Copied:
    """Do the jobs. Nobody looks at the places written: the frozen layer names others, and lies above the clean one."""
    _drop_shadowed(cache, clean, number, jobs)
    return await copy_all(cache, jobs)


async def copy_all(cache: Cache, jobs: list[Job]) -> Copied:
    """Copy sectors to places that nothing durable names, and that nobody looks at. Raises OSError."""
    copied: Copied = {}
    if not jobs:
        return copied
    token = cache.quarantine.pin()
    storing = {job.to for job in jobs}
    cache.in_flight.storing |= storing

    def let_go() -> None:
        cache.in_flight.storing -= storing
        cache.quarantine.unpin(token)

    try:
        for job in jobs:
            cache.ready.masks[job.to] &= ~job.mask
        since = cache.ready.forgotten
        await cache.publish()
        crcs = await cache.threads.writes.run(_copy_sectors, cache, jobs)
        await cache.sums.load([slot for job in jobs for slot in (job.source, job.to)])
        for job in jobs:
            good = _take_sums(cache, job, crcs[job])
            cache.ready.masks[job.to] &= ~job.mask  # a reader may have set it
            cache.ready.note(job.to, good, since)
            slot, mask = copied.get(job.i, (job.to, 0))
            copied[job.i] = (slot, mask | job.mask)
    finally:
        cache.threads.writes.when_ended(let_go)
    return copied


def _copy_sectors(cache: Cache, jobs: list[Job]) -> dict[Job, list[int]]:
    """In a thread. Returns checksums of what was copied, by sector."""
    found = {}
    for job in jobs:
        crcs = found[job] = [-1] * SECTORS
        for first, count in sector_runs(job.mask):
            data = bytearray(count * SECTOR)
            cache.device.read_into(cache.device.at(job.source, first * SECTOR), [data])
            cache.device.write(cache.device.at(job.to, first * SECTOR), data)
            crcs[first : first + count] = checksums(data)
    return found


def _take_sums(cache: Cache, job: Job, crcs: list[int]) -> int:
    """The copies have the checksums of their source, so a bad copy shows when it is read; the good ones as a mask."""
    for slot in (job.to, job.source):
        cache.sums.load_now(slot)  # unless loaded just now
    cache.sums.change(job.to)
    values, to, source = cache.sums.values, job.to * SECTORS, job.source * SECTORS
    good = 0
    for first, count in sector_runs(job.mask):
        wanted = values[source + first : source + first + count]
        values[to + first : to + first + count] = wanted
        if wanted.tolist() == crcs[first : first + count]:
            good |= MASKS[first][first + count - 1]
        else:
            good |= sum(
                1 << first + n for n, value in enumerate(wanted) if value == crcs[first + n]
            )
    return good


def _hand_over(
    cache: Cache, frozen: Layer, clean: Layer, number: int, i: int, copied: tuple[int, int]
) -> None:
    """Have one block change layers; both pages go into the same commit. A critical section: must not be split.

    ``copied``: the slot into which sectors of the block were copied (NO_SLOT: none were), and their mask.
    """
    if not frozen.pages.page(number)[i] & FULL:
        return
    clean.pages.page(number)
    page, target = frozen.pages.writable(number), clean.pages.writable(number)
    old = slot_of(target[i])
    if old >= 0 and copied[0] == old:
        _merge(clean, target, i, page[i], done=copied[1])
    else:
        _replace(cache, frozen, clean, number, i, copied)
    cache.removal.clear(frozen, page, i)


def _merge(clean: Layer, target: Page, i: int, word: int, *, done: int) -> None:
    """The clean slot stays, and has the sectors ``done`` of the private block as well."""
    old = target[i]
    zero = zero_of(word)
    stale = valid_of(word) & ~done & ~zero  # could not be copied
    valid = valid_of(old) & ~stale | done | zero
    clean.sectors += valid.bit_count() - valid_of(old).bit_count()
    target[i] = pack(slot_of(old), zero_of(old) & ~stale & ~done | zero, valid)


def _replace(
    cache: Cache, frozen: Layer, clean: Layer, number: int, i: int, copied: tuple[int, int]
) -> None:
    """A private slot becomes the clean one. What lies in the other private slot and was not copied is dropped."""
    page, target = frozen.pages.page(number), clean.pages.page(number)
    old = target[i]
    if has_slot(old):
        cache.removal.free(clean, slot_of(old))
    entry = entry_at(page, i)
    slots, data = entry.slots, entry.sides
    major = _major(data)
    kept = data[major]
    slot = slots[major] if kept else NO_SLOT
    if slot >= 0 and copied[0] == slot:
        kept |= copied[1]
    zero = zero_of(old) & ~entry.valid | entry.zero
    if slot >= 0:
        put_entry(page, i, _given_away(entry, major))
        frozen.slots -= 1
        clean.slots += 1
        key = block_key(clean.id, number * PAGE_BLOCKS + i)
        cache.slots.own(slot, key, held=clean.pinned)
        # either way it is known to be in use then, wherever the scan after a start is
        (cache.slots.placement.hold if clean.pinned else cache.slots.placement.unhold)(slot)
    clean.sectors += (kept | zero).bit_count() - valid_of(old).bit_count()
    target[i] = pack(slot, zero, kept | zero)


def _given_away(entry: Entry, side: int) -> Entry:
    """A frozen entry without the slot of that side, so that clearing the entry does not free a clean slot."""
    word, second = entry
    return Entry(word, without_slot(second)) if side else Entry(without_slot(word), second)
