# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Scrub: read every slot that holds something from the device, and compare it with its entry and its checksums.

Beside guests: one block at a time, by a thread that comes last at the disk, and no more than half of the time.
Clean blocks that are damaged are retired and fetched again; damaged private data is told, with where it belongs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import trio

from forebay_cache.cache import Cache
from forebay_cache.format.checksum import SIZE, UNREADABLE, matching
from forebay_cache.format.entry import Entry, block_key, entry_at, has_slot, valid_of
from forebay_cache.format.geometry import BLOCK, PAGE_BLOCKS, SECTOR, sector_runs
from forebay_cache.format.records import LayerName
from forebay_cache.index.pages import EMPTY
from forebay_cache.layers.layer import Layer
from forebay_cache.upkeep.medium import IdlePriorityReader, Medium

MOST_TOLD = 1000
"""So many damaged places are told one by one; of more there are counts only."""
PATIENCE_SECONDS = 1.0
"""A busy host holds the scrub up so long for each block, and no longer: it has to come to its end."""
_BUSY_STEP = 0.02

Refetch = Callable[[Layer, int, int], Awaitable[bool]]
"""``refetch(layer, offset, length)`` fetches bytes whose sectors were dropped. True: they are in the cache again.

Never raises OSError.
"""


@dataclass(frozen=True)
class Damage:
    """Neighbouring sectors of one block that are not what they were. The names are those that operators see as JSON."""

    layer: LayerName
    private: bool
    """True if only the cache has, or had, what was there."""
    offset: int
    """Where they begin, in bytes of the image or disk ..."""
    length: int
    """... and how many bytes they are."""
    slot: int
    """Where they lie; -1: the entry names none."""
    what: str
    """Of what kind: "checksum", "unreadable", or "index": the entry makes no sense."""
    repaired: bool = False
    """True if they were fetched again from the image."""


@dataclass
class Found:
    """What a scrub found. The names are those that operators see as JSON."""

    checked_bytes: int = 0
    damaged_clean: int = 0
    """Blocks with damaged sectors that the origin has, too ..."""
    repaired_clean: int = 0
    """... and how many of these were fetched again."""
    damaged_private: int = 0
    """Blocks with damaged sectors that only the cache had."""
    damaged_index: int = 0
    """Entries that make no sense."""
    damage: list[Damage] = field(default_factory=list)
    """The first places; of all there are counts."""

    def note(self, damage: Damage) -> None:
        """Keep one run of damaged sectors, unless there are too many."""
        if len(self.damage) < MOST_TOLD:
            self.damage.append(damage)

    def json(self) -> dict[str, Any]:
        """As a dict of plain values; ``layer`` as LayerName.json() has it."""
        found = asdict(self)
        for told, damage in zip(found["damage"], self.damage, strict=True):
            told["layer"] = damage.layer.json()
        return found


@dataclass(frozen=True)
class _Scrubber:
    """What one scrub works with, and where it puts what it finds."""

    cache: Cache
    medium: Medium
    reader: IdlePriorityReader
    found: Found
    busy: Callable[[], bool]
    refetch: Refetch | None


async def scrub(
    cache: Cache,
    progress: Callable[[int, int], None],
    *,
    busy: Callable[[], bool] = lambda: False,
    refetch: Refetch | None = None,
) -> Found:
    """Check all slots. Damaged clean blocks are taken out of the cache and, with ``refetch``, fetched again.

    ``progress`` is called with (bytes done, bytes in all); ``busy`` says whether guests wait for something. Raises
    IndexFault, and OSError where the device does not answer. Cancelled, it has checked and mended what it came to.
    """
    found = Found()
    layers = [x for x in cache.layers if not x.is_dead]
    total = sum(x.slots for x in layers) * BLOCK
    progress(0, total)
    reader = IdlePriorityReader("scrub", cache.threads.timeout)
    medium = Medium(cache.device.fd, cache.device.at)
    try:
        scrubber = _Scrubber(cache, medium, reader, found, busy, refetch)
        for layer in layers:
            for number in await layer.pages.numbers():
                await layer.pages.load([number])
                await trio.lowlevel.checkpoint()
                for i in range(PAGE_BLOCKS):
                    await _check(scrubber, layer, number, i)
                progress(min(found.checked_bytes, total), total)
    finally:
        if not reader.hangs:
            medium.close()
        reader.close()
    progress(total, total)
    return found


