# SPDX-FileCopyrightText: Forebay developers
# SPDX-License-Identifier: Apache-2.0

"""Writes into a private layer while the device is slow: a thread makes them, and nobody else waits.

What ``private.write`` does in one go falls apart here. The data goes to places that nobody reads and durable state does
not name; when it is there, and not before, sums, words and the record change in one step; then the record is published.
Until then readers find what was there before. The caller holds the range, so that writes of the same sectors come one
after the other, and none of them is zeroed meanwhile.

Two things are simpler than while the device is quick. Acknowledged data is never overwritten in place: a sector that
was written since the last sync began is synced first, and changes sides then. And a block of which slots are being
taken is waited for, so that it does not get two.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import trio

from forebay_cache.blocks import private
from forebay_cache.cache import Cache
from forebay_cache.device.pace import Watch
from forebay_cache.format import ops
from forebay_cache.format.checksum import checksums
from forebay_cache.format.entry import (
    Entry,
    block_key,
    bound,
    entry_at,
    moved,
    put_entry,
    with_slot,
    written,
)
from forebay_cache.format.geometry import (
    MASKS,
    PAGE_BLOCKS,
    SECTOR,
    SECTOR_SHIFT,
    SECTORS,
    block_runs,
    sector_runs,
)
from forebay_cache.layers.layer import Layer, LayerState
from forebay_fast.latency import DEVICE_WRITE

_target = moved
"""As in ``private``."""


class Grown(NamedTuple):
    """By how many sectors and slots a write has made its layer larger."""

    sectors: int
    slots: int


class _Part(NamedTuple):
    """What a write does to one block of its layer."""

    block: int
    first: int  # sector at which `data` begins
    mask: int
    target: int  # those of its sectors that go to the second slot
    had: tuple[int, int]  # the slots that the page named
    slots: tuple[int, int]  # those that it is going to name
    data: memoryview

    @property
    def fresh(self) -> list[int]:
        """The slots that were taken for it."""
        return [slot for slot, old in zip(self.slots, self.had, strict=True) if slot != old]

    @property
    def sides(self) -> list[tuple[int, int, int]]:
        """(side, slot, mask of the sectors that go there)."""
        both = (0, self.slots[0], self.mask & ~self.target), (1, self.slots[1], self.target)
        return [one for one in both if one[2]]

    def piece(self, start: int, count: int) -> memoryview:
        """The data of some of its sectors."""
        return self.data[(start - self.first) * SECTOR : (start + count - self.first) * SECTOR]


async def write(
    cache: Cache, layer: Layer, offset: int, data: memoryview, may_store: Callable[[], bool]
) -> Grown | None:
    """Store whole sectors, as :func:`private.write`, and raise as it does. The layer has to be open.

    ``may_store`` is asked once more when the data is on the device, and nothing is stored if it says no. Returns how
    the layer has grown if it was done: ``cache.publish()`` has to come before the reply. None: nothing was done, see
    :func:`prepare`. Cannot be cancelled once a thread is at work.
    """
    parts = _plan(cache, layer, offset, data)
    if parts is None:
        return None
    # Nobody else gets the slots that are written to, if these are given up meanwhile.
    token = cache.quarantine.pin()
    cache.in_flight.begin_write(layer)
    keys = [block_key(layer.id, part.block) for part in parts if part.fresh]
    cache.in_flight.taking |= {key: trio.Event() for key in keys}
    grown: Grown | None = None
    since = cache.ready.forgotten
    try:
        sums, took = await cache.threads.writes.run(_write, cache, parts)
        cache.threads.pace.note_write(took)
        cache.threads.pace.latency.note(DEVICE_WRITE, took)
        cache.failure.check()
        if may_store() and cache.intent.has_room(len(data)):
            grown = _store(cache, layer, parts, sums, since)
    except OSError as error:
        cache.failure.fail(error)
        raise
    finally:
        if grown is None:
            _give_back(cache, parts)
        for key in keys:
            cache.in_flight.taking.pop(key).set()
        cache.threads.writes.when_ended(partial(_let_go, cache, layer, token))
    return grown


def _let_go(cache: Cache, layer: Layer, token: int) -> None:
    """The thread has ended: slots may go to others, and the layer may be settled."""
    cache.in_flight.end_write(layer)
    cache.quarantine.unpin(token)


def _give_back(cache: Cache, parts: list[_Part]) -> None:
    for part in parts:
        for slot in part.fresh:
            cache.slots.abandon(slot)


def _plan(cache: Cache, layer: Layer, offset: int, data: memoryview) -> list[_Part] | None:
    """Say what is to be written where, and take the slots for it. None, and nothing is taken, if something has to be
    waited for. A critical section: must not be split. Raises OSError if the device has failed.
    """
    cache.failure.check()
    if not cache.intent.has_room(len(data)):
        return None
    parts = []
    at = 0
    for block, start, length in block_runs(offset, len(data)):
        part = _part(cache, layer, block, start >> SECTOR_SHIFT, data[at : at + length])
        if part is None:
            return None
        parts.append(part)
        at += length
    wanted = sum(slot < 0 for part in parts for _, slot, _ in part.sides)
    if wanted > cache.slots.placement.free:
        cache.slots.want_eviction()
        return None
    return [_with_slots(cache, layer, part) for part in parts]


def _part(cache: Cache, layer: Layer, block: int, first: int, data: memoryview) -> _Part | None:
    """The same for one block, without taking slots: those that are missing are NO_SLOT."""
    number, i = divmod(block, PAGE_BLOCKS)
    page = layer.pages.look(number)
    mask = MASKS[first][first + (len(data) >> SECTOR_SHIFT) - 1]
    key = block_key(layer.id, block)
    intent = cache.intent
    busy = (intent.syncing.get(key, 0) | intent.open_sectors.get(key, 0)) & mask
    if page is None or busy or key in cache.in_flight.taking:
        return None
    word, second = entry_at(page, i)
    target = _target(word, second, mask, 0)
    slots = Entry(word, second).slots
    part = _Part(block, first, mask, target, slots, slots, data)
    known = all(slot < 0 or cache.sums.change(slot) for _, slot, _ in part.sides)
    return part if known else None


def _with_slots(cache: Cache, layer: Layer, part: _Part) -> _Part:
    slots = list(part.had)
    for side, slot, _ in part.sides:
        if slot < 0:
            slots[side] = cache.slots.take(block_key(layer.id, part.block), held=True)
    return part._replace(slots=(slots[0], slots[1]))


def _write(cache: Cache, parts: list[_Part]) -> tuple[list[list[int]], float]:
    """In a thread: write the parts. Returns the checksums of each, and the seconds it took. Raises OSError."""
    watch = Watch()
    for part in parts:
        for _, slot, mask in part.sides:
            for start, count in sector_runs(mask):
                at = cache.device.at(slot, start * SECTOR)
                cache.device.write(at, part.piece(start, count))
    took = watch.seconds()
    return [checksums(part.data) for part in parts], took


def _store(
    cache: Cache, layer: Layer, parts: list[_Part], sums: list[list[int]], since: int
) -> Grown | None:
    """Have sums, words and records say what was written. A critical section: must not be split.

    Returns None, and has done nothing, if something has come in between: then it has to be written again.
    """
    if layer.state is not LayerState.OPEN:
        return None
    if not all(_is_as_planned(cache, layer, part) for part in parts):
        return None
    sectors, slots = layer.sectors, layer.slots
    for part, values in zip(parts, sums, strict=True):
        _store_part(cache, layer, part, values, since)
    return Grown(layer.sectors - sectors, layer.slots - slots)


def _is_as_planned(cache: Cache, layer: Layer, part: _Part) -> bool:
    """False if a block has other slots now, or its sectors have to go elsewhere, or checksums have been shed."""
    number, i = divmod(part.block, PAGE_BLOCKS)
    page = layer.pages.look(number)
    if page is None:
        return False
    entry = entry_at(page, i)
    key = block_key(layer.id, part.block)
    opened = cache.intent.open_sectors.get(key, 0) & part.mask
    return (
        not opened
        and entry.slots == part.had
        and not (_target(entry.word, entry.second, part.mask, 0) ^ part.target)
        & bound(entry.word, 0)
        and all(cache.sums.change(slot) for _, slot, _ in part.sides)
    )


def _store_part(cache: Cache, layer: Layer, part: _Part, values: list[int], since: int) -> None:
    """The same for one block."""
    number, i = divmod(part.block, PAGE_BLOCKS)
    for side, slot, mask in part.sides:
        noted: list[int] = []
        for start, count in sector_runs(mask):
            run = values[start - part.first : start - part.first + count]
            at = slot * SECTORS + start
            cache.sums.values[at : at + count] = array("I", run)
            noted += run
        cache.intent.note(ops.write(side, mask, layer.id, part.block, slot, noted))
        cache.ready.note(slot, mask, since)
    page = layer.pages.writable(number)
    word, second = entry_at(page, i)
    layer.slots += len(part.fresh)
    layer.sectors += (part.mask & ~word).bit_count()
    word, second = written(word, second, part.mask, part.target)
    put_entry(page, i, Entry(with_slot(word, part.slots[0]), with_slot(second, part.slots[1])))
    key = block_key(layer.id, part.block)
    cache.intent.open_sectors[key] = cache.intent.open_sectors.get(key, 0) | part.mask


async def prepare(cache: Cache, layer: Layer, offset: int, length: int) -> None:
    """Wait for what kept :func:`write` from being done. Raises CacheFull or OSError."""
    for block, start, part in block_runs(offset, length):
        key = block_key(layer.id, block)
        taking = cache.in_flight.taking.get(key)
        if taking is not None:
            await taking.wait()
        mask = MASKS[start >> SECTOR_SHIFT][(start + part - 1) >> SECTOR_SHIFT]
        if cache.intent.open_sectors.get(key, 0) & mask:
            await cache.make_durable()
    await private.prepare(cache, layer, offset, length)