async def _check(scrubber: _Scrubber, layer: Layer, number: int, i: int) -> None:
    """Check block ``i`` of a page: its entry, then each slot that it names."""
    cache, found = scrubber.cache, scrubber.found
    block = number * PAGE_BLOCKS + i
    if wrong := _nonsense(cache, layer, number, i):
        found.damaged_index += 1
        found.note(Damage(layer.name, layer.private, block * BLOCK, BLOCK, wrong, "index"))
        if not layer.private and not layer.is_dead:
            _forget(layer, number, i)
            await _again(scrubber, layer, block * BLOCK, BLOCK)
        return
    for slot, mask in held(layer, number, i):
        found.checked_bytes += BLOCK
        before = cache.sums.get(slot)
        token = cache.quarantine.pin()
        began = trio.current_time()
        try:
            sums, stored = await scrubber.reader.ask(partial(read_slot, scrubber, slot))
        finally:
            cache.quarantine.unpin(token)
        if _is_judged(cache, layer, number, i, slot, mask, before, stored):
            bad = mask & ~matching(sums, cache.sums.get(slot) or stored)
            if bad:
                await _damaged(scrubber, layer, block, slot, bad, sums)
        await _stand_aside(scrubber.busy, trio.current_time() - began)


def read_slot(scrubber: _Scrubber, slot: int) -> tuple[list[int], bytes]:
    """In the thread: the checksums of a slot as it lies on the medium, and (u32[16]) as the index has them."""
    stored = scrubber.cache.index.sums([slot]).get(slot, bytes(SIZE))
    return scrubber.medium.sums(slot), stored


def _is_judged(
    cache: Cache,
    layer: Layer,
    number: int,
    i: int,
    slot: int,
    mask: int,
    before: bytes | None,
    stored: bytes,
) -> bool:
    """False if the block was changed while it was read, so that what was read says nothing."""
    if layer.is_dead or (slot, mask) not in held(layer, number, i):
        return False
    return (cache.sums.get(slot) or stored) == (before or stored)


async def _damaged(
    scrubber: _Scrubber, layer: Layer, block: int, slot: int, bad: int, sums: list[int]
) -> None:
    """Note that the sectors ``bad`` of a slot are damaged. A clean block is dropped, and fetched again if it can be."""
    cache, found = scrubber.cache, scrubber.found
    cache.slots.damaged_slots += 1
    cache.ready.masks[slot] &= ~bad  # whoever reads it looks for himself, and gets an error
    repaired = False
    if layer.private:
        found.damaged_private += 1
    else:
        found.damaged_clean += 1
        cache.removal.retire(layer, block, slot)
        repaired = await _again(scrubber, layer, block * BLOCK, BLOCK)
    for first, count in sector_runs(bad):
        unread = any(sums[s] == UNREADABLE for s in range(first, first + count))
        found.note(
            Damage(
                layer.name,
                layer.private,
                block * BLOCK + first * SECTOR,
                count * SECTOR,
                slot,
                "unreadable" if unread else "checksum",
                repaired,
            )
        )


async def _again(scrubber: _Scrubber, layer: Layer, offset: int, length: int) -> bool:
    """Have bytes of an image fetched again. True if they were."""
    if scrubber.refetch is None or not await scrubber.refetch(layer, offset, length):
        return False
    scrubber.found.repaired_clean += 1
    return True


async def _stand_aside(busy: Callable[[], bool], took: float) -> None:
    """Leave the device to others for as long as it was taken from them, and longer while guests wait."""
    await trio.sleep(took)
    with trio.move_on_after(PATIENCE_SECONDS):
        while busy():  # noqa: ASYNC110 - nobody tells
            await trio.sleep(_BUSY_STEP)


def held(layer: Layer, number: int, i: int) -> list[tuple[int, int]]:
    """(slot, mask of the sectors that lie there) for each slot that one block of a page names, if any do."""
    entry = _entry(layer, number, i)
    return [(slot, mask) for slot, mask in entry.places() if slot >= 0 and mask]


def _entry(layer: Layer, number: int, i: int) -> Entry:
    """What a page says of its block ``i``; nothing if it was shed meanwhile."""
    page = layer.pages.look(number)
    return entry_at(EMPTY if page is None else page, i)


def _nonsense(cache: Cache, layer: Layer, number: int, i: int) -> int:
    """0 if an entry makes sense. Else the slot, + 1, that it names and cannot have, or -1 for what else cannot be."""
    entry = _entry(layer, number, i)
    if entry.fault():
        return -1
    owner = block_key(layer.id, number * PAGE_BLOCKS + i)
    for slot, _ in entry.places():
        if slot >= cache.device.slots:
            return slot + 1
        if cache.slots.scan is None and cache.slots.owner[slot] != owner and not layer.is_dead:
            return slot + 1
    return 0


def _forget(layer: Layer, number: int, i: int) -> None:
    """Drop an entry of a clean layer. Its slot is left alone, because it is another block's, or is none."""
    page = layer.pages.writable(number)
    word = page[i]
    layer.sectors -= valid_of(word).bit_count()
    layer.slots -= has_slot(word)
    page[i] = 0
